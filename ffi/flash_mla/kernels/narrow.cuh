// Decode for few query rows: bound by the bytes of the cache. narrow_config.cuh has the plan.
#pragma once

#include "flash_mla/kernels/narrow_output.cuh"
#include "flash_mla/kernels/narrow_producer.cuh"
#include "flash_mla/kernels/narrow_scores.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
JAX_DS_DEVICE void init_barriers(const DecodeParams& p, NarrowShared<Config>& shared) {
  prefetch_tensormap(&p.kv_map);
  prefetch_tensormap(&p.q_map);
  shared.ring.init(1, 128);  // emptied by the threads of the output
  for (u64& barrier : shared.p_full) mbarrier_init(&barrier, 128);
  mbarrier_init(&shared.q_full, 1);
  mbarrier_init(&shared.q_empty, 128);
  fence_mbarrier_init();
}

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             1) void decode_narrow(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) u8 bytes[];
  static_assert(sizeof(NarrowShared<Config>) <= NarrowSharedBytes(Config::kRows));
  auto& shared = *reinterpret_cast<NarrowShared<Config>*>(bytes);
  const u32 warp = warp_id();
  if (warp == 7) prefetch_start(p, blockIdx.x);
  if (warp == 8 && elect_one()) init_barriers(p, shared);
  griddepcontrol_wait();
  if (warp < 2) make_schedule<Config>(p, shared.schedule, blockIdx.x, warp);
  __syncthreads();
  if (warp == 8) {
    produce<Config>(p, shared);
  } else if (warp < 4) {
    NarrowScores<Config>{p, shared}.run();
  } else {
    if (warp == 4) announce_parts<Config>(p, shared.schedule, blockIdx.x);
    NarrowOutput<Config>{p, shared}.run();
  }
}

}  // namespace jax_ds::flash_mla
