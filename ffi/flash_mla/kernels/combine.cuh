// Puts the parts of split requests together: out = sum_i 2^(lse_i - lse) out_i.
#pragma once

#include "flash_mla/kernels/softmax.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

inline constexpr int kCombineThreads = 256;

// Row r of a request: where its part `i` lies.
struct PartRows {
  int first_group, row_groups, row_group, tile_rows, row;

  JAX_DS_DEVICE i64 at(int part) const {
    const i64 slot = static_cast<i64>(2 * (first_group + part) + (part == 0)) * row_groups;
    return (slot + row_group) * tile_rows + row;
  }
};

// log2 of the sum of all parts' exponentials, in every lane.
JAX_DS_DEVICE float total_lse(const CombineParams& p, const PartRows& rows, int parts) {
  float largest = -kInfinity;
  for (int i = lane_id(); i < parts; i += 32) largest = fmaxf(largest, p.partial_lse[rows.at(i)]);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  }
  const float zero = finite_reference(largest);
  float sum = 0.0f;
  for (int i = lane_id(); i < parts; i += 32) sum += exp2_approx(p.partial_lse[rows.at(i)] - zero);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return largest + log2_approx(sum);
}

template <typename Element>
JAX_DS_DEVICE void store_row(const CombineParams& p, i64 row, int column, float4 value) {
  const uint2 packed = {wgmma::pack(Element{}, value.x, value.y),
                        wgmma::pack(Element{}, value.z, value.w)};
  *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + row * kValueDim + column) = packed;
}

JAX_DS_DEVICE void add_scaled(float4& sum, float weight, float4 value) {
  sum.x += weight * value.x;
  sum.y += weight * value.y;
  sum.z += weight * value.z;
  sum.w += weight * value.w;
}

// kWide: few rows, many parts: a CTA for 128 columns of a row, its warps share the parts.
// Else a warp for each row.
template <bool kWide, typename Element>
__global__ __launch_bounds__(kCombineThreads) void combine(const __grid_constant__ CombineParams p) {
  __shared__ float4 sums[kCombineThreads / 32][32];
  constexpr int kWarps = kCombineThreads / 32;
  const int warp = threadIdx.x / 32;
  const i64 row = kWide ? blockIdx.x / 4 : static_cast<i64>(blockIdx.x) * kWarps + warp;
  griddepcontrol_wait();
  const int request = row / p.R;
  if (request >= p.B) return;
  const Parts parts = p.parts[request];
  if (parts.count <= 1) return;
  const int r = row - static_cast<i64>(request) * p.R;
  const PartRows rows{parts.first_group, p.row_groups, r / p.tile_rows, p.tile_rows,
                      r % p.tile_rows};
  const float lse = total_lse(p, rows, parts.count);
  const float zero = finite_reference(lse);
  if constexpr (kWide) {
    const int column = 128 * (blockIdx.x % 4) + 4 * lane_id();
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int i = warp; i < parts.count; i += kWarps) {
      const i64 at = rows.at(i);
      const float weight = exp2_approx(p.partial_lse[at] - zero);
      add_scaled(sum, weight,
                 *reinterpret_cast<const float4*>(p.partial_out + at * kValueDim + column));
    }
    sums[warp][lane_id()] = sum;
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < kWarps; ++w) add_scaled(sum, 1.0f, sums[w][lane_id()]);
    store_row<Element>(p, row, column, sum);
    if (blockIdx.x % 4 == 0 && lane_id() == 0) p.lse[row] = lse * kLn2;
  } else {
    float4 sum[4] = {};
#pragma unroll 2
    for (int i = 0; i < parts.count; ++i) {
      const i64 at = rows.at(i);
      const float weight = exp2_approx(p.partial_lse[at] - zero);
      const float* from = p.partial_out + at * kValueDim + 4 * lane_id();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        add_scaled(sum[j], weight, *reinterpret_cast<const float4*>(from + 128 * j));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) store_row<Element>(p, row, 128 * j + 4 * lane_id(), sum[j]);
    if (lane_id() == 0) p.lse[row] = lse * kLn2;
  }
}

}  // namespace jax_ds::flash_mla
