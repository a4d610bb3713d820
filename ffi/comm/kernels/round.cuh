// One round of a window (link.h), as every CTA of a communication kernel goes through it.
//
//   const Round round = Round::next(link);
//   bool alive = round.begin(axis_index);  // peers' staging is free
//   if (alive) ...store...
//   round.send();                          // ours are stored
//   alive = round.receive(alive);          // everybody's have arrived
//   ...read...
//   round.end();
//
// An operation in two halves sends in one kernel and receives in another, which is told the slot.
// Small data that are needed early travel ahead as notes: announce() and hear(). All CTAs must be
// on the GPU together: they wait for each other through the peers.
#pragma once

#include "comm/kernels/link.h"
#include "kernels/ptx_system.cuh"

namespace jax_ds::comm {

struct Round {
  const Link& link;
  const int slot;
  Progress* const progress;
  const u64 number;
  const u64 earlier_ctas;

  // The unfinished round in `slot`, or the next one there. Counters are read before the round can
  // end, because every CTA takes part in the end.
  JAX_DS_DEVICE Round(const Link& link, int slot)
      : link(link),
        slot(slot),
        progress(&link.counters->slots[slot]),
        number(link.counters->slots[slot].round + 1),
        earlier_ctas(link.counters->slots[slot].ctas) {}

  // A new round in the slot whose turn it is; in the other, if only that is free. Ranks choose
  // alike, because they start and finish rounds in the same order.
  static JAX_DS_DEVICE Round next(const Link& link) {
    const int turn = link.counters->next;
    const Progress& at_turn = link.counters->slots[turn];
    const bool taken = at_turn.started != at_turn.round;
    return Round(link, taken && link.num_slots == 2 ? 1 - turn : turn);
  }

  JAX_DS_DEVICE Signals* signals(int rank) const {
    return reinterpret_cast<Signals*>(link.windows[rank] + slot * link.slot_bytes);
  }

  JAX_DS_DEVICE char* staging(int rank) const {
    return link.windows[rank] + slot * link.slot_bytes + kStagingOffset;
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
#pragma unroll 1
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
      if (progress->started == number) {
        fail(Fault::kNoSlot, link.rank, link.rank);
        ok = false;
      }
      ok = wait(&signals(link.rank)->consumed[threadIdx.x], earlier_ctas, threadIdx.x) && ok;
    }
    return __syncthreads_and(ok);
  }

  // Tells `rank` that the notes which this CTA, alone, has stored there are complete.
  JAX_DS_DEVICE void announce(int rank) const {
    __syncthreads();
    if (threadIdx.x == 0) red_release_sys_add(&signals(rank)->announced[link.rank], 1);
  }

  // Waits for everybody's notes.
  JAX_DS_DEVICE bool hear(bool alive) const {
    return wait_for_all(alive, signals(link.rank)->announced, number);
  }

  // Tells every rank that this CTA has stored its records, unless a CTA could not begin.
  JAX_DS_DEVICE void send() const {
    tell(&Signals::arrived);
    if (!last_of_grid(&progress->sent)) return;
    progress->sent = 0;
    progress->started = number;
    link.counters->next = (slot + 1) % link.num_slots;
  }

  // Waits for everybody's records.
  JAX_DS_DEVICE bool receive(bool alive) const {
    return wait_for_all(alive, signals(link.rank)->arrived, earlier_ctas + gridDim.x);
  }

  // Tells every rank that this CTA has read what it had to.
  JAX_DS_DEVICE void end() const {
    tell(&Signals::consumed);
    if (!last_of_grid(&progress->left)) return;
    progress->left = 0;
    progress->taken[0] = progress->taken[1] = 0;
    progress->ctas = earlier_ctas + gridDim.x;
    progress->round = number;
  }

 private:
  using Words = u64 (Signals::*)[kMaxRanks];

  // What the CTA did before happens before the rank sees the signal.
  JAX_DS_DEVICE void tell(Words words) const {
    __syncthreads();
    const int rank = threadIdx.x;
    if (rank < link.num_ranks && ld_relaxed_gpu(link.dead) == 0) {
      red_release_sys_add(&(signals(rank)->*words)[link.rank], 1);
    }
  }

  // Whether all ranks' words, indexed by rank, reach `value`.
  JAX_DS_DEVICE bool wait_for_all(bool alive, const u64* words, u64 value) const {
    bool ok = alive;
    if (alive && threadIdx.x < link.num_ranks) {
      ok = wait(words + threadIdx.x, value, threadIdx.x);
    }
    return __syncthreads_and(ok);
  }

  // True in one thread of the CTA that is the last of the grid to come here. Nobody waits for it,
  // and it is a thread that signals no rank: what it does is for the next kernel.
  JAX_DS_DEVICE bool last_of_grid(u32* count) const {
    return threadIdx.x == kMaxRanks && atom_acq_rel_gpu_add(count, 1) + 1 == gridDim.x;
  }
};

}  // namespace jax_ds::comm
