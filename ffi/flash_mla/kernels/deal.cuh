// Dealing requests of uneven lengths out whole, so that none is split.
#pragma once

#include "flash_mla/kernels/schedule.cuh"

namespace jax_ds::flash_mla {

// All threads, after make_schedule() and a barrier: sorts the requests by length and deals them to
// the groups to and fro, if that is even enough. Every CTA comes to the same result. `scratch`:
// 2 * kMaxSorted words of shared memory, which TMA may write afterwards.
template <typename Config>
JAX_DS_DEVICE void deal_requests(const DecodeParams& p, Schedule& schedule, int group,
                                 int* scratch) {
  const int per_group = schedule.deal;
  if (per_group == 0) return;
  int* keys = scratch;                // blocks * kMaxSorted + request: no two are equal
  int* order = scratch + kMaxSorted;  // requests by falling key
  const int threads = blockDim.x, padded = (p.B + 3) / 4 * 4;
  for (int b = threadIdx.x; b < padded; b += threads) {
    keys[b] = b < p.B ? min(blocks_of(length_of(p, b)), (1 << 22) - 1) * kMaxSorted + b : -1;
  }
  __syncthreads();
  for (int b = threadIdx.x; b < p.B; b += threads) {
    const int key = keys[b];
    int longer = 0;
#pragma unroll 4
    for (int i = 0; i < padded; i += 4) {
      const int4 other = *reinterpret_cast<const int4*>(keys + i);
      longer += (other.x > key) + (other.y > key) + (other.z > key) + (other.w > key);
    }
    order[longer] = b;
  }
  __syncthreads();
  const auto rank = [&](int g, int i) {
    return i * p.num_groups + (i % 2 == 0 ? g : p.num_groups - 1 - g);
  };
  bool uneven = false;
  for (int g = threadIdx.x; g < p.num_groups; g += threads) {
    int sum = 0;
    for (int i = 0; i < per_group; ++i) {
      if (rank(g, i) < p.B) sum += Config::kOverhead + keys[order[rank(g, i)]] / kMaxSorted;
    }
    uneven |= sum > schedule.limit;
  }
  fence_proxy_async_shared();  // TMA writes there next
  if (__syncthreads_or(uneven)) return;
  if (threadIdx.x == 0) {
    int count = 0;
    for (int i = 0; i < per_group; ++i) {
      if (rank(group, i) < p.B) schedule.requests[count++] = order[rank(group, i)];
    }
    schedule.requests[count] = 0;
    schedule.begin = {0, 0};
    schedule.end = {count, 0};
    schedule.dealt = true;
  }
  __syncthreads();
}

}  // namespace jax_ds::flash_mla
