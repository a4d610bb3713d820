// The first kernel of prefill's gradient: what the other two need of each query, read once and
// turned from [token, head] to [head, token].
#pragma once

#include "flash_mla/kernels/prefill_backward_config.h"
#include "flash_mla/kernels/prefill_common.cuh"

namespace jax_ds::flash_mla {

// The dot product of eight pairs of bf16.
JAX_DS_DEVICE float dot_bf16(uint4 a, uint4 b) {
  const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(x[i] << 16), __uint_as_float(y[i] << 16), sum);
    sum = fmaf(__uint_as_float(x[i] & 0xffff0000u), __uint_as_float(y[i] & 0xffff0000u), sum);
  }
  return sum;
}

// A CTA takes 32 tokens of 16 heads: 16 heads of a token lie together, and 32 tokens of a result.
template <int kVDim>
__global__ void __launch_bounds__(kDeltaThreads)
    PrefillDelta(const __grid_constant__ PrefillDeltaParams p) {
  constexpr int kLanes = kVDim / 8;  // of a row, 16 bytes each
  constexpr int kRows = kDeltaThreads / kLanes, kPasses = kDeltaTokens * kDeltaHeads / kRows;
  __shared__ float delta[kDeltaHeads][kDeltaTokens + 1], lse[kDeltaHeads][kDeltaTokens + 1];
  const int head_tiles = (p.heads + kDeltaHeads - 1) / kDeltaHeads;
  const int token_tiles = (p.queries + kDeltaTokens - 1) / kDeltaTokens;
  const int first_head = blockIdx.x % head_tiles * kDeltaHeads;
  const int first_token = blockIdx.x / head_tiles % token_tiles * kDeltaTokens;
  const int batch = blockIdx.x / head_tiles / token_tiles;
  // Row r of the tile: head r % 16 of token r / 16. Outside the array, the tile's first.
  const auto inside = [&](int r) {
    return first_head + r % kDeltaHeads < p.heads && first_token + r / kDeltaHeads < p.queries;
  };
  const auto place = [&](int r) {
    const int row = inside(r) ? r : 0;
    const i64 token = static_cast<i64>(batch) * p.queries + first_token + row / kDeltaHeads;
    return token * p.heads + first_head + row % kDeltaHeads;
  };
  griddepcontrol_wait();
  if (blockIdx.x == 0 && threadIdx.x < 2) p.counters[threadIdx.x] = 0;

  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
#pragma unroll 8
  for (int pass = 0; pass < kPasses; ++pass) {
    const int r = pass * kRows + row;
    const i64 at = place(r) * kLanes + lane;
    float sum =
        dot_bf16(static_cast<const uint4*>(p.out)[at], static_cast<const uint4*>(p.dout)[at]);
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (lane == 0) delta[r % kDeltaHeads][r / kDeltaHeads] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = threadIdx.x; r < kDeltaTokens * kDeltaHeads; r += kDeltaThreads) {
    float& d = delta[r % kDeltaHeads][r / kDeltaHeads];
    const float natural = p.lse[place(r)];
    // A query that sees no key: probabilities of zero, and no NaN of its cotangents may meet them.
    const bool blind = natural == -kInfinity;
    lse[r % kDeltaHeads][r / kDeltaHeads] = blind ? kInfinity : natural * kLog2e;
    d = blind ? 0.0f : d - p.dlse[place(r)];
  }
  __syncthreads();
  const int stride = QueryStatisticsStride(p.queries);
#pragma unroll
  for (int i = threadIdx.x; i < kDeltaTokens * kDeltaHeads; i += kDeltaThreads) {
    const int head = i / kDeltaTokens, token = i % kDeltaTokens;
    if (first_head + head >= p.heads || first_token + token >= p.queries) continue;
    const i64 pair = static_cast<i64>(batch) * p.heads + first_head + head;
    float* out = p.statistics + pair * 2 * stride + first_token + token;
    out[0] = lse[head][token];
    out[stride] = delta[head][token];
  }
}

}  // namespace jax_ds::flash_mla
