// Moving records by warps. Every loop over tokens is strided over all warps of the grid.
#pragma once

#include "deep_ep/kernels/params.h"
#include "kernels/ptx_system.cuh"

namespace jax_ds::deep_ep {

constexpr u32 kAllLanes = 0xffffffffu;

JAX_DS_DEVICE int grid_warp() { return blockIdx.x * (kThreads / 32) + warp_id(); }
JAX_DS_DEVICE int grid_warps() { return gridDim.x * (kThreads / 32); }

// Copies `vectors` pieces from one address to those that `to(bit)` gives for the bits of `mask`.
// Seven pieces in flight a lane: one or two rounds for 7168 bytes, four for 14336.
template <class To>
JAX_DS_DEVICE void fan_out(const void* from, int vectors, u32 mask, To to) {
  constexpr int kPieces = 7;
  const int lane = lane_id();
  // Uniform over the warp: `to` may shuffle.
  for (int base = 0; base < vectors; base += 32 * kPieces) {
    uint4 piece[kPieces];
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int i = base + 32 * u + lane;
      if (i < vectors) piece[u] = ld_global_once_v4(static_cast<const uint4*>(from) + i);
    }
    for (u32 left = mask; left != 0; left &= left - 1) {
      uint4* out = reinterpret_cast<uint4*>(to(__ffs(left) - 1));
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        const int i = base + 32 * u + lane;
        if (i < vectors) st_global_v4(out + i, piece[u]);
      }
    }
  }
}

template <class To>
JAX_DS_DEVICE void fan_out_floats(const float* from, int count, u32 mask, To to) {
  for (int i = lane_id(); i < count; i += 32) {
    const float value = from[i];
    for (u32 left = mask; left != 0; left &= left - 1) to(__ffs(left) - 1)[i] = value;
  }
}

JAX_DS_DEVICE void fill(void* at, int vectors, u32 word) {
  const uint4 piece = make_uint4(word, word, word, word);
  for (int i = lane_id(); i < vectors; i += 32) st_global_v4(static_cast<uint4*>(at) + i, piece);
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

}  // namespace jax_ds::deep_ep
