// What both decode kernels need: the online softmax in base 2, page look-up, bookkeeping of parts.
#pragma once

#include "flash_mla/kernels/schedule.cuh"
#include "kernels/constants.h"

namespace jax_ds::flash_mla {

// The reference point follows the maximum only once it lags by more than this (base 2):
// probabilities then stay below 2^8, which costs no precision, and the output is seldom rescaled.
inline constexpr float kLag = 8.0f;

// Named barrier of the warpgroup of scores and softmax; __syncthreads has 0.
inline constexpr u32 kScoresBarrier = 1;

JAX_DS_DEVICE void sync_scores() { bar_sync(kScoresBarrier, 128); }

JAX_DS_DEVICE float power_of_two(u32 negative) { return __int_as_float((127 - negative) << 23); }

// Moves `reference` up, to a whole number, if `largest` has left it behind. What was summed before
// is then to be scaled by 2^-(returned value): exactly, and a byte tells others how much.
JAX_DS_DEVICE u32 move_reference(float& reference, float largest) {
  if (!(largest > reference + kLag)) return 0;
  const float next = ceilf(largest);
  // Where 126 is too little, what was summed before is lost in the rounding anyway.
  const u32 shift = static_cast<u32>(fminf(next - reference, 126.0f));
  reference = next;
  return shift;
}

// A row that has seen nothing yet: -inf - -inf must not arise.
JAX_DS_DEVICE float finite_reference(float reference) {
  return reference == -kInfinity ? 0.0f : reference;
}

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows, 128-byte swizzle.
JAX_DS_DEVICE u32 swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Where the boxes of an item begin, as rows of the cache seen as [P * page_size, 576]. A warp reads
// 32 entries of the page table at a time and the next 32 ahead of their use. Only entries of pages
// that hold tokens are read; a box without any starts at row 0, which exists.
struct PageRows {
  const DecodeParams& p;
  const int* table;
  int base;           // a multiple of a block's boxes
  int end;            // tokens
  int current, next;  // rows of boxes base + lane and base + 32 + lane

  JAX_DS_DEVICE PageRows(const DecodeParams& params, const Item& item)
      : p(params),
        table(params.page_table + static_cast<i64>(item.request) * params.N),
        base(item.first * (kBlock / params.box_tokens)),
        end(min(item.last * kBlock, item.length)) {
    current = fetch(base + lane_id());
    next = fetch(base + 32 + lane_id());
  }

  JAX_DS_DEVICE int fetch(int box) const {
    const int token = box * p.box_tokens;
    if (token >= end) return 0;
    // Unsigned: a division of few registers, of which the wide kernel's producer has 24.
    const u32 page = static_cast<u32>(token) / static_cast<u32>(p.page_size);
    return __ldg(table + page) * p.page_size + (token - static_cast<int>(page) * p.page_size);
  }

  // To be called block after block by a whole warp; then row() knows the boxes of the block and at
  // least 32 more.
  JAX_DS_DEVICE void advance(int block) {
    if (block * (kBlock / p.box_tokens) - base < 32) return;
    base += 32;
    current = next;
    next = fetch(base + 32 + lane_id());
  }

  JAX_DS_DEVICE int row(int box) const {
    const int lane = box - base;
    return __shfl_sync(0xffffffffu, lane < 32 ? current : next, lane % 32);
  }
};

// One warp: tells the combining kernel how the requests that start in this group were shared out,
// and lets it start. That one starts when all CTAs have been here, hence the fence: it reads this
// before its griddepcontrol.wait.
template <typename Config>
JAX_DS_DEVICE void announce_parts(const DecodeParams& p, const Schedule& schedule, int group) {
  if (lane_id() == 0) {
    Items<Config> items(p, schedule);
    for (Item item; items.next(item);) {
      if (item.first == 0) p.parts[item.request] = {group, item.split ? schedule.end_parts : 1};
    }
    __threadfence();
  }
  __syncwarp();
  griddepcontrol_launch_dependents();
}

// One warp, at once: what the schedule and the loads are about to wait for, to L2, at the place
// where it lies if all requests are of one length.
JAX_DS_DEVICE void prefetch_start(const DecodeParams& p, int group) {
  const u32 request = static_cast<u32>(group) * p.B / p.num_groups;
  const int* entries = p.page_table + static_cast<i64>(request) * p.N;
  const int entry = 32 * lane_id();
  if (entry < p.N) prefetch_l2(entries + entry);
  if (lane_id() * 32 < p.B) prefetch_l2(p.seq_lens + lane_id() * 32);
}

}  // namespace jax_ds::flash_mla
