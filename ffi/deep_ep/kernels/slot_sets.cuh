// Sets of slots as bits in shared memory, and the numbering of their members in slot order. Every
// CTA makes them for itself. G = ceil(B / 32) words a set.
#pragma once

#include "deep_ep/kernels/low_latency_params.h"
#include "deep_ep/kernels/records.cuh"
#include "kernels/warp.cuh"

namespace jax_ds::deep_ep {

struct SlotSets {
  u32* const bits;    // [sets, G]
  u32* const before;  // [sets, G] members in earlier groups
  u16* const list;    // [B] the members of the last set, in order
  const int sets, slots, groups;

  // Uses slot_sets_bytes(sets, slots) of dynamic shared memory.
  JAX_DS_DEVICE SlotSets(u32* shared, int sets, int slots)
      : bits(shared),
        before(shared + sets * ((slots + 31) / 32)),
        list(reinterpret_cast<u16*>(shared + 2 * sets * ((slots + 31) / 32))),
        sets(sets),
        slots(slots),
        groups((slots + 31) / 32) {}

  JAX_DS_DEVICE int at(int set, int slot) const { return set * groups + slot / 32; }

  // The number of members before `slot`.
  JAX_DS_DEVICE int number(int set, int slot) const {
    const u32 lower = (1u << slot % 32) - 1;
    return before[at(set, slot)] + __popc(bits[at(set, slot)] & lower);
  }

  JAX_DS_DEVICE bool holds(int set, int slot) const { return bits[at(set, slot)] >> slot % 32 & 1; }

  JAX_DS_DEVICE int count(int set) const {
    const int last = set * groups + groups - 1;
    return before[last] + __popc(bits[last]);
  }

  // All threads.
  JAX_DS_DEVICE void clear() const {
    for (int i = threadIdx.x; i < sets * groups; i += kThreads) bits[i] = 0;
    __syncthreads();
  }

  JAX_DS_DEVICE void insert(int set, int slot) const {
    atomicOr(bits + at(set, slot), 1u << slot % 32);
  }

  // All threads, after each has put in its slots. Afterwards everything can be read.
  JAX_DS_DEVICE void finish() const {
    __syncthreads();
    for (int set = warp_id(); set < sets; set += kThreads / 32) number_members(set);
    __syncthreads();
    const int last = sets - 1;
    for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
      if (holds(last, slot)) list[number(last, slot)] = static_cast<u16>(slot);
    }
    __syncthreads();
  }

 private:
  // One warp: running sums, 32 groups at a time.
  JAX_DS_DEVICE void number_members(int set) const {
    const int lane = lane_id();
    u32 total = 0;
    for (int base = 0; base < groups; base += 32) {
      const int g = base + lane;
      const u32 mine = g < groups ? __popc(bits[set * groups + g]) : 0;
      const u32 sum = warp_inclusive_sum(mine);
      if (g < groups) before[set * groups + g] = total + sum - mine;
      total += __shfl_sync(kAllLanes, sum, 31);
    }
  }
};

}  // namespace jax_ds::deep_ep
