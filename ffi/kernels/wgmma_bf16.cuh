// wgmma for 16-bit operands: D[64, N] (+)= A[64, 16] * B[16, N] in float32.
//
// Shared-memory operands are tiles of 128-byte rows in the 128-byte swizzle that TMA writes, rows
// in groups of eight, 1024 bytes apart. K-major: a row is one index of M (or N) and holds 64
// elements of K. MN-major: a row is one index of K and holds 64 elements of M (or N); the next 64
// lie `atom_stride` bytes further.
//
// Thread t of the warpgroup holds, with r = 16 * (t / 32) + (t % 32) / 4 and c = 2 * (t % 4):
// d[4j + 0..1] = D[r, 8j + c .. +1] and d[4j + 2..3] = D[r + 8, 8j + c .. +1].
#pragma once

#include "kernels/ptx.cuh"
#include "kernels/wgmma_descriptor.h"

namespace jax_ds::wgmma {

JAX_DS_DEVICE void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

JAX_DS_DEVICE void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
JAX_DS_DEVICE void wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of a K-major tile without swizzle: 8 rows x 16 bytes lie together, the next eight rows
// 128 bytes on, the next eight elements of K `k_stride` bytes on.
JAX_DS_DEVICE u64 descriptor_unswizzled(u32 shared, u32 k_stride) {
  return static_cast<u64>(128 >> 4) << 32 | static_cast<u64>(k_stride >> 4) << 16 |
         ((shared & 0x3ffff) >> 4);
}

enum class Major : int { kK = 0, kMN = 1 };

struct Bf16 {};
struct F16 {};

#define JAX_DS_EIGHT(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_DS_D4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define JAX_DS_D8 JAX_DS_EIGHT(0)
#define JAX_DS_D12 JAX_DS_EIGHT(0), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define JAX_DS_D16 JAX_DS_EIGHT(0), JAX_DS_EIGHT(8)
#define JAX_DS_D24 JAX_DS_D16, JAX_DS_EIGHT(16)
#define JAX_DS_D32 JAX_DS_D16, JAX_DS_EIGHT(16), JAX_DS_EIGHT(24)
#define JAX_DS_D64 \
  JAX_DS_D32, JAX_DS_EIGHT(32), JAX_DS_EIGHT(40), JAX_DS_EIGHT(48), JAX_DS_EIGHT(56)
#define JAX_DS_D96 \
  JAX_DS_D64, JAX_DS_EIGHT(64), JAX_DS_EIGHT(72), JAX_DS_EIGHT(80), JAX_DS_EIGHT(88)
#define JAX_DS_D128                                                                             \
  JAX_DS_D32, JAX_DS_EIGHT(32), JAX_DS_EIGHT(40), JAX_DS_EIGHT(48), JAX_DS_EIGHT(56),           \
      JAX_DS_EIGHT(64), JAX_DS_EIGHT(72), JAX_DS_EIGHT(80), JAX_DS_EIGHT(88), JAX_DS_EIGHT(96), \
      JAX_DS_EIGHT(104), JAX_DS_EIGHT(112), JAX_DS_EIGHT(120)

#define JAX_DS_L4 "%0, %1, %2, %3"
#define JAX_DS_L8 JAX_DS_L4 ", %4, %5, %6, %7"
#define JAX_DS_L12 JAX_DS_L8 ", %8, %9, %10, %11"
#define JAX_DS_L16 JAX_DS_L12 ", %12, %13, %14, %15"
#define JAX_DS_L24 JAX_DS_L16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JAX_DS_L32 \
  JAX_DS_L16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_DS_L64                                                                   \
  JAX_DS_L32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_DS_L96                                                                   \
  JAX_DS_L64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JAX_DS_L128                                                                  \
  JAX_DS_L32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109" \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122"   \
  ", %123, %124, %125, %126, %127"

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
  JAX_DS_WGMMA_SS(T, TYPE, 48, 24, 24, 25, 26, 27, 28)          \
  JAX_DS_WGMMA_SS(T, TYPE, 64, 32, 32, 33, 34, 35, 36)          \
  JAX_DS_WGMMA_SS(T, TYPE, 128, 64, 64, 65, 66, 67, 68)         \
  JAX_DS_WGMMA_SS(T, TYPE, 256, 128, 128, 129, 130, 131, 132)   \
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
