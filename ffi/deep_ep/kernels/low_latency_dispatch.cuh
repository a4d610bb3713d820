// Low-latency dispatch, in one kernel or two: quantize each token once and push it to each rank
// that needs it; number the rows here from the ids of all tokens; copy what has arrived into them.
//
// No counts are exchanged beforehand: a token's record goes to the slot of its source rank and
// index, and the ids, which travel ahead as notes, tell the receiver everything else.
#pragma once

#include "deep_ep/kernels/slot_sets.cuh"
#include "quantization/kernels/block.cuh"

namespace jax_ds::deep_ep {

using quantization::Input;

// The first half: this rank's tokens, as the other ranks will see them.
template <Input kInput, bool kQuantize>
struct TokenSender {
  using Segment = quantization::Segment<kInput>;
  static constexpr int kElementBytes = Segment::W::kBytes;
  // A warp takes 512 elements of a token at a step, sixteen a lane and a block of 128 for eight
  // lanes. Steps of one part are in flight together.
  static constexpr int kStepElements = 512;
  static constexpr int kSteps = kInput == Input::kBfloat16 ? 7 : 3;

  const LowLatencyDispatchParams& p;
  const comm::Round& round;

  // The ranks that hold token t's experts, as bits.
  JAX_DS_DEVICE u32 ranks_of_token(int t) const {
    const int lane = lane_id(), last = p.link.num_ranks * p.experts;
    const int id = lane < p.top_k ? p.ids[t * p.top_k + lane] : -1;
    return __reduce_or_sync(kAllLanes, id >= 0 && id < last ? 1u << id / p.experts : 0);
  }

  JAX_DS_DEVICE void push() const {
    const int parts = (p.hidden + kStepElements * kSteps - 1) / (kStepElements * kSteps);
    for (int i = grid_warp(); i < p.num_tokens * parts; i += grid_warps()) {
      const int t = i / parts, part = i % parts;
      const int first = part * kSteps * kStepElements + 16 * static_cast<int>(lane_id());
      Segment x[kSteps];
#pragma unroll
      for (int u = 0; u < kSteps; ++u) load(x[u], t, first + u * kStepElements);
      const u32 ranks = ranks_of_token(t);
      if (part == 0) store_needed(t, ranks);
      const i64 slot = static_cast<i64>(p.link.rank) * p.num_tokens + t;
#pragma unroll
      for (int u = 0; u < kSteps; ++u) store(x[u], ranks, slot, first + u * kStepElements);
    }
  }

 private:
  JAX_DS_DEVICE void store_needed(int t, u32 ranks) const {
    for (int r = lane_id(); r < p.link.num_ranks; r += 32) {
      p.needed[static_cast<i64>(r) * p.num_tokens + t] = ranks >> r & 1;
    }
  }

  JAX_DS_DEVICE void load(Segment& x, int t, int column) const {
    x.clear();
    if (column >= p.hidden) return;
    const char* at =
        static_cast<const char*>(p.x) + (static_cast<i64>(t) * p.hidden + column) * kElementBytes;
    x.template load<true>(0, at, 8);
    x.template load<true>(1, at + 8 * kElementBytes, 8);
  }

  // The segment at `column`, quantized, in the record of `slot` at each of the ranks.
  JAX_DS_DEVICE void store(Segment& x, u32 ranks, i64 slot, int column) const {
    const bool exists = column < p.hidden;
    if constexpr (kQuantize) {
      const float scale = quantization::scale_of(quantization::max_over_eight(x.amax()), false);
      u32 values[4];
      quantization::quantize(x, scale, values);
      for (u32 left = exists ? ranks : 0; left != 0; left &= left - 1) {
        char* to = record_at(round, p.record, __ffs(left) - 1, slot);
        st_global_v4(to + column, make_uint4(values[0], values[1], values[2], values[3]));
        if (column % quantization::kBlock != 0) continue;
        reinterpret_cast<float*>(to + p.hidden)[column / quantization::kBlock] = scale;
      }
    } else {
      for (u32 left = exists ? ranks : 0; left != 0; left &= left - 1) {
        char* to = record_at(round, p.record, __ffs(left) - 1, slot) + column * kElementBytes;
#pragma unroll
        for (int i = 0; i < Segment::kWords; i += 4) {
          st_global_v4(to + 4 * i,
                       make_uint4(x.words[i], x.words[i + 1], x.words[i + 2], x.words[i + 3]));
        }
      }
    }
  }
};

// The second half: rows from what the ranks have sent. Set e of `named` holds the slots whose token
// names local expert e; the last set, those that name any.
struct RowReceiver {
  const LowLatencyDispatchParams& p;
  const comm::Round& round;
  const SlotSets named;
  const int* const ids;  // [B, K]

  JAX_DS_DEVICE RowReceiver(const LowLatencyDispatchParams& p, const comm::Round& round,
                            u32* shared)
      : p(p),
        round(round),
        named(shared, p.experts + 1, p.link.num_ranks * p.num_tokens),
        ids(reinterpret_cast<const int*>(notes_at(round, p.record, p.link.rank, p.num_tokens))) {}

  JAX_DS_DEVICE int local(int id) const { return id - p.link.rank * p.experts; }
  JAX_DS_DEVICE bool here(int id) const {
    return static_cast<u32>(local(id)) < static_cast<u32>(p.experts);
  }
  JAX_DS_DEVICE int row(int expert, int slot) const {
    return expert * p.region + named.number(expert, slot);
  }

  // Once the ids are here. So many of a thread's are in flight together.
  static constexpr int kIds = 16;

  JAX_DS_DEVICE void number_rows() const {
    named.clear();
    const int count = named.slots * p.top_k;
    for (int first = threadIdx.x; first < count; first += kIds * kThreads) {
      int id[kIds];
#pragma unroll
      for (int u = 0; u < kIds; ++u) {
        const int i = first + u * kThreads;
        id[u] = i < count ? ids[i] : -1;
      }
#pragma unroll
      for (int u = 0; u < kIds; ++u) {
        if (!here(id[u])) continue;
        const int slot = (first + u * kThreads) / p.top_k;
        named.insert(local(id[u]), slot);
        named.insert(p.experts, slot);
      }
    }
    named.finish();
  }

  // The part of the handle that says which row is whose.
  JAX_DS_DEVICE void store_handle() const {
    const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
    for (int e = thread; e < p.experts; e += threads) p.group_sizes[e] = named.count(e);
    const bool by_expert = p.experts < p.top_k;  // how a slot's columns are numbered
    for (int i = thread; i < named.slots * p.top_k; i += threads) {
      const int slot = i / p.top_k, k = i % p.top_k, id = ids[i];
      int first = 0;  // mention of the same expert
      while (ids[i - k + first] != id) ++first;
      p.column[i] = !here(id) ? -1 : by_expert ? local(id) : first;
      if (!by_expert) p.row_of[i] = here(id) && first == k ? row(local(id), slot) : -1;
    }
    if (!by_expert) return;
    for (int i = thread; i < named.slots * p.experts; i += threads) {
      const int slot = i / p.experts, e = i % p.experts;
      p.row_of[i] = named.holds(e, slot) ? row(e, slot) : -1;
    }
  }

  // Copies every token that has arrived into its rows.
  JAX_DS_DEVICE void expand() const {
    const int parts = num_parts(p.record.vectors), count = named.count(p.experts) * parts;
    const i64 bytes = static_cast<i64>(p.record.vectors) * 16;
    const auto id_of = [&](int i) { return id_in_lane(i / parts); };
    // Let rows leave L2 before what ranks are sending.
    const auto store = [](uint4* at, uint4 piece) { st_global_v4(at, piece, kEvictFirst); };
    for_each_taken(&round.progress->taken[1], count, id_of, [&](int i, int id) {
      const int slot = named.list[i / parts], part = i % parts;
      // Of the lanes that name one expert, the first.
      const u32 same = __match_any_sync(kAllLanes, id);
      const bool has_row = here(id) && __ffs(same) - 1 == lane_id();
      const int mine = has_row ? row(local(id), slot) : -1;
      const u32 mask = __ballot_sync(kAllLanes, has_row);
      const char* from = record_at(round, p.record, p.link.rank, slot);
      const auto row_of_lane = [&](int j) {
        return static_cast<char*>(p.rows) + __shfl_sync(kAllLanes, mine, j) * bytes;
      };
      fan_out(from, p.record.vectors, part, mask, row_of_lane, store);
      if (part != 0 || p.row_scales == nullptr) return;
      scatter_scales(reinterpret_cast<const float*>(from + bytes), p.record.num_scales, mask, mine,
                     p.row_scales);
    });
  }

  // Every row is NaN, and counts.
  JAX_DS_DEVICE void poison() const {
    const i64 bytes = static_cast<i64>(p.record.vectors) * 16;
    for (int c = grid_warp(); c < p.experts * p.region; c += grid_warps()) {
      float* scales = p.row_scales == nullptr
                          ? nullptr
                          : p.row_scales + static_cast<i64>(c) * p.record.num_scales;
      fill_row(static_cast<char*>(p.rows) + c * bytes, scales, p.record, true);
    }
    const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
    for (int e = thread; e < p.experts; e += threads) p.group_sizes[e] = p.region;
    for (int i = thread; i < named.slots * p.top_k; i += threads) p.column[i] = -1;
    for (int i = thread; i < named.slots * p.columns; i += threads) p.row_of[i] = -1;
  }

  JAX_DS_DEVICE void run(bool alive) const {
    alive = round.hear(alive);
    if (alive) number_rows();  // while tokens are on their way
    alive = round.receive(alive);
    if (alive) {
      expand();
      store_handle();  // by warps that find nothing more to copy
    } else {
      poison();
    }
    round.end();
  }

 private:
  // Lane k's id k of the token in the n-th slot that holds one.
  JAX_DS_DEVICE int id_in_lane(int n) const {
    const int lane = lane_id();
    return lane < p.top_k ? ids[named.list[n] * p.top_k + lane] : -1;
  }
};

template <Input kInput, bool kQuantize, Half kHalf>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_dispatch(const __grid_constant__ LowLatencyDispatchParams p) {
  extern __shared__ u32 shared[];
  const comm::Round round =
      kHalf == Half::kFinish ? comm::Round(p.link, *p.ticket) : comm::Round::next(p.link);
  bool alive = true;
  if constexpr (kHalf != Half::kFinish) {
    const TokenSender<kInput, kQuantize> sender{p, round};
    alive = round.begin(p.axis_index);
    if (alive) {
      share_notes(round, p.record, p.ids, p.num_tokens, p.top_k);
      sender.push();
    }
    round.send();
    if (kHalf == Half::kStart && blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = round.slot;
  }
  if constexpr (kHalf != Half::kStart) RowReceiver(p, round, shared).run(alive);
}

}  // namespace jax_ds::deep_ep
