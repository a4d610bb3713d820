// The second level of accumulation: partial tiles times their scales, in float32 registers.
#pragma once

#include "deep_gemm/kernels/storage.cuh"

namespace jax_ds::deep_gemm {

// A stage's scales, for this thread's elements.
template <Config kConfig>
struct Scales {
  static constexpr int kN = kConfig.block_n;
  static constexpr bool kWide = kConfig.mode == kWgrad;
  static constexpr int kUnit = ScaleUnit(kConfig);
  float lhs[2];                                        // rows r and r + 8
  float rhs[kWide ? kN / 4 : RhsScaleSlots(kConfig)];  // units; wgrad: its columns

  JAX_DS_DEVICE void load(const Storage<kConfig>& s, int slot, int row) {
    const u32 lane = lane_id();
    lhs[0] = ld_shared_f32(shared_address(&s.lhs_scales[slot][row + lane / 4]));
    lhs[1] = ld_shared_f32(shared_address(&s.lhs_scales[slot][row + lane / 4 + 8]));
    if constexpr (kWide) {
      const u32 columns = shared_address(&s.rhs_scales[slot][lane % 4 * ScaleLane(kConfig)]);
#pragma unroll
      for (int i = 0; i < kN / 4; i += 4) {
        const float4 v = ld_shared_v4_f32(columns + 4 * i);
        rhs[i] = v.x, rhs[i + 1] = v.y, rhs[i + 2] = v.z, rhs[i + 3] = v.w;
      }
    } else {
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
  }

  // total += scales * partial.
  JAX_DS_DEVICE void promote(float (&total)[kN / 2], const float (&partial)[kN / 2]) const {
    if constexpr (kWide) {
#pragma unroll
      for (int e = 0; e < kN / 2; ++e) {
        total[e] += lhs[e / 2 % 2] * rhs[e / 4 * 2 + e % 2] * partial[e];
      }
    } else {
#pragma unroll
      for (int unit = 0; unit < kN; unit += kUnit) {
        const float scale[2] = {lhs[0] * rhs[unit / kUnit], lhs[1] * rhs[unit / kUnit]};
#pragma unroll
        for (int e = unit / 2; e < (unit + kUnit) / 2; ++e) {
          total[e] += scale[e / 2 % 2] * partial[e];
        }
      }
    }
  }
};

}  // namespace jax_ds::deep_gemm
