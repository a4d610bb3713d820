// A CTA's shared memory, and what a configuration must keep to.
#pragma once

#include "deep_gemm/kernels/config.h"
#include "kernels/pipeline.cuh"

namespace jax_ds::deep_gemm {

// Which tile of a ragged group: rows of the group from `row` on.
struct alignas(16) Spot {
  int group;
  int row;
  int column;  // of a cluster
  int height;  // in parts of 64 rows; 0: rows to be zeroed; on the board: -1 after the last tile
};

// What is known of groups.
template <Config kConfig>
struct Groups {
  int ends[kConfig.mode == kDense ? 4 : kMaxGroups];  // as load_groups says
};

template <Config kConfig>
  requires(IsRagged(kConfig) && !DealsTiles(kConfig))
struct Groups<kConfig> {
  int ends[kMaxGroups];
  int tiles;  // of all groups
};

template <Config kConfig>
  requires(DealsTiles(kConfig))
struct Groups<kConfig> {
  int ends[kMaxGroups];
  Spot board[kBoard];  // the next tiles of this CTA
  PipelineBarriers<kBoard> posted;
};

template <Config kConfig>
struct Storage {
  u8 lhs[kConfig.stages][kConfig.block_m * kBlockK];
  u8 rhs[kConfig.stages][kConfig.block_n * kBlockK];
  u8 staging[kConfig.math * 4][StagingBytes(kConfig)];
  float4 reduce[ReduceBytes(kConfig) / 16];
  float4 joined[JoinBytes(kConfig) / 16];
  alignas(16) float lhs_scales[kConfig.stages][LhsScaleSlots(kConfig)];
  alignas(16) float rhs_scales[kConfig.stages][RhsScaleSlots(kConfig)];
  Groups<kConfig> groups;
  PipelineBarriers<kConfig.stages> ring;
  PipelineBarriers<1> reduced;  // the reduce buffer, filled by the other splits
};

// The first of a warpgroup's `wave`-th 64 rows of the tile. Warpgroups alternate, so that of a tile
// that ends early none has all the work. No member of Config: that would read sizes from memory.
template <Config kConfig>
JAX_DS_DEVICE int first_row(int group, int wave) {
  constexpr int kGroups = kConfig.row_groups();
  return (wave * kGroups + group) * 64;
}

template <Config kConfig>
constexpr bool legal() {
  constexpr Config c = kConfig;
  static_assert(c.block_m % (64 * c.row_groups()) == 0 && c.waves() <= 2,
                "64 or 128 rows a warpgroup");
  static_assert(c.block_n % 16 == 0 && c.block_n * kBlockK % 1024 == 0, "swizzle atoms");
  static_assert(!IsRagged(c) || c.block_m <= 256, "Cut divides by at most four");
  static_assert(c.block_m / c.multicast % 8 == 0, "parts of the lhs tile");
  static_assert(c.cluster() <= 8, "portable clusters");
  static_assert(ScaleUnits(c) <= 16, "scales of rhs");
  static_assert(
      c.split == 1 || (c.waves() == 1 && c.mode != kMasked && c.block_n / c.split % 8 == 0),
      "whole strips");
  static_assert(c.k_parts() == 1 || (c.waves() == 1 && c.mode == kDense), "one total a thread");
  static_assert(c.k_parts() == 1 || c.stages % (2 * c.depth) == 0,
                "a slot's turn is always the same");
  static_assert(c.depth == 1 || (c.depth == 2 && c.waves() == 1 && c.stages > 2), "registers");
  static_assert(c.mode != kWgrad || (c.block_n <= (c.waves() > 1 ? 128 : 160) && c.depth == 1),
                "registers");
  static_assert(c.row_groups() <= 2 && (c.row_groups() == 1 || c.per_sm == 1), "registers");
  static_assert(
      !c.moves_registers() || c.math * c.math_registers() + c.producer_registers() <= 3 * 168,
      "three warpgroups start with 168");
  static_assert(sizeof(Storage<c>) <= SharedBytes(c), "SharedBytes counts the storage");
  return true;
}

}  // namespace jax_ds::deep_gemm
