// wgmma for e4m3 operands: D[64, N] (+)= A[64, 32] * B[N, 32]^T in float32, both operands K-major
// in shared memory, 128 bytes of K a row, in the 128-byte swizzle that TMA writes.
#pragma once

#include "kernels/wgmma.cuh"

namespace jax_ds {

// The low word of the descriptor of a tile at `shared`, aligned to 1024 bytes: the next 32 elements
// of K are 2 further, the next 8 rows 64.
JAX_DS_DEVICE u32 wgmma_address(const void* shared) {
  return wgmma::low_word(shared_address(shared));
}

template <int kN>
struct WgmmaE4m3;  // ::mma(d, a, b, accumulate): d (+)= A * B^T

// R = N / 2 registers; A, B, P: the operand numbers R, R + 1, R + 2.
#define JAX_DS_WGMMA(N, R, A, B, P)                                                         \
  template <>                                                                               \
  struct WgmmaE4m3<N> {                                                                     \
    static JAX_DS_DEVICE void mma(float (&d)[R], u64 a, u64 b, bool accumulate) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                  \
                   ", 0;\n"                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" JAX_DS_L##R \
                   "}, %" #A ", %" #B ", p, 1, 1;\n}\n"                                     \
                   : JAX_DS_D##R                                                            \
                   : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)));                    \
    }                                                                                       \
  }

JAX_DS_WGMMA(32, 16, 16, 17, 18);
JAX_DS_WGMMA(64, 32, 32, 33, 34);
JAX_DS_WGMMA(96, 48, 48, 49, 50);
JAX_DS_WGMMA(112, 56, 56, 57, 58);
JAX_DS_WGMMA(128, 64, 64, 65, 66);
JAX_DS_WGMMA(160, 80, 80, 81, 82);
JAX_DS_WGMMA(192, 96, 96, 97, 98);

}  // namespace jax_ds
