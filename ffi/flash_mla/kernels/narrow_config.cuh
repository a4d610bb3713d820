// Decode for few query rows: tiles, shared memory and barriers.
//
// Operands are swapped (S^T = K Q^T, O^T = V^T P^T), so that the cache's tokens and latent columns
// fill the 64 rows of the tensor cores' tiles and the query rows are the N dimension: 8 to 32.
// Two blocks of 64 tokens are worked on at a time. Each math warpgroup computes the scores of one
// block; both multiply both blocks' probabilities with their half of the latent columns.
#pragma once

#include "flash_mla/kernels/schedule.cuh"
#include "kernels/mbarrier.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

template <int kRows_, typename Element_>
struct NarrowConfig {
  using Element = Element_;
  static constexpr int kRows = kRows_;  // query rows, padded
  static constexpr int kMathThreads = 256;
  static constexpr int kThreads = kMathThreads + 32;
  static constexpr int kQueryTileBytes = kRows * kTileCols * 2;
  static constexpr int kMaxShared = 232448;
  static constexpr int kFixedShared = (kKeyTiles + 2) * kQueryTileBytes + kRows * 8 * 4 * 2 + 1024;
  // A ring of single tiles: two blocks in work need 18 of them, the rest is being filled.
  static constexpr int kSlots = (kMaxShared - kFixedShared) / kTileBytes;
  static constexpr int kOverhead = 1;
  static constexpr int kWholePercent = 8;

  static_assert(kRows % 8 == 0 && kRows >= 8 && kRows <= 32);
  static_assert(kSlots >= 2 * kKeyTiles);
};

template <typename Config>
struct alignas(1024) NarrowShared {
  u8 ring[Config::kSlots][kTileBytes];                 // 64 tokens x 64 columns
  u8 q[kKeyTiles][Config::kQueryTileBytes];            // rows x 64 columns
  u8 p[2][Config::kQueryTileBytes];                    // rows x 64 tokens, one for each block
  float warp_max[Config::kRows][8];
  float warp_sum[Config::kRows][8];
  u64 full[Config::kSlots], empty[Config::kSlots];
  u64 q_full, q_empty;
  Schedule schedule;
};

// A block's tiles enter the ring rotary part first, since that slot is free again soonest.
JAX_DS_DEVICE int key_tile(int place) { return place == 0 ? kKeyTiles - 1 : place - 1; }

// Positions in the ring, counted without wrapping: slot and phase of the n-th tile.
template <int kSlots>
struct Ring {
  u32 slot = 0;
  u32 phase = 0;

  JAX_DS_DEVICE Ring ahead(u32 tiles) const {
    Ring r = *this;
    r.slot += tiles;
    if (r.slot >= kSlots) {
      r.slot -= kSlots;
      r.phase ^= 1;
    }
    return r;
  }
};

}  // namespace jax_ds::flash_mla
