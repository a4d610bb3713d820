// Which rows a block of 128 tokens holds, where every group starts at a multiple of 128 tokens.
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds::quantization {

struct TokenBlock {
  int first_row;
  int rows;         // 0: padding after the last group
  int used_blocks;  // before that padding
};

// Rows and blocks of 128 tokens of some groups; both saturate, so that sums cannot overflow.
struct Extent {
  u32 rows, blocks;

  JAX_DS_DEVICE Extent plus(Extent other, u32 most_rows) const {
    return {min(rows + other.rows, most_rows), min(blocks + other.blocks, 1u << 30)};
  }
  JAX_DS_DEVICE Extent from_lane_before(int distance) const {
    return {__shfl_up_sync(0xffffffffu, rows, distance),
            __shfl_up_sync(0xffffffffu, blocks, distance)};
  }
};

// The whole warp calls it; each lane looks at a stretch of consecutive groups. Negative sizes count
// as zero; rows are handed out in order until the m rows run out.
JAX_DS_DEVICE TokenBlock find_rows(const int* group_sizes, int num_groups, int m, int token_block) {
  const u32 most_rows = static_cast<u32>(m), block = static_cast<u32>(token_block);
  const int lane = threadIdx.x % 32, stretch = (num_groups + 31) / 32;
  const int first = min(lane * stretch, num_groups), end = min(first + stretch, num_groups);
  auto extent_of = [=](int group) -> Extent {
    const u32 rows = min(static_cast<u32>(max(__ldg(group_sizes + group), 0)), most_rows);
    return {rows, (rows + 127) / 128};
  };
  Extent after = {0, 0};  // of all groups up to this lane's last
#pragma unroll 1
  for (int group = first; group < end; ++group) after = after.plus(extent_of(group), most_rows);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Extent other = after.from_lane_before(distance);
    if (lane >= distance) after = after.plus(other, most_rows);
  }
  Extent before = after.from_lane_before(1);
  if (lane == 0) before = {0, 0};
  const int used_blocks = __shfl_sync(0xffffffffu, after.blocks, 31);
  // In the lane whose groups hold the block.
  TokenBlock found = {0, 0, used_blocks};
  if (before.blocks <= block && block < after.blocks) {
#pragma unroll 1
    for (int group = first; group < end; ++group) {
      const Extent extent = extent_of(group), next = before.plus(extent, most_rows);
      const u32 row = before.rows + (block - before.blocks) * 128;
      if (block < next.blocks) {
        // Groups past the last row hold blocks without rows.
        if (row < next.rows) {
          found.first_row = static_cast<int>(row);
          found.rows = static_cast<int>(min(next.rows - row, 128u));
        }
        break;
      }
      before = next;
    }
  }
  const u32 finder = __ballot_sync(0xffffffffu, found.rows > 0);
  if (finder == 0) return found;
  const int owner = __ffs(finder) - 1;
  return {__shfl_sync(0xffffffffu, found.first_row, owner),
          __shfl_sync(0xffffffffu, found.rows, owner), used_blocks};
}

}  // namespace jax_ds::quantization
