// Low-latency combine, in one kernel or two: combine.cuh with few tokens. Slots with rows are
// listed first, so that all warps get the same work, and what a warp takes is a part of a token.
#pragma once

#include "deep_ep/kernels/combine.cuh"
#include "deep_ep/kernels/slot_sets.cuh"

namespace jax_ds::deep_ep {

// The slots that have rows here, as the only set.
JAX_DS_DEVICE void find_slots(const CombineParams& p, const SlotSets& held) {
  for (int g = warp_id(); g < held.groups; g += kThreads / 32) {
    const int slot = 32 * g + lane_id();
    int any = -1;  // negative: none; loads do not wait for each other
#pragma unroll 8
    for (int j = 0; slot < held.slots && j < p.columns; ++j) {
      any = max(any, p.row_of[slot * p.columns + j]);
    }
    const u32 word = __ballot_sync(kAllLanes, any >= 0);
    if (lane_id() == 0) held.bits[g] = word;
  }
  held.finish();
}

template <bool kBfloat16>
JAX_DS_DEVICE void push_slots(const CombineKernel<kBfloat16>& kernel, const SlotSets& held) {
  const int parts = num_parts(kernel.p.record.vectors);
  for_each_taken(
      &kernel.round.progress->taken[0], held.count(0) * parts,
      [&](int i) { return kernel.fetch(held.list[i / parts]); },
      [&](int i, const SlotInLanes& in_lanes) {
        const float weight = kernel.weight_of_column(in_lanes);
        kernel.push_part(held.list[i / parts], in_lanes, weight, i % parts);
      });
}

template <bool kBfloat16, Half kHalf>
__global__ void __launch_bounds__(kThreads, 1)
    low_latency_combine(const __grid_constant__ CombineParams p) {
  extern __shared__ u32 shared[];
  const comm::Round round =
      kHalf == Half::kFinish ? comm::Round(p.link, *p.ticket) : comm::Round::next(p.link);
  const CombineKernel<kBfloat16> kernel{p, round};
  bool alive = true;
  if constexpr (kHalf != Half::kFinish) {
    alive = round.begin(p.axis_index);
    if (alive) kernel.share_weights();
    // While weights are on their way.
    const SlotSets held(shared, 1, p.link.num_ranks * p.num_tokens);
    find_slots(p, held);
    alive = kernel.hear_weights(alive);
    if (alive) push_slots(kernel, held);
    round.send();
    if (kHalf == Half::kStart && blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = round.slot;
  }
  if constexpr (kHalf != Half::kStart) kernel.receive(alive);
}

}  // namespace jax_ds::deep_ep
