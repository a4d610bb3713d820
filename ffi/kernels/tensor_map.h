// The 128 bytes of a TMA descriptor, for kernels and for the host code that encodes it: cuda.h does
// not compile under NVRTC.
#pragma once

namespace jax_ds {

// CUtensorMap of the driver API. A kernel takes it as `const __grid_constant__ TensorMap`, or as a
// member of its one such parameter.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};
static_assert(sizeof(TensorMap) == 128, "the driver writes 128 bytes");

}  // namespace jax_ds
