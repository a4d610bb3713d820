// A ring of shared-memory slots between one producer and its consumers: slot i is filled when
// full[i] completes and free again when empty[i] does.
#pragma once

#include "kernels/mbarrier.cuh"

namespace jax_ds {

// Lives in shared memory.
template <int kStages>
struct PipelineBarriers {
  u64 full[kStages];
  u64 empty[kStages];

  // One thread; afterwards fence_mbarrier_init() and a CTA (or cluster) barrier.
  // `filling` arrivals complete a fill (beside the bytes announced), `emptying` free a slot.
  JAX_DS_DEVICE void init(u32 filling, u32 emptying) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], filling);
      mbarrier_init(&empty[i], emptying);
    }
  }
};

// One side's position in the ring; each thread of a side keeps its own and advances it alike.
template <int kStages>
struct PipelineState {
  u32 slot = 0;
  u32 phase = 0;

  JAX_DS_DEVICE void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Producer: acquire, fill (TMA counts its bytes on full()), and let the bytes commit the slot.
// Consumer: wait, read, release.
template <int kStages>
struct Pipeline {
  PipelineBarriers<kStages>& barriers;
  PipelineState<kStages> state;

  JAX_DS_DEVICE explicit Pipeline(PipelineBarriers<kStages>& b) : barriers(b) {}

  JAX_DS_DEVICE u32 slot() const { return state.slot; }
  JAX_DS_DEVICE u64* full() const { return &barriers.full[state.slot]; }
  JAX_DS_DEVICE u64* empty() const { return &barriers.empty[state.slot]; }

  // Waits until the slot is free. A fresh ring is free.
  JAX_DS_DEVICE void acquire() const { mbarrier_wait(empty(), state.phase ^ 1); }
  // Arrives, announcing the bytes that are to come.
  JAX_DS_DEVICE void commit(u32 bytes) const { mbarrier_arrive_expect_tx(full(), bytes); }
  JAX_DS_DEVICE void wait() const { mbarrier_wait(full(), state.phase); }
  JAX_DS_DEVICE void release() const { mbarrier_arrive(empty()); }
  JAX_DS_DEVICE void advance() { state.advance(); }
};

}  // namespace jax_ds
