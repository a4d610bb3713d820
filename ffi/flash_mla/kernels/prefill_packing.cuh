// Writes a packed batch's lists (prefill_packing.h) where its offsets are: on the device. Block
// (0, side) cuts that side into tiles and sorts them, the longest first; the others write what each
// row sees.
#pragma once

#include "flash_mla/kernels/prefill_packing.h"
#include "kernels/warp.cuh"

namespace jax_ds::flash_mla {

struct PackStorage {
  int warps[32];
  int places[kPackThreads];  // of tiles by length, then where the next of that length goes
};

// Inclusive scan over the block of `operation`, associative.
template <typename Operation>
JAX_DS_DEVICE int block_scan(int value, int* warps, Operation operation) {
  const u32 lane = lane_id(), warp = threadIdx.x / 32;
  value = warp_inclusive_scan(value, operation);
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  for (u32 w = warp; w-- > 0;) value = operation(warps[w], value);
  __syncthreads();
  return value;
}

struct PackSide {
  const PackParams& p;
  bool keys;

  JAX_DS_DEVICE const PackedSide& held() const { return keys ? p.keys : p.queries; }
  JAX_DS_DEVICE const PackedSide& other() const { return keys ? p.queries : p.keys; }
  JAX_DS_DEVICE int* lists() const {
    return p.lists + (keys ? PackedLayout(p.queries.rows).words : 0);
  }
  JAX_DS_DEVICE PackedInterval sees(int row) const {
    return keys ? packed_queries(p.queries, p.keys, p.causal, row)
                : packed_keys(p.queries, p.keys, p.causal, row);
  }
};

// Where tiles begin, in order; returns how many there are.
JAX_DS_DEVICE int pack_starts(const PackSide& side, int* starts, PackStorage& s) {
  const PackedSide& held = side.held();
  const int parts = packed_parts(held), most = packed_max_tiles(held.rows);
  const auto later = [](int a, int b) { return max(a, b); };
  const auto sum = [](int a, int b) { return a + b; };
  __shared__ int anchor_before, tiles_before;
  if (threadIdx.x == 0) anchor_before = tiles_before = 0;
  __syncthreads();
  for (int base = 0; base < parts; base += kPackThreads) {
    const int part = base + threadIdx.x;
    const int begin = packed_begin(held, part), end = packed_begin(held, part + 1);
    const bool anchored = part < parts && packed_anchor(held, part);
    const int anchor = max(anchor_before, block_scan(anchored ? begin : 0, s.warps, later));
    // Tiles begin at the anchor and every 128 rows from there: these of them inside the part.
    const int step = (max(0, begin - anchor) + kHeldRows - 1) / kHeldRows;
    const int steps = (max(0, end - anchor) + kHeldRows - 1) / kHeldRows;
    const int count = part < parts ? max(0, steps - step) : 0;
    const int through = tiles_before + block_scan(count, s.warps, sum);
    for (int i = 0; i < count; ++i) {
      const int at = through - count + i;
      if (at < most) starts[at] = anchor + (step + i) * kHeldRows;
    }
    __syncthreads();
    if (threadIdx.x == kPackThreads - 1) anchor_before = anchor, tiles_before = through;
    __syncthreads();
  }
  return min(tiles_before, most);
}

JAX_DS_DEVICE void pack_tiles(const PackSide& side, PackStorage& s) {
  const PackedLayout layout(side.held().rows);
  int* lists = side.lists();
  int* starts = lists + layout.starts;
  const int tiles = pack_starts(side, starts, s);
  const auto tile = [&](int i) {
    const int row = starts[i];
    const int next = i + 1 < tiles ? starts[i + 1] : side.held().rows;
    const int end = max(row + 1, min(next, row + kHeldRows));
    const int first = side.sees(row).first;
    return int4{row, end, first, max(first, side.sees(end - 1).last)};
  };
  // Longest first: counted by length in steps of 64, where the few longer ones are alike.
  const auto bin = [](const int4& t) {
    return kPackThreads - 1 - min((t.w - t.z + 63) / 64, kPackThreads - 1);
  };
  s.places[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < tiles; i += kPackThreads) atomicAdd(&s.places[bin(tile(i))], 1);
  __syncthreads();
  const int own = s.places[threadIdx.x];
  const int through = block_scan(own, s.warps, [](int a, int b) { return a + b; });
  s.places[threadIdx.x] = through - own;
  __syncthreads();
  for (int i = threadIdx.x; i < tiles; i += kPackThreads) {
    const int4 t = tile(i);
    reinterpret_cast<int4*>(lists + layout.tiles)[atomicAdd(&s.places[bin(t)], 1)] = t;
  }
  if (threadIdx.x == 0) {
    lists[kPackedTiles] = tiles;
    lists[kPackedCounter] = 0;
    lists[kPackedOthersEnd] = packed_begin(side.other(), side.other().sequences + 1);
  }
}

__global__ void __launch_bounds__(kPackThreads) PrefillPack(const __grid_constant__ PackParams p) {
  __shared__ PackStorage storage;
  const PackSide side{p, blockIdx.y == 1};
  griddepcontrol_wait();
  if (blockIdx.x == 0) {
    pack_tiles(side, storage);
    return;
  }
  const int row = (blockIdx.x - 1) * kPackThreads + threadIdx.x;
  if (row >= side.held().rows) return;
  const PackedInterval sees = side.sees(row);
  int* intervals = side.lists() + PackedLayout(side.held().rows).intervals;
  reinterpret_cast<int2*>(intervals)[row] = {sees.first, sees.last};
}

}  // namespace jax_ds::flash_mla
