// dq: 128 queries against all keys they see (prefill_backward.cuh).
#pragma once

#include "flash_mla/kernels/prefill_backward.cuh"

namespace jax_ds::flash_mla {

// ---- producer: one thread -----------------------------------------------------------------------

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void produce_for_dq(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kWalked = kConfig.walked;
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  TileReader<false> reader(s.board);
  while (reader.next()) {
    const HeldTile tile = reader.tile();
    const int kv_head = tile.head / (p.queries.heads / p.keys.heads);
    held.acquire();
    held.commit(s.kHeldBytes);
    load_slabs<kBackwardHeld>(s.held_wide[0], &p.q, held.full(), kConfig.qk_dim / 64, tile.head,
                              tile.row, tile.batch);
    load_slabs<kBackwardHeld>(s.held_narrow[0], &p.dout, held.full(), kConfig.v_dim / 64, tile.head,
                              tile.row, tile.batch);
    held.advance();
    for (int block = walked_blocks(tile, kWalked) - 1; block >= 0; --block, ring.advance()) {
      ring.acquire();
      ring.commit(s.kStageBytes);
      const int row = tile.first + block * kWalked, slot = ring.slot();
      load_keys<kConfig, kWalked>(p, s.walked_wide[slot][0], ring.full(), kv_head, row, tile.batch);
      load_slabs<kWalked>(s.walked_narrow[slot][0], &p.v, ring.full(), kConfig.v_dim / 64, kv_head,
                          row, tile.batch);
    }
  }
}

// ---- consumer: one math warpgroup ---------------------------------------------------------------

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void consume_for_dq(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kWalked = kConfig.walked, kHeld = kBackwardHeld;
  const int warp = warp_id(), group = warp / 4;
  const u32 q = shared_address(s.held_wide) + group * 64 * 128;
  const u32 dout = shared_address(s.held_narrow) + group * 64 * 128;
  const bool releases = threadIdx.x % 128 == 0;
  const float scale_log2 = p.scale * kLog2e;
  const int keys_end = kConfig.mask == kPackedMask ? p.queries.packed[kPackedOthersEnd] : 0;
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  TileReader<true> reader(s.board);
  while (reader.next()) {
    const HeldTile tile = reader.tile();
    const int row = tile.row + group * 64 + warp % 4 * 16;
    const int stride = QueryStatisticsStride(p.queries.rows);
    const float* statistics =
        p.rows + (static_cast<i64>(tile.batch) * p.queries.heads + tile.head) * 2 * stride;
    float lse[2], delta[2];
    Interval<Side::kQueries, kConfig.mask> seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = min(row + half * 8 + static_cast<int>(lane_id()) / 4, tile.end - 1);
      lse[half] = statistics[i];
      delta[half] = statistics[stride + i];
      seen[half] = row_interval<Side::kQueries, kConfig.mask>(p.queries, i);
    }
    const auto common =
        common_interval<Side::kQueries, kConfig.mask>(p.queries, tile, tile.row + group * 64);

    float dq[kConfig.qk_dim / 2] = {};
    u32 ds[kWalked / 16][4];
    u32 previous = 0;  // the slot whose keys the pending product reads
    const int blocks = walked_blocks(tile, kWalked);
    held.wait();
    for (int block = blocks - 1; block >= 0; --block, ring.advance()) {
      const int slot = warp_uniform(ring.slot()), key = tile.first + block * kWalked;
      float scores[kWalked / 2], dp[kWalked / 2];
      ring.wait();
      if constexpr (kConfig.mask == kPackedMask) {
        // Only the last block can reach into the padding.
        if (block == blocks - 1 && key + kWalked > keys_end) {
          clear_rows<kWalked>(shared_address(s.walked_wide[slot]), kConfig.qk_dim / 64, 3 + group,
                              [=](int i) { return key + i >= keys_end; });
        }
      }
      multiply_slabs<kConfig.qk_dim, kHeld, kWalked>(scores, q,
                                                     shared_address(s.walked_wide[slot]));
      multiply_slabs<kConfig.v_dim, kHeld, kWalked>(dp, dout,
                                                    shared_address(s.walked_narrow[slot]));
      // The last block's product runs under this one's exponentials.
      if (block < blocks - 1) {
        accumulate_slabs<kWalked>(dq, ds, shared_address(s.walked_wide[warp_uniform(previous)]));
        wgmma::wait_group<1>();
      } else {
        wgmma::wait_group<0>();
      }
      // The next queries may arrive while the rest of this tile is done.
      if (releases && block == 0) held.release();
#pragma unroll
      for (int j = 0; j < kWalked / 2; ++j) {
        const int half = j / 2 % 2;
        scores[j] = ex2(scores[j] * scale_log2 - lse[half]) * (dp[j] - delta[half]);
      }
      if (!common.sees_all(key, kWalked)) {
        hide<kWalked>(scores, key, seen, 0.0f);
      }
      wgmma::wait_group<0>();
      if (block < blocks - 1 && releases) mbarrier_arrive(&s.ring.empty[previous]);
      pack_operand(scores, ds);
      previous = slot;
    }
    held.advance();
    accumulate_slabs<kWalked>(dq, ds, shared_address(s.walked_wide[warp_uniform(previous)]));
    wgmma::wait_group<0>();
    if (releases) mbarrier_arrive(&s.ring.empty[previous]);
#pragma unroll
    for (int j = 0; j < kConfig.qk_dim / 2; ++j) dq[j] *= p.scale;
    const i64 token_stride = static_cast<i64>(p.queries.heads) * kConfig.qk_dim;
    u16* out = static_cast<u16*>(p.dq) +
               (static_cast<i64>(tile.batch) * p.queries.rows + row) * token_stride +
               tile.head * kConfig.qk_dim;
#pragma unroll
    for (int slab = 0; slab < kConfig.qk_dim / 64; ++slab) {
      store_slab(dq, slab, shared_address(s.staging[warp]), out + slab * 64, token_stride,
                 tile.end - row);
    }
  }
}

template <PrefillBackwardConfig kConfig>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    PrefillDq(const __grid_constant__ PrefillBackwardParams p) {
  BackwardStorage<kConfig>& s = backward_prologue<kConfig>(p);
  run_roles<Side::kQueries, kConfig.mask, 240>(
      p.queries, s.board, [&] { produce_for_dq<kConfig>(p, s); },
      [&] { consume_for_dq<kConfig>(p, s); });
}

}  // namespace jax_ds::flash_mla
