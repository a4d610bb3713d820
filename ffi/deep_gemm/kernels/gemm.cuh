// FP8 matrix products with fine-grained scales on Hopper: out = (lhs * scales) (rhs * scales)^T.
//
// Two warps produce: TMA brings 128 bytes of K of both operands into a ring of shared-memory slots,
// cp.async their scales. Math warpgroups consume: for each slot four wgmma compute a partial tile
// with the tensor core's own (about 14 bits of) accumulation, which is then scaled and added to the
// float32 total in registers. That promotion is what makes e4m3 products accurate; it runs while
// another warpgroup has the tensor cores. The grid is persistent.
#pragma once

#include "deep_gemm/kernels/config.h"
#include "deep_gemm/kernels/epilogue.cuh"
#include "deep_gemm/kernels/produce.cuh"
#include "deep_gemm/kernels/promote.cuh"
#include "deep_gemm/kernels/scheduler.cuh"
#include "deep_gemm/kernels/split.cuh"
#include "deep_gemm/kernels/storage.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_fp8.cuh"

namespace jax_ds::deep_gemm {

// ---- main loop: one math warpgroup -------------------------------------------------------------

// partial = lhs tile * rhs tile^T over one stage, asynchronously. Takes their wgmma addresses.
template <int kN>
JAX_DS_DEVICE void multiply(float (&partial)[kN / 2], u32 lhs, u32 rhs) {
  wgmma::fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    WgmmaE4m3<kN>::mma(partial, wgmma::with_low_word(lhs + 2 * k),
                       wgmma::with_low_word(rhs + 2 * k), k > 0);
  }
  wgmma::commit_group();
}

// Arrives on the slot's barrier: every thread on that of its own CTA, so that tools can follow what
// it has read; a lane for its warp on those of the other CTAs that fill the slot.
template <Config kConfig>
JAX_DS_DEVICE void release(const Pipeline<kConfig.stages>& ring) {
  __syncwarp();
  if constexpr (kConfig.multicast > 1) {
    const u32 rank = cluster_ctarank(), own = rank % kConfig.multicast;
    if (lane_id() < kConfig.multicast && lane_id() != own) {
      mbarrier_arrive_cluster(ring.empty(), rank - own + lane_id());
    }
  }
  ring.release();
}

// total += the products of the next kDepth slots, for kWaves (perhaps no) times 64 rows. All are
// issued, then promoted one by one, so that the tensor cores have work while this warpgroup
// promotes. They must be drained before the function ends: the assembler serialises wgmma that are
// in flight around a loop.
template <Config kConfig, int kDepth, int kWaves>
JAX_DS_DEVICE void accumulate(const Storage<kConfig>& s, Pipeline<kConfig.stages>& ring,
                              float (&total)[kConfig.waves()][kConfig.block_n / 2], int group,
                              int scale_row) {
  constexpr int kN = kConfig.block_n;
  Pipeline<kConfig.stages> done = ring;
  int slots[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d, ring.advance()) {
    slots[d] = ring.slot();
    ring.wait();
  }
  auto release_next = [&] {
    release<kConfig>(done);
    done.advance();
  };
  if constexpr (kWaves == 0) {
    for (int d = 0; d < kDepth; ++d) release_next();
  } else {
    Scales<kConfig> scales[kWaves][kDepth];
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        scales[wave][d].load(s, slots[d], first_row<kConfig>(group, wave) + scale_row);
      }
    }
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      const int row = first_row<kConfig>(group, wave);
      float partial[kDepth][kN / 2];
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const u32 lhs = wgmma_address(s.lhs[0]) + slots[d] * (sizeof(s.lhs[0]) / 16) + row * 8;
        const u32 rhs = wgmma_address(s.rhs[0]) + slots[d] * (sizeof(s.rhs[0]) / 16);
        multiply<kN>(partial[d], lhs, rhs);
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        d + 1 < kDepth ? wgmma::wait_group<1>() : wgmma::wait_group<0>();
        // Its scales are in registers: the slot may be overwritten.
        if (wave == kWaves - 1) release_next();
        scales[wave][d].promote(total[wave], partial[d]);
      }
    }
  }
}

// One tile's products, over `blocks` slots.
template <Config kConfig, int kWaves>
JAX_DS_DEVICE void multiply_tile(const Storage<kConfig>& s, Pipeline<kConfig.stages>& ring,
                                 float (&total)[kConfig.waves()][kConfig.block_n / 2], int group,
                                 int blocks, int scale_row) {
  // Unrolled, the next slot's barrier is asked while the last products are promoted.
  constexpr int kFull = kConfig.output == kFloat32 ? 2 : 4;  // time to compile
  constexpr int kUnroll =
      kConfig.math > 1 && kConfig.depth == 1 && kWaves == kConfig.waves() ? kFull : 1;
#pragma unroll kUnroll
  for (; blocks >= kConfig.depth; blocks -= kConfig.depth) {
    accumulate<kConfig, kConfig.depth, kWaves>(s, ring, total, group, scale_row);
  }
  for (; kConfig.depth > 1 && blocks > 0; --blocks) {
    accumulate<kConfig, 1, kWaves>(s, ring, total, group, scale_row);
  }
}

// Whether the warpgroups issue their products alternately: barrier kTurns + i lets warpgroup i go,
// those below are for stores. It gains where each has two waves, and loses where it has one.
constexpr bool TakesTurns(const Config& c) {
  return c.mode == kWgrad && c.math == 2 && c.waves() == 2;
}
constexpr u32 kTurns = 3;

// The same for a weight gradient. All waves use the columns' scales, which stay in registers. The
// next slot's are read between the two steps of the last promotion: a wgmma waits for all that its
// warps have asked shared memory for, so that nothing may be asked for shortly before it.
template <Config kConfig>
JAX_DS_DEVICE void multiply_gradient_tile(const Storage<kConfig>& s, Pipeline<kConfig.stages>& ring,
                                          float (&total)[kConfig.waves()][kConfig.block_n / 2],
                                          int group, int blocks, int scale_row) {
  constexpr int kN = kConfig.block_n, kLast = kConfig.waves() - 1;
  if (blocks == 0) return;
  const u32 lhs_tiles = wgmma_address(s.lhs[0]) + first_row<kConfig>(group, 0) * 8;
  ColumnScales<kConfig> columns;
  RowScales<kConfig> rows[kLast + 1];
  const auto load = [&] {
    columns.load(s, ring.slot());
    rows[0].load(s, ring.slot(), first_row<kConfig>(group, 0) + scale_row);
  };
  ring.wait();
  load();
  for (bool more = true; more;) {
    const u32 lhs = lhs_tiles + ring.slot() * (sizeof(s.lhs[0]) / 16);
    const u32 rhs = wgmma_address(s.rhs[0]) + ring.slot() * (sizeof(s.rhs[0]) / 16);
    float partial[kN / 2];
    const auto issue = [&](u32 from) {
      if constexpr (TakesTurns(kConfig)) bar_sync(kTurns + group, kConfig.math_threads());
      multiply<kN>(partial, from, rhs);
      if constexpr (TakesTurns(kConfig)) bar_arrive(kTurns + 1 - group, kConfig.math_threads());
    };
    if constexpr (kLast > 0) {
      issue(lhs);
      rows[kLast].load(s, ring.slot(), first_row<kConfig>(group, kLast) + scale_row);
      wgmma::wait_group<0>();
      columns.scale(partial);
      add_rows(total[0], partial, rows[0]);
    }
    issue(lhs + kLast * kConfig.math * 64 * 8);
    const Pipeline<kConfig.stages> done = ring;
    ring.advance();
    more = --blocks > 0;
    if (more) ring.wait();
    wgmma::wait_group<0>();
    release<kConfig>(done);
    columns.scale(partial);
    const RowScales<kConfig> last = rows[kLast];
    if (more) load();
    add_rows(total[kLast], partial, last);
  }
}

// The same where a second warpgroup has these rows: they take turns, always at the same slots. If a
// slot changed hands, one warpgroup could come to it a round early, before it was ever filled,
// which by its barrier's parity looks as if it were full.
template <Config kConfig>
JAX_DS_DEVICE void multiply_in_turns(const Storage<kConfig>& s, Pipeline<kConfig.stages>& ring,
                                     float (&total)[1][kConfig.block_n / 2], int group, int part,
                                     int blocks, int scale_row) {
  constexpr int kDepth = kConfig.depth;
  for (int turn = 0; blocks > 0; blocks -= kDepth, turn ^= 1) {
    if (turn != part) {
      for (int d = 0; d < min(kDepth, blocks); ++d) ring.advance();
    } else if (blocks >= kDepth) {
      accumulate<kConfig, kDepth, 1>(s, ring, total, group, scale_row);
    } else {
      accumulate<kConfig, 1, 1>(s, ring, total, group, scale_row);
    }
  }
}

// Rows of the warp's part from `valid` on are zero: what was read there may be NaN.
template <Config kConfig>
JAX_DS_DEVICE void clear_rows(float (&total)[kConfig.block_n / 2], int valid) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half + static_cast<int>(lane_id()) / 4 < valid) continue;
#pragma unroll
    for (int j = 0; j < kConfig.block_n / 8; ++j) {
      total[4 * j + 2 * half] = total[4 * j + 2 * half + 1] = 0.f;
    }
  }
}

// The kWave-th 64 rows and what follows, piece by piece.
template <Config kConfig, int kWave = 0>
JAX_DS_DEVICE void store_waves(const Params& p,
                               const float (&total)[kConfig.waves()][kConfig.block_n / 2],
                               const Tile& tile, int row, Staging<kConfig>& staging) {
  if constexpr (kWave < kConfig.waves()) {
    const int first = tile.out_row + row + first_row<kConfig>(0, kWave);
    store_tile<kConfig>(p, total[kWave], {tile.matrix, first, tile.out_end, tile.col}, staging);
    store_waves<kConfig, kWave + 1>(p, total, tile, row, staging);
  }
}

template <Config kConfig>
JAX_DS_DEVICE void consume(const Params& p, Storage<kConfig>& s) {
  constexpr int kWaves = kConfig.waves(), kN = kConfig.block_n;
  constexpr int kGroups = kConfig.row_groups();
  const int warp = warp_id(), group = warp / 4 % kGroups, warp_row = warp % 4 * 16;
  const int k_part = warp / 4 / kGroups;
  Staging<kConfig> staging(s.staging[warp]);

  Pipeline<kConfig.stages> ring(s.ring);
  Pipeline<1> reduce_buffer(s.reduced);
  TileSchedule<kConfig> schedule(p, s.groups);
  Tile next;
  if (TakesTurns(kConfig) && group == 1) bar_arrive(kTurns, kConfig.math_threads());
  for (bool more = schedule.next(next); more;) {
    const Tile tile = next;
    float total[kWaves][kN / 2] = {};
    const int blocks = tile.k_blocks;
    const int scale_row = tile.lhs_row - first_scale<kConfig>(p, tile.lhs_row) + warp_row;
    // A group may end before some of the tile's rows: they are left out, 64 at a time.
    const int end = tile.rows - first_row<kConfig>(group, 0);
    if constexpr (kConfig.mode == kWgrad) {
      multiply_gradient_tile<kConfig>(s, ring, total, group, blocks, scale_row);
    } else if constexpr (kConfig.k_parts() > 1) {
      multiply_in_turns<kConfig>(s, ring, total, group, k_part, blocks, scale_row);
    } else if (!IsRagged(kConfig) || end > first_row<kConfig>(0, kWaves - 1)) {
      multiply_tile<kConfig, kWaves>(s, ring, total, group, blocks, scale_row);
    } else if (kWaves > 1 && end > 0) {
      multiply_tile<kConfig, 1>(s, ring, total, group, blocks, scale_row);
    } else if (kConfig.math > 1) {
      multiply_tile<kConfig, 0>(s, ring, total, group, blocks, scale_row);
    }

    more = schedule.next(next);  // its divisions run beside the stores
    if constexpr (kConfig.k_parts() > 1) {
      join_parts<kConfig>(s, total[0], group, k_part);
      if (k_part > 0) continue;
    }
    if constexpr (kConfig.split > 1) {
      float share[kN / 2 / kConfig.split];
      reduce_splits<kConfig>(s, reduce_buffer, total[0], share, more);
      constexpr int kColumns = kN / kConfig.split;
      const int part = cluster_ctarank() / kConfig.multicast;
      const int row = first_row<kConfig>(group, 0) + warp_row;
      const WarpTile t{tile.matrix, tile.out_row + row, tile.out_end, tile.col + part * kColumns};
      store_tile<kConfig>(p, share, t, staging);
    } else {
      const int row = first_row<kConfig>(group, 0) + warp_row;
      if constexpr (kConfig.mode == kMasked) {
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
          clear_rows<kConfig>(total[wave], tile.rows - row - first_row<kConfig>(0, wave));
        }
      }
      if constexpr (StagesWhole(kConfig)) {
        store_whole<kConfig>(p, total, tile, group, s.staging[4 * group]);
      } else {
        store_waves<kConfig>(p, total, tile, row, staging);
      }
    }
    // Or the assembler takes the warp to be divergent in the next main loop, and computes slots and
    // descriptors in every thread instead of once.
    __syncwarp();
  }
  // TMA must have read the shared memory, of which the lanes that stored know, before it is gone.
  if constexpr (StoresByTma(kConfig)) bulk_wait_group_read<0>();
}

// ---- entry -------------------------------------------------------------------------------------

template <Config kConfig>
__global__ void __launch_bounds__(kConfig.threads(), kConfig.per_sm)
    Gemm(const __grid_constant__ Params p) {
  static_assert(legal<kConfig>());
  extern __shared__ __align__(1024) u8 memory[];
  Storage<kConfig>& s = *reinterpret_cast<Storage<kConfig>*>(memory);
  constexpr u32 kMathWarps = kConfig.math * 4, kRowWarps = kConfig.row_groups() * 4;

  // Where no other CTA fills its slots, the producer's own initialisation is all it must wait for.
  constexpr bool kEarly = kConfig.mode == kDense && kConfig.multicast == 1;

  const u32 warp = warp_id();
  const bool producer = warp == kMathWarps;
  if (producer && elect_one()) {
    s.ring.init(1 + 32, kRowWarps * (32 + kConfig.multicast - 1));
    if constexpr (kConfig.split > 1) s.reduced.init(1, kRowWarps * (kConfig.split - 1));
    if constexpr (DealsTiles(kConfig)) s.groups.posted.init(1, 1 + 32 + kMathWarps * 32);
    fence_mbarrier_init();
  }
  if (warp == 0 && elect_one()) {
    prefetch_tensormap(&p.lhs);
    prefetch_tensormap(&p.rhs);
    if constexpr (StoresByTma(kConfig)) prefetch_tensormap(&p.out);
  }
  __syncwarp();
  if constexpr (kConfig.cluster() > 1) barrier_cluster_arrive_relaxed();
  // A successor may come as soon as there is room; it waits for our end as we do for another's.
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (kConfig.mode != kDense && warp == 0) {
    load_groups<kConfig>(p, s.groups.ends);
    if constexpr (IsRagged(kConfig) && !DealsTiles(kConfig)) count_tiles<kConfig>(p, s.groups);
  }
  TileLoads<kConfig> loads(p, s);
  if (kEarly && producer) {
    bar_arrive(0, kConfig.threads());
    // Into slots nobody has used: the cluster's barrier is met before the thread waits for others,
    // which racecheck takes the whole CTA to do.
    if (elect_one()) loads.template issue < kConfig.stages<4 ? kConfig.stages : 4>();
    __syncwarp();
  } else {
    bar_sync(0, kConfig.threads());
  }
  // Nobody may write to a CTA of the cluster that has not come so far.
  if constexpr (kConfig.cluster() > 1) barrier_cluster_wait();

  if (warp >= kMathWarps) {
    if constexpr (kConfig.moves_registers()) setmaxnreg_dec<kConfig.producer_registers()>();
    if (warp == kMathWarps + 1) {
      produce_scales<kConfig>(p, s);
    } else if (producer && elect_one()) {
      if constexpr (kEarly) {
        loads.template issue<TileLoads<kConfig>::kAll>();
      } else {
        TileLoads<kConfig>(p, s).template issue<TileLoads<kConfig>::kAll>();
      }
    }
    if constexpr (DealsTiles(kConfig)) {
      if (warp == kMathWarps + 2) Dealer<kConfig>(p, s.groups).run();
    }
    __syncwarp();
  } else {
    if constexpr (kConfig.moves_registers()) setmaxnreg_inc<kConfig.math_registers()>();
    consume<kConfig>(p, s);
  }
  // The slots of CTAs that share lhs are released by all of them: none may leave before that. Parts
  // of split tiles are awaited by who receives them.
  if constexpr (kConfig.multicast > 1) cluster_sync();
}

}  // namespace jax_ds::deep_gemm
