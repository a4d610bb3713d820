// Decode for many query rows: bound by the tensor cores. wide_config.cuh has the plan.
#pragma once

#include "flash_mla/kernels/deal.cuh"
#include "flash_mla/kernels/wide_output.cuh"
#include "flash_mla/kernels/wide_scores.cuh"

namespace jax_ds::flash_mla {

// Every thread that has written or read arrives itself: as fast as one lane for its warp after
// __syncwarp(), which racecheck does not follow.
template <typename Config>
JAX_DS_DEVICE void init_barriers(const DecodeParams& p, WideShared<Config>& shared) {
  prefetch_tensormap(&p.kv_map);
  prefetch_tensormap(&p.rope_map);
  prefetch_tensormap(&p.q_map);
  constexpr u32 kReleases = 256;  // the output's threads
  for (int i = 0; i < Config::kStages; ++i) {
    mbarrier_init(&shared.values_full[i], 1);
    mbarrier_init(&shared.values_empty[i], kReleases);
  }
  for (int i = 0; i < Config::kRopeSlots; ++i) {
    mbarrier_init(&shared.rope_full[i], 1);
    mbarrier_init(&shared.rope_empty[i], kReleases);
    mbarrier_init(&shared.go[i], 128);
  }
  for (int i = 0; i < Config::kAnnouncements; ++i) mbarrier_init(&shared.announced[i], 1);
  mbarrier_init(&shared.q_empty, 128);
  fence_mbarrier_init();
}

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             1) void decode_wide(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) u8 bytes[];
  static_assert(sizeof(WideShared<Config>) <= kWideSharedBytes);
  auto& shared = *reinterpret_cast<WideShared<Config>*>(bytes);
  const u32 warp = warp_id();
  if (warp == 3) prefetch_start(p, blockIdx.x / p.row_groups);
  if (warp == 2 && elect_one()) init_barriers<Config>(p, shared);
  griddepcontrol_wait();
  if (warp < 2) {
    const Place place = place_of<Config>(p);
    make_schedule<Config>(p, shared.schedule, place.group, warp);
    if (threadIdx.x == 0) shared.place = place;
  }
  __syncthreads();
  deal_requests<Config>(p, shared.schedule, shared.place.group,
                        reinterpret_cast<int*>(shared.values));
  if (warp < 4) {
    setmaxnreg_dec<Config::kProducerRegisters>();
    if (warp == 0) Producer<Config>{p, shared}.run();
    if (warp == 1) write_empty<Config>(p, shared);
  } else if (warp < 8) {
    setmaxnreg_inc<Config::kScoresRegisters>();
    WideScores<Config>{p, shared}.run();
  } else {
    setmaxnreg_inc<Config::kOutputRegisters>();
    WideOutput<Config>{p, shared, static_cast<int>(warp / 4 - 2)}.run();
  }
}

}  // namespace jax_ds::flash_mla
