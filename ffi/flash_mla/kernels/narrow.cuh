// Decode for few query rows: bound by the bytes of the cache. narrow_config.cuh has the plan.
#pragma once

#include "flash_mla/kernels/narrow_config.cuh"
#include "flash_mla/kernels/softmax.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
using NarrowRing = Ring<Config::kSlots>;

// ---- producer: one warp ------------------------------------------------------------------------

template <typename Config>
JAX_DS_DEVICE void load_block(const DecodeParams& p, NarrowShared<Config>& shared, int row,
                              NarrowRing<Config>& ring) {
  for (int place = 0; place < kKeyTiles; ++place) {
    mbarrier_wait(&shared.empty[ring.slot], ring.phase ^ 1);
    if (elect_one()) {
      mbarrier_arrive_expect_tx(&shared.full[ring.slot], kTileBytes);
      tma_load_3d(shared.ring[ring.slot], &p.kv_map, &shared.full[ring.slot], 0, row,
                  key_tile(place), kEvictFirst);
    }
    ring = ring.ahead(1);
  }
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
  NarrowRing<Config> ring;
  u32 q_phase = 0;
  Items items(p, shared.schedule);
  for (Item item; items.next(item);) {
    if (item.empty()) continue;
    PageRows rows(p, item);
    // The first block before the query: its buffer may be in use by the previous item yet.
    load_block<Config>(p, shared, rows.row(item.first), ring);
    load_query<Config>(p, shared, item.request, q_phase);
    q_phase ^= 1;
    for (int block = item.first + 1; block < item.last; ++block) {
      load_block<Config>(p, shared, rows.row(block), ring);
    }
  }
}

// ---- math: two warpgroups ----------------------------------------------------------------------

template <typename Config>
struct NarrowMath {
  static constexpr int kRows = Config::kRows;
  static constexpr int kColumns = kRows / 4;  // query rows that one thread holds values of
  using Element = typename Config::Element;
  using Major = wgmma::Major;

  const DecodeParams& p;
  NarrowShared<Config>& shared;
  const int warp = warp_id();       // 0 .. 7
  const int group = warp / 4;       // warpgroup: its block of a pair, its half of the columns
  const int quad = lane_id() % 4;   // holds query rows 8 i + 2 quad + {0, 1}
  const int token = 16 * (warp % 4) + lane_id() / 4;  // and token + 8, in the block

  NarrowRing<Config> ring;
  u32 q_phase = 0;

  float out[4][kRows / 2];  // O^T: four 64-column tiles of this warpgroup's half
  float row_max[kColumns];  // base 2, the reference point of the exponentials; alike in all threads
  float row_sum[kColumns];  // of this thread's own tokens

  static JAX_DS_DEVICE int query_row(int column) {
    return 8 * (column / 2) + 2 * (lane_id() % 4) + column % 2;
  }

  // S^T of this warpgroup's block.
  JAX_DS_DEVICE void scores(NarrowRing<Config> tiles, float (&s)[kRows / 2]) {
#pragma unroll
    for (int place = 0; place < kKeyTiles; ++place) {
      mbarrier_wait(&shared.full[tiles.slot], tiles.phase);
      wgmma::fence();
      const u64 k = wgmma::descriptor(shared_address(shared.ring[tiles.slot]));
      const u64 q = wgmma::descriptor(shared_address(shared.q[key_tile(place)]));
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma::mma<Major::kK, Major::kK>(Element{}, s, k + 2 * step, q + 2 * step,
                                         place + step != 0);
      }
      tiles = tiles.ahead(1);
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  // Scales to base 2, hides what a row may not see, and leaves each warp's row maxima in shared.
  JAX_DS_DEVICE void mask_and_reduce(const Item& item, int block, float (&s)[kRows / 2]) {
    const int start = block * kBlock;
    const bool partial = start + kBlock > visible_tokens(p, item.length, 0);
    float local[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float& upper = s[4 * (c / 2) + c % 2];
      float& lower = s[4 * (c / 2) + 2 + c % 2];
      upper *= p.scale_log2;
      lower *= p.scale_log2;
      if (partial) {
        const int visible = visible_tokens(p, item.length, query_row(c)) - start;
        if (token >= visible) upper = -kInfinity;
        if (token + 8 >= visible) lower = -kInfinity;
      }
      local[c] = fmaxf(upper, lower);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        local[c] = fmaxf(local[c], __shfl_xor_sync(0xffffffffu, local[c], lanes));
      }
      if (lane_id() < 4) shared.warp_max[query_row(c)][warp] = local[c];
    }
  }

  JAX_DS_DEVICE void no_scores() {
    if (lane_id() < 4) {
      for (int c = 0; c < kColumns; ++c) shared.warp_max[query_row(c)][warp] = -kInfinity;
    }
  }

  // Moves the reference points where the maxima have outgrown them, and the sums along.
  JAX_DS_DEVICE void update_max() {
    float factor[kColumns];
    bool changed = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const u32 address = shared_address(shared.warp_max[query_row(c)]);
      const float4 a = ld_shared_v4_f32(address);
      const float4 b = ld_shared_v4_f32(address + 16);
      const float largest = fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)),
                                  fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
      factor[c] = power_of_two(move_reference(row_max[c], largest));
      row_sum[c] *= factor[c];
      changed |= factor[c] != 1.0f;
    }
    if (!__any_sync(0xffffffffu, changed)) return;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) out[tile][i] *= factor[2 * (i / 4) + i % 2];
    }
  }

  // P^T, transposed on the way into shared memory: rows x 64 tokens.
  JAX_DS_DEVICE void store_probabilities(float (&s)[kRows / 2]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float reference = finite_reference(row_max[c]);
      float& upper = s[4 * (c / 2) + c % 2];
      float& lower = s[4 * (c / 2) + 2 + c % 2];
      upper = exp2_approx(upper - reference);
      lower = exp2_approx(lower - reference);
      row_sum[c] += upper + lower;
    }
    const u32 base = shared_address(shared.p[group]);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int row = 8 * i + lane_id() % 8;
      const int chunk = 2 * (warp % 4) + lane_id() / 8 % 2;  // eight tokens
      stmatrix_x2_trans(base + swizzled(row, chunk),
                        wgmma::pack(Element{}, s[4 * i], s[4 * i + 1]),
                        wgmma::pack(Element{}, s[4 * i + 2], s[4 * i + 3]));
    }
  }

  // Unused slots of a page may hold NaN, which a zero probability would not hide.
  JAX_DS_DEVICE void clear_unused_values(NarrowRing<Config> tiles, int tokens) {
    for (int place = 1; place < kKeyTiles; ++place) {
      const u32 base = shared_address(shared.ring[tiles.ahead(place).slot]);
      for (int i = tokens * 8 + threadIdx.x % 128; i < kBlock * 8; i += 128) {
        st_shared_v4(base + i * 16, 0, 0, 0, 0);
      }
    }
  }

  JAX_DS_DEVICE void wait_values(NarrowRing<Config> tiles) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const NarrowRing<Config> at = tiles.ahead(1 + 4 * group + tile);
      mbarrier_wait(&shared.full[at.slot], at.phase);
    }
  }

  // O^T += V^T P^T over kBlocks blocks, this warpgroup's half of the columns. The waits come first
  // and the products in one branch, or ptxas serialises them (C7519).
  template <int kBlocks>
  JAX_DS_DEVICE void accumulate(NarrowRing<Config> tiles, bool fresh) {
    wgmma::fence();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const u64 probabilities = wgmma::descriptor(shared_address(shared.p[block]));
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const u32 slot = tiles.ahead(1 + 4 * group + tile).slot;
        const u64 v = wgmma::descriptor(shared_address(shared.ring[slot]));
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          wgmma::mma<Major::kMN, Major::kK>(Element{}, out[tile], v + 128 * step,
                                            probabilities + 2 * step,
                                            !fresh || block + step != 0);
        }
      }
      tiles = tiles.ahead(kKeyTiles);
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  JAX_DS_DEVICE void release_values(NarrowRing<Config> tiles) {
    if (lane_id() != 0) return;
    for (int tile = 0; tile < 4; ++tile) {
      mbarrier_arrive(&shared.empty[tiles.ahead(1 + 4 * group + tile).slot]);
    }
  }

  // Blocks `block` and, unless `single`, `block + 1`.
  JAX_DS_DEVICE void pair(const Item& item, int block, bool single) {
    const NarrowRing<Config> first = ring;
    const NarrowRing<Config> second = ring.ahead(kKeyTiles);
    const NarrowRing<Config> own = group == 0 ? first : second;
    const int own_block = block + group;
    const bool idle = single && group == 1;
    float s[kRows / 2];
    if (idle) {
      no_scores();
    } else {
      scores(own, s);
      if (lane_id() == 0) mbarrier_arrive(&shared.empty[own.slot]);  // the rotary tile
      mask_and_reduce(item, own_block, s);
    }
    bar_sync(1, Config::kMathThreads);
    update_max();
    if (!idle) {
      store_probabilities(s);
      const int tokens = item.length - own_block * kBlock;
      if (tokens < kBlock) clear_unused_values(own, tokens);
      fence_proxy_async_shared();
    }
    bar_sync(2, Config::kMathThreads);
    const bool fresh = block == item.first;
    wait_values(first);
    if (single) {
      accumulate<1>(first, fresh);
    } else {
      wait_values(second);
      accumulate<2>(first, fresh);
      release_values(second);
    }
    release_values(first);
    ring = single ? second : second.ahead(kKeyTiles);
  }

  // Sums over all threads' tokens; then 1 / sum (0 for an empty row) into row_sum, log2-sum into lse.
  JAX_DS_DEVICE void finish_sums(float (&lse)[kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        row_sum[c] += __shfl_xor_sync(0xffffffffu, row_sum[c], lanes);
      }
      if (lane_id() < 4) shared.warp_sum[query_row(c)][warp] = row_sum[c];
    }
    bar_sync(1, Config::kMathThreads);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const u32 address = shared_address(shared.warp_sum[query_row(c)]);
      const float4 a = ld_shared_v4_f32(address);
      const float4 b = ld_shared_v4_f32(address + 16);
      const float sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
      lse[c] = row_max[c] + log2_approx(sum);
      row_sum[c] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
  }

  JAX_DS_DEVICE void store_partial(const Item& item, const float (&lse)[kColumns]) {
    const int slot = (2 * blockIdx.x + item.part_slot) * kRows;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = query_row(c);
      if (row >= p.S * p.H) continue;
      if (warp == 0 && lane_id() < 4) p.partial_lse[slot + row] = lse[c];
      float* target = p.partial_out + static_cast<i64>(slot + row) * kValueDim + 256 * group + token;
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        target[64 * tile] = out[tile][4 * (c / 2) + c % 2] * row_sum[c];
        target[64 * tile + 8] = out[tile][4 * (c / 2) + 2 + c % 2] * row_sum[c];
      }
    }
  }

  JAX_DS_DEVICE void store_final(const Item& item, const float (&lse)[kColumns]) {
    const int R = p.S * p.H;
    const i64 base = static_cast<i64>(item.request) * R;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (warp == 0 && lane_id() < 4 && query_row(c) < R) {
        p.lse[base + query_row(c)] = lse[c] * kLn2;
      }
    }
    u16* out_rows = static_cast<u16*>(p.out) + base * kValueDim;
    const int column = 256 * group + 16 * (warp % 4) + 2 * quad;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float a = row_sum[2 * i], b = row_sum[2 * i + 1];
      const int row = 8 * i + lane_id() / 4;
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const float* o = out[tile] + 4 * i;
        // Transposed: this lane then holds two neighbouring columns of one row.
        const u32 left = movmatrix_trans(wgmma::pack(Element{}, o[0] * a, o[1] * b));
        const u32 right = movmatrix_trans(wgmma::pack(Element{}, o[2] * a, o[3] * b));
        if (row < R) {
          u16* target = out_rows + row * kValueDim + column + 64 * tile;
          *reinterpret_cast<u32*>(target) = left;
          *reinterpret_cast<u32*>(target + 8) = right;
        }
      }
    }
  }

  JAX_DS_DEVICE void run() {
    Items items(p, shared.schedule);
    for (Item item; items.next(item);) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        row_max[c] = -kInfinity;
        row_sum[c] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4 * (kRows / 2); ++i) out[i / (kRows / 2)][i % (kRows / 2)] = 0.0f;
      if (!item.empty()) {
        mbarrier_wait(&shared.q_full, q_phase);
        q_phase ^= 1;
        for (int block = item.first; block < item.last; block += 2) {
          pair(item, block, block + 1 == item.last);
        }
        // All of this warp's reads of the query ended with its last wait.
        if (lane_id() == 0) mbarrier_arrive(&shared.q_empty);
      }
      float lse[kColumns];
      finish_sums(lse);
      if (item.split) {
        store_partial(item, lse);
      } else {
        store_final(item, lse);
      }
      note_parts(p, shared.schedule, item, threadIdx.x == 0);
    }
  }
};

// ---- entry -------------------------------------------------------------------------------------

template <typename Config>
__global__ __launch_bounds__(Config::kThreads, 1) void decode_narrow(
    const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) u8 bytes[];
  static_assert(sizeof(NarrowShared<Config>) <= 232448);
  auto& shared = *reinterpret_cast<NarrowShared<Config>*>(bytes);
  const u32 warp = warp_id();
  griddepcontrol_launch_dependents();
  if (warp == 0) {
    const Scheduler<Config::kOverhead, Config::kWholePercent> scheduler(p);
    const Schedule schedule = scheduler.schedule(blockIdx.x);
    if (lane_id() == 0) shared.schedule = schedule;
  } else if (warp == Config::kMathThreads / 32 && elect_one()) {
    prefetch_tensormap(&p.kv_map);
    prefetch_tensormap(&p.q_map);
    for (int i = 0; i < Config::kSlots; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], 4);  // the warps of one warpgroup
    }
    mbarrier_init(&shared.q_full, 1);
    mbarrier_init(&shared.q_empty, Config::kMathThreads / 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == Config::kMathThreads / 32) {
    produce<Config>(p, shared);
  } else {
    NarrowMath<Config>{p, shared}.run();
  }
}

}  // namespace jax_ds::flash_mla
