// Numbers that kernels and the host code that fills in their parameters share.
#pragma once

namespace jax_ds {

// exp(x) = 2^(x log2(e)), and the GPU computes powers of two.
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

}  // namespace jax_ds
