// wgmma for e4m3 operands: D[64, N] (+)= A[64, 32] * B[N, 32]^T in float32, both operands K-major
// in shared memory, 128 bytes of K a row, in the 128-byte swizzle that TMA writes.
//
// Thread t of the warpgroup holds, with r = 16 * (t / 32) + (t % 32) / 4 and c = 2 * (t % 4):
// d[4j + 0..1] = D[r, 8j + c .. +1] and d[4j + 2..3] = D[r + 8, 8j + c .. +1].
#pragma once

#include "kernels/ptx.cuh"

namespace jax_ds {

// The matrix descriptor of a tile at `shared` (aligned to 1024 bytes): rows of 128 bytes, groups of
// eight rows 1024 bytes apart. Its lower half counts 16 bytes: the next 32 elements of K are 2
// further, the next 8 rows 64. Only that half varies, so it is what loops should keep.
JAX_DS_DEVICE u32 wgmma_address(const void* shared) {
  return 1u << 16 | ((shared_address(shared) & 0x3ffff) >> 4);
}

JAX_DS_DEVICE u64 wgmma_descriptor(u32 address) {
  constexpr u64 kSwizzle128 = 1ull << 62;
  constexpr u64 kGroupStride = 1024 >> 4;
  return kSwizzle128 | kGroupStride << 32 | address;
}

// Orders register and shared-memory accesses before the wgmma that follow.
JAX_DS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

JAX_DS_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
JAX_DS_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kN>
struct WgmmaE4m3;  // ::mma(d, a, b, accumulate): d (+)= A * B^T

// Operand lists, in pieces of 16 registers.
#define JAX_DS_REGISTERS(i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_DS_R8 JAX_DS_REGISTERS(0)
#define JAX_DS_R16 JAX_DS_R8, JAX_DS_REGISTERS(8)
#define JAX_DS_R32 JAX_DS_R16, JAX_DS_REGISTERS(16), JAX_DS_REGISTERS(24)
#define JAX_DS_R48 JAX_DS_R32, JAX_DS_REGISTERS(32), JAX_DS_REGISTERS(40)
#define JAX_DS_R56 JAX_DS_R48, JAX_DS_REGISTERS(48)
#define JAX_DS_R64 JAX_DS_R56, JAX_DS_REGISTERS(56)
#define JAX_DS_R80 JAX_DS_R64, JAX_DS_REGISTERS(64), JAX_DS_REGISTERS(72)
#define JAX_DS_R88 JAX_DS_R80, JAX_DS_REGISTERS(80)
#define JAX_DS_R96 JAX_DS_R88, JAX_DS_REGISTERS(88)

#define JAX_DS_P8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAX_DS_P16 JAX_DS_P8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAX_DS_P32                                          \
  JAX_DS_P16                                                \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26" \
  ", %27, %28, %29, %30, %31"
#define JAX_DS_P48                                          \
  JAX_DS_P32                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42" \
  ", %43, %44, %45, %46, %47"
#define JAX_DS_P56 JAX_DS_P48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JAX_DS_P64 JAX_DS_P56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_DS_P80                                          \
  JAX_DS_P64                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74" \
  ", %75, %76, %77, %78, %79"
#define JAX_DS_P88 JAX_DS_P80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JAX_DS_P96 JAX_DS_P88 ", %88, %89, %90, %91, %92, %93, %94, %95"

// R = N / 2 registers; A, B, P: the operand numbers R, R + 1, R + 2.
#define JAX_DS_WGMMA(N, R, A, B, P)                                                         \
  template <>                                                                               \
  struct WgmmaE4m3<N> {                                                                     \
    static JAX_DS_DEVICE void mma(float (&d)[R], u64 a, u64 b, bool accumulate) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                  \
                   ", 0;\n"                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" JAX_DS_P##R \
                   "}, %" #A ", %" #B ", p, 1, 1;\n}\n"                                     \
                   : JAX_DS_R##R                                                            \
                   : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)));                    \
    }                                                                                       \
  }

JAX_DS_WGMMA(16, 8, 8, 9, 10);
JAX_DS_WGMMA(32, 16, 16, 17, 18);
JAX_DS_WGMMA(64, 32, 32, 33, 34);
JAX_DS_WGMMA(96, 48, 48, 49, 50);
JAX_DS_WGMMA(112, 56, 56, 57, 58);
JAX_DS_WGMMA(128, 64, 64, 65, 66);
JAX_DS_WGMMA(160, 80, 80, 81, 82);
JAX_DS_WGMMA(176, 88, 88, 89, 90);
JAX_DS_WGMMA(192, 96, 96, 97, 98);

}  // namespace jax_ds
