// One PTX instruction a function, named as in the PTX manual. No CUDA header is included: kernels
// are compiled by NVRTC from these sources alone.
#pragma once

namespace jax_ds {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define JAX_DS_DEVICE __device__ __forceinline__

// ---- where am I --------------------------------------------------------------------------------

JAX_DS_DEVICE u32 lane_id() { return threadIdx.x % 32; }

// Uniform over the warp, and known to the compiler to be so.
JAX_DS_DEVICE u32 warp_id() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// True in one thread of the (converged) warp.
JAX_DS_DEVICE bool elect_one() {
  u32 elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

JAX_DS_DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

JAX_DS_DEVICE u64 globaltimer() {
  u64 nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

// ---- shared memory addresses -------------------------------------------------------------------

JAX_DS_DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// The address, in the cluster's window, of the same shared variable in CTA `rank` of the cluster.
JAX_DS_DEVICE u32 mapa(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// ---- barriers and fences -----------------------------------------------------------------------

// Named barrier `id` (1 to 15; 0 is __syncthreads) over `threads` threads.
JAX_DS_DEVICE void bar_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar_sync that tells every thread whether `value` holds in any.
JAX_DS_DEVICE bool bar_red_or(u32 id, u32 threads, bool value) {
  u32 any;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "bar.red.or.pred p, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<u32>(value))
      : "memory");
  return any != 0;
}

JAX_DS_DEVICE void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

JAX_DS_DEVICE void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Orders no memory: for barriers initialised under fence_mbarrier_init.
JAX_DS_DEVICE void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

JAX_DS_DEVICE void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

JAX_DS_DEVICE void cluster_sync() {
  barrier_cluster_arrive();
  barrier_cluster_wait();
}

// Orders ordinary accesses to shared memory before later ones of TMA or wgmma.
JAX_DS_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes mbarrier.init visible to the cluster and to the async proxy.
JAX_DS_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---- registers and launches --------------------------------------------------------------------

template <int kRegisters>
JAX_DS_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
JAX_DS_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Blocks until the grids this one depends on have finished and their writes are visible. Nothing
// a predecessor writes may be read before it.
JAX_DS_DEVICE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Allows the dependent grid to start; its own griddepcontrol.wait still waits for our end.
JAX_DS_DEVICE void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- data movement -----------------------------------------------------------------------------

JAX_DS_DEVICE float ld_shared_f32(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

JAX_DS_DEVICE void st_shared_v4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

JAX_DS_DEVICE void st_shared_v4_f32(u32 address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

JAX_DS_DEVICE uint4 ld_shared_v4(u32 address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

JAX_DS_DEVICE float4 ld_shared_v4_f32(u32 address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

JAX_DS_DEVICE float2 ld_shared_v2_f32(u32 address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

// Stores to another CTA of the cluster and counts the 16 bytes on that CTA's `barrier`. Both
// addresses come from mapa.
JAX_DS_DEVICE void st_async_v4_f32(u32 address, u32 barrier, float a, float b, float c, float d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(address),
      "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

JAX_DS_DEVICE void st_global_v4(void* pointer, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Without a branch: addresses of several such stores are computed side by side.
JAX_DS_DEVICE void st_global_v4_if(bool stores, void* pointer, uint4 value) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %5, 0;\n"
      "@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n"
      "}\n" ::"l"(pointer),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(static_cast<u32>(stores))
      : "memory");
}

JAX_DS_DEVICE void st_global_b32(void* pointer, u32 value) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

JAX_DS_DEVICE void st_global_v2_f32(float* pointer, float a, float b) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(pointer), "f"(a), "f"(b) : "memory");
}

JAX_DS_DEVICE void st_shared_v2_f32(u32 address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
JAX_DS_DEVICE void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Two matrices, each transposed on the way.
JAX_DS_DEVICE void stmatrix_x2_trans(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(a), "r"(b)
               : "memory");
}

JAX_DS_DEVICE void ldmatrix_x4(u32 address, u32 (&d)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements that lies across the warp's registers.
JAX_DS_DEVICE u32 movmatrix_trans(u32 a) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// kSize bytes, 4 or 8, zero where `valid` is false (nothing is read then).
template <int kSize>
JAX_DS_DEVICE void cp_async_small(u32 shared, const void* global, bool valid) {
  const u32 bytes = valid ? kSize : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(global),
               "r"(bytes), "n"(kSize)
               : "memory");
}

JAX_DS_DEVICE void cp_async_4(u32 shared, const void* global, bool valid) {
  cp_async_small<4>(shared, global, valid);
}

JAX_DS_DEVICE void cp_async_16(u32 shared, const void* global, bool valid) {
  const u32 bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

JAX_DS_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
JAX_DS_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives on the mbarrier once this thread's earlier cp.async are complete; the arrival is one of
// those the barrier was initialised to expect.
JAX_DS_DEVICE void cp_async_mbarrier_arrive_noinc(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Two floats rounded to nearest even; `low` lands in the lower half.
JAX_DS_DEVICE u32 cvt_bf16x2(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Products of two pairs, each rounded to nearest even.
JAX_DS_DEVICE u32 mul_bf16x2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// 2^x and log2(x), to about two units in the last place; ex2(-inf) = 0.
JAX_DS_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To one unit in the last place; of infinity and of anything above 2^126, zero.
JAX_DS_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

JAX_DS_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

JAX_DS_DEVICE void prefetch_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer) : "memory");
}

// ---- synchronisation through global memory -----------------------------------------------------

JAX_DS_DEVICE int2 ld_relaxed_gpu_v2_s32(const void* pointer) {
  int2 value;
  asm volatile("ld.relaxed.gpu.global.v2.s32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(pointer)
               : "memory");
  return value;
}

JAX_DS_DEVICE u32 atom_acq_rel_gpu_add(u32* pointer, u32 value) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(pointer), "r"(value)
               : "memory");
  return old;
}

}  // namespace jax_ds
