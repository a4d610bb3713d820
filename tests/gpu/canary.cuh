// A kernel with the faults that the sanitizer's tools look for: they must find them.
#pragma once

namespace jax_ds {

// Warps read what others may still be writing, and `out` holds fewer numbers than there are
// threads.
__global__ void canary(int* out) {
  __shared__ volatile int cells[64];
  cells[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = cells[63 - threadIdx.x];
}

}  // namespace jax_ds
