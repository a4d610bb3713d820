// The gradient of prefill, in kernels that recompute the probabilities from lse. All of them are
// deterministic: every sum has one owner that adds in a fixed order, and no result is added to by
// an atomic.
//
//   p  = exp(scale q k^T - lse)      delta = rowsum(dout out) - dlse
//   ds = p (dout v^T - delta)
//
//   dq = scale ds k                  dk = scale ds^T q                  dv = p^T dout
//
// PrefillDq holds 128 queries and walks the keys; it begins a tile with delta, which PrefillDkv
// reads from memory. PrefillDkv holds 128 keys and walks the queries, with everything transposed,
// so that the left operand of each last product is already in registers: neither p nor ds ever sees
// shared memory. Recomputing the first two products in both costs 1152 instead of 832 (units of 2
// Sq Sk at head sizes 192/128) and saves float32 atomics on dq.
//
// Here: what both share.
#pragma once

#include "flash_mla/kernels/prefill_backward_config.h"
#include "flash_mla/kernels/prefill_common.cuh"
#include "flash_mla/kernels/prefill_tiles.cuh"

namespace jax_ds::flash_mla {

// `held_wide`, `walked_wide`: q or k; `held_narrow`, `walked_narrow`: dout or v.
template <PrefillBackwardConfig kConfig>
struct BackwardStorage {
  u8 held_wide[kConfig.qk_dim / 64][kBackwardHeld * 128];
  u8 held_narrow[kConfig.v_dim / 64][kBackwardHeld * 128];
  u8 walked_wide[kConfig.stages][kConfig.qk_dim / 64][kConfig.walked * 128];
  u8 walked_narrow[kConfig.stages][kConfig.v_dim / 64][kConfig.walked * 128];
  u8 staging[8][2048];
  float statistics[kConfig.stages][2][kConfig.walked];  // of walked queries: lse, delta
  TileBoard board;
  PipelineBarriers<1> held;
  PipelineBarriers<kConfig.stages> ring;

  static constexpr u32 kHeldBytes = sizeof(held_wide) + sizeof(held_narrow);
  static constexpr u32 kStageBytes = sizeof(walked_wide[0]) + sizeof(walked_narrow[0]);
};

template <PrefillBackwardConfig kConfig>
constexpr bool backward_legal() {
  constexpr PrefillBackwardConfig c = kConfig;
  static_assert(c.qk_dim % 64 == 0 && c.rope % 64 == 0 && c.v_dim % 64 == 0, "slabs of 64 columns");
  static_assert(c.walked == kBackwardBox, "a tile of the walked side is a box a slab");
  static_assert(sizeof(BackwardStorage<c>) <= PrefillBackwardSharedBytes(c), "counted");
  static_assert(PrefillBackwardSharedBytes(c) <= 232448, "an SM's shared memory");
  return true;
}

// Loads the keys' rows, of which the last `rope` columns lie in an array of their own.
template <PrefillBackwardConfig kConfig, int kRows>
JAX_DS_DEVICE void load_keys(const PrefillBackwardParams& p, u8* shared, u64* barrier, int kv_head,
                             int row, int batch) {
  constexpr int kOwn = (kConfig.qk_dim - kConfig.rope) / 64;
  load_slabs<kRows, kBackwardBox>(shared, &p.k, barrier, kOwn, kv_head, row, batch);
  load_slabs<kRows, kBackwardBox>(shared + kOwn * kRows * 128, &p.k_rope, barrier,
                                  kConfig.rope / 64, 0, row, batch);
}

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE BackwardStorage<kConfig>& backward_prologue(const PrefillBackwardParams& p) {
  static_assert(backward_legal<kConfig>());
  extern __shared__ __align__(1024) u8 memory[];
  BackwardStorage<kConfig>& s = *reinterpret_cast<BackwardStorage<kConfig>*>(memory);
  if (warp_id() == 0 && elect_one()) {
    prefetch_tensormap(&p.q);
    prefetch_tensormap(&p.dout);
    prefetch_tensormap(&p.k);
    prefetch_tensormap(&p.v);
    s.board.init();
    s.held.init(1, 2);
    s.ring.init(1, 2);
    fence_mbarrier_init();
  }
  griddepcontrol_wait();
  __syncthreads();
  return s;
}

}  // namespace jax_ds::flash_mla
