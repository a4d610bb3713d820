// Decode for few query rows: tiles, shared memory and barriers.
//
// Operands are swapped (S^T = K Q^T, O^T = V^T P^T), so that the cache's tokens and latent columns
// fill the 64 rows of the tensor cores' tiles and the query rows are the N dimension: 8 to 32.
// Roles: a producer warp, a warpgroup for the scores and the softmax, a warpgroup for the output.
// P_j takes the place of K_j's rotary tile, which nobody reads after the scores.
#pragma once

#include "flash_mla/kernels/schedule.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

template <int kRows_, typename Element_>
struct NarrowConfig {
  using Element = Element_;
  static constexpr int kRows = kRows_;  // query rows, padded
  static constexpr int kThreads = kNarrowThreads;
  static constexpr int kQueryTileBytes = kRows * kTileCols * 2;
  static constexpr int kStages = 2;
  static constexpr int kOverhead = 1;
  static constexpr int kSlack = 12;
  static constexpr bool kDeals = false;

  static_assert(kRows % 8 == 0 && kRows >= 8 && kRows <= kNarrowMaxRows);
};

template <typename Config>
struct alignas(1024) NarrowShared {
  // Blocks of the cache: groups of 8 tokens x 64 columns, in the order in which memory holds them;
  // in the place of the rotary tile, later P: groups of 8 rows x 64 tokens.
  u8 blocks[Config::kStages][kGroups][kKeyTiles][kGroupTileBytes];
  u8 q[kKeyTiles][Config::kQueryTileBytes];  // rows x 64 columns
  float warp_max[Config::kRows][4];
  float warp_sum[Config::kRows][4];
  float factor[Config::kStages][Config::kRows];  // of the output so far, where it has moved
  int moved[Config::kStages];
  float inverse[Config::kStages][Config::kRows];  // 1 / row sum, after an item's last block
  PipelineBarriers<Config::kStages> ring;
  u64 p_full[Config::kStages];
  u64 q_full, q_empty;
  Schedule schedule;
};

inline constexpr u32 kNarrowGroupStride = kKeyTiles * kGroupTileBytes;

// Query rows that one thread holds values of in an accumulator with the rows as columns.
template <typename Config>
struct Columns {
  static JAX_DS_DEVICE int row(int column) {
    return 8 * (column / 2) + 2 * (lane_id() % 4) + column % 2;
  }
  // Places in the accumulator of the thread's upper and lower token (or latent column).
  static constexpr int upper(int column) { return 4 * (column / 2) + column % 2; }
  static constexpr int lower(int column) { return upper(column) + 2; }
};

}  // namespace jax_ds::flash_mla
