// Dispatch in one kernel: push each token once to each rank that needs it, then copy what arrived
// into its rows. A rank's own tokens go to their rows directly.
#pragma once

#include "deep_ep/kernels/records.cuh"

namespace jax_ds::deep_ep {

struct DispatchKernel {
  const DispatchParams& p;
  const comm::Round round;

  JAX_DS_DEVICE explicit DispatchKernel(const DispatchParams& p)
      : p(p), round(comm::Round::next(p.link)) {}

  JAX_DS_DEVICE i64 bytes() const { return static_cast<i64>(p.record.vectors) * 16; }

  JAX_DS_DEVICE const char* token(int t) const {
    return static_cast<const char*>(p.x) + t * bytes();
  }

  JAX_DS_DEVICE const float* token_scales(int t) const {
    return p.scales + static_cast<i64>(t) * p.record.num_scales;
  }

  JAX_DS_DEVICE char* row(int c) const { return static_cast<char*>(p.rows) + c * bytes(); }

  JAX_DS_DEVICE float* row_scales(int c) const {
    return p.row_scales + static_cast<i64>(c) * p.record.num_scales;
  }

  JAX_DS_DEVICE char* staged(int rank, i64 slot) const {
    return record_at(round, p.record, rank, slot);
  }

  JAX_DS_DEVICE void push() const {
    const u32 others = ~(1u << p.link.rank);
    const i64 first_slot = static_cast<i64>(p.link.rank) * p.num_tokens;
    const auto needed_by = [&](int t) {
      return others & ranks_of(p.needed, p.link.num_ranks, p.num_tokens, t);
    };
    for_each_ahead(p.num_tokens, needed_by, [&](int t, u32 ranks) {
      if (ranks == 0) return;
      fan_out(token(t), p.record.vectors, ranks, [&](int r) { return staged(r, first_slot + t); });
      if (p.scales == nullptr) return;
      fan_out_floats(token_scales(t), p.record.num_scales, ranks, [&](int r) {
        return reinterpret_cast<float*>(staged(r, first_slot + t) + bytes());
      });
    });
  }

  // Rows without a token are zero, with scales 1; `poison` makes every row NaN.
  JAX_DS_DEVICE void fill_rows(bool poison) const {
    const int lane = lane_id();
    for (i64 base = 32LL * grid_warp(); base < p.capacity; base += 32LL * grid_warps()) {
      const i64 c = base + lane;
      const bool empty = c < p.capacity && (poison || p.row_source[c] < 0);
      for (u32 left = __ballot_sync(kAllLanes, empty); left != 0; left &= left - 1) {
        const int at = static_cast<int>(base) + __ffs(left) - 1;
        fill_row(row(at), p.row_scales == nullptr ? nullptr : row_scales(at), p.record, poison);
      }
    }
  }

  JAX_DS_DEVICE void expand() const {
    const int num_slots = p.link.num_ranks * p.num_tokens;
    const int first_own = p.link.rank * p.num_tokens;
    const auto rows_of = [&](int slot) { return row_in_lane(p.row_of, p.columns, slot); };
    for_each_ahead(num_slots, rows_of, [&](int slot, int mine) {
      const u32 mask = __ballot_sync(kAllLanes, mine >= 0);
      if (mask == 0) return;
      const int t = slot - first_own;
      const bool own = t >= 0 && t < p.num_tokens;
      const char* from = own ? token(t) : staged(p.link.rank, slot);
      fan_out(from, p.record.vectors, mask,
              [&](int j) { return row(__shfl_sync(kAllLanes, mine, j)); });
      if (p.row_scales == nullptr) return;
      const float* scales = own ? token_scales(t) : reinterpret_cast<const float*>(from + bytes());
      scatter_scales(scales, p.record.num_scales, mask, mine, p.row_scales);
    });
  }

  JAX_DS_DEVICE void run() const {
    bool alive = round.begin(p.axis_index);
    if (alive) push();
    round.send();
    if (alive) fill_rows(false);
    alive = round.receive(alive);
    if (alive) {
      expand();
    } else {
      fill_rows(true);
    }
    round.end();
  }
};

__global__ void __launch_bounds__(kThreads, 1) dispatch(const __grid_constant__ DispatchParams p) {
  DispatchKernel(p).run();
}

}  // namespace jax_ds::deep_ep
