// dk and dv: 128 keys against all queries that see them, of every head that reads them
// (prefill_backward.cuh).
#pragma once

#include "flash_mla/kernels/prefill_backward.cuh"

namespace jax_ds::flash_mla {

// ---- producer: one thread -----------------------------------------------------------------------

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void produce_for_dkv(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kWalked = kConfig.walked;
  const int shared_by = p.queries.heads / p.keys.heads;
  Pipeline<1> held(s.held);
  Pipeline<kConfig.stages> ring(s.ring);
  TileReader<false> reader(s.board);
  while (reader.next()) {
    const HeldTile tile = reader.tile();
    held.acquire();
    held.commit(s.kHeldBytes);
    load_keys<kConfig, kBackwardHeld>(p, s.held_wide[0], held.full(), tile.head, tile.row,
                                      tile.batch);
    load_slabs<kBackwardHeld, kBackwardBox>(s.held_narrow[0], &p.v, held.full(), kConfig.v_dim / 64,
                                            tile.head, tile.row, tile.batch);
    held.advance();
    const int blocks = walked_blocks(tile, kWalked);
    for (int h = 0; h < shared_by; ++h) {
      const int head = tile.head * shared_by + h;
      for (int block = 0; block < blocks; ++block, ring.advance()) {
        const int row = tile.first + block * kWalked, slot = ring.slot();
        ring.acquire();
        ring.commit(s.kStageBytes + sizeof(s.statistics[0]));
        load_slabs<kWalked>(s.walked_wide[slot][0], &p.q, ring.full(), kConfig.qk_dim / 64, head,
                            row, tile.batch);
        load_slabs<kWalked>(s.walked_narrow[slot][0], &p.dout, ring.full(), kConfig.v_dim / 64,
                            head, row, tile.batch);
        // Past the last query everything is zero, and with lse and delta zero it adds nothing.
        tma_load_3d(s.statistics[slot], &p.statistics, ring.full(), row, 0,
                    tile.batch * p.queries.heads + head);
      }
    }
  }
}

// ---- consumer: one math warpgroup ---------------------------------------------------------------

// A warpgroup holds 64 keys.
template <PrefillBackwardConfig kConfig>
struct DkvConsumer {
  static constexpr int kWalked = kConfig.walked, kHeld = kBackwardHeld;

  const PrefillBackwardParams& p;
  BackwardStorage<kConfig>& s;
  Pipeline<kConfig.stages> ring;
  const u32 group = warp_id() / 4;
  const u32 k = shared_address(s.held_wide) + group * 64 * 128;
  const u32 v = shared_address(s.held_narrow) + group * 64 * 128;
  const bool releases = threadIdx.x % 128 == 0;

  JAX_DS_DEVICE DkvConsumer(const PrefillBackwardParams& params, BackwardStorage<kConfig>& storage)
      : p(params), s(storage), ring(storage.ring) {}

  // This thread's columns of a row of the block's statistics: 0 is lse, 1 is delta.
  JAX_DS_DEVICE float2 statistic(int slot, int which, int j) const {
    return ld_shared_v2_f32(shared_address(s.statistics[slot][which]) + lane_id() % 4 * 8 + j * 32);
  }

  // Scores to probabilities.
  JAX_DS_DEVICE void exponentiate(float (&scores)[kWalked / 2], int slot) const {
    const float scale_log2 = p.scale * kLog2e;
#pragma unroll
    for (int j = 0; j < kWalked / 8; ++j) {
      const float2 lse = statistic(slot, 0, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[4 * j + i] = ex2(scores[4 * j + i] * scale_log2 - (i % 2 ? lse.y : lse.x));
      }
    }
  }

  // dp to dp - delta.
  JAX_DS_DEVICE void subtract_delta(float (&dp)[kWalked / 2], int slot) const {
#pragma unroll
    for (int j = 0; j < kWalked / 8; ++j) {
      const float2 delta = statistic(slot, 1, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[4 * j + i] -= i % 2 ? delta.y : delta.x;
    }
  }

  // ds / scale = p (dp - delta), of pairs of bf16: it is rounded to them anyway, and float32
  // probabilities would not fit in registers.
  JAX_DS_DEVICE static void multiply_pairs(const u32 (&probabilities)[kWalked / 16][4],
                                           const float (&dp)[kWalked / 2],
                                           u32 (&ds)[kWalked / 16][4]) {
#pragma unroll
    for (int j = 0; j < kWalked / 4; ++j) {
      ds[j / 4][j % 4] =
          mul_bf16x2(probabilities[j / 4][j % 4], cvt_bf16x2(dp[2 * j], dp[2 * j + 1]));
    }
  }

  // Queries that see no key may hold NaN. Every warp looks at all of them, so that all agree.
  JAX_DS_DEVICE void clear_blind_queries(int slot) const {
    const float* lse = s.statistics[slot][0];
    bool any = false;
    for (int i = lane_id(); i < kWalked; i += 32) any |= lse[i] == kInfinity;
    if (!__any_sync(0xffffffffu, any)) return;
    const auto blind = [=](int i) { return lse[i] == kInfinity; };
    clear_rows<kWalked>(shared_address(s.walked_wide[slot]), kConfig.qk_dim / 64, group, blind);
    clear_rows<kWalked>(shared_address(s.walked_narrow[slot]), kConfig.v_dim / 64, group, blind);
  }

  // Zeroes what the mask hides. What the thread's keys see is asked for anew: few blocks need it.
  JAX_DS_DEVICE void hide_unseen(float (&d)[kWalked / 2], int query, const HeldTile& tile) const {
    Interval<Side::kKeys, kConfig.mask> seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row + threadIdx.x / 32 * 16 + half * 8 + lane_id() / 4;
      seen[half] = row_interval<Side::kKeys, kConfig.mask>(p.keys, min(row, tile.end - 1));
    }
    hide<kWalked>(d, query, seen, 0.0f);
  }

  // scores = k q^T of the block of queries in this slot; asynchronous.
  JAX_DS_DEVICE void multiply_queries(float (&scores)[kWalked / 2], u32 slot, bool masked) const {
    if (kConfig.mask != kFullMask && masked) clear_blind_queries(slot);
    multiply_slabs<kConfig.qk_dim, kHeld, kWalked>(scores, k, shared_address(s.walked_wide[slot]));
  }

  // Of the block whose scores are given: dv += p^T dout; leaves ds^T for dk.
  JAX_DS_DEVICE void multiply_values(const HeldTile& tile, int query, u32 slot, bool masked,
                                     float (&scores)[kWalked / 2], u32 (&ds)[kWalked / 16][4],
                                     float (&dv)[kConfig.v_dim / 2]) const {
    const u32 dout = shared_address(s.walked_narrow[slot]);
    u32 probabilities[kWalked / 16][4];
    exponentiate(scores, slot);
    if (masked) hide_unseen(scores, query, tile);
    pack_operand(scores, probabilities);
    // The same registers once more: beside dk and dv, 160 of them at head sizes 192/128, there is
    // no room for scores and dp of 64 queries at once.
    float (&dp)[kWalked / 2] = scores;
    multiply_slabs<kConfig.v_dim, kHeld, kWalked>(dp, v, dout);
    accumulate_slabs<kWalked>(dv, probabilities, dout);
    wgmma::wait_group<1>();
    subtract_delta(dp, slot);
    if (masked) hide_unseen(dp, query, tile);
    multiply_pairs(probabilities, dp, ds);
    wgmma::wait_group<0>();
  }

  // Passes over blocks of queries that see none of this warpgroup's keys.
  JAX_DS_DEVICE void pass(int blocks) {
    for (; blocks > 0; --blocks, ring.advance()) {
      ring.wait();
      sync_warpgroup(group);  // no warp may still wait for what is released
      if (releases) ring.release();
    }
  }

  // Takes the held keys past the queries of every head that reads them, but for those of the first
  // head before any that see this warpgroup's keys. The next block's scores are issued with dk's
  // product of this one.
  JAX_DS_DEVICE void walk(const HeldTile& tile, float (&dk)[kConfig.qk_dim / 2],
                          float (&dv)[kConfig.v_dim / 2]) {
    const int row = tile.row + group * 64;
    const auto common = common_interval<Side::kKeys, kConfig.mask>(p.keys, tile, row);
    const auto joint = joint_interval<Side::kKeys, kConfig.mask>(p.keys, tile, row);
    const int blocks = warp_uniform(walked_blocks(tile, kWalked));
    const int before = warp_uniform(min(blocks - 1, max(0, joint.first - tile.first) / kWalked));
    int left = blocks * (p.queries.heads / p.keys.heads) - before;
    int query = tile.first + before * kWalked;
    pass(before);
    ring.wait();
    bool masked = !common.sees_all(query, kWalked);
    float scores[kWalked / 2];
    multiply_queries(scores, warp_uniform(ring.slot()), masked);
    wgmma::wait_group<0>();
    while (true) {
      const u32 place = ring.slot();
      const int slot = warp_uniform(place);
      const u32 q = shared_address(s.walked_wide[slot]);
      u32 ds[kWalked / 16][4];
      multiply_values(tile, query, slot, masked, scores, ds, dv);
      ring.advance();
      query = query + kWalked < tile.last ? query + kWalked : tile.first;  // of the next head
      if (--left == 0) {
        // The next keys and values may arrive while the rest of this tile is done.
        if (releases) mbarrier_arrive(s.held.empty);
        accumulate_slabs<kWalked>(dk, ds, q);
        wgmma::wait_group<0>();
        if (releases) mbarrier_arrive(&s.ring.empty[place]);
        return;
      }
      ring.wait();
      masked = !common.sees_all(query, kWalked);
      accumulate_slabs<kWalked>(dk, ds, q);
      multiply_queries(scores, warp_uniform(ring.slot()), masked);
      wgmma::wait_group<1>();
      if (releases) mbarrier_arrive(&s.ring.empty[place]);
      wgmma::wait_group<0>();
    }
  }
};

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void consume_for_dkv(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kOwn = kConfig.qk_dim - kConfig.rope;
  DkvConsumer<kConfig> consumer(p, s);
  TileReader<true> reader(s.board);
  while (reader.next()) {
    const HeldTile& tile = reader.posted();
    float dk[kConfig.qk_dim / 2] = {};
    float dv[kConfig.v_dim / 2] = {};
    mbarrier_wait(s.held.full, reader.phase());
    consumer.walk(tile, dk, dv);

#pragma unroll
    for (int j = 0; j < kConfig.qk_dim / 2; ++j) dk[j] *= p.scale;
    const int warp = threadIdx.x / 32, row = tile.row + warp * 16;
    const u32 staging = shared_address(s.staging[warp]);
    store_rows<0, kOwn>(dk, staging, p.dk, p.keys, tile, row);
    store_rows<kOwn, kConfig.rope>(dk, staging, p.dk_rope, p.keys, tile, row);
    store_rows<0, kConfig.v_dim>(dv, staging, p.dv, p.keys, tile, row);
  }
}

template <PrefillBackwardConfig kConfig>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    PrefillDkv(const __grid_constant__ PrefillBackwardParams p) {
  BackwardStorage<kConfig>& s = backward_prologue<kConfig>(p);
  run_roles<Side::kKeys, kConfig.mask, 240>(
      p.keys, s.board, [&] { produce_for_dkv<kConfig>(p, s); },
      [&] { consume_for_dkv<kConfig>(p, s); });
}

}  // namespace jax_ds::flash_mla
