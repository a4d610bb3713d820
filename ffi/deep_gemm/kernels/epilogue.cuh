// From accumulators to global memory. Rows at or past `row_end` and columns at or past `n` are not
// stored: a group may end anywhere.
#pragma once

#include "deep_gemm/kernels/config.h"
#include "kernels/tma.cuh"

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

// One warp's staging buffers: 16 rows x 128 bytes in TMA's swizzle, units of 16 bytes exchanged by
// the row, so that neither side meets bank conflicts. Stores go on while the next tile is computed;
// a buffer is reused once TMA has read it. Lane 0 issues: bulk groups belong to a thread.
template <Config kConfig>
class Staging {
 public:
  static constexpr int kWidth = 128 / OutputBytes(kConfig);  // columns
  static constexpr int kBuffers = StagingBuffers(kConfig) > 0 ? StagingBuffers(kConfig) : 1;

  JAX_DS_DEVICE explicit Staging(u8* memory) : base_(memory) {}

  // `total`: this thread's elements of the tile, from column `first` of it on.
  JAX_DS_DEVICE void store(const Params& p, const float* total, int row, int col) {
    if (lane_id() == 0) bulk_wait_group_read<kBuffers - 1>();
    __syncwarp();
    u8* const buffer = base_ + next_ * kStagingBytes;
    write(shared_address(buffer), total);
    fence_proxy_async_shared();
    __syncwarp();
    if (lane_id() == 0) {
      if constexpr (kConfig.output == kFloat32Add) {
        tma_reduce_add_2d(&p.out, buffer, col, row);
      } else {
        tma_store_2d(&p.out, buffer, col, row);
      }
      bulk_commit_group();
    }
    next_ = next_ + 1 == kBuffers ? 0 : next_ + 1;
  }

  JAX_DS_DEVICE void drain() const {
    if (lane_id() == 0) bulk_wait_group<0>();
  }

 private:
  JAX_DS_DEVICE static void write(u32 buffer, const float* d) {
    const u32 lane = lane_id();
    if constexpr (kConfig.output == kBfloat16) {
      // Matrix m of stmatrix: rows 8 (m % 2) on, the (m / 2)-th half of a strip of 16 columns.
      const u32 matrix = lane / 8, row = lane % 8 + 8 * (matrix % 2);
#pragma unroll
      for (int strip = 0; strip < 4; ++strip, d += 8) {
        const u32 unit = 2 * strip + matrix / 2;
        stmatrix_x4(buffer + row * 128 + ((unit ^ row % 8) << 4), cvt_bf16x2(d[0], d[1]),
                    cvt_bf16x2(d[2], d[3]), cvt_bf16x2(d[4], d[5]), cvt_bf16x2(d[6], d[7]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j, d += 4) {
        const u32 row = lane / 4, unit = 2 * j + lane % 4 / 2, half = lane % 2 * 8;
        const u32 place = buffer + row * 128 + ((unit ^ row) << 4) + half;
        st_shared_v2_f32(place, d[0], d[1]);
        st_shared_v2_f32(place + 8 * 128, d[2], d[3]);
      }
    }
  }

  u8* base_;
  u32 next_ = 0;
};

template <Config kConfig, int kColumns>
JAX_DS_DEVICE void store_tile(const Params& p, const float* total, const WarpTile& t,
                              Staging<kConfig>& staging) {
  // TMA clips at the end of the output, but knows nothing of groups.
  if (StoresByTma(kConfig) && (kConfig.mode == kDense || t.row + 16 <= t.row_end)) {
    constexpr int kWidth = Staging<kConfig>::kWidth;
#pragma unroll
    for (int col = 0; col < kColumns; col += kWidth) {
      staging.store(p, total + col / 2, t.row, t.col + col);
    }
  } else {
    store_registers<kConfig.output, kColumns>(total, t, p.out_data);
  }
}

}  // namespace jax_ds::deep_gemm
