// PTX between GPUs: system-scope synchronisation, and streaming accesses of 16 bytes.
#pragma once

#include "kernels/cache_policy.cuh"

namespace jax_ds {

JAX_DS_DEVICE u64 ld_acquire_sys(const u64* pointer) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
  return value;
}

JAX_DS_DEVICE void red_release_sys_add(u64* pointer, u64 value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

JAX_DS_DEVICE u32 ld_relaxed_gpu(const u32* pointer) {
  u32 value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

JAX_DS_DEVICE u32 atom_exch_gpu(u32* pointer, u32 value) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.exch.b32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(pointer), "r"(value)
               : "memory");
  return old;
}

JAX_DS_DEVICE u32 atom_relaxed_gpu_add(u32* pointer, u32 value) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(pointer), "r"(value)
               : "memory");
  return old;
}

JAX_DS_DEVICE void st_release_sys(u32* pointer, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// Data that is read once passes L1 by.
JAX_DS_DEVICE uint4 ld_global_once_v4(const void* pointer) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer)
               : "memory");
  return value;
}

JAX_DS_DEVICE void st_global_v4(void* pointer, uint4 value, CachePolicy policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(pointer),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
               : "memory");
}

}  // namespace jax_ds
