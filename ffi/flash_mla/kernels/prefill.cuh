// Attention with a head size of queries and keys that differs from that of values: 192/128 in
// DeepSeek models. out = softmax(scale * q k^T + mask) v, one pass, nothing of size Sq x Sk stored.
//
// A CTA takes 128 queries of one head. One thread produces: TMA brings the queries, then tiles of
// keys and of values into two rings. Two math warpgroups consume, 64 queries each: scores of the
// next tile of keys and products with the current tile of values are issued together, and the
// softmax of the next tile runs under the latter. The warpgroups take turns at issuing, so that one
// computes exponentials while the other has the tensor cores (FlashAttention-3's two overlaps:
// Shah et al. 2024, section 3). The first scores of the next tile of queries are issued with the
// last product of this one, whose output leaves meanwhile. The grid is persistent; a thread of its
// own deals out tiles of queries (prefill_tiles.cuh). Tiles of keys are walked from the diagonal
// backwards, so that only the first ones are masked.
#pragma once

#include "flash_mla/kernels/prefill_common.cuh"
#include "flash_mla/kernels/prefill_softmax.cuh"
#include "flash_mla/kernels/prefill_tiles.cuh"

namespace jax_ds::flash_mla {

// ---- shared storage -----------------------------------------------------------------------------

// Tiles are held as slabs of 64 columns: rows of 128 bytes, swizzled.
template <PrefillConfig kConfig>
struct PrefillStorage {
  static constexpr int kQSlab = kPrefillBoxM * 128;
  static constexpr int kKeySlab = kConfig.block_n * 128;
  u8 q[2][kConfig.qk_dim / 64][kQSlab];  // of each math warpgroup
  u8 k[kConfig.stages][kConfig.qk_dim / 64][kKeySlab];
  u8 v[kConfig.stages][kConfig.v_dim / 64][kKeySlab];
  u8 staging[8][2048];
  TileBoard board;
  PipelineBarriers<1> q_ring[2];
  PipelineBarriers<kConfig.stages> k_ring;
  PipelineBarriers<kConfig.stages> v_ring;
};

template <PrefillConfig kConfig>
constexpr bool prefill_legal() {
  constexpr PrefillConfig c = kConfig;
  static_assert(c.qk_dim % 64 == 0 && c.rope % 64 == 0 && c.v_dim % 64 == 0, "slabs of 64 columns");
  static_assert(sizeof(PrefillStorage<c>) <= PrefillSharedBytes(c), "the storage is counted");
  static_assert(PrefillSharedBytes(c) <= 232448, "an SM's shared memory");
  return true;
}

// ---- producer: one thread -----------------------------------------------------------------------

template <PrefillConfig kConfig>
JAX_DS_DEVICE void prefill_produce(const PrefillParams& p, PrefillStorage<kConfig>& s) {
  constexpr int kN = kConfig.block_n;
  constexpr int kOwnSlabs = (kConfig.qk_dim - kConfig.rope) / 64;
  Pipeline<kConfig.stages> k_ring(s.k_ring), v_ring(s.v_ring);
  TileReader<false> reader(s.board);
  while (reader.next()) {
    const HeldTile tile = reader.tile();
    const int kv_head = tile.head / (p.queries.heads / p.kv_heads);
    auto load_keys = [&](int block) {
      k_ring.acquire();
      k_ring.commit(sizeof(s.k[0]));
      load_slabs<kN>(s.k[k_ring.slot()][0], &p.k, k_ring.full(), kOwnSlabs, kv_head,
                     tile.first + block * kN, tile.batch);
      load_slabs<kN>(s.k[k_ring.slot()][kOwnSlabs], &p.k_rope, k_ring.full(), kConfig.rope / 64, 0,
                     tile.first + block * kN, tile.batch);
      k_ring.advance();
    };
    auto load_values = [&](int block) {
      v_ring.acquire();
      v_ring.commit(sizeof(s.v[0]));
      load_slabs<kN>(s.v[v_ring.slot()][0], &p.v, v_ring.full(), kConfig.v_dim / 64, kv_head,
                     tile.first + block * kN, tile.batch);
      v_ring.advance();
    };
    // In the order of use: the scores of a block come before the values of the one before it.
    const int blocks = walked_blocks(tile, kN);
    load_keys(blocks - 1);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      mbarrier_wait(s.q_ring[group].empty, reader.phase() ^ 1);
      mbarrier_arrive_expect_tx(s.q_ring[group].full, sizeof(s.q[0]));
      load_slabs<kPrefillBoxM>(s.q[group][0], &p.q, s.q_ring[group].full, kConfig.qk_dim / 64,
                               tile.head, tile.row + group * kPrefillBoxM, tile.batch);
    }
    for (int block = blocks - 2; block >= 0; --block) {
      load_keys(block);
      load_values(block + 1);
    }
    load_values(0);
  }
}

// ---- consumer: one math warpgroup ---------------------------------------------------------------

// What the queries of a tile see: this thread's two rows, and all 64 of the warpgroup.
template <PrefillConfig kConfig>
struct PrefillSight {
  Interval<Side::kQueries, kConfig.mask> own[2], common;

  JAX_DS_DEVICE PrefillSight(const PrefillParams& p, const HeldTile& tile) {
    const int row = tile.row + threadIdx.x / 32 * 16 + lane_id() / 4;
    own[0] = row_interval<Side::kQueries, kConfig.mask>(p.queries, min(row, tile.end - 1));
    own[1] = row_interval<Side::kQueries, kConfig.mask>(p.queries, min(row + 8, tile.end - 1));
    common = common_interval<Side::kQueries, kConfig.mask>(p.queries, tile,
                                                           tile.row + threadIdx.x / 128 * 64);
  }
};

// A warpgroup holds 64 queries.
template <PrefillConfig kConfig>
struct PrefillConsumer {
  static constexpr int kN = kConfig.block_n;

  const PrefillParams& p;
  PrefillStorage<kConfig>& s;
  const u32 warp = warp_id(), group = warp / 4;
  const u32 q = shared_address(s.q[group]);
  const bool releases = threadIdx.x % 128 == 0;
  const int keys_end;  // of a packed batch: padding from here on
  Pipeline<kConfig.stages> k_ring, v_ring;

  JAX_DS_DEVICE PrefillConsumer(const PrefillParams& params, PrefillStorage<kConfig>& storage)
      : p(params),
        s(storage),
        keys_end(kConfig.mask == kPackedMask ? params.queries.packed[kPackedOthersEnd] : 0),
        k_ring(storage.k_ring),
        v_ring(storage.v_ring) {
    if (group == 1) pass_turn();
  }

  // Group 0 begins.
  JAX_DS_DEVICE void take_turn() const { bar_sync(kTurnBarrier + group, 256); }
  JAX_DS_DEVICE void pass_turn() const { bar_arrive(kTurnBarrier + (group ^ 1), 256); }

  // scores = q k^T, of the block of keys that is next in the ring; asynchronous.
  JAX_DS_DEVICE void multiply_keys(float (&scores)[kN / 2]) const {
    multiply_slabs<kConfig.qk_dim, kPrefillBoxM, kN>(
        scores, q, shared_address(s.k[warp_uniform(k_ring.slot())]));
  }
  // Once they are there; the queries may be overwritten after the tile's last block.
  JAX_DS_DEVICE void release_keys(bool last) {
    if (releases) k_ring.release();
    if (releases && last) mbarrier_arrive(s.q_ring[group].empty);
    k_ring.advance();
  }

  // out += probabilities v, likewise.
  JAX_DS_DEVICE void multiply_values(const u32 (&probabilities)[kN / 16][4],
                                     float (&out)[kConfig.v_dim / 2]) const {
    accumulate_slabs<kN>(out, probabilities, shared_address(s.v[warp_uniform(v_ring.slot())]));
  }
  JAX_DS_DEVICE void release_values() {
    if (releases) v_ring.release();
    v_ring.advance();
  }

  // Keys past the end of a packed batch may hold NaN. Only a tile's first block can reach there.
  JAX_DS_DEVICE void clear_padding(int key) const {
    const int end = keys_end;
    if (key + kN <= end) return;
    v_ring.wait();
    clear_rows<kN>(shared_address(s.v[v_ring.slot()]), kConfig.v_dim / 64, group,
                   [=](int i) { return key + i >= end; });
  }

  // Takes the queries past all blocks but the first, whose probabilities are given; leaves those of
  // the last.
  JAX_DS_DEVICE void walk(const HeldTile& tile, const PrefillSight<kConfig>& sees, int blocks,
                          float (&scores)[kN / 2], u32 (&probabilities)[kN / 16][4],
                          OnlineSoftmax<kN>& softmax, float (&out)[kConfig.v_dim / 2]) {
    for (int block = blocks - 2; block >= 0; --block) {
      k_ring.wait();
      take_turn();
      multiply_keys(scores);
      v_ring.wait();
      multiply_values(probabilities, out);
      pass_turn();
      wgmma::wait_group<1>();
      release_keys(block == 0);
      const int key = tile.first + block * kN;
      if (!sees.common.sees_all(key, kN)) hide<kN>(scores, key, sees.own, -kInfinity);
      float shrink[2];
      const bool shrinks = softmax.absorb(scores, p.scale_log2, shrink);
      wgmma::wait_group<0>();
      release_values();
      pack_operand(scores, probabilities);
      if (shrinks) {
#pragma unroll
        for (int j = 0; j < kConfig.v_dim / 2; ++j) out[j] *= shrink[j / 2 % 2];
      }
    }
  }

  // Normalises and stores a warp's 16 rows, and their lse.
  JAX_DS_DEVICE void write(const HeldTile& tile, OnlineSoftmax<kN>& softmax,
                           float (&out)[kConfig.v_dim / 2]) const {
    const int row = tile.row + warp * 16;
    softmax.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + half * 8 + lane_id() / 4;
      const float inverse = softmax.sum[half] == 0.0f ? 0.0f : rcp(softmax.sum[half]);
#pragma unroll
      for (int j = 0; j < kConfig.v_dim / 8; ++j) {
        out[4 * j + 2 * half] *= inverse;
        out[4 * j + 2 * half + 1] *= inverse;
      }
      if (lane_id() % 4 == 0 && i < tile.end) {
        const i64 at =
            (static_cast<i64>(tile.batch) * p.queries.rows + i) * p.queries.heads + tile.head;
        // A row without keys: the logarithm of zero.
        p.lse[at] = (softmax.reference[half] + lg2(softmax.sum[half])) * kLn2;
      }
    }
    store_rows<0, kConfig.v_dim>(out, shared_address(s.staging[warp]), p.out, p.queries, tile, row);
  }
};

template <PrefillConfig kConfig>
JAX_DS_DEVICE void prefill_consume(const PrefillParams& p, PrefillStorage<kConfig>& s) {
  constexpr int kN = kConfig.block_n;
  PrefillConsumer<kConfig> c(p, s);
  TileReader<true> reader(s.board);
  if (!reader.next()) return;
  HeldTile tile = reader.tile();
  PrefillSight<kConfig> sees(p, tile);
  float scores[kN / 2];
  mbarrier_wait(s.q_ring[c.group].full, reader.phase());
  c.k_ring.wait();
  c.take_turn();
  c.multiply_keys(scores);
  c.pass_turn();
  wgmma::wait_group<0>();
  while (true) {
    // The scores of the tile's first block are there.
    const int blocks = walked_blocks(tile, kN), key = tile.first + (blocks - 1) * kN;
    c.release_keys(blocks == 1);
    float out[kConfig.v_dim / 2] = {};
    u32 probabilities[kN / 16][4];
    OnlineSoftmax<kN> softmax;
    hide<kN>(scores, key, sees.own, -kInfinity);
    if constexpr (kConfig.mask == kPackedMask) {
      softmax.begin(scores, p.scale_log2);
    } else {
      // The same again. Shorter code is slower here, by 3% of the whole: ptxas, not the work.
      float unused[2];
      softmax.absorb(scores, p.scale_log2, unused);
    }
    pack_operand(scores, probabilities);
    if constexpr (kConfig.mask == kPackedMask) c.clear_padding(key);
    c.walk(tile, sees, blocks, scores, probabilities, softmax, out);

    const HeldTile done = tile;
    const bool more = reader.next();
    c.v_ring.wait();
    if (!more) {
      c.multiply_values(probabilities, out);
      wgmma::wait_group<0>();
      c.write(done, softmax, out);
      return;
    }
    // The last product of this tile and the first of the next, under which results leave.
    tile = reader.tile();
    c.take_turn();
    c.multiply_values(probabilities, out);
    mbarrier_wait(s.q_ring[c.group].full, reader.phase());
    c.k_ring.wait();
    c.multiply_keys(scores);
    c.pass_turn();
    sees = PrefillSight<kConfig>(p, tile);
    wgmma::wait_group<1>();
    c.release_values();
    c.write(done, softmax, out);
    wgmma::wait_group<0>();
  }
}

// ---- entry --------------------------------------------------------------------------------------

template <PrefillConfig kConfig>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    Prefill(const __grid_constant__ PrefillParams p) {
  static_assert(prefill_legal<kConfig>());
  extern __shared__ __align__(1024) u8 memory[];
  PrefillStorage<kConfig>& s = *reinterpret_cast<PrefillStorage<kConfig>*>(memory);

  if (warp_id() == 0 && elect_one()) {
    prefetch_tensormap(&p.q);
    prefetch_tensormap(&p.k);
    prefetch_tensormap(&p.v);
    s.board.init();
    s.q_ring[0].init(1, 1);
    s.q_ring[1].init(1, 1);
    s.k_ring.init(1, 2);
    s.v_ring.init(1, 2);
    fence_mbarrier_init();
  }
  griddepcontrol_wait();
  __syncthreads();

  run_roles<Side::kQueries, kConfig.mask, 232>(
      p.queries, s.board, [&] { prefill_produce<kConfig>(p, s); },
      [&] { prefill_consume<kConfig>(p, s); });
}

}  // namespace jax_ds::flash_mla
