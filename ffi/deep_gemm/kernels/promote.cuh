// The second level of accumulation: partial tiles times their scales, in float32 registers.
#pragma once

#include "deep_gemm/kernels/storage.cuh"

namespace jax_ds::deep_gemm {

// A stage's scales, for this thread's elements.
template <Config kConfig>
struct Scales {
  static constexpr int kN = kConfig.block_n;
  static constexpr bool kWide = kConfig.mode == kWgrad;
  static constexpr int kBlocks = kWide ? 1 : ScaleBlocks(kConfig);
  static constexpr int kUnit = ScaleUnit(kConfig);  // columns that lie in one block of 128
  // Where registers are scarce the columns' scales stay in shared memory until they are used, and
  // the slot is released after that.
  static constexpr bool kLate = kWide && (kN > 128 || kConfig.waves() > 1 || kConfig.math > 2);
  float lhs[2];                                   // rows r and r + 8
  float rhs[kWide && !kLate ? kN / 4 : kBlocks];  // its columns, or blocks of 128
  u32 columns;                                    // shared address of its columns' scales

  JAX_DS_DEVICE void load(const Storage<kConfig>& s, int slot, int row) {
    const u32 lane = lane_id();
    lhs[0] = ld_shared_f32(shared_address(&s.lhs_scales[slot][row + lane / 4]));
    lhs[1] = ld_shared_f32(shared_address(&s.lhs_scales[slot][row + lane / 4 + 8]));
    if constexpr (kWide) {
      columns = shared_address(&s.rhs_scales[slot][lane % 4 * ScaleLane(kConfig)]);
      if constexpr (!kLate) {
#pragma unroll
        for (int i = 0; i < kN / 4; i += 4) load_columns(rhs + i, i);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        rhs[b] = ld_shared_f32(shared_address(&s.rhs_scales[slot][b]));
      }
    }
  }

  // total += scales * partial. `split`: first column, from the tile's, of the second block.
  JAX_DS_DEVICE void promote(float* total, const float* partial, int split) const {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < kN / 4; i += 4) {
        float late[4];
        if constexpr (kLate) load_columns(late, i);
        const float* column = kLate ? late : rhs + i;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          total[2 * i + e] += lhs[e / 2 % 2] * column[e / 4 * 2 + e % 2] * partial[2 * i + e];
        }
      }
    } else {
#pragma unroll
      for (int unit = 0; unit < kN; unit += kUnit) {
        float block = rhs[0];
#pragma unroll
        for (int b = 1; b < kBlocks; ++b) block = unit >= split + 128 * (b - 1) ? rhs[b] : block;
        const float scale[2] = {lhs[0] * block, lhs[1] * block};
#pragma unroll
        for (int e = unit / 2; e < (unit + kUnit) / 2; ++e) {
          total[e] += scale[e / 2 % 2] * partial[e];
        }
      }
    }
  }

 private:
  JAX_DS_DEVICE void load_columns(float* to, int i) const {
    const float4 v = ld_shared_v4_f32(columns + 4 * i);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
};

}  // namespace jax_ds::deep_gemm
