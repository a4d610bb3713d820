// The gradient of prefill, in two kernels that recompute the probabilities from lse. Both are
// deterministic: every sum has one owner, and no atomic is used.
//
//   p  = exp(scale q k^T - lse)       ds = p (dout v^T - delta)
//   dq = scale ds k                   dk = scale ds^T q            dv = p^T dout
//
// PrefillDq holds 128 queries and walks the keys; PrefillDkv holds 128 keys and walks the queries,
// with everything transposed, so that the left operand of each last product is already in
// registers: neither p nor ds ever sees shared memory. Recomputing the first two products in both
// costs 1152 instead of 832 (units of 2 Sq Sk at head sizes 192/128) and saves float32 atomics on
// dq or a third kernel.
#pragma once

#include "flash_mla/kernels/prefill_backward_config.h"
#include "flash_mla/kernels/prefill_common.cuh"

namespace jax_ds::flash_mla {

// ---- shared storage -----------------------------------------------------------------------------

// `held_wide`, `walked_wide`: q or k; `held_narrow`, `walked_narrow`: dout or v.
template <PrefillBackwardConfig kConfig>
struct BackwardStorage {
  u8 held_wide[kConfig.qk_dim / 64][kBackwardHeld * 128];
  u8 held_narrow[kConfig.v_dim / 64][kBackwardHeld * 128];
  u8 walked_wide[kConfig.stages][kConfig.qk_dim / 64][kConfig.walked * 128];
  u8 walked_narrow[kConfig.stages][kConfig.v_dim / 64][kConfig.walked * 128];
  u8 staging[8][2048];
  float lse[kConfig.stages][kConfig.walked];
  float delta[kConfig.stages][kConfig.walked];
  PipelineBarriers<1> held;
  PipelineBarriers<kConfig.stages> ring;

  static constexpr u32 kHeldBytes = sizeof(held_wide) + sizeof(held_narrow);
  static constexpr u32 kStageBytes = sizeof(walked_wide[0]) + sizeof(walked_narrow[0]);
};

template <PrefillBackwardConfig kConfig>
constexpr bool backward_legal() {
  constexpr PrefillBackwardConfig c = kConfig;
  static_assert(c.qk_dim % 64 == 0 && c.rope % 64 == 0 && c.v_dim % 64 == 0, "slabs of 64 columns");
  static_assert(c.walked % 16 == 0, "steps of 16 in the last products");
  static_assert(sizeof(BackwardStorage<c>) <= PrefillBackwardSharedBytes(c), "counted");
  static_assert(PrefillBackwardSharedBytes(c) <= 232448, "an SM's shared memory");
  return true;
}

// Loads the keys' rows, of which the last `rope` columns lie in an array of their own.
template <PrefillBackwardConfig kConfig, int kRows>
JAX_DS_DEVICE void load_keys(const PrefillBackwardParams& p, u8* shared, u64* barrier, int kv_head,
                             int row, int batch) {
  constexpr int kOwn = (kConfig.qk_dim - kConfig.rope) / 64;
  load_slabs<kRows>(shared, &p.k, barrier, kOwn, kv_head, row, batch);
  load_slabs<kRows>(shared + kOwn * kRows * 128, &p.k_rope, barrier, kConfig.rope / 64, 0, row,
                    batch);
}

// ---- dq: 128 queries against all keys they see --------------------------------------------------

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE int key_blocks(const PrefillBackwardParams& p, const HeadTile& tile) {
  int keys = p.keys;
  if (kConfig.causal) {
    const int end = min(tile.row + kBackwardHeld, p.queries);
    keys = max(0, min(keys, end + p.keys - p.queries));
  }
  return (keys + kConfig.walked - 1) / kConfig.walked;
}

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void produce_for_dq(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  HeadTile tile;
  for (int round = 0;
       head_tile(round, p.batch, p.heads, p.queries, p.section, kConfig.causal, tile); ++round) {
    const int kv_head = tile.head / (p.heads / p.kv_heads);
    held.acquire();
    held.commit(s.kHeldBytes);
    load_slabs<kBackwardHeld>(s.held_wide[0], &p.q, held.full(), kConfig.qk_dim / 64, tile.head,
                              tile.row, tile.batch);
    load_slabs<kBackwardHeld>(s.held_narrow[0], &p.dout, held.full(), kConfig.v_dim / 64, tile.head,
                              tile.row, tile.batch);
    held.advance();
    for (int block = key_blocks<kConfig>(p, tile) - 1; block >= 0; --block, ring.advance()) {
      ring.acquire();
      ring.commit(s.kStageBytes);
      const int row = block * kConfig.walked, slot = ring.slot();
      load_keys<kConfig, kConfig.walked>(p, s.walked_wide[slot][0], ring.full(), kv_head, row,
                                         tile.batch);
      load_slabs<kConfig.walked>(s.walked_narrow[slot][0], &p.v, ring.full(), kConfig.v_dim / 64,
                                 kv_head, row, tile.batch);
    }
  }
}

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void consume_for_dq(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kWalked = kConfig.walked, kHeld = kBackwardHeld;
  const int warp = warp_id(), group = warp / 4;
  const u32 q = shared_address(s.held_wide) + group * 64 * 128;
  const u32 dout = shared_address(s.held_narrow) + group * 64 * 128;
  const bool releases = threadIdx.x % 128 == 0;
  const float scale_log2 = p.scale * kLog2e;
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  HeadTile tile;
  for (int round = 0;
       head_tile(round, p.batch, p.heads, p.queries, p.section, kConfig.causal, tile); ++round) {
    const int row = tile.row + group * 64 + warp % 4 * 16;
    const i64 head = static_cast<i64>(tile.batch) * p.heads + tile.head;
    float lse_log2[2], delta[2];
    int limit[2];  // keys that this thread's two queries see
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + half * 8 + lane_id() / 4;
      const bool valid = i < p.queries;
      lse_log2[half] = valid ? p.lse[head * p.queries + i] * kLog2e : kInfinity;
      delta[half] = valid ? p.delta[head * p.queries + i] : 0.0f;
      limit[half] = kConfig.causal ? min(p.keys, i + 1 + p.keys - p.queries) : p.keys;
    }
    // Blocks from this one on hold keys that some query of the warpgroup does not see.
    int unmasked = p.keys;
    if (kConfig.causal) {
      unmasked = max(0, min(unmasked, tile.row + group * 64 + 1 + p.keys - p.queries));
    }
    unmasked /= kWalked;

    float dq[kConfig.qk_dim / 2] = {};
    u32 ds[kWalked / 16][4];
    u32 previous = 0;  // the slot whose keys the pending product reads
    const int blocks = key_blocks<kConfig>(p, tile);
    held.wait();
    for (int block = blocks - 1; block >= 0; --block, ring.advance()) {
      const int slot = ring.slot();
      float scores[kWalked / 2], dp[kWalked / 2];
      ring.wait();
      multiply_slabs<kConfig.qk_dim, kHeld, kWalked>(scores, q,
                                                     shared_address(s.walked_wide[slot]));
      multiply_slabs<kConfig.v_dim, kHeld, kWalked>(dp, dout,
                                                    shared_address(s.walked_narrow[slot]));
      // The last block's product runs under this one's exponentials.
      if (block < blocks - 1) {
        accumulate_slabs<kWalked>(dq, ds, shared_address(s.walked_wide[previous]));
        wgmma::wait_group<1>();
      } else {
        wgmma::wait_group<0>();
      }
      const bool masked = block >= unmasked;
      const int column = block * kWalked + lane_id() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kWalked / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = scores[4 * j + i];
          x = ex2(x * scale_log2 - lse_log2[i / 2]) * (dp[4 * j + i] - delta[i / 2]);
          if (masked && column + 8 * j + i % 2 >= limit[i / 2]) x = 0.0f;
        }
      }
      wgmma::wait_group<0>();
      if (block < blocks - 1 && releases) mbarrier_arrive(&s.ring.empty[previous]);
      pack_operand(scores, ds);
      previous = slot;
    }
    // The queries may be overwritten: every product with them is done.
    if (releases) held.release();
    held.advance();
    if (blocks > 0) {
      accumulate_slabs<kWalked>(dq, ds, shared_address(s.walked_wide[previous]));
      wgmma::wait_group<0>();
      if (releases) mbarrier_arrive(&s.ring.empty[previous]);
    }
#pragma unroll
    for (int j = 0; j < kConfig.qk_dim / 2; ++j) dq[j] *= p.scale;
    const i64 stride = static_cast<i64>(p.heads) * kConfig.qk_dim;
    u16* out = static_cast<u16*>(p.dq) + (static_cast<i64>(tile.batch) * p.queries + row) * stride +
               tile.head * kConfig.qk_dim;
#pragma unroll
    for (int slab = 0; slab < kConfig.qk_dim / 64; ++slab) {
      store_slab(dq, slab, shared_address(s.staging[warp]), out + slab * 64, stride,
                 p.queries - row);
    }
  }
}

// ---- dk and dv: 128 keys against all queries that see them, of every head that reads them -------

// First block of queries of which any sees a key of the tile.
template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE int first_query_block(const PrefillBackwardParams& p, const HeadTile& tile) {
  return kConfig.causal ? max(0, tile.row - (p.keys - p.queries)) / kConfig.walked : 0;
}

// One warp: a thread issues TMA, all lanes copy lse and delta.
template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void produce_for_dkv(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  const bool elected = elect_one();
  const int shared_by = p.heads / p.kv_heads;
  const int blocks = (p.queries + kConfig.walked - 1) / kConfig.walked;
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  HeadTile tile;
  for (int round = 0; head_tile(round, p.batch, p.kv_heads, p.keys, p.section, false, tile);
       ++round) {
    held.acquire();
    if (elected) {
      held.commit(s.kHeldBytes);
      load_keys<kConfig, kBackwardHeld>(p, s.held_wide[0], held.full(), tile.head, tile.row,
                                        tile.batch);
      load_slabs<kBackwardHeld>(s.held_narrow[0], &p.v, held.full(), kConfig.v_dim / 64, tile.head,
                                tile.row, tile.batch);
    }
    held.advance();
    for (int h = 0; h < shared_by; ++h) {
      const int head = tile.head * shared_by + h;
      const i64 rows = (static_cast<i64>(tile.batch) * p.heads + head) * p.queries;
      for (int block = first_query_block<kConfig>(p, tile); block < blocks;
           ++block, ring.advance()) {
        const int row = block * kConfig.walked, slot = ring.slot();
        ring.acquire();
        if (elected) {
          ring.commit(s.kStageBytes);
          load_slabs<kConfig.walked>(s.walked_wide[slot][0], &p.q, ring.full(), kConfig.qk_dim / 64,
                                     head, row, tile.batch);
          load_slabs<kConfig.walked>(s.walked_narrow[slot][0], &p.dout, ring.full(),
                                     kConfig.v_dim / 64, head, row, tile.batch);
        }
#pragma unroll
        for (int i = lane_id(); i < kConfig.walked; i += 32) {
          // Queries past the end are zero, and with lse and delta zero they add nothing.
          const bool valid = row + i < p.queries;
          const i64 at = valid ? rows + row + i : 0;
          cp_async_4(shared_address(&s.lse[slot][i]), p.lse + at, valid);
          cp_async_4(shared_address(&s.delta[slot][i]), p.delta + at, valid);
        }
        cp_async_mbarrier_arrive_noinc(shared_address(ring.full()));
      }
    }
  }
}

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void consume_for_dkv(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kWalked = kConfig.walked, kHeld = kBackwardHeld;
  constexpr int kOwn = (kConfig.qk_dim - kConfig.rope) / 64;
  const int warp = warp_id(), group = warp / 4;
  const u32 k = shared_address(s.held_wide) + group * 64 * 128;
  const u32 v = shared_address(s.held_narrow) + group * 64 * 128;
  const bool releases = threadIdx.x % 128 == 0;
  const int shared_by = p.heads / p.kv_heads;
  const int blocks = (p.queries + kWalked - 1) / kWalked;
  const float scale_log2 = p.scale * kLog2e;
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  HeadTile tile;
  for (int round = 0; head_tile(round, p.batch, p.kv_heads, p.keys, p.section, false, tile);
       ++round) {
    const int row = tile.row + group * 64 + warp % 4 * 16;
    // First query that sees this thread's first key; the second is eight further on.
    const int first = kConfig.causal ? row + lane_id() / 4 - (p.keys - p.queries) : 0;
    // Blocks from this one on are seen by every key of the warpgroup.
    const int last = tile.row + group * 64 + 63 - (p.keys - p.queries);
    const int unmasked = kConfig.causal ? (max(0, last) + kWalked - 1) / kWalked : 0;

    float dk[kConfig.qk_dim / 2] = {};
    float dv[kConfig.v_dim / 2] = {};
    held.wait();
    for (int h = 0; h < shared_by; ++h) {
      for (int block = first_query_block<kConfig>(p, tile); block < blocks;
           ++block, ring.advance()) {
        const int slot = ring.slot();
        const u32 q = shared_address(s.walked_wide[slot]);
        const u32 dout = shared_address(s.walked_narrow[slot]);
        const u32 lse = shared_address(s.lse[slot]) + lane_id() % 4 * 8;
        const u32 delta = shared_address(s.delta[slot]) + lane_id() % 4 * 8;
        const bool masked = block < unmasked;
        const int column = block * kWalked + lane_id() % 4 * 2;
        float scores[kWalked / 2], dp[kWalked / 2];
        u32 operand[kWalked / 16][4];
        ring.wait();
        multiply_slabs<kConfig.qk_dim, kHeld, kWalked>(scores, k, q);
        multiply_slabs<kConfig.v_dim, kHeld, kWalked>(dp, v, dout);
        wgmma::wait_group<1>();
#pragma unroll
        for (int j = 0; j < kWalked / 8; ++j) {
          const float2 column_lse = ld_shared_v2_f32(lse + j * 32);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = scores[4 * j + i];
            x = ex2(x * scale_log2 - (i % 2 ? column_lse.y : column_lse.x) * kLog2e);
            if (masked && column + 8 * j + i % 2 < first + i / 2 * 8) x = 0.0f;
          }
        }
        pack_operand(scores, operand);
        accumulate_slabs<kWalked>(dv, operand, dout);
        wgmma::wait_group<1>();
#pragma unroll
        for (int j = 0; j < kWalked / 8; ++j) {
          const float2 column_delta = ld_shared_v2_f32(delta + j * 32);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // The rounded probability serves here too: float32 ones would not fit in registers.
            const u32 pair = operand[j / 2][j % 2 * 2 + i / 2];
            const float probability = __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
            float& x = dp[4 * j + i];
            x = probability * (x - (i % 2 ? column_delta.y : column_delta.x));
            if (masked && column + 8 * j + i % 2 < first + i / 2 * 8) x = 0.0f;
          }
        }
        u32 ds[kWalked / 16][4];
        pack_operand(dp, ds);
        accumulate_slabs<kWalked>(dk, ds, q);
        wgmma::wait_group<0>();
        if (releases) ring.release();
      }
    }
    if (releases) held.release();
    held.advance();

#pragma unroll
    for (int j = 0; j < kConfig.qk_dim / 2; ++j) dk[j] *= p.scale;
    const u32 staging = shared_address(s.staging[warp]);
    const i64 token = static_cast<i64>(tile.batch) * p.keys + row;
    auto store = [&](auto& d, int slab, void* out, int width, int place) {
      const i64 stride = static_cast<i64>(p.kv_heads) * width;
      store_slab(d, slab, staging,
                 static_cast<u16*>(out) + token * stride + tile.head * width + place * 64, stride,
                 p.keys - row);
    };
#pragma unroll
    for (int slab = 0; slab < kConfig.qk_dim / 64; ++slab) {
      if (slab < kOwn) {
        store(dk, slab, p.dk, kOwn * 64, slab);
      } else {
        store(dk, slab, p.dk_rope, kConfig.rope, slab - kOwn);
      }
    }
#pragma unroll
    for (int slab = 0; slab < kConfig.v_dim / 64; ++slab) {
      store(dv, slab, p.dv, kConfig.v_dim, slab);
    }
  }
}

// ---- entries ------------------------------------------------------------------------------------

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE BackwardStorage<kConfig>& backward_prologue(const PrefillBackwardParams& p,
                                                          u32 filling) {
  static_assert(backward_legal<kConfig>());
  extern __shared__ __align__(1024) u8 memory[];
  BackwardStorage<kConfig>& s = *reinterpret_cast<BackwardStorage<kConfig>*>(memory);
  if (warp_id() == 0 && elect_one()) {
    prefetch_tensormap(&p.q);
    prefetch_tensormap(&p.dout);
    prefetch_tensormap(&p.k);
    prefetch_tensormap(&p.v);
    s.held.init(1, 2);
    s.ring.init(filling, 2);
    fence_mbarrier_init();
  }
  griddepcontrol_wait();
  __syncthreads();
  return s;
}

template <PrefillBackwardConfig kConfig>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    PrefillDq(const __grid_constant__ PrefillBackwardParams p) {
  BackwardStorage<kConfig>& s = backward_prologue<kConfig>(p, 1);
  const u32 warp = warp_id();
  if (warp >= 8) {
    setmaxnreg_dec<24>();
    if (warp == 8 && elect_one()) produce_for_dq<kConfig>(p, s);
  } else {
    setmaxnreg_inc<240>();
    consume_for_dq<kConfig>(p, s);
  }
}

template <PrefillBackwardConfig kConfig>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    PrefillDkv(const __grid_constant__ PrefillBackwardParams p) {
  BackwardStorage<kConfig>& s = backward_prologue<kConfig>(p, 1 + 32);
  const u32 warp = warp_id();
  if (warp >= 8) {
    setmaxnreg_dec<24>();
    if (warp == 8) produce_for_dkv<kConfig>(p, s);
  } else {
    setmaxnreg_inc<240>();
    consume_for_dkv<kConfig>(p, s);
  }
}

}  // namespace jax_ds::flash_mla
