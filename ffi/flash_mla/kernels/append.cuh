// Writes the S newest tokens of every request into its pages.
#pragma once

#include "flash_mla/kernels/params.h"
#include "kernels/ptx.cuh"

namespace jax_ds::flash_mla {

// A CTA a token. Tokens before the sequence's start (seq_lens < S) and beyond its table are
// dropped.
__global__ __launch_bounds__(kAppendThreads) void append(const __grid_constant__ AppendParams p) {
  constexpr int kPieces = kKeyDim * 2 / 16;
  const int b = blockIdx.x / p.S;
  const int position = p.seq_lens[b] - p.S + static_cast<int>(blockIdx.x) % p.S;
  if (position < 0 || position >= p.N * p.page_size) return;
  const int page = p.page_table[static_cast<i64>(b) * p.N + position / p.page_size];
  if (page < 0 || page >= p.P) return;
  const i64 row = static_cast<i64>(page) * p.page_size + position % p.page_size;
  const int i = threadIdx.x;
  if (i < kPieces) {
    static_cast<uint4*>(p.pages)[row * kPieces + i] =
        static_cast<const uint4*>(p.kv)[static_cast<i64>(blockIdx.x) * kPieces + i];
  }
}

}  // namespace jax_ds::flash_mla
