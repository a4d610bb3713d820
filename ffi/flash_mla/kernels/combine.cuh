// Puts the parts of split requests together: out = sum_i 2^(lse_i - lse) out_i.
//
// What counts here is latency: little code, as it has to be fetched first, and loads that do not
// wait for each other.
#pragma once

#include "flash_mla/kernels/softmax.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

// How a request was shared out. The decode kernel has written it before it let this one start; what
// else it writes is there after griddepcontrol.wait.
JAX_DS_DEVICE Parts parts_of(const CombineParams& p, u32 request) {
  const int2 parts = ld_relaxed_gpu_v2_s32(p.parts + request);
  return {parts.x, parts.y};
}

// Row r of a request: where its part `i` lies. The workspace has less than 2^31 elements.
struct PartRows {
  int step;  // rows of the workspace from slot to slot
  int base;

  // r = row_group * tile_rows + row of the tile.
  JAX_DS_DEVICE PartRows(const CombineParams& p, const Parts& parts, u32 r)
      : step(p.row_groups * p.tile_rows), base(2 * parts.first_group * step + r) {}

  JAX_DS_DEVICE int at(int part) const { return base + step * (part == 0 ? 1 : 2 * part); }
};

// Weights 2^(lse_i - lse) of the parts: lane l of a warp holds those of parts l, l + 32, ..., and 0
// from the last part on.
template <int kParts>
struct Weights {
  static constexpr int kRegisters = (kParts + 31) / 32;
  float weight[kRegisters];
  float lse;  // base 2

  // Only loads; normalize() waits for them.
  JAX_DS_DEVICE Weights(const CombineParams& p, const PartRows& rows, int parts) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      const int part = 32 * i + lane_id();
      weight[i] = part < parts ? p.partial_lse[rows.at(part)] : -kInfinity;
    }
  }

  JAX_DS_DEVICE void normalize() {
    float largest = -kInfinity;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) largest = fmaxf(largest, weight[i]);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    }
    const float zero = finite_reference(largest);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      weight[i] = ex2(weight[i] - zero);
      sum += weight[i];
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    lse = largest + lg2(sum);
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) weight[i] *= scale;
  }

  // The register with the weight of this part, in lane part % 32.
  JAX_DS_DEVICE float around(int part) const {
    float w = 0.0f;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) w = part / 32 == i ? weight[i] : w;
    return w;
  }
};

template <typename Element>
JAX_DS_DEVICE void store_row(const CombineParams& p, u32 row, int column, float4 value) {
  const uint2 packed = {wgmma::pack(Element{}, value.x, value.y),
                        wgmma::pack(Element{}, value.z, value.w)};
  *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + static_cast<i64>(row) * kValueDim + column) =
      packed;
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
  const u32 row = blockIdx.x / 4;
  const int column = 128 * (blockIdx.x % 4) + 4 * lane_id();
  griddepcontrol_launch_dependents();
  const u32 request = row / p.R;
  const Parts parts = parts_of(p, request);
  griddepcontrol_wait();
  if (parts.count <= 1) return;
  const PartRows rows(p, parts, row - request * p.R);
  Weights<kParts> weights(p, rows, parts.count);
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
  weights.normalize();
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
  static_assert(32 % kAhead == 0);
  griddepcontrol_launch_dependents();
  if constexpr (kPieces == 1) {
    // Where there are many rows, often no request is split: found out at once, not row by row.
    bool split = false;
    for (u32 b = threadIdx.x; b < p.B; b += kCombineThreads) split |= parts_of(p, b).count > 1;
    split = __syncthreads_or(split);
    griddepcontrol_wait();
    if (!split) return;
  }
  const u32 pieces = p.B * p.R * kPieces;
  for (u32 piece = blockIdx.x * kWarps + threadIdx.x / 32; piece < pieces;
       piece += gridDim.x * kWarps) {
    const u32 row = piece / kPieces;
    const int column = piece % kPieces * (kValueDim / kPieces) + 4 * lane_id();
    const u32 request = row / p.R;
    const Parts parts = parts_of(p, request);
    if (kPieces != 1) griddepcontrol_wait();
    if (parts.count <= 1) continue;
    const PartRows rows(p, parts, row - request * p.R);
    Weights<kMaxCtas> weights(p, rows, parts.count);
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
    weights.normalize();
    float4 sum[kVectors] = {};
    for (int first = 0; first < parts.count; first += kAhead) {
      if (first != 0) load(first);
      const float around = weights.around(first);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float weight = __shfl_sync(0xffffffffu, around, (first + i) % 32);
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
