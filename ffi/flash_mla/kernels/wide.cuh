// Decode for many query rows: bound by the tensor cores. wide_config.cuh has the plan.
#pragma once

#include "flash_mla/kernels/softmax.cuh"
#include "flash_mla/kernels/wide_config.cuh"

namespace jax_ds::flash_mla {

// This CTA's place: group of the schedule, query rows.
template <typename Config>
JAX_DS_DEVICE Place place_of(const DecodeParams& p) {
  const int cluster = blockIdx.x / Config::kCluster;
  const int rank = Config::kCluster == 1 ? 0 : cluster_ctarank();
  const int row_group = cluster % p.row_groups;
  return {cluster / p.row_groups, (row_group * Config::kCluster + rank) * Config::kRows};
}

// Where this CTA's rows of a part lie in the workspace.
template <typename Config>
JAX_DS_DEVICE i64 partial_row(const DecodeParams& p, const Place& place, int part_slot) {
  return static_cast<i64>(2 * place.group + part_slot) * p.row_groups * Config::kCluster *
             Config::kRows +
         place.first_row;
}

// One lane of a warp, for all CTAs of the cluster: the warp no longer reads the slot.
template <typename Config>
JAX_DS_DEVICE void release(u64* barrier) {
  if constexpr (Config::kCluster == 1) {
    mbarrier_arrive(barrier);
  } else {
    for (int rank = 0; rank < Config::kCluster; ++rank) mbarrier_arrive_cluster(barrier, rank);
  }
}

// ---- producer: the warps of one warpgroup ------------------------------------------------------

// Warp 0 finds the items, announces each to the other roles along with its query, and loads pages.
template <typename Config>
struct Producer {
  const DecodeParams& p;
  WideShared<Config>& shared;
  Progress at;

  // Each CTA of a cluster loads its share of the groups, for all.
  JAX_DS_DEVICE void load(const TensorMap* map, u8* target, int group_bytes, u64* full, int tile,
                          int row) const {
    if (!elect_one()) return;
    mbarrier_arrive_expect_tx(full, kGroups * group_bytes);
    if constexpr (Config::kCluster == 1) {
      tma_load_4d(target, map, full, 0, 0, tile, row / kGroupRows);
    } else {
      const int first = cluster_ctarank() * (kGroups / Config::kCluster);
      tma_load_4d_multicast(target + first * group_bytes, map, full, Config::kMulticast, 0, 0, tile,
                            row / kGroupRows + first);
    }
  }

  JAX_DS_DEVICE void load_block(int row) {
    mbarrier_wait(&shared.values_empty[at.stage()], at.stage_phase() ^ 1);
    load(&p.kv_map, shared.values[at.stage()][0][0], kWideGroupStride,
         &shared.values_full[at.stage()], 0, row);
    at.template advance_stage<Config::kStages>();
    mbarrier_wait(&shared.rope_empty[at.slot()], at.slot_phase() ^ 1);
    load(&p.rope_map, shared.rope[at.slot()], kGroupTileBytes, &shared.rope_full[at.slot()],
         kKeyTiles - 1, row);
    at.advance_slot();
  }

  // Tells the other roles; blocks == 0: that there are no more items.
  JAX_DS_DEVICE void announce(const Announcement& item) {
    if (elect_one()) {
      const u32 slot = at.items() % Config::kAnnouncements;
      shared.announcements[slot] = item;
      mbarrier_arrive(&shared.announced[slot]);
    }
    at.advance_item();
  }

  JAX_DS_DEVICE void load_query(const Item& item) {
    mbarrier_wait(&shared.values_empty[at.stage()], at.stage_phase() ^ 1);
    mbarrier_wait(&shared.q_empty, (at.items() + 1) % 2);
    announce({item.request, item.length - item.first * kBlock, item.last - item.first,
              item.split ? item.part_slot : kWhole});
    if (elect_one()) {
      u64* full = &shared.values_full[at.stage()];
      mbarrier_arrive_expect_tx(full, kKeyTiles * kTileBytes);
      const int row = item.request * p.S * p.H + shared.place.first_row;
      for (int t = 0; t < kKeyTiles; ++t) {
        u8* target = t < Config::kQueryRegTiles ? shared.query[at.stage()][t]
                                                : shared.q[t - Config::kQueryRegTiles];
        tma_load_2d(target, &p.q_map, full, t * kTileCols, row);
      }
    }
    at.template advance_stage<Config::kStages>();
  }

  JAX_DS_DEVICE void run() {
    Items walk(p, shared.schedule);
    for (Item item; walk.next(item);) {
      if (item.empty()) continue;
      load_query(item);
      PageRows rows(p, item);
      for (int block = item.first; block < item.last; ++block) load_block(rows.row(block));
    }
    announce({.blocks = 0});
  }
};

// Warp 1 writes the results of requests without tokens and notes how requests were shared out.
template <typename Config>
JAX_DS_DEVICE void write_empty(const DecodeParams& p, WideShared<Config>& shared) {
  const int R = p.S * p.H;
  Items items(p, shared.schedule);
  for (Item item; items.next(item);) {
    note_parts(p, shared.schedule, item, lane_id() == 0 && shared.place.first_row == 0,
               shared.place.group, 0);
    if (!item.empty()) continue;
    for (int i = 0; i < Config::kRows && shared.place.first_row + i < R; ++i) {
      const i64 row = static_cast<i64>(item.request) * R + shared.place.first_row + i;
      u8* target = static_cast<u8*>(p.out) + row * kValueDim * 2 + lane_id() * 16;
      st_global_v4(target, uint4{0, 0, 0, 0});
      st_global_v4(target + 512, uint4{0, 0, 0, 0});
      if (lane_id() == 0) p.lse[row] = -kInfinity;
    }
  }
}

// ---- scores: one warpgroup ---------------------------------------------------------------------

template <typename Config>
struct Scores {
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
    bar_sync(1, 128);  // all warps have done with the previous item's
    st_shared_v4(shared_address(shared.q_fragment[chunk][matrix_row()]), piece.x, piece.y, piece.z,
                 piece.w);
    fence_proxy_async_shared();
    bar_sync(1, 128);
    release_stage();
  }

  // On behalf of both output warpgroups, which take no notice of the query's stage.
  JAX_DS_DEVICE void release_stage() {
    if (lane_id() == 0) {
      release<Config>(&shared.values_empty[at.stage()]);
      release<Config>(&shared.values_empty[at.stage()]);
    }
    at.template advance_stage<Config::kStages>();
  }

  // S = Q K^T. Once all but the rotary part is through, opens the previous block's P V.
  JAX_DS_DEVICE void multiply(const Query& q, float (&s)[32], bool open_previous) const {
    mbarrier_wait(&shared.values_full[at.stage()], at.stage_phase());
    wgmma::fence();
#pragma unroll
    for (int t = 0; t < kValueTiles; ++t) {
      const u64 k =
          wgmma::descriptor(shared_address(shared.values[at.stage()][0][t]), kWideGroupStride);
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
    mbarrier_wait(&shared.rope_full[at.slot()], at.slot_phase());
    wgmma::fence();
    const u64 k = wgmma::descriptor(shared_address(shared.rope[at.slot()]));
    const u64 from = wgmma::descriptor(shared_address(shared.q[Config::kQuerySharedTiles - 1]));
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma::mma<kK, kK>(Element{}, s, from + 2 * step, k + 2 * step, true);
    }
    wgmma::commit_group();
    wgmma::wait_group<1>();
    if (open_previous && lane_id() == 0) mbarrier_arrive(&shared.go[at.slot() ^ 1]);
    wgmma::wait_group<0>();
  }

  // Scales to base 2 and hides what the rows may not see. `tokens`: to the request's end.
  JAX_DS_DEVICE void mask(int tokens, float (&s)[32]) const {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] *= p.scale_log2;
    if (tokens - (p.causal ? p.S - 1 : 0) >= kBlock) return;
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

  // Scores to probabilities; what the output so far is scaled by goes to shared memory.
  JAX_DS_DEVICE void softmax(float (&s)[32]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = s[2 * half];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        largest = fmaxf(largest, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const u32 shift = move_reference(reference[half], largest);
      if (lane_id() % 4 == 0) shared.shift[at.slot()][row + 8 * half] = shift;
      const float zero = finite_reference(reference[half]);
      float added = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& a = s[4 * i + 2 * half];
        float& b = s[4 * i + 2 * half + 1];
        a = exp2_approx(a - zero);
        b = exp2_approx(b - zero);
        added += a + b;
      }
      sum[half] = sum[half] * power_of_two(shift) + added;
    }
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
    for (int i = tokens * 64 + threadIdx.x % 128; i < kBlock * 64; i += 128) {
      const int row = i / 64, tile = i / 8 % 8, chunk = i % 8;
      const u8* target = shared.values[at.stage()][row / kGroupRows][tile];
      st_shared_v4(shared_address(target) + row % kGroupRows * 128 + chunk * 16, 0, 0, 0, 0);
    }
  }

  JAX_DS_DEVICE void finish(const Announcement& item) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
      if (lane_id() % 4 != 0) continue;
      shared.inverse[at.slot()][row + 8 * half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
      const float lse = reference[half] + log2_approx(sum[half]);
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
    for (int blocks = item.blocks; blocks > 0; --blocks, tokens -= kBlock) {
      float s[32];
      multiply(q, s, !opened);
      if (blocks == 1 && lane_id() == 0) mbarrier_arrive(&shared.q_empty);
      mask(tokens, s);
      softmax(s);
      bar_sync(1, 128);  // all warps have done with the rotary tile
      store_probabilities(s);
      if (tokens < kBlock) clear_unused_values(tokens);
      if (blocks == 1) finish(item);
      fence_proxy_async_shared();
      __syncwarp();
      const u32 slot = at.slot();
      at.template advance_stage<Config::kStages>();
      // The next block opens this one's P V, unless there is none or it is still to come.
      opened =
          blocks == 1 || !mbarrier_test_wait(&shared.values_full[at.stage()], at.stage_phase());
      if (opened && lane_id() == 0) mbarrier_arrive(&shared.go[slot]);
      at.advance_slot();
    }
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

// ---- output: two warpgroups --------------------------------------------------------------------

template <typename Config>
struct Output {
  using Element = typename Config::Element;

  const DecodeParams& p;
  WideShared<Config>& shared;
  const int half;                                        // of the columns
  const int row = 16 * (warp_id() % 4) + lane_id() / 4;  // and row + 8

  Progress at;

  JAX_DS_DEVICE void rescale(float (&out)[128]) const {
    const u32 upper_shift = shared.shift[at.slot()][row];
    const u32 lower_shift = shared.shift[at.slot()][row + 8];
    if (!__any_sync(0xffffffffu, upper_shift + lower_shift != 0)) return;
    const float upper = power_of_two(upper_shift), lower = power_of_two(lower_shift);
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] *= i % 4 < 2 ? upper : lower;
  }

  // As two products of 128 columns: ptxas gives one of 256 no registers in a CTA of 512 threads.
  JAX_DS_DEVICE void multiply(float (&out)[128]) const {
    const u64 probabilities = wgmma::descriptor(shared_address(shared.rope[at.slot()]));
    const u64 v = wgmma::descriptor(shared_address(shared.values[at.stage()][0][4 * half]),
                                    kWideGroupStride, kGroupTileBytes);
    float (&left)[64] = *reinterpret_cast<float (*)[64]>(&out[0]);
    float (&right)[64] = *reinterpret_cast<float (*)[64]>(&out[64]);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const u64 rows = v + step * (2 * kWideGroupStride / 16);
      wgmma::mma<wgmma::Major::kK, wgmma::Major::kMN>(Element{}, left, probabilities + 2 * step,
                                                      rows, true);
      wgmma::mma<wgmma::Major::kK, wgmma::Major::kMN>(Element{}, right, probabilities + 2 * step,
                                                      rows + 2 * kGroupTileBytes / 16, true);
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  JAX_DS_DEVICE void release_block() {
    __syncwarp();
    if (lane_id() == 0) {
      release<Config>(&shared.values_empty[at.stage()]);
      release<Config>(&shared.rope_empty[at.slot()]);
    }
    at.template advance_stage<Config::kStages>();
    at.advance_slot();
  }

  JAX_DS_DEVICE void store_partial(const Announcement& item, const float (&out)[128], float upper,
                                   float lower) const {
    float* target = p.partial_out +
                    (partial_row<Config>(p, shared.place, item.part) + row) * kValueDim +
                    256 * half + 2 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      st_global_v2_f32(target + 8 * i, out[4 * i] * upper, out[4 * i + 1] * upper);
      st_global_v2_f32(target + 8 * kValueDim + 8 * i, out[4 * i + 2] * lower,
                       out[4 * i + 3] * lower);
    }
  }

  // Four packed pairs a lane, one of each of four groups of eight columns, to eight columns of the
  // group that the lane's place in its quad names: a 4x4 transpose over the quad.
  static JAX_DS_DEVICE uint4 gather(u32 a, u32 b, u32 c, u32 d) {
    const bool odd = lane_id() & 1, high = lane_id() & 2;
    const u32 x = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
    const u32 y = __shfl_xor_sync(0xffffffffu, odd ? c : d, 1);
    (odd ? a : b) = x;
    (odd ? c : d) = y;
    const u32 z = __shfl_xor_sync(0xffffffffu, high ? a : c, 2);
    const u32 w = __shfl_xor_sync(0xffffffffu, high ? b : d, 2);
    (high ? a : c) = z;
    (high ? b : d) = w;
    return {a, b, c, d};
  }

  JAX_DS_DEVICE void store_final(const Announcement& item, const float (&out)[128], float upper,
                                 float lower) const {
    const int R = p.S * p.H;
    const int r = shared.place.first_row + row;
    u16* target = static_cast<u16*>(p.out) + (static_cast<i64>(item.request) * R + r) * kValueDim +
                  256 * half + 8 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      u32 a[4], b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* o = out + 4 * (i + j);
        a[j] = wgmma::pack(Element{}, o[0] * upper, o[1] * upper);
        b[j] = wgmma::pack(Element{}, o[2] * lower, o[3] * lower);
      }
      const uint4 first = gather(a[0], a[1], a[2], a[3]);
      const uint4 second = gather(b[0], b[1], b[2], b[3]);
      if (r < R) st_global_v4(target + 8 * i, first);
      if (r + 8 < R) st_global_v4(target + 8 * kValueDim + 8 * i, second);
    }
  }

  JAX_DS_DEVICE void run_item(const Announcement& item) {
    float out[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] = 0.0f;
    float upper = 0.0f, lower = 0.0f;
    const int blocks = item.blocks;
    for (int i = 0; i < blocks; ++i) {
      mbarrier_wait(&shared.go[at.slot()], at.slot_phase());
      mbarrier_wait(&shared.values_full[at.stage()], at.stage_phase());
      if (i != 0) rescale(out);
      multiply(out);
      // Read before the slot is released: the scores of the next item may overwrite it.
      if (i + 1 == blocks) {
        upper = shared.inverse[at.slot()][row];
        lower = shared.inverse[at.slot()][row + 8];
      }
      release_block();
    }
    if (item.part != kWhole) {
      store_partial(item, out, upper, lower);
    } else {
      store_final(item, out, upper, lower);
    }
  }

  JAX_DS_DEVICE void run() {
    for (;; at.advance_item()) {
      const u32 place = at.items() % Config::kAnnouncements;
      mbarrier_wait(&shared.announced[place], at.items() / Config::kAnnouncements % 2);
      const Announcement& item = shared.announcements[place];
      if (item.blocks == 0) break;
      at.template advance_stage<Config::kStages>();  // the query's
      run_item(item);
    }
  }
};

// ---- entry -------------------------------------------------------------------------------------

template <typename Config>
JAX_DS_DEVICE void init_barriers(WideShared<Config>& shared) {
  constexpr u32 kReleases = 8 * Config::kCluster;  // the output's warps, in every CTA
  for (int i = 0; i < Config::kStages; ++i) {
    mbarrier_init(&shared.values_full[i], 1);
    mbarrier_init(&shared.values_empty[i], kReleases);
  }
  for (int i = 0; i < Config::kRopeSlots; ++i) {
    mbarrier_init(&shared.rope_full[i], 1);
    mbarrier_init(&shared.rope_empty[i], kReleases);
    mbarrier_init(&shared.go[i], 4);
  }
  for (int i = 0; i < Config::kAnnouncements; ++i) mbarrier_init(&shared.announced[i], 1);
  mbarrier_init(&shared.q_empty, 4);
  fence_mbarrier_init();
}

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             1) void decode_wide(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) u8 bytes[];
  static_assert(sizeof(WideShared<Config>) <= kMaxSharedBytes);
  auto& shared = *reinterpret_cast<WideShared<Config>*>(bytes);
  const u32 warp = warp_id();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (warp == 0) {
    const Scheduler<Config::kOverhead, Config::kWholePercent> scheduler(p);
    const Place place = place_of<Config>(p);
    const Schedule schedule = scheduler.schedule(place.group);
    if (lane_id() == 0) {
      shared.schedule = schedule;
      shared.place = place;
    }
  } else if (warp == 1 && elect_one()) {
    prefetch_tensormap(&p.kv_map);
    prefetch_tensormap(&p.rope_map);
    prefetch_tensormap(&p.q_map);
    init_barriers<Config>(shared);
  }
  __syncthreads();
  if constexpr (Config::kCluster > 1) cluster_sync();

  if (warp < 4) {
    setmaxnreg_dec<Config::kProducerRegisters>();
    if (warp == 0) Producer<Config>{p, shared}.run();
    if (warp == 1) write_empty<Config>(p, shared);
  } else if (warp < 8) {
    setmaxnreg_inc<Config::kScoresRegisters>();
    Scores<Config>{p, shared}.run();
  } else {
    setmaxnreg_inc<Config::kOutputRegisters>();
    Output<Config>{p, shared, static_cast<int>(warp / 4 - 2)}.run();
  }
  // No CTA leaves while the other may still write to it or arrive on its barriers.
  if constexpr (Config::kCluster > 1) {
    __syncwarp();
    cluster_sync();
  }
}

}  // namespace jax_ds::flash_mla
