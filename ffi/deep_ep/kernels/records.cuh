// Moving records by warps. Every loop over tokens is strided over all warps of the grid.
#pragma once

#include "comm/kernels/round.cuh"
#include "deep_ep/kernels/params.h"
#include "kernels/ptx_system.cuh"

namespace jax_ds::deep_ep {

constexpr u32 kAllLanes = 0xffffffffu;

JAX_DS_DEVICE int grid_warp() { return blockIdx.x * (kThreads / 32) + warp_id(); }
JAX_DS_DEVICE int grid_warps() { return gridDim.x * (kThreads / 32); }

// `work(i, fetch(i))` for each i below `count`, strided over all warps. What a warp must know
// before it can move anything, its `fetch`, is on its way while it does the work before.
template <class Fetch, class Work>
JAX_DS_DEVICE void for_each_ahead(int count, Fetch fetch, Work work) {
  int i = grid_warp();
  if (i >= count) return;
  auto next = fetch(i);
  for (; i < count; i += grid_warps()) {
    const auto mine = next;
    const int following = i + grid_warps();
    if (following < count) next = fetch(following);
    work(i, mine);
  }
}

// The same for few pieces of different sizes: a warp that is done takes the next one, by the
// counter `taken`. Neighbours, which may be alike, begin in different CTAs.
template <class Fetch, class Work>
JAX_DS_DEVICE void for_each_taken(u32* taken, int count, Fetch fetch, Work work) {
  const auto take = [&] { return lane_id() == 0 ? atom_relaxed_gpu_add(taken, 1) : 0; };
  int i = blockIdx.x + gridDim.x * warp_id();
  if (i >= count) return;
  auto next = fetch(i);
  u32 ticket = take();
  while (i < count) {
    const auto mine = next;
    const int following = grid_warps() + __shfl_sync(kAllLanes, ticket, 0);
    if (following < count) {
      next = fetch(following);
      ticket = take();
    }
    work(i, mine);
    i = following;
  }
}

// A record's payload is cut into parts of so many pieces a lane, all in flight at once: two parts
// for 7168 bytes, four for 14336.
constexpr int kPieces = 7;

JAX_DS_DEVICE int num_parts(int vectors) { return (vectors + 32 * kPieces - 1) / (32 * kPieces); }

// Copies part `part` of `vectors` pieces from one address to those that `to(bit)` gives for the
// bits of `mask`, with `store(address, piece)`.
template <class To, class Store>
JAX_DS_DEVICE void fan_out(const void* from, int vectors, int part, u32 mask, To to, Store store) {
  const int first = part * 32 * kPieces + lane_id();
  uint4 piece[kPieces];
#pragma unroll
  for (int u = 0; u < kPieces; ++u) {
    const int i = first + 32 * u;
    if (i < vectors) piece[u] = ld_global_once_v4(static_cast<const uint4*>(from) + i);
  }
  // Uniform over the warp: `to` may shuffle.
  for (u32 left = mask; left != 0; left &= left - 1) {
    uint4* out = reinterpret_cast<uint4*>(to(__ffs(left) - 1));
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int i = first + 32 * u;
      if (i < vectors) store(out + i, piece[u]);
    }
  }
}

template <class To>
JAX_DS_DEVICE void fan_out(const void* from, int vectors, u32 mask, To to) {
  const int parts = num_parts(vectors);
  const auto store = [](uint4* at, uint4 piece) { st_global_v4(at, piece); };
  for (int part = 0; part < parts; ++part) fan_out(from, vectors, part, mask, to, store);
}

template <class To>
JAX_DS_DEVICE void fan_out_floats(const float* from, int count, u32 mask, To to) {
  for (int i = lane_id(); i < count; i += 32) {
    const float value = from[i];
    for (u32 left = mask; left != 0; left &= left - 1) to(__ffs(left) - 1)[i] = value;
  }
}

// Copies scales into the rows of the bits of `mask`; lane j's `mine` is the row of bit j.
JAX_DS_DEVICE void scatter_scales(const float* from, int count, u32 mask, int mine, float* rows) {
  for (u32 left = mask; left != 0; left &= left - 1) {
    const i64 row = __shfl_sync(kAllLanes, mine, __ffs(left) - 1);
    for (int i = lane_id(); i < count; i += 32) rows[row * count + i] = from[i];
  }
}

JAX_DS_DEVICE void fill(void* at, int vectors, u32 word) {
  const uint4 piece = make_uint4(word, word, word, word);
  for (int i = lane_id(); i < vectors; i += 32) st_global_v4(static_cast<uint4*>(at) + i, piece);
}

// Makes a row without a token, or a poisoned one: NaN everywhere.
JAX_DS_DEVICE void fill_row(void* row, float* scales, const Record& record, bool poison) {
  fill(row, record.vectors, poison ? 0xffffffffu : 0);
  if (scales == nullptr) return;
  const float scale = poison ? __int_as_float(0x7fffffff) : 1.0f;
  for (int i = lane_id(); i < record.num_scales; i += 32) scales[i] = scale;
}

// The ranks that need token t, as bits.
JAX_DS_DEVICE u32 ranks_of(const unsigned char* needed, int num_ranks, int num_tokens, int t) {
  const int lane = lane_id();
  const bool mine = lane < num_ranks && needed[static_cast<i64>(lane) * num_tokens + t] != 0;
  return __ballot_sync(kAllLanes, mine);
}

// Lane j's row of column j of slot b, -1 for none.
JAX_DS_DEVICE int row_in_lane(const int* row_of, int columns, i64 slot) {
  const int lane = lane_id();
  return lane < columns ? row_of[slot * columns + lane] : -1;
}

// The record of slot b in a rank's staging.
JAX_DS_DEVICE char* record_at(const comm::Round& round, const Record& record, int rank, i64 b) {
  return round.staging(rank) + b * record.stride;
}

// The notes of all slots in a rank's staging, behind the records.
JAX_DS_DEVICE u32* notes_at(const comm::Round& round, const Record& record, int rank,
                            int num_tokens) {
  const i64 slots = static_cast<i64>(round.link.num_ranks) * num_tokens;
  return reinterpret_cast<u32*>(record_at(round, record, rank, slots));
}

// Stores this rank's notes, `width` words for each of its tokens, at every rank. One CTA serves a
// rank, so that it can say when they are complete.
JAX_DS_DEVICE void share_notes(const comm::Round& round, const Record& record, const void* words,
                               int num_tokens, int width) {
  const u32* const from = static_cast<const u32*>(words);
  const int count = num_tokens * width;
  const int vectors = count % 4 == 0 ? count / 4 : 0;  // else a rank's notes may not be aligned
  for (int rank = blockIdx.x; rank < round.link.num_ranks; rank += gridDim.x) {
    u32* to = notes_at(round, record, rank, num_tokens) + static_cast<i64>(round.link.rank) * count;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      st_global_v4(to + 4 * i, ld_global_once_v4(from + 4 * i));
    }
    for (int i = 4 * vectors + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
    round.announce(rank);
  }
}

}  // namespace jax_ds::deep_ep
