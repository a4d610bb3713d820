// Decode for few query rows: bound by the bytes of the cache. narrow_config.cuh has the plan.
#pragma once

#include "flash_mla/kernels/narrow_config.cuh"
#include "flash_mla/kernels/softmax.cuh"

namespace jax_ds::flash_mla {

// ---- producer: one warp ------------------------------------------------------------------------

template <typename Config>
JAX_DS_DEVICE void load_block(const DecodeParams& p, NarrowShared<Config>& shared, PageRows& rows,
                              int block, Pipeline<Config::kStages>& ring) {
  rows.advance(block);
  ring.acquire();
  if (elect_one()) ring.commit(kKeyTiles * kTileBytes);
  for (int token = 0; token < kBlock; token += p.box_tokens) {
    const int row = rows.row((block * kBlock + token) / p.box_tokens);
    if (elect_one()) {
      tma_load_4d(shared.blocks[ring.slot()][token / kGroupRows], &p.kv_map, ring.full(), 0, 0, 0,
                  row / kGroupRows, kEvictFirst);
    }
  }
  ring.advance();
}

template <typename Config>
JAX_DS_DEVICE void load_query(const DecodeParams& p, NarrowShared<Config>& shared, int request,
                              u32 phase) {
  mbarrier_wait(&shared.q_empty, phase ^ 1);
  if (elect_one()) {
    mbarrier_arrive_expect_tx(&shared.q_full, kKeyTiles * Config::kQueryTileBytes);
    for (int t = 0; t < kKeyTiles; ++t) {
      tma_load_2d(shared.q[t], &p.q_map, &shared.q_full, t * kTileCols, request * p.S * p.H);
    }
  }
}

template <typename Config>
JAX_DS_DEVICE void produce(const DecodeParams& p, NarrowShared<Config>& shared) {
  Pipeline<Config::kStages> ring(shared.ring);
  u32 q_phase = 0;
  Items<Config> items(p, shared.schedule);
  for (Item item; items.next(item);) {
    if (item.empty()) continue;
    PageRows rows(p, item);
    // The first block before the query: its buffer may be in use by the previous item yet.
    load_block<Config>(p, shared, rows, item.first, ring);
    load_query<Config>(p, shared, item.request, q_phase);
    q_phase ^= 1;
    for (int block = item.first + 1; block < item.last; ++block) {
      load_block<Config>(p, shared, rows, block, ring);
    }
  }
}

// ---- scores: one warpgroup ---------------------------------------------------------------------

// Query rows that one thread holds values of in an accumulator with the rows as columns.
template <typename Config>
struct Columns {
  static JAX_DS_DEVICE int row(int column) {
    return 8 * (column / 2) + 2 * (lane_id() % 4) + column % 2;
  }
  // Places in the accumulator of the thread's upper and lower token (or latent column).
  static constexpr int upper(int column) { return 4 * (column / 2) + column % 2; }
  static constexpr int lower(int column) { return upper(column) + 2; }
};

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
    bar_sync(1, 128);
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
      upper = exp2_approx(fmaf(upper, p.scale_log2, -reference));
      lower = exp2_approx(fmaf(lower, p.scale_log2, -reference));
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
    bar_sync(1, 128);
    if (warp != 0 || lane_id() >= 4) return;
    for (int c = 0; c < kColumns; ++c) {
      const int row = Columns<Config>::row(c);
      const float4 m = ld_shared_v4_f32(shared_address(shared.warp_sum[row]));
      const float sum = (m.x + m.y) + (m.z + m.w);
      shared.inverse[ring.slot()][row] = sum == 0.0f ? 0.0f : 1.0f / sum;
      store_lse(item, row, row_max[c] + log2_approx(sum));
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
    const bool moved = bar_red_or(1, 128, outgrown(s));
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
      note_parts(p, shared.schedule, item, threadIdx.x == 0);
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

// ---- output: one warpgroup ---------------------------------------------------------------------

template <typename Config>
struct NarrowOutput {
  static constexpr int kRows = Config::kRows;
  static constexpr int kColumns = kRows / 4;
  using Element = typename Config::Element;
  using Out = float[kValueTiles][kRows / 2];  // O^T, by tiles of 64 latent columns

  const DecodeParams& p;
  NarrowShared<Config>& shared;
  const int warp = warp_id() % 4;

  Pipeline<Config::kStages> ring{shared.ring};

  // By factors of the query rows, in shared memory.
  static JAX_DS_DEVICE void scale(Out& out, const float (&factors)[kRows]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float factor = factors[Columns<Config>::row(c)];
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        out[tile][Columns<Config>::upper(c)] *= factor;
        out[tile][Columns<Config>::lower(c)] *= factor;
      }
    }
  }

  // O^T += V^T P^T.
  JAX_DS_DEVICE void multiply(Out& out) const {
    ring.wait();
    const auto& tiles = shared.blocks[ring.slot()][0];
    const u64 v = wgmma::descriptor(shared_address(tiles), kNarrowGroupStride);
    const u64 p_tile = wgmma::descriptor(shared_address(tiles[kKeyTiles - 1]), kNarrowGroupStride);
    wgmma::fence();
#pragma unroll
    for (int tile = 0; tile < kValueTiles; ++tile) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma::mma<wgmma::Major::kMN, wgmma::Major::kK>(
            Element{}, out[tile],
            v + tile * (kGroupTileBytes / 16) + step * (2 * kNarrowGroupStride / 16),
            p_tile + 2 * step, true);
      }
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  JAX_DS_DEVICE void release_block() {
    ring.release();
    ring.advance();
  }

  JAX_DS_DEVICE void store_partial(const Item& item, const Out& out) const {
    const int slot = (2 * blockIdx.x + item.part_slot) * kRows;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = Columns<Config>::row(c);
      if (row >= p.S * p.H) continue;
      float* target =
          p.partial_out + static_cast<i64>(slot + row) * kValueDim + 16 * warp + lane_id() / 4;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        target[64 * tile] = out[tile][Columns<Config>::upper(c)];
        target[64 * tile + 8] = out[tile][Columns<Config>::lower(c)];
      }
    }
  }

  JAX_DS_DEVICE void store_final(const Item& item, const Out& out) const {
    const int R = p.S * p.H;
    u16* out_rows = static_cast<u16*>(p.out) + static_cast<i64>(item.request) * R * kValueDim;
    const int column = 16 * warp + 2 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int row = 8 * i + lane_id() / 4;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        const float* o = out[tile] + 4 * i;
        // Transposed: this lane then holds two neighbouring columns of one row.
        const u32 left = movmatrix_trans(wgmma::pack(Element{}, o[0], o[1]));
        const u32 right = movmatrix_trans(wgmma::pack(Element{}, o[2], o[3]));
        if (row < R) {
          u16* target = out_rows + row * kValueDim + column + 64 * tile;
          *reinterpret_cast<u32*>(target) = left;
          *reinterpret_cast<u32*>(target + 8) = right;
        }
      }
    }
  }

  JAX_DS_DEVICE void run() {
    Items<Config> items(p, shared.schedule);
    for (Item item; items.next(item);) {
      Out out;
#pragma unroll
      for (int i = 0; i < kValueTiles * (kRows / 2); ++i) {
        out[i / (kRows / 2)][i % (kRows / 2)] = 0.0f;
      }
      for (int block = item.first; block < item.last; ++block) {
        mbarrier_wait(&shared.p_full[ring.slot()], ring.state.phase);
        if (block != item.first && shared.moved[ring.slot()]) [[unlikely]] {
          scale(out, shared.factor[ring.slot()]);
        }
        multiply(out);
        if (block + 1 == item.last) scale(out, shared.inverse[ring.slot()]);
        release_block();
      }
      if (item.split) {
        store_partial(item, out);
      } else {
        store_final(item, out);
      }
    }
  }
};

// ---- entry -------------------------------------------------------------------------------------

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             1) void decode_narrow(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) u8 bytes[];
  static_assert(sizeof(NarrowShared<Config>) <= NarrowSharedBytes(Config::kRows));
  auto& shared = *reinterpret_cast<NarrowShared<Config>*>(bytes);
  const u32 warp = warp_id();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (warp < 2) {
    make_schedule<Config>(p, shared.schedule, blockIdx.x, warp);
  } else if (warp == 8 && elect_one()) {
    prefetch_tensormap(&p.kv_map);
    prefetch_tensormap(&p.q_map);
    shared.ring.init(1, 128);  // emptied by the threads of the output
    for (u64& barrier : shared.p_full) mbarrier_init(&barrier, 128);
    mbarrier_init(&shared.q_full, 1);
    mbarrier_init(&shared.q_empty, 128);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == 8) {
    produce<Config>(p, shared);
  } else if (warp < 4) {
    NarrowScores<Config>{p, shared}.run();
  } else {
    NarrowOutput<Config>{p, shared}.run();
  }
}

}  // namespace jax_ds::flash_mla
