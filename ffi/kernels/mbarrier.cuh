// mbarrier objects in shared memory. A phase completes when the expected arrivals and bytes have
// come; waiting takes the parity of the phase waited for. A fresh barrier's phase 0 is incomplete
// and the phase "before" it (parity 1) counts as complete, so the first wait of a producer on an
// empty slot passes with parity 1.
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds {

JAX_DS_DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

JAX_DS_DEVICE void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives on the barrier at the same place in CTA `rank` of the cluster. It orders only what a CTA
// can see: enough to say that one has finished reading. Data sent to another CTA counts itself, by
// st_async or TMA.
JAX_DS_DEVICE void mbarrier_arrive_cluster(u64* barrier, u32 rank) {
  asm volatile(
      "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapa(shared_address(barrier), rank))
      : "memory");
}

// Arrives and adds `bytes` to what the phase waits for.
JAX_DS_DEVICE void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// True if the phase of this parity is complete; does not wait.
JAX_DS_DEVICE bool mbarrier_test_wait(u64* barrier, u32 parity) {
  u32 complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

// Suspends the thread for a while; true once the phase of this parity is complete.
JAX_DS_DEVICE bool mbarrier_try_wait(u64* barrier, u32 parity) {
  u32 complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

JAX_DS_DEVICE void mbarrier_wait(u64* barrier, u32 parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace jax_ds
