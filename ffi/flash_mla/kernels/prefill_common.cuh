// What prefill's forward and backward kernels share: slabs in, products, the way out.
#pragma once

#include "flash_mla/kernels/prefill_slabs.h"
#include "kernels/constants.h"
#include "kernels/pipeline.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

// A value on which the warp agrees, in a uniform register: what is computed from it, operand
// descriptors above all, then needs no other registers and no moves between the two kinds.
JAX_DS_DEVICE u32 warp_uniform(u32 value) { return __reduce_or_sync(0xffffffffu, value); }

// Named barriers; __syncthreads has 0. `g`: the number of a math warpgroup.
inline constexpr u32 kTurnBarrier = 1;       // + g: g may issue its products
inline constexpr u32 kWarpgroupBarrier = 3;  // + g: its own warps
inline constexpr u32 kMeetingBarrier = 5;    // of both

JAX_DS_DEVICE void sync_warpgroup(u32 group) { bar_sync(kWarpgroupBarrier + group, 128); }

// Loads `kRows` rows of a head as slabs of 64 columns: rows of 128 bytes, swizzled. The map's boxes
// are of kBox rows.
template <int kRows, int kBox = kRows>
JAX_DS_DEVICE void load_slabs(u8* shared, const TensorMap* map, u64* barrier, int slabs, int head,
                              int row, int batch) {
  for (int slab = 0; slab < slabs; ++slab) {
#pragma unroll
    for (int i = 0; i < kRows; i += kBox) {
      tma_load_4d(shared + (slab * kRows + i) * 128, map, barrier, slab * 64, head, row + i, batch);
    }
  }
}

// Zeroes rows of slabs for which `clears(row)`, for the products that warpgroup `group` then
// issues: padding may hold NaN, and zero times NaN is NaN. Both warpgroups do so, each for itself.
template <int kRows, typename Clears>
JAX_DS_DEVICE void clear_rows(u32 slabs, int num_slabs, u32 group, Clears clears) {
  for (int i = threadIdx.x % 128; i < num_slabs * kRows * 8; i += 128) {
    if (clears(i / 8 % kRows)) st_shared_v4(slabs + i * 16, 0, 0, 0, 0);
  }
  fence_proxy_async_shared();
  sync_warpgroup(group);
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

// Columns [64 slab, 64 slab + 64) of a warp's 16 rows as bf16, turned around in 2 KB of shared
// memory so that a row leaves in pieces of 16 bytes: piece i of lane l belongs to row 4 i + l / 8.
template <int kRegisters>
JAX_DS_DEVICE void turn_slab(const float (&d)[kRegisters], int slab, u32 staging,
                             uint4 (&pieces)[4]) {
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
    pieces[i] = ld_shared_v4(staging + row * 128 + (chunk ^ (row % 8)) * 16);
  }
}

}  // namespace jax_ds::flash_mla
