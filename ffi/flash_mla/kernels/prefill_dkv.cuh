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
    load_slabs<kBackwardHeld>(s.held_narrow[0], &p.v, held.full(), kConfig.v_dim / 64, tile.head,
                              tile.row, tile.batch);
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
    clear_rows<kWalked>(shared_address(s.walked_wide[slot]), kConfig.qk_dim / 64, 3 + group, blind);
    clear_rows<kWalked>(shared_address(s.walked_narrow[slot]), kConfig.v_dim / 64, 3 + group,
                        blind);
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

  // Takes the held keys past the queries of every head that reads them.
  JAX_DS_DEVICE void walk(const HeldTile& tile, const Interval<Side::kKeys, kConfig.mask>& common,
                          float (&dk)[kConfig.qk_dim / 2], float (&dv)[kConfig.v_dim / 2]) {
    const int blocks = walked_blocks(tile, kWalked) * (p.queries.heads / p.keys.heads);
    int query = tile.first;
    for (int block = 0; block < blocks; ++block, ring.advance()) {
      const int slot = warp_uniform(ring.slot());
      const u32 q = shared_address(s.walked_wide[slot]);
      const u32 dout = shared_address(s.walked_narrow[slot]);
      const bool masked = !common.sees_all(query, kWalked);
      float scores[kWalked / 2];
      u32 operand[kWalked / 16][4];
      ring.wait();
      if (kConfig.mask != kFullMask && masked) clear_blind_queries(slot);
      multiply_slabs<kConfig.qk_dim, kHeld, kWalked>(scores, k, q);
      wgmma::wait_group<0>();
      exponentiate(scores, slot);
      if (masked) hide_unseen(scores, query, tile);
      pack_operand(scores, operand);

      // The same registers once more: beside dk and dv, 160 of them at head sizes 192/128, there is
      // no room for scores and dp of 64 queries at once.
      float (&dp)[kWalked / 2] = scores;
      multiply_slabs<kConfig.v_dim, kHeld, kWalked>(dp, v, dout);
      accumulate_slabs<kWalked>(dv, operand, dout);
      wgmma::wait_group<1>();
      // The next keys and values may arrive while the rest of this tile is done.
      if (releases && block == blocks - 1) mbarrier_arrive(s.held.empty);
      subtract_delta(dp, slot);
      if (masked) hide_unseen(dp, query, tile);
      u32 ds[kWalked / 16][4];
      multiply_pairs(operand, dp, ds);
      wgmma::wait_group<0>();
      accumulate_slabs<kWalked>(dk, ds, q);
      wgmma::wait_group<0>();
      if (releases) ring.release();
      query += kWalked;
      if (query >= tile.last) query = tile.first;  // of the next head
    }
  }
};

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void consume_for_dkv(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  constexpr int kOwn = (kConfig.qk_dim - kConfig.rope) / 64;
  DkvConsumer<kConfig> consumer(p, s);
  TileReader<true> reader(s.board);
  while (reader.next()) {
    const HeldTile& tile = reader.posted();
    const auto common =
        common_interval<Side::kKeys, kConfig.mask>(p.keys, tile, tile.row + consumer.group * 64);
    float dk[kConfig.qk_dim / 2] = {};
    float dv[kConfig.v_dim / 2] = {};
    mbarrier_wait(s.held.full, reader.phase());
    consumer.walk(tile, common, dk, dv);

#pragma unroll
    for (int j = 0; j < kConfig.qk_dim / 2; ++j) dk[j] *= p.scale;
    const int warp = threadIdx.x / 32, row = tile.row + warp * 16;
    const i64 token = static_cast<i64>(tile.batch) * p.keys.rows + row;
    auto store = [&](auto& d, int slab, void* out, int width, int place) {
      const i64 stride = static_cast<i64>(p.keys.heads) * width;
      store_slab(d, slab, shared_address(s.staging[warp]),
                 static_cast<u16*>(out) + token * stride + tile.head * width + place * 64, stride,
                 tile.end - row);
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

template <PrefillBackwardConfig kConfig>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    PrefillDkv(const __grid_constant__ PrefillBackwardParams p) {
  BackwardStorage<kConfig>& s = backward_prologue<kConfig>(p);
  run_roles<Side::kKeys, kConfig.mask, 240>(
      p.keys, s.board, [&] { produce_for_dkv<kConfig>(p, s); },
      [&] { consume_for_dkv<kConfig>(p, s); });
}

}  // namespace jax_ds::flash_mla
