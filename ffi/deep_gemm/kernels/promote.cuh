// The second level of accumulation: partial tiles times their scales, in float32 registers.
#pragma once

#include "deep_gemm/kernels/storage.cuh"

namespace jax_ds::deep_gemm {

// A stage's scales, for this thread's elements.
template <Config kConfig>
struct Scales {
  static constexpr bool kWide = kConfig.mode == kWgrad;
  static constexpr bool kStraddles = !kWide && 128 % kConfig.block_n != 0;
  static constexpr int kUnit = ScaleUnit(kConfig);  // columns that lie in one block of 128
  // Where registers are scarce the columns' scales stay in shared memory until they are used, and
  // the slot is released after that.
  static constexpr bool kLate = kWide && (kConfig.math == 3 || kConfig.depth > 1);
  float lhs[2];                                          // rows r and r + 8
  float rhs[kWide && !kLate ? kConfig.block_n / 4 : 2];  // its columns, or two blocks of 128
  u32 columns;                                           // shared address of the columns' scales

  JAX_DS_DEVICE void load(const Storage<kConfig>& s, int slot, int row) {
    const u32 lane = lane_id();
    lhs[0] = ld_shared_f32(shared_address(&s.lhs_scales[slot][row + lane / 4]));
    lhs[1] = ld_shared_f32(shared_address(&s.lhs_scales[slot][row + lane / 4 + 8]));
    columns = shared_address(&s.rhs_scales[slot][kWide ? 2 * (lane % 4) : 0]);
    if constexpr (kWide && !kLate) {
#pragma unroll
      for (int j = 0; j < kConfig.block_n / 8; ++j) load_columns(&rhs[2 * j], j);
    } else if constexpr (!kWide) {
      rhs[0] = ld_shared_f32(columns);
      if constexpr (kStraddles) rhs[1] = ld_shared_f32(columns + 4);
    }
  }

  JAX_DS_DEVICE void load_columns(float* pair, int j) const {
    const float2 value = ld_shared_v2_f32(columns + 32 * j);
    pair[0] = value.x;
    pair[1] = value.y;
  }

  // total += scales * partial. `split`: first column, from the tile's, of the second block.
  JAX_DS_DEVICE void promote(float* total, const float* partial, int split) {
#pragma unroll
    for (int unit = 0; unit < kConfig.block_n; unit += kUnit) {
      float scale[2] = {lhs[0], lhs[1]};
      if constexpr (!kWide) {
        const float block = kStraddles && unit >= split ? rhs[1] : rhs[0];
        scale[0] *= block;
        scale[1] *= block;
      }
#pragma unroll
      for (int j = unit / 8; j < (unit + kUnit) / 8; ++j) {
        if constexpr (kLate) load_columns(rhs, j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float column = kWide ? rhs[(kLate ? 0 : 2 * j) + i % 2] : 1.f;
          total[4 * j + i] += scale[i / 2] * column * partial[4 * j + i];
        }
      }
    }
  }
};

}  // namespace jax_ds::deep_gemm
