// Which rows a block of 128 tokens holds, where every group starts at a multiple of 128 tokens.
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds::quantization {

struct TokenBlock {
  int first_row;
  int rows;  // 0: padding after the last group
};

constexpr int kScanWarps = 8;

struct GroupScratch {
  u32 warp_totals[kScanWarps];
  TokenBlock found;
};

// Inclusive scan of `value` over the CTA's 256 threads with the associative `op` (0 is neutral);
// `total` is the scan's last element.
template <class Op>
JAX_DS_DEVICE u32 block_scan(u32 value, Op op, GroupScratch& scratch, u32& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value = op(value, other);
  }
  if (lane == 31) scratch.warp_totals[warp] = value;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kScanWarps; ++w) {
    if (w == warp) value = op(value, total);
    total = op(total, scratch.warp_totals[w]);
  }
  __syncthreads();
  return value;
}

// All 256 threads call it. Negative sizes count as zero; rows are handed out in order until the m
// rows run out.
JAX_DS_DEVICE TokenBlock find_rows(const int* group_sizes, int num_groups, int m, int token_block,
                                   GroupScratch& scratch) {
  // Sums that saturate at m cannot overflow, and saturating addition is associative.
  auto add_rows = [m](u32 a, u32 b) { return min(a + b, static_cast<u32>(m)); };
  auto add = [](u32 a, u32 b) { return a + b; };
  const u32 token = static_cast<u32>(token_block) * 128;
  if (threadIdx.x == 0) scratch.found = {0, 0};
  u32 rows_before = 0, tokens_before = 0;  // of earlier chunks of groups
  for (int chunk = 0; chunk < num_groups; chunk += 256) {
    const int group = chunk + threadIdx.x;
    const int size = group < num_groups ? group_sizes[group] : 0;
    const u32 clipped = static_cast<u32>(min(max(size, 0), m));
    u32 chunk_rows, chunk_tokens;
    u32 end = add_rows(rows_before, block_scan(clipped, add_rows, scratch, chunk_rows));
    // The rows before this group: those of the thread before, by the same sums.
    u32 start = __shfl_up_sync(0xffffffffu, end, 1);
    if (threadIdx.x % 32 == 0) {
      start = rows_before;
      for (int w = 0; w < static_cast<int>(threadIdx.x) / 32; ++w) {
        start = add_rows(start, scratch.warp_totals[w]);
      }
    }
    // Everyone has read the totals of rows before those of tokens replace them.
    __syncthreads();
    const u32 padded = (end - start + 127) / 128 * 128;
    const u32 tokens_end = tokens_before + block_scan(padded, add, scratch, chunk_tokens);
    const u32 tokens_start = tokens_end - padded;
    if (tokens_start <= token && token < tokens_end) {
      const u32 row = start + (token - tokens_start);
      scratch.found = {static_cast<int>(row), static_cast<int>(min(end - row, 128u))};
    }
    rows_before = add_rows(rows_before, chunk_rows);
    tokens_before += chunk_tokens;
  }
  __syncthreads();
  return scratch.found;
}

}  // namespace jax_ds::quantization
