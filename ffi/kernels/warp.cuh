// Sums over the lanes of a warp.
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds {

// What the lanes up to this one hold, in order, joined by `operation` (associative).
template <typename T, typename Operation>
JAX_DS_DEVICE T warp_inclusive_scan(T value, Operation operation) {
#pragma unroll
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane_id() >= distance) value = operation(before, value);
  }
  return value;
}

template <typename T>
JAX_DS_DEVICE T warp_inclusive_sum(T value) {
  return warp_inclusive_scan(value, [](T a, T b) { return a + b; });
}

}  // namespace jax_ds
