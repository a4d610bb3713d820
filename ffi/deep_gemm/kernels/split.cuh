// Adding up what warpgroups of a CTA, and CTAs of a cluster, computed over their parts of K.
#pragma once

#include "deep_gemm/kernels/storage.cuh"

namespace jax_ds::deep_gemm {

// Adds the total of the second warpgroup that has these rows to that of the first. Both call it;
// the second is done with the tile then.
template <Config kConfig>
JAX_DS_DEVICE void join_parts(Storage<kConfig>& s, float (&total)[kConfig.block_n / 2], int group,
                              int part) {
  constexpr int kThreads = 128 * kConfig.row_groups();
  const u32 base = shared_address(&s.joined[threadIdx.x % kThreads]);
  const int written = 1 + group, read = 3 + group;
  if (part == 1) {
#pragma unroll
    for (int i = 0; i < kConfig.block_n / 8; ++i) {
      const float* v = total + 4 * i;
      st_shared_v4_f32(base + i * kThreads * 16, v[0], v[1], v[2], v[3]);
    }
    bar_arrive(written, 256);
    bar_sync(read, 256);  // or the next tile's total might overwrite this one's
  } else {
    bar_sync(written, 256);
#pragma unroll
    for (int i = 0; i < kConfig.block_n / 8; ++i) {
      const float4 v = ld_shared_v4_f32(base + i * kThreads * 16);
      total[4 * i] += v.x, total[4 * i + 1] += v.y;
      total[4 * i + 2] += v.z, total[4 * i + 3] += v.w;
    }
    bar_arrive(read, 256);
  }
}

// Adds the partial tiles of a cluster's splits in order: the CTA of split r gets the r-th part of
// every thread's registers, which is the r-th part of the tile's columns. `more`: tiles follow.
template <Config kConfig>
JAX_DS_DEVICE void reduce_splits(Storage<kConfig>& s, Pipeline<1>& buffer, const float* total,
                                 float* share, bool more) {
  constexpr int kSplit = kConfig.split;
  constexpr int kVectors = kConfig.block_n / 2 / kSplit / 4;  // of four floats, of one share
  constexpr int kThreads = 128 * kConfig.row_groups();
  const u32 rank = cluster_ctarank(), thread = threadIdx.x;
  const u32 self = rank / kConfig.multicast, column = rank % kConfig.multicast;

  if (thread == 0) buffer.commit((kSplit - 1) * kVectors * kThreads * 16);
  buffer.acquire();
#pragma unroll
  for (int to = 0; to < kSplit; ++to) {
    if (to == self) continue;
    const u32 place = self < to ? self : self - 1, peer = to * kConfig.multicast + column;
    const u32 base = mapa(shared_address(&s.reduce[place * kVectors * kThreads + thread]), peer);
    const u32 full = mapa(shared_address(buffer.full()), peer);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float* v = total + (to * kVectors + i) * 4;
      st_async_v4_f32(base + i * kThreads * 16, full, v[0], v[1], v[2], v[3]);
    }
  }

  buffer.wait();
#pragma unroll
  for (int from = 0; from < kSplit; ++from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float4 v;
      if (from == self) {
        // The index must be a constant for `total` to stay in registers.
        const float* own = total + (from * kVectors + i) * 4;
        v = float4{own[0], own[1], own[2], own[3]};
      } else {
        const u32 place = from < self ? from : from - 1;
        v = ld_shared_v4_f32(shared_address(&s.reduce[(place * kVectors + i) * kThreads + thread]));
      }
      share[4 * i + 0] = from == 0 ? v.x : share[4 * i + 0] + v.x;
      share[4 * i + 1] = from == 0 ? v.y : share[4 * i + 1] + v.y;
      share[4 * i + 2] = from == 0 ? v.z : share[4 * i + 2] + v.z;
      share[4 * i + 3] = from == 0 ? v.w : share[4 * i + 3] + v.w;
    }
  }
  __syncwarp();
  // After the last tile nobody waits for it, and the other CTA may be gone.
  if (more && lane_id() < kSplit && lane_id() != self) {
    mbarrier_arrive_cluster(buffer.empty(), lane_id() * kConfig.multicast + column);
  }
  buffer.advance();
}

}  // namespace jax_ds::deep_gemm
