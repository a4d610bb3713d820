// From accumulators to global memory. Rows at or past `row_end` and columns at or past `n` are not
// stored: a group may end anywhere.
#pragma once

#include "deep_gemm/kernels/config.h"
#include "kernels/ptx.cuh"

namespace jax_ds::deep_gemm {

// Where one warp's part of a tile lies: 16 rows from `row`, columns from `col`.
struct WarpTile {
  int row;
  int row_end;
  int col;
  int n;
};

// Straight from the registers: four lanes fill 32 bytes of float32, a whole sector, or 16 of bf16.
template <int kOutput, int kColumns>
JAX_DS_DEVICE void store_registers(const float* total, const WarpTile& t, void* out) {
  const int row = t.row + lane_id() / 4;
  const int col = t.col + lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= t.row_end) continue;
    const i64 line = static_cast<i64>(row + 8 * half) * t.n + col;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (col + 8 * j >= t.n) continue;
      const float a = total[4 * j + 2 * half], b = total[4 * j + 2 * half + 1];
      if constexpr (kOutput == kBfloat16) {
        st_global_b32(static_cast<u16*>(out) + line + 8 * j, cvt_bf16x2(a, b));
      } else if constexpr (kOutput == kFloat32) {
        st_global_v2_f32(static_cast<float*>(out) + line + 8 * j, a, b);
      } else {
        red_global_add_v2_f32(static_cast<float*>(out) + line + 8 * j, a, b);
      }
    }
  }
}

// bfloat16: the warp turns 16 rows x 64 columns around in its own 2 KB of shared memory, so that
// eight lanes store the 128 bytes of a row. Units of 16 bytes are swizzled by the row: no bank
// conflicts, and no other warp to wait for.
template <int kColumns>
JAX_DS_DEVICE void store_bf16(const float* total, const WarpTile& t, u32 staging, void* out) {
  const u32 lane = lane_id();
  const u32 matrix = lane / 8;
  const u32 write_row = lane % 8 + 8 * (matrix % 2);
#pragma unroll
  for (int chunk = 0; chunk < kColumns; chunk += 64) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4 && chunk + 16 * j < kColumns; ++j) {
      const float* d = total + (chunk + 16 * j) / 2;
      const u32 unit = 2 * j + matrix / 2;
      stmatrix_x4(staging + write_row * 128 + ((unit ^ write_row % 8) << 4), cvt_bf16x2(d[0], d[1]),
                  cvt_bf16x2(d[2], d[3]), cvt_bf16x2(d[4], d[5]), cvt_bf16x2(d[6], d[7]));
    }
    __syncwarp();
    const u32 unit = lane % 8;
    const int col = t.col + chunk + unit * 8;
    const bool inside = chunk + unit * 8 < kColumns && col < t.n;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 read_row = 4 * i + lane / 8;
      const uint4 value = ld_shared_v4(staging + read_row * 128 + ((unit ^ read_row % 8) << 4));
      const int row = t.row + read_row;
      if (inside && row < t.row_end) {
        st_global_v4(static_cast<u16*>(out) + static_cast<i64>(row) * t.n + col, value);
      }
    }
  }
}

template <Config kConfig, int kColumns>
JAX_DS_DEVICE void store_tile(const float* total, const WarpTile& t, u32 staging, void* out) {
  if constexpr (StagingBytes(kConfig) > 0) {
    store_bf16<kColumns>(total, t, staging, out);
  } else {
    store_registers<kConfig.output, kColumns>(total, t, out);
  }
}

}  // namespace jax_ds::deep_gemm
