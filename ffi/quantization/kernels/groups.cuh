// Which rows a block of 128 tokens holds, where every group starts at a multiple of 128 tokens.
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds::quantization {

struct TokenBlock {
  int first_row;
  int rows;  // 0: padding after the last group
};

// Sum of `value` over the lanes before this one, where `op` adds (0 is neutral).
template <class Op>
JAX_DS_DEVICE u32 sum_before(u32 value, Op op) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value = op(value, other);
  }
  value = __shfl_up_sync(0xffffffffu, value, 1);
  return lane == 0 ? 0 : value;
}

// The whole warp calls it; each lane looks at a stretch of consecutive groups. Negative sizes count
// as zero; rows are handed out in order until the m rows run out.
JAX_DS_DEVICE TokenBlock find_rows(const int* group_sizes, int num_groups, int m, int token_block) {
  const u32 limit = static_cast<u32>(m), token = static_cast<u32>(token_block) * 128;
  // Sums that saturate at m cannot overflow, and saturating addition is associative.
  auto add_rows = [limit](u32 a, u32 b) { return min(a + b, limit); };
  auto size_of = [=](int group) {
    return min(static_cast<u32>(max(__ldg(group_sizes + group), 0)), limit);
  };
  const int stretch = (num_groups + 31) / 32;
  const int first = min(static_cast<int>(threadIdx.x) % 32 * stretch, num_groups);
  const int end = min(first + stretch, num_groups);
  u32 rows = 0;
#pragma unroll 1
  for (int group = first; group < end; ++group) rows = add_rows(rows, size_of(group));
  const u32 first_row = sum_before(rows, add_rows);
  // Walks this lane's groups with a running (row, token).
  auto walk = [&](u32 tokens, auto visit) {
    u32 row = first_row;
#pragma unroll 1
    for (int group = first; group < end; ++group) {
      const u32 next = add_rows(row, size_of(group));
      visit(row, next, tokens);
      tokens += (next - row + 127) / 128 * 128;
      row = next;
    }
    return tokens;
  };
  const u32 tokens = walk(0, [](u32, u32, u32) {});
  TokenBlock found = {0, 0};
  walk(sum_before(tokens, [](u32 a, u32 b) { return a + b; }), [&](u32 row, u32 next, u32 start) {
    // An empty group holds no token; of the others one at most starts before `token` and ends
    // after.
    if (start <= token && token - start < next - row) {
      const u32 at = row + (token - start);
      found = {static_cast<int>(at), static_cast<int>(min(next - at, 128u))};
    }
  });
  const u32 finder = __ballot_sync(0xffffffffu, found.rows > 0);
  if (finder == 0) return found;
  const int lane = __ffs(finder) - 1;
  return {__shfl_sync(0xffffffffu, found.first_row, lane),
          __shfl_sync(0xffffffffu, found.rows, lane)};
}

}  // namespace jax_ds::quantization
