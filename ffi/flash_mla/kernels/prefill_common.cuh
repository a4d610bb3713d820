// What prefill's forward and backward kernels share: the order of tiles, the mask, the way out.
#pragma once

#include "flash_mla/kernels/prefill_slabs.h"
#include "kernels/pipeline.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// 128 rows (queries or keys) of one head.
struct HeadTile {
  int batch;
  int head;
  int row;
};

// The tile of this CTA in round `round`; false after the last. `section` heads are walked together,
// their tiles from the first (or, `descending`, the last) rows on: where the mask is causal, the
// longest come first. Every other round deals the CTAs their tiles in reverse, so that none gets
// the longer one every time.
JAX_DS_DEVICE bool head_tile(int round, int batch, int heads, int rows, int section,
                             bool descending, HeadTile& tile) {
  const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int index = round * gridDim.x + place;
  const int row_tiles = (rows + 127) / 128;
  if (index >= batch * heads * row_tiles) return false;
  const int first = index / (section * row_tiles) * section;
  const int inside = index - first * row_tiles;
  const int width = min(section, batch * heads - first);
  const int head = first + inside % width, row = inside / width;
  tile.batch = head / heads;
  tile.head = head % heads;
  tile.row = (descending ? row_tiles - 1 - row : row) * 128;
  return true;
}

// Waits, and loads `kRows` rows of a head as slabs of 64 columns: rows of 128 bytes, swizzled.
template <int kRows>
JAX_DS_DEVICE void load_slabs(u8* shared, const TensorMap* map, u64* barrier, int slabs, int head,
                              int row, int batch) {
  for (int slab = 0; slab < slabs; ++slab) {
    tma_load_4d(shared + slab * kRows * 128, map, barrier, slab * 64, head, row, batch);
  }
}

// d = a b^T, both K-major in slabs; asynchronous, one group. kRowsA, kRowsB: rows of their slabs.
template <int kK, int kRowsA, int kRowsB, int kRegisters>
JAX_DS_DEVICE void multiply_slabs(float (&d)[kRegisters], u32 a, u32 b) {
  using namespace wgmma;
  fence();
#pragma unroll
  for (int i = 0; i < kK / 16; ++i) {
    mma<Major::kK, Major::kK>(Bf16{}, d, columns_operand(a, kRowsA, i),
                              columns_operand(b, kRowsB, i), i > 0);
  }
  commit_group();
}

// d += a b, a in registers (pairs of bf16), b: [kRows, N] in slabs of N; asynchronous, one group.
template <int kRows, int kRegisters>
JAX_DS_DEVICE void accumulate_slabs(float (&d)[kRegisters], const u32 (&a)[kRows / 16][4], u32 b) {
  using namespace wgmma;
  fence();
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    mma<Major::kMN>(Bf16{}, d, a[i], rows_operand(b, kRows, i), true);
  }
  commit_group();
}

// A thread's part of a 64 x 8n tile, as the left operand of the next product.
template <int kRegisters>
JAX_DS_DEVICE void pack_operand(const float (&d)[kRegisters], u32 (&a)[kRegisters / 8][4]) {
#pragma unroll
  for (int j = 0; j < kRegisters / 2; ++j) a[j / 4][j % 4] = cvt_bf16x2(d[2 * j], d[2 * j + 1]);
}

// Writes columns [64 slab, 64 slab + 64) of a warp's 16 rows as bf16, turned around in 2 KB of
// shared memory so that a row leaves in pieces of 16 bytes. `out`: where row 0, column 64 slab
// goes.
template <int kRegisters>
JAX_DS_DEVICE void store_slab(const float (&d)[kRegisters], int slab, u32 staging, u16* out,
                              i64 row_stride, int valid_rows) {
  const u32 lane = lane_id();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* v = d + slab * 32 + j * 8;
    const u32 row = lane % 16, chunk = (2 * j + lane / 16) ^ (row % 8);
    stmatrix_x4(staging + row * 128 + chunk * 16, cvt_bf16x2(v[0], v[1]), cvt_bf16x2(v[2], v[3]),
                cvt_bf16x2(v[4], v[5]), cvt_bf16x2(v[6], v[7]));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 4 + lane / 8, chunk = lane % 8;
    if (row < valid_rows) {
      st_global_v4(out + row * row_stride + chunk * 8,
                   ld_shared_v4(staging + row * 128 + (chunk ^ (row % 8)) * 16));
    }
  }
}

}  // namespace jax_ds::flash_mla
