// The second level of accumulation: partial tiles times their scales, in float32 registers.
#pragma once

#include "deep_gemm/kernels/storage.cuh"

namespace jax_ds::deep_gemm {

// A stage's scales of this thread's rows, r and r + 8.
template <Config kConfig>
struct RowScales {
  float lhs[2];

  JAX_DS_DEVICE void load(const Storage<kConfig>& s, int slot, int row) {
    const float* const scales = s.lhs_scales[slot] + row + lane_id() / 4;
    lhs[0] = ld_shared_f32(shared_address(scales));
    lhs[1] = ld_shared_f32(shared_address(scales + 8));
  }
};

// A stage's scales, for this thread's elements, where blocks of columns share one.
template <Config kConfig>
struct Scales {
  static constexpr int kN = kConfig.block_n;
  static constexpr int kUnit = ScaleUnit(kConfig);
  RowScales<kConfig> rows;
  float rhs[RhsScaleSlots(kConfig)];  // of units

  JAX_DS_DEVICE void load(const Storage<kConfig>& s, int slot, int row) {
    rows.load(s, slot, row);
    const u32 units = shared_address(s.rhs_scales[slot]);
    if constexpr (ScaleUnits(kConfig) == 1) {
      rhs[0] = ld_shared_f32(units);
    } else {
#pragma unroll
      for (int i = 0; i < ScaleUnits(kConfig); i += 4) {
        const float4 v = ld_shared_v4_f32(units + 4 * i);
        rhs[i] = v.x, rhs[i + 1] = v.y, rhs[i + 2] = v.z, rhs[i + 3] = v.w;
      }
    }
  }

  // total += scales * partial.
  JAX_DS_DEVICE void promote(float (&total)[kN / 2], const float (&partial)[kN / 2]) const {
#pragma unroll
    for (int unit = 0; unit < kN; unit += kUnit) {
      const float scale[2] = {rows.lhs[0] * rhs[unit / kUnit], rows.lhs[1] * rhs[unit / kUnit]};
#pragma unroll
      for (int e = unit / 2; e < (unit + kUnit) / 2; ++e) {
        total[e] += scale[e / 2 % 2] * partial[e];
      }
    }
  }
};

// A stage's scales of this thread's columns, of which each has its own: weight gradients.
template <Config kConfig>
struct ColumnScales {
  static constexpr int kN = kConfig.block_n;
  float rhs[kN / 4];

  JAX_DS_DEVICE void load(const Storage<kConfig>& s, int slot) {
    const u32 columns = shared_address(&s.rhs_scales[slot][lane_id() % 4 * ScaleLane(kConfig)]);
#pragma unroll
    for (int i = 0; i < kN / 4; i += 4) {
      const float4 v = ld_shared_v4_f32(columns + 4 * i);
      rhs[i] = v.x, rhs[i + 1] = v.y, rhs[i + 2] = v.z, rhs[i + 3] = v.w;
    }
  }

  // partial *= scales of the columns.
  JAX_DS_DEVICE void scale(float (&partial)[kN / 2]) const {
#pragma unroll
    for (int e = 0; e < kN / 2; ++e) partial[e] *= rhs[e / 4 * 2 + e % 2];
  }
};

// total += scales of the rows * partial.
template <Config kConfig, int kSize>
JAX_DS_DEVICE void add_rows(float (&total)[kSize], const float (&partial)[kSize],
                            const RowScales<kConfig>& rows) {
#pragma unroll
  for (int e = 0; e < kSize; ++e) total[e] += rows.lhs[e / 2 % 2] * partial[e];
}

}  // namespace jax_ds::deep_gemm
