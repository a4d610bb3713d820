// wgmma for 16-bit operands: D[64, N] (+)= A[64, 16] * B[16, N] in float32.
//
// Shared-memory operands are tiles of 128-byte rows in the 128-byte swizzle that TMA writes, rows
// in groups of eight, 1024 bytes apart. K-major: a row is one index of M (or N) and holds 64
// elements of K. MN-major: a row is one index of K and holds 64 elements of M (or N); the next 64
// lie `atom_stride` bytes further.
#pragma once

#include "kernels/wgmma.cuh"

namespace jax_ds::wgmma {

// Descriptor of a K-major tile without swizzle: 8 rows x 16 bytes lie together, the next eight rows
// 128 bytes on, the next eight elements of K `k_stride` bytes on.
JAX_DS_DEVICE u64 descriptor_unswizzled(u32 shared, u32 k_stride) {
  return static_cast<u64>(128 >> 4) << 32 | low_word(shared, k_stride);
}

enum class Major : int { kK = 0, kMN = 1 };

struct Bf16 {};
struct F16 {};

// Both operands in shared memory. R = N / 2 registers; A, B, P, TA, TB: operands R, R + 1, ...
#define JAX_DS_WGMMA_SS(T, TYPE, N, R, A, B, P, TA, TB)                                           \
  template <Major kA, Major kB>                                                                   \
  JAX_DS_DEVICE void mma(T, float (&d)[R], u64 a, u64 b, bool accumulate) {                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                          \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" JAX_DS_L##R \
                 "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                         \
                 : JAX_DS_D##R                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)), "n"(static_cast<int>(kA)),  \
                   "n"(static_cast<int>(kB)));                                                    \
  }

// A in registers, as four 8x8 matrices: rows r and r + 8 of columns c, then of columns c + 8.
#define JAX_DS_WGMMA_RS(T, TYPE, N, R, A0, A1, A2, A3, B, P, TB)                                  \
  template <Major kB>                                                                             \
  JAX_DS_DEVICE void mma(T, float (&d)[R], const u32(&a)[4], u64 b, bool accumulate) {            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                          \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" JAX_DS_L##R \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"  \
                 : JAX_DS_D##R                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                            \
                   "r"(static_cast<u32>(accumulate)), "n"(static_cast<int>(kB)));                 \
  }

#define JAX_DS_WGMMA_ALL(T, TYPE)                               \
  JAX_DS_WGMMA_SS(T, TYPE, 8, 4, 4, 5, 6, 7, 8)                 \
  JAX_DS_WGMMA_SS(T, TYPE, 16, 8, 8, 9, 10, 11, 12)             \
  JAX_DS_WGMMA_SS(T, TYPE, 24, 12, 12, 13, 14, 15, 16)          \
  JAX_DS_WGMMA_SS(T, TYPE, 32, 16, 16, 17, 18, 19, 20)          \
  JAX_DS_WGMMA_SS(T, TYPE, 64, 32, 32, 33, 34, 35, 36)          \
  JAX_DS_WGMMA_SS(T, TYPE, 128, 64, 64, 65, 66, 67, 68)         \
  JAX_DS_WGMMA_RS(T, TYPE, 64, 32, 32, 33, 34, 35, 36, 37, 38)  \
  JAX_DS_WGMMA_RS(T, TYPE, 128, 64, 64, 65, 66, 67, 68, 69, 70) \
  JAX_DS_WGMMA_RS(T, TYPE, 192, 96, 96, 97, 98, 99, 100, 101, 102)

JAX_DS_WGMMA_ALL(Bf16, "bf16")
JAX_DS_WGMMA_ALL(F16, "f16")

// Two floats rounded to nearest even in the operand type; `low` in the lower half.
JAX_DS_DEVICE u32 pack(Bf16, float low, float high) { return cvt_bf16x2(low, high); }

JAX_DS_DEVICE u32 pack(F16, float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace jax_ds::wgmma
