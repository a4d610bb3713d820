// Attention with a head size of queries and keys that differs from that of values: 192/128 in
// DeepSeek models. out = softmax(scale * q k^T + mask) v, one pass, nothing of size Sq x Sk stored.
//
// A CTA takes 128 queries of one head. One thread produces: TMA brings the queries, then tiles of
// keys and of values into two rings. Two math warpgroups consume, 64 queries each: scores of the
// next tile of keys and products with the current tile of values are issued together, and the
// softmax of the next tile runs under the latter. The warpgroups take turns at issuing, so that one
// computes exponentials while the other has the tensor cores (FlashAttention-3's two overlaps:
// Shah et al. 2024, section 3). The grid is persistent; a thread of its own deals out tiles of
// queries (prefill_tiles.cuh). Tiles of keys are walked from the diagonal backwards, so that only
// the first ones are masked.
#pragma once

#include "flash_mla/kernels/prefill_common.cuh"
#include "flash_mla/kernels/prefill_tiles.cuh"

namespace jax_ds::flash_mla {

// ---- shared storage -----------------------------------------------------------------------------

// Tiles are held as slabs of 64 columns: rows of 128 bytes, swizzled.
template <PrefillConfig kConfig>
struct PrefillStorage {
  static constexpr int kQSlab = kPrefillBlockM * 128;
  static constexpr int kKeySlab = kConfig.block_n * 128;
  u8 q[kConfig.qk_dim / 64][kQSlab];
  u8 k[kConfig.stages][kConfig.qk_dim / 64][kKeySlab];
  u8 v[kConfig.stages][kConfig.v_dim / 64][kKeySlab];
  u8 staging[8][2048];
  TileBoard board;
  PipelineBarriers<1> q_ring;
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
  Pipeline<1> q_ring(s.q_ring);
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
    const int blocks = walked_blocks(tile, kN);
    if (blocks == 0) continue;  // the consumers write zeros
    q_ring.acquire();
    q_ring.commit(sizeof(s.q));
    load_slabs<kPrefillBlockM>(s.q[0], &p.q, q_ring.full(), kConfig.qk_dim / 64, tile.head,
                               tile.row, tile.batch);
    q_ring.advance();
    // In the order of use: the scores of a block come before the values of the one before it.
    load_keys(blocks - 1);
    for (int block = blocks - 2; block >= 0; --block) {
      load_keys(block);
      load_values(block + 1);
    }
    load_values(0);
  }
}

// ---- softmax of a warpgroup's 64 queries --------------------------------------------------------

// Of the two rows r and r + 8 that this thread shares with the other three of its quad.
template <int kColumns>
struct OnlineSoftmax {
  // Probabilities are relative to a reference in units of log2. It follows the maximum only once it
  // lags by more than kLag: they stay below 2^kLag, which costs no precision, and earlier results
  // seldom have to shrink.
  static constexpr float kLag = 8.0f;
  float reference[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};  // of this thread's columns only

  // Turns scores into probabilities; returns by what earlier results shrink.
  JAX_DS_DEVICE void absorb(float (&scores)[kColumns / 2], float scale_log2, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -kInfinity;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top *= scale_log2;
      shrink[half] = 1.0f;
      if (top > reference[half] + kLag) {
        shrink[half] = ex2(reference[half] - top);
        reference[half] = top;
      }
      // A row that has seen no key yet: any finite reference will do.
      const float finite = reference[half] == -kInfinity ? 0.0f : reference[half];
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[4 * j + i] = ex2(scores[4 * j + i] * scale_log2 - finite);
          total += scores[4 * j + i];
        }
      }
      sum[half] = sum[half] * shrink[half] + total;
    }
  }

  // Sums over the quad; afterwards `sum` is the row's.
  JAX_DS_DEVICE void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    }
  }
};

// ---- consumer: one math warpgroup ---------------------------------------------------------------

// Normalises and stores a warp's 16 rows from `row` on, and their lse.
template <PrefillConfig kConfig>
JAX_DS_DEVICE void prefill_write(const PrefillParams& p, const HeldTile& tile, int row,
                                 OnlineSoftmax<kConfig.block_n>& softmax,
                                 float (&out)[kConfig.v_dim / 2], u32 staging) {
  softmax.finish();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + half * 8 + lane_id() / 4;
    const float inverse = softmax.sum[half] == 0.0f ? 0.0f : 1.0f / softmax.sum[half];
#pragma unroll
    for (int j = 0; j < kConfig.v_dim / 8; ++j) {
      out[4 * j + 2 * half] *= inverse;
      out[4 * j + 2 * half + 1] *= inverse;
    }
    if (lane_id() % 4 == 0 && i < tile.end) {
      const i64 at =
          (static_cast<i64>(tile.batch) * p.queries.rows + i) * p.queries.heads + tile.head;
      p.lse[at] = softmax.reference[half] == -kInfinity
                      ? -kInfinity
                      : (softmax.reference[half] + lg2(softmax.sum[half])) * kLn2;
    }
  }
  const i64 stride = static_cast<i64>(p.queries.heads) * kConfig.v_dim;
  u16* rows = static_cast<u16*>(p.out) +
              (static_cast<i64>(tile.batch) * p.queries.rows + row) * stride +
              tile.head * kConfig.v_dim;
#pragma unroll
  for (int slab = 0; slab < kConfig.v_dim / 64; ++slab) {
    store_slab(out, slab, staging, rows + slab * 64, stride, tile.end - row);
  }
}

template <PrefillConfig kConfig>
JAX_DS_DEVICE void prefill_consume(const PrefillParams& p, PrefillStorage<kConfig>& s) {
  constexpr int kN = kConfig.block_n;
  const int warp = warp_id(), group = warp / 4;
  const u32 q = shared_address(s.q) + group * 64 * 128;
  const u32 staging = shared_address(s.staging[warp]);
  const bool releases = threadIdx.x % 128 == 0;
  // Taking turns: barrier 1 + g lets warpgroup g issue its wgmma; group 0 begins.
  if (kConfig.ordered && group == 1) bar_arrive(1, 256);

  Pipeline<1> q_ring(s.q_ring);
  Pipeline<kConfig.stages> k_ring(s.k_ring), v_ring(s.v_ring);
  TileReader<true> reader(s.board);
  HeldTile following;
  auto read_ahead = [&] {
    reader.next();
    following = reader.tile();
  };
  read_ahead();
  while (following.head >= 0) {
    const HeldTile tile = following;
    const int row = tile.row + group * 64 + warp % 4 * 16;
    const int blocks = walked_blocks(tile, kN);
    float out[kConfig.v_dim / 2] = {};
    OnlineSoftmax<kN> softmax;
    if (blocks > 0) {
      Interval<Side::kQueries, kConfig.mask> seen[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = min(row + half * 8 + static_cast<int>(lane_id()) / 4, tile.end - 1);
        seen[half] = row_interval<Side::kQueries, kConfig.mask>(p.queries, i);
      }
      const auto common =
          common_interval<Side::kQueries, kConfig.mask>(p.queries, tile, tile.row + group * 64);

      float scores[kN / 2];
      u32 probabilities[kN / 16][4];
      float shrink[2];
      auto multiply_keys = [&] {
        multiply_slabs<kConfig.qk_dim, kPrefillBlockM, kN>(
            scores, q, shared_address(s.k[warp_uniform(k_ring.slot())]));
      };
      auto multiply_values = [&] {
        accumulate_slabs<kN>(out, probabilities, shared_address(s.v[warp_uniform(v_ring.slot())]));
      };

      q_ring.wait();
      k_ring.wait();
      if constexpr (kConfig.ordered) bar_sync(1 + group, 256);
      multiply_keys();
      if constexpr (kConfig.ordered) bar_arrive(1 + (group ^ 1), 256);
      wgmma::wait_group<0>();
      if (releases) k_ring.release();
      k_ring.advance();
      hide<kN>(scores, tile.first + (blocks - 1) * kN, seen, -kInfinity);
      softmax.absorb(scores, p.scale_log2, shrink);
      pack_operand(scores, probabilities);
      if constexpr (kConfig.mask == kPackedMask) {
        // Only the last block can reach into the padding.
        const int key = tile.first + (blocks - 1) * kN, end = p.queries.packed[kPackedOthersEnd];
        if (key + kN > end) {
          v_ring.wait();
          clear_rows<kN>(shared_address(s.v[v_ring.slot()]), kConfig.v_dim / 64, 3 + group,
                         [=](int i) { return key + i >= end; });
        }
      }

      for (int block = blocks - 2; block >= 0; --block) {
        k_ring.wait();
        if constexpr (kConfig.ordered) bar_sync(1 + group, 256);
        multiply_keys();
        v_ring.wait();
        multiply_values();
        if constexpr (kConfig.ordered) bar_arrive(1 + (group ^ 1), 256);
        wgmma::wait_group<1>();
        if (releases) k_ring.release();
        k_ring.advance();
        const int key = tile.first + block * kN;
        if (!common.sees_all(key, kN)) {
          hide<kN>(scores, key, seen, -kInfinity);
        }
        softmax.absorb(scores, p.scale_log2, shrink);
        wgmma::wait_group<0>();
        if (releases) v_ring.release();
        v_ring.advance();
        pack_operand(scores, probabilities);
        if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
          for (int j = 0; j < kConfig.v_dim / 2; ++j) out[j] *= shrink[j / 2 % 2];
        }
      }
      // The queries may be overwritten: the next tile's arrive while this one's output leaves.
      if (releases) q_ring.release();
      q_ring.advance();

      v_ring.wait();
      multiply_values();
      read_ahead();  // hidden by the last product
      wgmma::wait_group<0>();
      if (releases) v_ring.release();
      v_ring.advance();
    } else {
      read_ahead();
    }
    prefill_write<kConfig>(p, tile, row, softmax, out, staging);
  }
}

// ---- entry --------------------------------------------------------------------------------------

template <PrefillConfig kConfig>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    Prefill(const __grid_constant__ PrefillParams p) {
  static_assert(prefill_legal<kConfig>());
  extern __shared__ __align__(1024) u8 memory[];
  PrefillStorage<kConfig>& s = *reinterpret_cast<PrefillStorage<kConfig>*>(memory);

  const u32 warp = warp_id();
  if (warp == 0 && elect_one()) {
    prefetch_tensormap(&p.q);
    prefetch_tensormap(&p.k);
    prefetch_tensormap(&p.v);
    s.board.init();
    s.q_ring.init(1, 2);
    s.k_ring.init(1, 2);
    s.v_ring.init(1, 2);
    fence_mbarrier_init();
  }
  griddepcontrol_wait();
  __syncthreads();

  if (warp >= 8) {
    setmaxnreg_dec<24>();
    if (warp == 8 && elect_one()) prefill_produce<kConfig>(p, s);
    if (warp == 9 && elect_one()) post_tiles<Side::kQueries, kConfig.mask>(p.queries, s.board);
  } else {
    setmaxnreg_inc<240>();
    prefill_consume<kConfig>(p, s);
  }
}

}  // namespace jax_ds::flash_mla
