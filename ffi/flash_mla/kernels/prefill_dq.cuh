// dq: 128 queries against all keys they see (prefill_backward.cuh); and what PrefillDkv needs to
// know of each query.
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
    load_slabs<kBackwardHeld, kBackwardBox>(s.held_wide[0], &p.q, held.full(), kConfig.qk_dim / 64,
                                            tile.head, tile.row, tile.batch);
    load_slabs<kBackwardHeld, kBackwardBox>(s.held_narrow[0], &p.dout, held.full(),
                                            kConfig.v_dim / 64, tile.head, tile.row, tile.batch);
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

// ---- what is known of a query -------------------------------------------------------------------

// The dot product of eight pairs of bf16.
JAX_DS_DEVICE float dot_bf16(uint4 a, uint4 b) {
  const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(x[i] << 16), __uint_as_float(y[i] << 16), sum);
    sum = fmaf(__uint_as_float(x[i] & 0xffff0000u), __uint_as_float(y[i] & 0xffff0000u), sum);
  }
  return sum;
}

struct QueryStatistics {
  float lse;    // in units of log2; +inf of a query that sees no key
  float delta;  // dout . out - dlse
};

// Of query `i`: computed by the four threads of a quad, and left in memory for PrefillDkv by the
// first of them if `keeps`.
template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE QueryStatistics query_statistics(const PrefillBackwardParams& p, const HeldTile& tile,
                                               int i, bool keeps) {
  constexpr int kPieces = kConfig.v_dim / 8;  // of a row, 16 bytes each
  const i64 row = (static_cast<i64>(tile.batch) * p.queries.rows + i) * p.queries.heads + tile.head;
  const uint4* out = static_cast<const uint4*>(p.out) + row * kPieces;
  const uint4* dout = static_cast<const uint4*>(p.dout_rows) + row * kPieces;
  const float lse = p.lse[row], dlse = p.dlse[row];
  float delta = 0.0f;
#pragma unroll
  for (int piece = lane_id() % 4; piece < kPieces; piece += 4) {
    delta += dot_bf16(out[piece], dout[piece]);
  }
  delta += __shfl_xor_sync(0xffffffffu, delta, 1);
  delta += __shfl_xor_sync(0xffffffffu, delta, 2);
  // A query that sees no key: probabilities of zero, and no NaN of its cotangents may meet them.
  const bool blind = lse == -kInfinity;
  const QueryStatistics known = {blind ? kInfinity : lse * kLog2e, blind ? 0.0f : delta - dlse};
  if (keeps && lane_id() % 4 == 0) {
    const int stride = QueryStatisticsStride(p.queries.rows);
    const i64 pair = static_cast<i64>(tile.batch) * p.queries.heads + tile.head;
    float* kept = p.known + pair * 2 * stride + i;
    kept[0] = known.lse;
    kept[stride] = known.delta;
  }
  return known;
}

// ---- consumer: one math warpgroup ---------------------------------------------------------------

// A warpgroup holds 64 queries.
template <PrefillBackwardConfig kConfig>
struct DqConsumer {
  static constexpr int kWalked = kConfig.walked, kHeld = kBackwardHeld;
  static constexpr Side kSide = Side::kQueries;

  const PrefillBackwardParams& p;
  BackwardStorage<kConfig>& s;
  Pipeline<1> held;
  Pipeline<kConfig.stages> ring;
  const u32 warp = warp_id(), group = warp / 4;
  const u32 q = shared_address(s.held_wide) + group * 64 * 128;
  const u32 dout = shared_address(s.held_narrow) + group * 64 * 128;
  const bool releases = threadIdx.x % 128 == 0;
  const int keys_end;  // of a packed batch: padding from here on

  JAX_DS_DEVICE DqConsumer(const PrefillBackwardParams& params, BackwardStorage<kConfig>& storage)
      : p(params),
        s(storage),
        held(storage.held),
        ring(storage.ring),
        keys_end(kConfig.mask == kPackedMask ? params.queries.packed[kPackedOthersEnd] : 0) {}

  // Keys past the end of a packed batch may hold NaN.
  JAX_DS_DEVICE void clear_padding(int slot, int key) const {
    const int end = keys_end;
    if (key + kWalked <= end) return;
    clear_rows<kWalked>(shared_address(s.walked_wide[slot]), kConfig.qk_dim / 64, group,
                        [=](int i) { return key + i >= end; });
  }

  // A warpgroup's queries see the first blocks of the tile's keys: so many, one at least.
  JAX_DS_DEVICE int seen_blocks(const HeldTile& tile, u32 of) const {
    const int last = joint_interval<kSide, kConfig.mask>(p.queries, tile, tile.row + of * 64).last;
    const int blocks = max(1, (last - tile.first + kWalked - 1) / kWalked);
    return warp_uniform(min(blocks, walked_blocks(tile, kWalked)));
  }

  // dq += ds k, asynchronous.
  JAX_DS_DEVICE void accumulate(float (&dq)[kConfig.qk_dim / 2], const u32 (&ds)[kWalked / 16][4],
                                u32 slot) const {
    accumulate_slabs<kWalked>(dq, ds, shared_address(s.walked_wide[warp_uniform(slot)]));
  }

  // Takes this thread's rows past the tile's keys.
  JAX_DS_DEVICE void walk(const HeldTile& tile, const QueryStatistics (&known)[2],
                          const Interval<kSide, kConfig.mask> (&seen)[2],
                          float (&dq)[kConfig.qk_dim / 2]) {
    const float scale_log2 = p.scale * kLog2e;
    const auto common =
        common_interval<kSide, kConfig.mask>(p.queries, tile, tile.row + group * 64);
    const int all = walked_blocks(tile, kWalked), blocks = seen_blocks(tile, group);
    // Who sees fewer waits for the other: the ring is too short for one to go ahead.
    const int others = seen_blocks(tile, group ^ 1);
    const int meeting = blocks == others ? -1 : min(blocks, others) - 1;
    u32 ds[kWalked / 16][4];
    u32 previous = 0;  // the slot whose keys the pending product reads
    for (int block = all; block > blocks; --block, ring.advance()) {
      ring.wait();
      sync_warpgroup(group);  // no warp may still wait for what is released
      if (releases) ring.release();
    }
    held.wait();
    for (int block = blocks - 1; block >= 0; --block, ring.advance()) {
      const int slot = warp_uniform(ring.slot()), key = tile.first + block * kWalked;
      float scores[kWalked / 2], dp[kWalked / 2];
      if (block == meeting) bar_sync(kMeetingBarrier, 256);
      ring.wait();
      // Only the last of all can reach into the padding.
      if (kConfig.mask == kPackedMask && block == all - 1) clear_padding(slot, key);
      multiply_slabs<kConfig.qk_dim, kHeld, kWalked>(scores, q,
                                                     shared_address(s.walked_wide[slot]));
      multiply_slabs<kConfig.v_dim, kHeld, kWalked>(dp, dout,
                                                    shared_address(s.walked_narrow[slot]));
      // The last block's product runs under this one's exponentials.
      if (block < blocks - 1) {
        accumulate(dq, ds, previous);
        wgmma::wait_group<1>();
      } else {
        wgmma::wait_group<0>();
      }
      // The next queries may arrive while the rest of this tile is done.
      if (releases && block == 0) held.release();
#pragma unroll
      for (int j = 0; j < kWalked / 2; ++j) {
        const int half = j / 2 % 2;
        scores[j] = ex2(scores[j] * scale_log2 - known[half].lse) * (dp[j] - known[half].delta);
      }
      if (!common.sees_all(key, kWalked)) hide<kWalked>(scores, key, seen, 0.0f);
      wgmma::wait_group<0>();
      if (block < blocks - 1 && releases) mbarrier_arrive(&s.ring.empty[previous]);
      pack_operand(scores, ds);
      previous = slot;
    }
    held.advance();
    accumulate(dq, ds, previous);
    wgmma::wait_group<0>();
    if (releases) mbarrier_arrive(&s.ring.empty[previous]);
  }
};

template <PrefillBackwardConfig kConfig>
JAX_DS_DEVICE void consume_for_dq(const PrefillBackwardParams& p, BackwardStorage<kConfig>& s) {
  DqConsumer<kConfig> consumer(p, s);
  TileReader<true> reader(s.board);
  while (reader.next()) {
    const HeldTile tile = reader.tile();
    const int row = tile.row + consumer.warp * 16;
    QueryStatistics known[2];
    Interval<Side::kQueries, kConfig.mask> seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + half * 8 + static_cast<int>(lane_id()) / 4, i = min(own, tile.end - 1);
      known[half] = query_statistics<kConfig>(p, tile, i, i == own);
      seen[half] = row_interval<Side::kQueries, kConfig.mask>(p.queries, i);
    }
    float dq[kConfig.qk_dim / 2] = {};
    consumer.walk(tile, known, seen, dq);
#pragma unroll
    for (int j = 0; j < kConfig.qk_dim / 2; ++j) dq[j] *= p.scale;
    store_rows<0, kConfig.qk_dim>(dq, shared_address(s.staging[consumer.warp]), p.dq, p.queries,
                                  tile, row);
  }
}

template <PrefillBackwardConfig kConfig>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    PrefillDq(const __grid_constant__ PrefillBackwardParams p) {
  BackwardStorage<kConfig>& s = backward_prologue<kConfig>(p);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.keys.counter = 0;  // for PrefillDkv
  // Where dq takes fewer registers, the producers need not do with 24.
  constexpr int kRegisters = kConfig.qk_dim > 128 ? 240 : 232;
  run_roles<Side::kQueries, kConfig.mask, kRegisters>(
      p.queries, s.board, [&] { produce_for_dq<kConfig>(p, s); },
      [&] { consume_for_dq<kConfig>(p, s); });
}

}  // namespace jax_ds::flash_mla
