// One round of a window (link.h), as every CTA of a communication kernel goes through it.
//
//   Round round(link);
//   bool alive = round.begin();      // peers' staging is free
//   if (alive) ...store...
//   round.send();                    // ours are stored
//   alive = round.receive(alive);    // everybody's have arrived
//   ...read...
//   round.end();
//
// All CTAs must be on the GPU together: they wait for each other through the peers.
#pragma once

#include "comm/kernels/link.h"
#include "kernels/ptx_system.cuh"

namespace jax_ds::comm {

struct Round {
  const Link& link;
  const u64 number;

  // `number` is read before any CTA can end the round, because every CTA takes part in the end.
  JAX_DS_DEVICE explicit Round(const Link& link) : link(link), number(link.progress->round + 1) {}

  static JAX_DS_DEVICE Signals* signals(const Link& link, int rank) {
    return reinterpret_cast<Signals*>(link.windows[rank]);
  }

  static JAX_DS_DEVICE char* staging(const Link& link, int rank) {
    return link.windows[rank] + kStagingOffset;
  }

  JAX_DS_DEVICE void fail(Fault fault, int rank, int peer) const {
    if (atom_exch_gpu(link.dead, 1) != 0) return;
    Failure* record = link.failure;
    record->fault = static_cast<int>(fault);
    record->operation = static_cast<int>(link.operation);
    record->rank = rank;
    record->peer = peer;
    record->round = number;
    st_release_sys(&record->complete, 1);
  }

  // Whether `*word` reaches `value` in time; at once false where the device is already dead.
  JAX_DS_DEVICE bool wait(const u64* word, u64 value, int peer) const {
    u64 deadline = 0;
    for (;;) {
      for (int i = 0; i < 32; ++i) {
        if (ld_acquire_sys(word) >= value) return true;
      }
      if (ld_relaxed_gpu(link.dead) != 0) return false;
      const u64 now = globaltimer();
      if (deadline == 0) deadline = now + link.timeout_ns;
      if (now < deadline) continue;
      fail(Fault::kPeerMissing, link.rank, peer);
      return false;
    }
  }

  // `axis_index`: this rank by the mesh; it must be NCCL's too, or records would go astray.
  JAX_DS_DEVICE bool begin(const int* axis_index) const {
    bool ok = true;
    if (threadIdx.x < link.num_ranks) {
      const int mesh_rank = *axis_index;
      if (mesh_rank != link.rank) {
        fail(Fault::kRankMismatch, mesh_rank, link.rank);
        ok = false;
      }
      const Signals* mine = signals(link, link.rank);
      ok = wait(&mine->consumed[threadIdx.x], number - 1, threadIdx.x) && ok;
    }
    return __syncthreads_and(ok);
  }

  // The last CTA to come here tells every rank, unless one of them could not begin.
  JAX_DS_DEVICE void send() const {
    if (!last_cta(&link.progress->sent)) return;
    if (threadIdx.x < link.num_ranks && ld_relaxed_gpu(link.dead) == 0) {
      red_release_sys_add(&signals(link, threadIdx.x)->arrived[link.rank], 1);
    }
  }

  JAX_DS_DEVICE bool receive(bool alive) const {
    bool ok = alive;
    if (alive && threadIdx.x < link.num_ranks) {
      ok = wait(&signals(link, link.rank)->arrived[threadIdx.x], number, threadIdx.x);
    }
    return __syncthreads_and(ok);
  }

  JAX_DS_DEVICE void end() const {
    if (!last_cta(&link.progress->left)) return;
    if (threadIdx.x < link.num_ranks && ld_relaxed_gpu(link.dead) == 0) {
      red_release_sys_add(&signals(link, threadIdx.x)->consumed[link.rank], 1);
    }
    if (threadIdx.x == 0) {
      link.progress->sent = 0;
      link.progress->left = 0;
      link.progress->round = number;
    }
  }

 private:
  // True in all threads of the CTA that is the last of the grid to add to `count`; what all CTAs
  // did before happens before what it does next.
  static JAX_DS_DEVICE bool last_cta(u32* count) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = atom_acq_rel_gpu_add(count, 1) + 1 == gridDim.x;
    __syncthreads();
    const bool is_last = last;
    __syncthreads();
    return is_last;
  }
};

}  // namespace jax_ds::comm
