// The tensor memory accelerator: tiles between global and shared memory, one thread issuing.
// Coordinates count elements, the innermost dimension first; what lies outside the tensor reads as
// zero and is not stored.
#pragma once

#include "kernels/cache_policy.cuh"
#include "kernels/mbarrier.cuh"
#include "kernels/tensor_map.h"

namespace jax_ds {

JAX_DS_DEVICE void prefetch_tensormap(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- tiles into shared memory; completion counts bytes on `barrier` -----------------------------

JAX_DS_DEVICE void tma_load_2d(void* shared, const TensorMap* map, u64* barrier, int x, int y,
                               CachePolicy policy = kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

JAX_DS_DEVICE void tma_load_3d(void* shared, const TensorMap* map, u64* barrier, int x, int y,
                               int z, CachePolicy policy = kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

JAX_DS_DEVICE void tma_load_4d(void* shared, const TensorMap* map, u64* barrier, int x, int y,
                               int z, int w, CachePolicy policy = kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
      : "memory");
}

// The tile lands at the same offset, and the bytes are counted on the barrier at the same offset,
// in every CTA of the cluster whose bit is set in `mask`.
JAX_DS_DEVICE void tma_load_2d_multicast(void* shared, const TensorMap* map, u64* barrier, u16 mask,
                                         int x, int y, CachePolicy policy = kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%4, %5}], [%2], %3, %6;" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "h"(mask), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

// Brings a tile into L2 only.
JAX_DS_DEVICE void tma_prefetch_4d(const TensorMap* map, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// ---- tiles out of shared memory; completion through this thread's bulk groups ------------------
// Before: fence_proxy_async_shared() in each thread that wrote the tile, then a barrier.

JAX_DS_DEVICE void tma_store_3d(const TensorMap* map, const void* shared, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Adds the tile to global memory, element by element.
JAX_DS_DEVICE void tma_reduce_add_3d(const TensorMap* map, const void* shared, int x, int y,
                                     int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], "
      "[%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

JAX_DS_DEVICE void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most kPending groups of this thread still read shared memory (it may be reused).
template <int kPending>
JAX_DS_DEVICE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// At most kPending groups are incomplete; the writes of the others are done.
template <int kPending>
JAX_DS_DEVICE void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_ds
