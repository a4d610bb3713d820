// The wide decode kernel: scores and softmax, one warpgroup.
#pragma once

#include "flash_mla/kernels/wide_producer.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
struct WideScores {
  using Element = typename Config::Element;
  static constexpr auto kK = wgmma::Major::kK;
  // The part of the query that stays in registers: fragments of 16 columns.
  using Query = u32[Config::kQueryFragments][4];

  const DecodeParams& p;
  WideShared<Config>& shared;
  const int row = 16 * (warp_id() % 4) + lane_id() / 4;  // and row + 8, of the CTA's 64

  Progress at;
  float reference[2], sum[2];  // base 2

  // Row that this lane addresses of the warp's 16 x 16 matrices.
  static JAX_DS_DEVICE int matrix_row() { return 16 * (warp_id() % 4) + lane_id() % 16; }

  JAX_DS_DEVICE void load_query(Query& q) {
    mbarrier_wait(&shared.values_full[at.stage()], at.stage_phase());
#pragma unroll
    for (int i = 0; i < Config::kQueryFragments; ++i) {
      ldmatrix_x4(shared_address(shared.query[at.stage()][i / 4]) +
                      swizzled(matrix_row(), 2 * (i % 4) + lane_id() / 16),
                  q[i]);
    }
    // The fragment without registers: a thread moves 16 bytes.
    const int chunk = lane_id() / 16;
    const uint4 piece =
        ld_shared_v4(shared_address(shared.query[at.stage()][Config::kQueryRegTiles - 1]) +
                     swizzled(matrix_row(), 6 + chunk));
    sync_scores();  // all warps have done with the previous item's
    st_shared_v4(shared_address(shared.q_fragment[chunk][matrix_row()]), piece.x, piece.y, piece.z,
                 piece.w);
    fence_proxy_async_shared();
    sync_scores();
    release_stage();
  }

  // On behalf of both output warpgroups, which take no notice of the query's stage.
  JAX_DS_DEVICE void release_stage() {
    mbarrier_arrive(&shared.values_empty[at.stage()]);
    mbarrier_arrive(&shared.values_empty[at.stage()]);
    at.template advance_stage<Config::kStages>();
  }

  // Column tiles [kBegin, kEnd) of S = Q K^T.
  template <int kBegin, int kEnd>
  JAX_DS_DEVICE void multiply(const Query& q, float (&s)[32]) const {
#pragma unroll
    for (int t = kBegin; t < kEnd; ++t) {
      const u64 k = t < kValueTiles
                        ? wgmma::descriptor(
                              shared_address(shared.values[at.stage()][0]) + t * kGroupTileBytes,
                              kWideGroupStride)
                        : wgmma::descriptor(shared_address(shared.rope[at.slot()]));
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int i = 4 * t + step;
        if (i < Config::kQueryFragments) {
          wgmma::mma<kK>(Element{}, s, q[i < Config::kQueryFragments ? i : 0], k + 2 * step,
                         i != 0);
        } else if (i == Config::kQueryFragments) {
          wgmma::mma<kK, kK>(Element{}, s,
                             wgmma::descriptor_unswizzled(shared_address(shared.q_fragment), 1024),
                             k + 2 * step, true);
        } else {
          const u64 from = wgmma::descriptor(shared_address(shared.q[t - Config::kQueryRegTiles]));
          wgmma::mma<kK, kK>(Element{}, s, from + 2 * step, k + 2 * step, true);
        }
      }
    }
    wgmma::commit_group();
  }

  // The scores of a block. Once most column tiles are through, opens the previous block's P V.
  JAX_DS_DEVICE void multiply(const Query& q, float (&s)[32], bool open_previous) const {
    mbarrier_wait(&shared.values_full[at.stage()], at.stage_phase());
    wgmma::fence();
    multiply<0, Config::kOpenTile>(q, s);
    multiply<Config::kOpenTile, kValueTiles>(q, s);
    // The rotary tile is often the last to come. What waits for it need not wait for more.
    const bool late =
        __any_sync(0xffffffffu, !mbarrier_test_wait(&shared.rope_full[at.slot()], at.slot_phase()));
    if (late && open_previous) {
      wgmma::wait_group<1>();
      mbarrier_arrive(&shared.go[at.slot() ^ 1]);
      open_previous = false;
    }
    mbarrier_wait(&shared.rope_full[at.slot()], at.slot_phase());
    wgmma::fence();
    multiply<kValueTiles, kKeyTiles>(q, s);
    wgmma::wait_group<2>();
    if (open_previous) mbarrier_arrive(&shared.go[at.slot() ^ 1]);
    wgmma::wait_group<0>();
  }

  // Hides what the rows may not see. `tokens`: to the request's end.
  JAX_DS_DEVICE void mask(int tokens, float (&s)[32]) const {
    if (tokens - (p.causal ? p.S - 1 : 0) >= kBlock) [[likely]]
      return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Counted from this lane's first token, so that each comparison is with a constant.
      const int visible =
          visible_tokens(p, tokens, shared.place.first_row + row + 8 * half) - 2 * (lane_id() % 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * i >= visible) s[4 * i + 2 * half] = -kInfinity;
        if (8 * i + 1 >= visible) s[4 * i + 2 * half + 1] = -kInfinity;
      }
    }
  }

  // Moves the reference points up to the rows' maxima where these have outgrown them.
  JAX_DS_DEVICE void move_references(float (&largest)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = largest[half];
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      const u32 shift = move_reference(reference[half], m);
      if (lane_id() % 4 == 0) shared.shift[at.slot()][row + 8 * half] = shift;
      sum[half] *= power_of_two(shift);
    }
  }

  // Scores to probabilities.
  JAX_DS_DEVICE void softmax(float (&s)[32]) {
    float largest[2] = {s[0], s[2]};  // of this thread's
#pragma unroll
    for (int i = 0; i < 32; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
    for (float& m : largest) m *= p.scale_log2;
    const bool outgrown = largest[0] > reference[0] + kLag || largest[1] > reference[1] + kLag;
    const bool moved = __any_sync(0xffffffffu, outgrown);
    if (moved) [[unlikely]]
      move_references(largest);
    if (lane_id() == 0) shared.moved[at.slot()][row / 16] = moved;
    const float zero[2] = {finite_reference(reference[0]), finite_reference(reference[1])};
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = ex2(fmaf(s[i], p.scale_log2, -zero[i / 2 % 2]));
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[i / 2 % 2] += s[i];
  }

  // P takes the rotary tile's place.
  JAX_DS_DEVICE void store_probabilities(const float (&s)[32]) const {
    const u32 base = shared_address(shared.rope[at.slot()]);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      stmatrix_x4(base + swizzled(matrix_row(), i + lane_id() / 16),
                  wgmma::pack(Element{}, s[4 * i], s[4 * i + 1]),
                  wgmma::pack(Element{}, s[4 * i + 2], s[4 * i + 3]),
                  wgmma::pack(Element{}, s[4 * i + 4], s[4 * i + 5]),
                  wgmma::pack(Element{}, s[4 * i + 6], s[4 * i + 7]));
    }
  }

  // Unused slots of a page may hold NaN, which a zero probability would not hide.
  JAX_DS_DEVICE void clear_unused_values(int tokens) const {
#pragma unroll 1
    for (int i = tokens * 64 + threadIdx.x % 128; i < kBlock * 64; i += 128) {
      const int token = i / 64, tile = i / 8 % 8, chunk = i % 8;
      const u8* target = shared.values[at.stage()][token / kGroupRows][tile];
      st_shared_v4(shared_address(target) + token % kGroupRows * 128 + chunk * 16, 0, 0, 0, 0);
    }
  }

  JAX_DS_DEVICE void finish(const Announcement& item) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
      if (lane_id() % 4 != 0) continue;
      const float inverse = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      shared.inverse[at.slot()][row + 8 * half] = inverse;
      const float lse = reference[half] + lg2(sum[half]);
      if (item.part != kWhole) {
        p.partial_lse[partial_row<Config>(p, shared.place, item.part) + row + 8 * half] = lse;
        continue;
      }
      const int R = p.S * p.H;
      const int r = shared.place.first_row + row + 8 * half;
      if (r < R) p.lse[static_cast<i64>(item.request) * R + r] = lse * kLn2;
    }
  }

  JAX_DS_DEVICE void run_item(const Announcement& item) {
    Query q;
    load_query(q);
    reference[0] = reference[1] = -kInfinity;
    sum[0] = sum[1] = 0.0f;
    int tokens = item.tokens;
    bool opened = true;  // the previous block's P V
    for (int blocks = item.blocks; true; --blocks, tokens -= kBlock) {
      float s[32];
      multiply(q, s, !opened);
      if (blocks == 1) mbarrier_arrive(&shared.q_empty);
      mask(tokens, s);
      softmax(s);
      sync_scores();  // all warps have done with the rotary tile
      store_probabilities(s);
      if (blocks == 1) break;
      publish();
      // The next block opens this one's P V, unless it is still to come.
      opened = __any_sync(0xffffffffu,
                          !mbarrier_test_wait(&shared.values_full[at.stage()], at.stage_phase()));
      if (opened) mbarrier_arrive(&shared.go[at.slot() ^ 1]);
    }
    // Outside of the loop: lanes that part ways inside make ptxas compute all its addresses and
    // descriptors thread by thread, not once a warp.
    if (tokens < kBlock) clear_unused_values(tokens);
    finish(item);
    publish();
    mbarrier_arrive(&shared.go[at.slot() ^ 1]);
  }

  // Makes what was written of this block visible to the output, and goes on to the next.
  JAX_DS_DEVICE void publish() {
    fence_proxy_async_shared();
    at.template advance_stage<Config::kStages>();
    at.advance_slot();
  }

  JAX_DS_DEVICE void run() {
    for (;; at.advance_item()) {
      const u32 place = at.items() % Config::kAnnouncements;
      mbarrier_wait(&shared.announced[place], at.items() / Config::kAnnouncements % 2);
      const Announcement& item = shared.announcements[place];
      if (item.blocks == 0) break;
      run_item(item);
    }
  }
};

}  // namespace jax_ds::flash_mla
