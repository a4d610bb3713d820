// The narrow decode kernel: scores and softmax, one warpgroup.
#pragma once

#include "flash_mla/kernels/narrow_config.cuh"
#include "flash_mla/kernels/softmax.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
struct NarrowScores {
  static constexpr int kRows = Config::kRows;
  static constexpr int kColumns = kRows / 4;
  using Element = typename Config::Element;
  using Scores = float[kRows / 2];

  const DecodeParams& p;
  NarrowShared<Config>& shared;
  const int warp = warp_id();
  const int token = 16 * warp + lane_id() / 4;  // and token + 8, in the block

  Pipeline<Config::kStages> ring{shared.ring};
  u32 q_phase = 0;
  float row_max[kColumns];  // base 2, the reference point of the exponentials; alike in all threads
  float row_sum[kColumns];  // of this thread's own tokens

  // S^T = K Q^T.
  JAX_DS_DEVICE void multiply(Scores& s) const {
    constexpr auto kK = wgmma::Major::kK;
    ring.wait();
    const u64 k = wgmma::descriptor(shared_address(shared.blocks[ring.slot()]), kNarrowGroupStride);
    const u64 q = wgmma::descriptor(shared_address(shared.q));
    wgmma::fence();
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma::mma<kK, kK>(Element{}, s, k + t * (kGroupTileBytes / 16) + 2 * step,
                           q + t * (Config::kQueryTileBytes / 16) + 2 * step, t + step != 0);
      }
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  // Hides what a row may not see.
  JAX_DS_DEVICE void mask(const Item& item, int block, Scores& s) const {
    const int start = block * kBlock;
    if (start + kBlock <= visible_tokens(p, item.length, 0)) [[likely]]
      return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int visible = visible_tokens(p, item.length, Columns<Config>::row(c)) - start;
      if (token >= visible) s[Columns<Config>::upper(c)] = -kInfinity;
      if (token + 8 >= visible) s[Columns<Config>::lower(c)] = -kInfinity;
    }
  }

  // The larger of this thread's two tokens, base 2.
  JAX_DS_DEVICE float largest(const Scores& s, int c) const {
    return p.scale_log2 * fmaxf(s[Columns<Config>::upper(c)], s[Columns<Config>::lower(c)]);
  }

  JAX_DS_DEVICE bool outgrown(const Scores& s) const {
    bool any = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) any |= largest(s, c) > row_max[c] + kLag;
    return any;
  }

  // Moves the reference points where the maxima have outgrown them, and the sums along.
  JAX_DS_DEVICE void update_max(const Scores& s) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float m = largest(s, c);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, lanes));
      }
      if (lane_id() < 4) shared.warp_max[Columns<Config>::row(c)][warp] = m;
    }
    sync_scores();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = Columns<Config>::row(c);
      const float4 m = ld_shared_v4_f32(shared_address(shared.warp_max[row]));
      const float all = fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w));
      const float factor = power_of_two(move_reference(row_max[c], all));
      row_sum[c] *= factor;
      if (warp == 0 && lane_id() < 4) shared.factor[ring.slot()][row] = factor;
    }
  }

  // P^T, transposed on the way into the rotary tile's place: rows x 64 tokens.
  JAX_DS_DEVICE void store_probabilities(Scores& s) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float reference = finite_reference(row_max[c]);
      float& upper = s[Columns<Config>::upper(c)];
      float& lower = s[Columns<Config>::lower(c)];
      upper = ex2(fmaf(upper, p.scale_log2, -reference));
      lower = ex2(fmaf(lower, p.scale_log2, -reference));
      row_sum[c] += upper + lower;
    }
    const int chunk = 2 * warp + lane_id() / 8 % 2;  // eight tokens
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const u32 group = shared_address(shared.blocks[ring.slot()][i][kKeyTiles - 1]);
      stmatrix_x2_trans(group + swizzled(lane_id() % 8, chunk),
                        wgmma::pack(Element{}, s[4 * i], s[4 * i + 1]),
                        wgmma::pack(Element{}, s[4 * i + 2], s[4 * i + 3]));
    }
  }

  // Unused slots of a page may hold NaN, which a zero probability would not hide.
  JAX_DS_DEVICE void clear_unused_values(int tokens) const {
#pragma unroll 1
    for (int i = tokens * 64 + threadIdx.x; i < kBlock * 64; i += 128) {
      const int row = i / 64, tile = i / 8 % 8, chunk = i % 8;
      u8* target = shared.blocks[ring.slot()][row / kGroupRows][tile];
      st_shared_v4(shared_address(target) + row % kGroupRows * 128 + chunk * 16, 0, 0, 0, 0);
    }
  }

  // Sums over all threads' tokens: the log-sum-exp out, its part of the normalisation to shared.
  JAX_DS_DEVICE void finish(const Item& item) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        row_sum[c] += __shfl_xor_sync(0xffffffffu, row_sum[c], lanes);
      }
      if (lane_id() < 4) shared.warp_sum[Columns<Config>::row(c)][warp] = row_sum[c];
    }
    sync_scores();
    if (warp != 0 || lane_id() >= 4) return;
    for (int c = 0; c < kColumns; ++c) {
      const int row = Columns<Config>::row(c);
      const float4 m = ld_shared_v4_f32(shared_address(shared.warp_sum[row]));
      const float sum = (m.x + m.y) + (m.z + m.w);
      shared.inverse[ring.slot()][row] = sum == 0.0f ? 0.0f : 1.0f / sum;
      store_lse(item, row, row_max[c] + lg2(sum));
    }
  }

  JAX_DS_DEVICE void store_lse(const Item& item, int row, float lse) const {
    const int R = p.S * p.H;
    if (row >= R) return;
    if (item.split) {
      p.partial_lse[(2 * blockIdx.x + item.part_slot) * kRows + row] = lse;
    } else {
      p.lse[static_cast<i64>(item.request) * R + row] = lse * kLn2;
    }
  }

  JAX_DS_DEVICE void run_block(const Item& item, int block) {
    Scores s;
    multiply(s);
    mask(item, block, s);
    // Seldom does any score outgrow its row's reference point. Also: all warps have done with the
    // rotary tile, and with the maxima of the block before.
    const bool moved = bar_red_or(kScoresBarrier, 128, outgrown(s));
    if (moved) [[unlikely]]
      update_max(s);
    if (threadIdx.x == 0) shared.moved[ring.slot()] = moved;
    store_probabilities(s);
    const int tokens = item.length - block * kBlock;
    if (tokens < kBlock) [[unlikely]]
      clear_unused_values(tokens);
    if (block + 1 == item.last) [[unlikely]]
      finish(item);
    fence_proxy_async_shared();
    mbarrier_arrive(&shared.p_full[ring.slot()]);
    ring.advance();
  }

  JAX_DS_DEVICE void run() {
    Items<Config> items(p, shared.schedule);
    for (Item item; items.next(item);) {
      if (item.empty()) {
        if (threadIdx.x < kRows) store_lse(item, threadIdx.x, -kInfinity);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        row_max[c] = -kInfinity;
        row_sum[c] = 0.0f;
      }
      mbarrier_wait(&shared.q_full, q_phase);
      q_phase ^= 1;
      for (int block = item.first; block < item.last; ++block) run_block(item, block);
      // All of this warp's reads of the query ended with its last wait.
      mbarrier_arrive(&shared.q_empty);
    }
  }
};

}  // namespace jax_ds::flash_mla
