// Dispatch in one kernel: push each token once to each rank that needs it, then copy what arrived
// into its rows. A rank's own tokens go to their rows directly.
#pragma once

#include "comm/kernels/round.cuh"
#include "deep_ep/kernels/records.cuh"

namespace jax_ds::deep_ep {

struct DispatchKernel {
  const DispatchParams& p;

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

  // Slot `slot` in the staging of `rank`.
  JAX_DS_DEVICE char* staged(int rank, i64 slot) const {
    return comm::Round::staging(p.link, rank) + slot * p.record.stride;
  }

  JAX_DS_DEVICE void push() const {
    const u32 others = ~(1u << p.link.rank);
    const i64 first_slot = static_cast<i64>(p.link.rank) * p.num_tokens;
    for (int t = grid_warp(); t < p.num_tokens; t += grid_warps()) {
      const u32 ranks = others & ranks_of(p.needed, p.link.num_ranks, p.num_tokens, t);
      if (ranks == 0) continue;
      fan_out(token(t), p.record.vectors, ranks, [&](int r) { return staged(r, first_slot + t); });
      if (p.scales == nullptr) continue;
      fan_out_floats(token_scales(t), p.record.num_scales, ranks, [&](int r) {
        return reinterpret_cast<float*>(staged(r, first_slot + t) + bytes());
      });
    }
  }

  // Rows without a token are zero, with scales 1; `poison` makes every row NaN.
  JAX_DS_DEVICE void fill_rows(bool poison) const {
    const int lane = lane_id();
    for (i64 base = 32LL * grid_warp(); base < p.capacity; base += 32LL * grid_warps()) {
      const i64 c = base + lane;
      const bool empty = c < p.capacity && (poison || p.row_source[c] < 0);
      for (u32 left = __ballot_sync(kAllLanes, empty); left != 0; left &= left - 1) {
        const int at = static_cast<int>(base) + __ffs(left) - 1;
        fill(row(at), p.record.vectors, poison ? 0xffffffffu : 0);
        if (p.row_scales == nullptr) continue;
        const float scale = poison ? __int_as_float(0x7fffffff) : 1.0f;
        for (int i = lane; i < p.record.num_scales; i += 32) row_scales(at)[i] = scale;
      }
    }
  }

  JAX_DS_DEVICE void expand() const {
    const int num_slots = p.link.num_ranks * p.num_tokens;
    const int first_own = p.link.rank * p.num_tokens;
    int slot = grid_warp();
    int next = slot < num_slots ? row_in_lane(p.row_of, p.columns, slot) : -1;
    for (; slot < num_slots; slot += grid_warps()) {
      const int mine = next;
      const int following = slot + grid_warps();
      // Fetched early: only with its rows can the next record be moved.
      next = following < num_slots ? row_in_lane(p.row_of, p.columns, following) : -1;
      const u32 mask = __ballot_sync(kAllLanes, mine >= 0);
      if (mask == 0) continue;
      const int t = slot - first_own;
      const bool own = t >= 0 && t < p.num_tokens;
      const char* from = own ? token(t) : staged(p.link.rank, slot);
      fan_out(from, p.record.vectors, mask,
              [&](int j) { return row(__shfl_sync(kAllLanes, mine, j)); });
      if (p.row_scales == nullptr) continue;
      const float* scales = own ? token_scales(t) : reinterpret_cast<const float*>(from + bytes());
      scatter_scales(scales, mask, mine);
    }
  }

  JAX_DS_DEVICE void scatter_scales(const float* from, u32 mask, int mine) const {
    for (u32 left = mask; left != 0; left &= left - 1) {
      float* out = row_scales(__shfl_sync(kAllLanes, mine, __ffs(left) - 1));
      for (int i = lane_id(); i < p.record.num_scales; i += 32) out[i] = from[i];
    }
  }

  JAX_DS_DEVICE void run() const {
    const comm::Round round(p.link);
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
  DispatchKernel{p}.run();
}

}  // namespace jax_ds::deep_ep
