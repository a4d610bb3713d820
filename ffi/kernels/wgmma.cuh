// What wgmma of every operand type share: order and completion, and the accumulator's registers as
// the operand lists of inline assembly.
//
// Thread t of the warpgroup holds, with r = 16 * (t / 32) + (t % 32) / 4 and c = 2 * (t % 4):
// d[4j + 0..1] = D[r, 8j + c .. +1] and d[4j + 2..3] = D[r + 8, 8j + c .. +1].
#pragma once

#include "kernels/ptx.cuh"
#include "kernels/wgmma_descriptor.h"

namespace jax_ds::wgmma {

// Orders register and shared-memory accesses before the wgmma that follow.
JAX_DS_DEVICE void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

JAX_DS_DEVICE void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
JAX_DS_DEVICE void wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_ds::wgmma

// D<R>: R registers, read and written; L<R>: the numbers of those operands.
#define JAX_DS_EIGHT(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_DS_D4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define JAX_DS_D8 JAX_DS_EIGHT(0)
#define JAX_DS_D12 JAX_DS_D8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define JAX_DS_D16 JAX_DS_D8, JAX_DS_EIGHT(8)
#define JAX_DS_D32 JAX_DS_D16, JAX_DS_EIGHT(16), JAX_DS_EIGHT(24)
#define JAX_DS_D48 JAX_DS_D32, JAX_DS_EIGHT(32), JAX_DS_EIGHT(40)
#define JAX_DS_D56 JAX_DS_D48, JAX_DS_EIGHT(48)
#define JAX_DS_D64 JAX_DS_D56, JAX_DS_EIGHT(56)
#define JAX_DS_D80 JAX_DS_D64, JAX_DS_EIGHT(64), JAX_DS_EIGHT(72)
#define JAX_DS_D96 JAX_DS_D80, JAX_DS_EIGHT(80), JAX_DS_EIGHT(88)

#define JAX_DS_L4 "%0, %1, %2, %3"
#define JAX_DS_L8 JAX_DS_L4 ", %4, %5, %6, %7"
#define JAX_DS_L12 JAX_DS_L8 ", %8, %9, %10, %11"
#define JAX_DS_L16 JAX_DS_L12 ", %12, %13, %14, %15"
#define JAX_DS_L32 \
  JAX_DS_L16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_DS_L48 \
  JAX_DS_L32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_DS_L56 JAX_DS_L48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JAX_DS_L64 JAX_DS_L56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_DS_L80 \
  JAX_DS_L64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define JAX_DS_L96 \
  JAX_DS_L80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
