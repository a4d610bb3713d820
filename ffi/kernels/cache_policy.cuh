// What L2 keeps: operands of loads and stores with a cache hint.
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds {

// As createpolicy.fractional would make them, for all of an access.
enum CachePolicy : u64 {
  kEvictNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12F0000000000000ull,
  kEvictLast = 0x14F0000000000000ull,
};

}  // namespace jax_ds
