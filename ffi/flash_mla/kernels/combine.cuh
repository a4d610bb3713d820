// Puts the parts of split requests together: out = sum_i 2^(lse_i - lse) out_i.
#pragma once

#include "flash_mla/kernels/softmax.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

// Row r of a request: where its part `i` lies.
struct PartRows {
  int first_group, row_groups, row_group, tile_rows, row;

  JAX_DS_DEVICE PartRows(const CombineParams& p, const Parts& parts, int r)
      : first_group(parts.first_group),
        row_groups(p.row_groups),
        row_group(r / p.tile_rows),
        tile_rows(p.tile_rows),
        row(r % p.tile_rows) {}

  JAX_DS_DEVICE i64 at(int part) const {
    const i64 slot = static_cast<i64>(2 * (first_group + part) + (part == 0)) * row_groups;
    return (slot + row_group) * tile_rows + row;
  }
};

// Weights 2^(lse_i - lse) of the parts: lane l of a warp holds those of parts l, l + 32, ...
template <int kParts>
struct Weights {
  static constexpr int kRegisters = (kParts + 31) / 32;
  float weight[kRegisters];
  float lse;  // base 2

  JAX_DS_DEVICE Weights(const CombineParams& p, const PartRows& rows, int parts) {
    float largest = -kInfinity;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const int part = 32 * i + lane_id();
      weight[i] = part < parts ? p.partial_lse[rows.at(part)] : -kInfinity;
    }
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) largest = fmaxf(largest, weight[i]);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    const float zero = finite_reference(largest);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      weight[i] = exp2_approx(weight[i] - zero);
      sum += weight[i];
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    lse = largest + log2_approx(sum);
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) weight[i] *= scale;
  }

  // Of one part, for the whole warp; 0 from the last part on.
  JAX_DS_DEVICE float of(int part) const {
    float w = 0.0f;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const float candidate = __shfl_sync(0xffffffffu, weight[i], part % 32);
      if (part / 32 == i) w = candidate;
    }
    return w;
  }
};

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

// Many parts, up to kParts: a CTA for 128 columns of a row, its warps share the parts. All loads
// are issued before the first is used: what counts here is latency.
template <typename Element, int kParts>
__global__ __launch_bounds__(kCombineThreads) void combine_many(const
                                                                __grid_constant__ CombineParams p) {
  constexpr int kWarps = kCombineThreads / 32;
  constexpr int kLoads = kParts / kWarps;
  __shared__ float4 sums[kWarps][32];
  const int warp = threadIdx.x / 32;
  const i64 row = blockIdx.x / 4;
  const int column = 128 * (blockIdx.x % 4) + 4 * lane_id();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int request = row / p.R;
  const Parts parts = p.parts[request];
  if (parts.count <= 1) return;
  const PartRows rows(p, parts, row - static_cast<i64>(request) * p.R);
  float4 values[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int part = kWarps * i + warp;
    values[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (part < parts.count) {
      values[i] =
          *reinterpret_cast<const float4*>(p.partial_out + rows.at(part) * kValueDim + column);
    }
  }
  const Weights<kParts> weights(p, rows, parts.count);
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    // Of part kWarps * i + warp.
    const float weight =
        __shfl_sync(0xffffffffu, weights.weight[i * kWarps / 32], i * kWarps % 32 + warp);
    add_scaled(sum, weight, values[i]);
  }
  sums[warp][lane_id()] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < kWarps; ++w) add_scaled(sum, 1.0f, sums[w][lane_id()]);
  store_row<Element>(p, row, column, sum);
  if (blockIdx.x % 4 == 0 && lane_id() == 0) p.lse[row] = weights.lse * kLn2;
}

// Few parts: warps take rows, or quarters of rows where there are few, in turn.
template <typename Element, int kPieces>
__global__ __launch_bounds__(kCombineThreads,
                             1) void combine_few(const __grid_constant__ CombineParams p) {
  constexpr int kWarps = kCombineThreads / 32;
  constexpr int kVectors = 4 / kPieces;  // of four columns, a lane
  constexpr int kAhead = 2 * kPieces;    // parts loaded before the first is used
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if constexpr (kPieces == 1) {
    // Where there are many rows, often no request is split: found out at once, not row by row.
    bool split = false;
    for (int b = threadIdx.x; b < p.B; b += kCombineThreads) split |= p.parts[b].count > 1;
    if (!__syncthreads_or(split)) return;
  }
  const i64 pieces = static_cast<i64>(p.B) * p.R * kPieces;
  for (i64 piece = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / 32; piece < pieces;
       piece += gridDim.x * kWarps) {
    const i64 row = piece / kPieces;
    const int column = piece % kPieces * (kValueDim / kPieces) + 4 * lane_id();
    const int request = row / p.R;
    const Parts parts = p.parts[request];
    if (parts.count <= 1) continue;
    const PartRows rows(p, parts, row - static_cast<i64>(request) * p.R);
    float4 values[kAhead][kVectors];
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float* from = p.partial_out + rows.at(first + i) * kValueDim + column;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          values[i][j] = {0.0f, 0.0f, 0.0f, 0.0f};
          if (first + i < parts.count) {
            values[i][j] = *reinterpret_cast<const float4*>(from + 128 * j);
          }
        }
      }
    };
    load(0);
    const Weights<kMaxCtas> weights(p, rows, parts.count);
    float4 sum[kVectors] = {};
    for (int first = 0; first < parts.count; first += kAhead) {
      if (first != 0) load(first);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float weight = weights.of(first + i);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) add_scaled(sum[j], weight, values[i][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) store_row<Element>(p, row, column + 128 * j, sum[j]);
    if (column == 0) p.lse[row] = weights.lse * kLn2;
  }
}

}  // namespace jax_ds::flash_mla
