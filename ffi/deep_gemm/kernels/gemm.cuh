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
#include "deep_gemm/kernels/promote.cuh"
#include "deep_gemm/kernels/scheduler.cuh"
#include "deep_gemm/kernels/split.cuh"
#include "deep_gemm/kernels/storage.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_fp8.cuh"

namespace jax_ds::deep_gemm {

// ---- producers: a warp for the operands, a warp for their scales --------------------------------

// One thread. TMA counts its bytes on the slot's barrier.
template <Config kConfig>
JAX_DS_DEVICE void produce_tiles(const Params& p, Storage<kConfig>& s) {
  constexpr int kLhsRows = kConfig.block_m / kConfig.multicast;
  constexpr u32 kBytes = (kConfig.block_m + kConfig.block_n) * kBlockK;
  const u32 rank = kConfig.multicast > 1 ? cluster_ctarank() : 0;
  const u32 part = rank % kConfig.multicast;  // of the lhs tile
  const u16 sharers = ((1 << kConfig.multicast) - 1) << (rank - part);

  Pipeline<kConfig.stages> ring(s.ring);
  Schedule<kConfig> schedule(p, s.group_ends);
  for (Tile tile; schedule.next(tile);) {
    const int lhs_row = tile.lhs_row + part * kLhsRows;
    const int rhs_row = (kConfig.mode == kWgrad ? 0 : tile.group * p.n) + tile.col;
    const int end = (tile.k_begin + tile.k_blocks) * kBlockK;
    for (int k = tile.k_begin * kBlockK; k < end; k += kBlockK, ring.advance()) {
      const int slot = ring.slot();
      ring.acquire();
      ring.commit(kBytes);
      tma_load_2d(s.rhs[slot], &p.rhs, ring.full(), k, rhs_row);
      if constexpr (kConfig.multicast > 1) {
        // Each sharer brings its part of the lhs tile to all of them.
        tma_load_2d_multicast(s.lhs[slot] + part * kLhsRows * kBlockK, &p.lhs, ring.full(), sharers,
                              k, lhs_row);
      } else {
        tma_load_2d(s.lhs[slot], &p.lhs, ring.full(), k, lhs_row);
      }
    }
  }
}

// `count` floats to shared memory, a lane every 32nd; zero from `limit` on, which is not read.
template <int kCount>
JAX_DS_DEVICE void copy_row(u32 shared, const float* row, int limit) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kCount; i += 32) {
    if (kCount % 32 == 0 || i + lane < kCount) {
      cp_async_4(shared + i * 4, row + i, i < limit - lane);
    }
  }
}

// The same for a scale each column, in the order in which the lanes that hold them will read.
template <Config kConfig>
JAX_DS_DEVICE void copy_columns(u32 shared, const float* row, int limit) {
  const int lane = lane_id();
  const u32 place = lane % 8 / 2 * ScaleLane(kConfig) + lane / 8 * 2 + lane % 2;
#pragma unroll
  for (int i = 0; i < kConfig.block_n; i += 32) {
    cp_async_4(shared + 4 * (place + i / 4), row + i, i < limit - lane);
  }
}

// A warp. TMA cannot copy the scales: their rows need not be multiples of 16 bytes. Each lane's
// arrival on the slot's barrier follows its copies.
template <Config kConfig>
JAX_DS_DEVICE void produce_scales(const Params& p, Storage<kConfig>& s) {
  constexpr bool kWide = kConfig.mode == kWgrad;
  const int lane = lane_id();
  constexpr bool kMask = kConfig.mode == kMasked;
  const int rhs_rows = kWide ? p.n : (p.n + 127) / 128;
  const int rhs_blocks = (p.k + kBlockK - 1) / kBlockK;

  Pipeline<kConfig.stages> ring(s.ring);
  Schedule<kConfig> schedule(p, s.group_ends);
  for (Tile tile; schedule.next(tile);) {
    const int rhs_row = kWide ? tile.col : tile.col / 128;
    const int lhs_row = kMask ? tile.lhs_row - tile.group * p.m : tile.lhs_row;
    const int lhs_block = kMask ? tile.group * rhs_blocks + tile.k_begin : tile.k_begin;
    const float* lhs = p.lhs_scales + static_cast<i64>(lhs_block) * p.m + lhs_row + lane;
    const float* rhs = p.rhs_scales;
    if constexpr (kWide) {
      rhs += static_cast<i64>(tile.k_begin) * rhs_rows + rhs_row + lane;
    } else {
      rhs += static_cast<i64>(tile.group * rhs_rows + rhs_row + lane) * rhs_blocks + tile.k_begin;
    }
    for (int i = 0; i < tile.k_blocks; ++i, ring.advance()) {
      const int slot = ring.slot();
      ring.acquire();
      copy_row<kConfig.block_m>(shared_address(&s.lhs_scales[slot][lane]), lhs, p.m - lhs_row);
      const u32 to = shared_address(s.rhs_scales[slot]);
      if constexpr (kWide) {
        copy_columns<kConfig>(to, rhs, rhs_rows - rhs_row);
      } else if (lane < ScaleBlocks(kConfig)) {
        cp_async_4(to + 4 * lane, rhs, rhs_row + lane < rhs_rows);
      }
      cp_async_mbarrier_arrive_noinc(shared_address(ring.full()));
      lhs += p.m;
      rhs += kWide ? rhs_rows : 1;
    }
  }
}

// ---- main loop: one math warpgroup -------------------------------------------------------------

// partial = lhs tile * rhs tile^T over one stage, asynchronously.
template <int kN>
JAX_DS_DEVICE void multiply(float (&partial)[kN / 2], const u8* lhs, const u8* rhs) {
  const u64 a = wgmma_descriptor(lhs), b = wgmma_descriptor(rhs);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    WgmmaE4m3<kN>::mma(partial, a + 2 * k, b + 2 * k, k > 0);
  }
  wgmma_commit_group();
}

// Arrives, for this warp, on the slot's barrier in every CTA that fills it.
template <Config kConfig>
JAX_DS_DEVICE void release(const Pipeline<kConfig.stages>& ring) {
  __syncwarp();
  if constexpr (kConfig.multicast > 1) {
    const u32 rank = cluster_ctarank();
    const u32 first = rank - rank % kConfig.multicast;
    if (lane_id() < kConfig.multicast) mbarrier_arrive_cluster(ring.empty(), first + lane_id());
  } else {
    if (lane_id() == 0) ring.release();
  }
}

// Warpgroups that issue at will drift into step: they share the tensor cores, then all promote
// while those idle. In turns, one multiplies while the others promote. Named barrier 1 + g lets
// warpgroup g issue; it is passed on once the last wgmma is issued, which then still runs for a
// while.
template <Config kConfig>
JAX_DS_DEVICE void take_turn(int group) {
  if constexpr (kConfig.turns) bar_sync(1 + group, 256);
}

template <Config kConfig>
JAX_DS_DEVICE void pass_turn(int group) {
  if constexpr (kConfig.turns) bar_arrive(group + 1 < kConfig.math ? 2 + group : 1, 256);
}

// The warpgroup's `wave`-th 64 rows of the tile. They take turns, so that of a tile that ends early
// none has all the work.
template <Config kConfig>
JAX_DS_DEVICE int first_row(int group, int wave) {
  return (wave * kConfig.math + group) * 64;
}

// total += the products of the next kDepth slots, for kWaves (perhaps no) times 64 rows. All are
// issued, then promoted one by one, so that the tensor cores have work while this warpgroup
// promotes. They must be drained before the function ends: the assembler serialises wgmma that are
// in flight around a loop.
template <Config kConfig, int kDepth, int kWaves>
JAX_DS_DEVICE void accumulate(const Storage<kConfig>& s, Pipeline<kConfig.stages>& ring,
                              float (&total)[kConfig.waves()][kConfig.block_n / 2], int group,
                              int split) {
  constexpr int kN = kConfig.block_n;
  const int warp_row = threadIdx.x / 32 % 4 * 16;
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
    take_turn<kConfig>(group);
    pass_turn<kConfig>(group);
    for (int d = 0; d < kDepth; ++d) release_next();
  } else {
    Scales<kConfig> scales[kWaves][kDepth];
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        scales[wave][d].load(s, slots[d], first_row<kConfig>(group, wave) + warp_row);
      }
    }
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      const int row = first_row<kConfig>(group, wave);
      float partial[kDepth][kN / 2];
      take_turn<kConfig>(group);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        multiply<kN>(partial[d], s.lhs[slots[d]] + row * kBlockK, s.rhs[slots[d]]);
      }
      pass_turn<kConfig>(group);
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        d + 1 < kDepth ? wgmma_wait_group<1>() : wgmma_wait_group<0>();
        // Once its scales are in registers the slot may be overwritten.
        constexpr bool kLate = Scales<kConfig>::kLate;
        if (kLate) scales[wave][d].promote(total[wave], partial[d], split);
        if (wave == kWaves - 1) release_next();
        if (!kLate) scales[wave][d].promote(total[wave], partial[d], split);
      }
    }
  }
}

// One tile's products, over `blocks` slots.
template <Config kConfig, int kWaves>
JAX_DS_DEVICE void multiply_tile(const Storage<kConfig>& s, Pipeline<kConfig.stages>& ring,
                                 float (&total)[kConfig.waves()][kConfig.block_n / 2], int group,
                                 int blocks, int split) {
  for (; blocks >= kConfig.depth; blocks -= kConfig.depth) {
    accumulate<kConfig, kConfig.depth, kWaves>(s, ring, total, group, split);
  }
  if (kConfig.depth > 1 && blocks > 0) {
    accumulate<kConfig, 1, kWaves>(s, ring, total, group, split);
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

template <Config kConfig, int kWave>
JAX_DS_DEVICE void store_wave(const Params& p, float (&total)[kConfig.waves()][kConfig.block_n / 2],
                              const Tile& tile, int row, Staging<kConfig>& staging) {
  if constexpr (kConfig.mode == kMasked) clear_rows<kConfig>(total[kWave], tile.rows - row);
  const WarpTile t{tile.matrix, tile.out_row + row, tile.out_end, tile.col};
  store_tile<kConfig>(p, total[kWave], t, staging);
}

template <Config kConfig>
JAX_DS_DEVICE void consume(const Params& p, Storage<kConfig>& s) {
  constexpr int kWaves = kConfig.waves(), kN = kConfig.block_n;
  const int warp = warp_id(), group = warp / 4, warp_row = warp % 4 * 16;
  Staging<kConfig> staging(s.staging[warp]);

  if (group == kConfig.math - 1) pass_turn<kConfig>(group);  // the first turn is warpgroup 0's
  Pipeline<kConfig.stages> ring(s.ring);
  Pipeline<1> reduce_buffer(s.reduced);
  Schedule<kConfig> schedule(p, s.group_ends);
  for (Tile tile; schedule.next(tile);) {
    float total[kWaves][kN / 2] = {};
    const int split = 128 - tile.col % 128, blocks = tile.k_blocks;
    // A group may end before some of the tile's rows: they are left out, 64 at a time.
    constexpr bool kEnds = kConfig.mode == kGrouped || kConfig.mode == kMasked;
    const int end = tile.rows - first_row<kConfig>(group, 0);
    if (!kEnds || end > first_row<kConfig>(0, kWaves - 1)) {
      multiply_tile<kConfig, kWaves>(s, ring, total, group, blocks, split);
    } else if (kWaves > 1 && end > 0) {
      multiply_tile<kConfig, 1>(s, ring, total, group, blocks, split);
    } else if (kConfig.math > 1) {
      multiply_tile<kConfig, 0>(s, ring, total, group, blocks, split);
    }

    if constexpr (kConfig.split > 1) {
      float share[kN / 2 / kConfig.split];
      reduce_splits<kConfig>(s, reduce_buffer, total[0], share);
      constexpr int kColumns = kN / kConfig.split;
      const int part = cluster_ctarank() / kConfig.multicast;
      const int row = first_row<kConfig>(group, 0) + warp_row;
      const WarpTile t{tile.matrix, tile.out_row + row, tile.out_end, tile.col + part * kColumns};
      store_tile<kConfig>(p, share, t, staging);
    } else {
      store_wave<kConfig, 0>(p, total, tile, first_row<kConfig>(group, 0) + warp_row, staging);
      if constexpr (kWaves > 1) {
        store_wave<kConfig, 1>(p, total, tile, first_row<kConfig>(group, 1) + warp_row, staging);
      }
    }
  }
  if constexpr (StoresByTma(kConfig)) staging.drain();
}

// ---- entry -------------------------------------------------------------------------------------

template <Config kConfig>
__global__ void __launch_bounds__(kConfig.threads(), kConfig.per_sm)
    Gemm(const __grid_constant__ Params p) {
  static_assert(legal<kConfig>());
  extern __shared__ __align__(1024) u8 memory[];
  Storage<kConfig>& s = *reinterpret_cast<Storage<kConfig>*>(memory);
  constexpr u32 kMathWarps = kConfig.math * 4;

  const u32 warp = warp_id();
  const bool producer = warp == kMathWarps;
  if (producer && elect_one()) {
    s.ring.init(1 + 32, kMathWarps * kConfig.multicast);
    if constexpr (kConfig.split > 1) s.reduced.init(1, kMathWarps * (kConfig.split - 1));
    fence_mbarrier_init();
  }
  if (warp == 0 && elect_one()) {
    prefetch_tensormap(&p.lhs);
    prefetch_tensormap(&p.rhs);
    if constexpr (StoresByTma(kConfig)) prefetch_tensormap(&p.out);
  }
  __syncwarp();
  if constexpr (kConfig.cluster() > 1) barrier_cluster_arrive();
  // A successor may come as soon as there is room; it waits for our end as we do for another's.
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (kConfig.mode != kDense && warp == 0) load_groups<kConfig>(p, s.group_ends);
  // The first loads need nobody: who issues them made the barriers.
  constexpr bool kEarly = kConfig.mode == kDense && kConfig.multicast == 1;
  if (kEarly && producer) {
    bar_arrive(0, kConfig.threads());
  } else {
    bar_sync(0, kConfig.threads());
  }
  // Nobody may write to a CTA of the cluster that has not come so far.
  if constexpr (kConfig.cluster() > 1) {
    if (!kEarly || warp < kMathWarps) barrier_cluster_wait();
  }

  if (warp >= kMathWarps) {
    if constexpr (kConfig.moves_registers()) setmaxnreg_dec<40>();
    if (warp == kMathWarps && elect_one()) produce_tiles<kConfig>(p, s);
    if (warp == kMathWarps + 1) produce_scales<kConfig>(p, s);
    __syncwarp();
  } else {
    if constexpr (kConfig.moves_registers()) setmaxnreg_inc<232>();
    consume<kConfig>(p, s);
  }
  if (kEarly && kConfig.cluster() > 1 && warp >= kMathWarps) barrier_cluster_wait();
  // A CTA's memory is written by its cluster: none may leave before all are done.
  if constexpr (kConfig.cluster() > 1) cluster_sync();
}

}  // namespace jax_ds::deep_gemm
