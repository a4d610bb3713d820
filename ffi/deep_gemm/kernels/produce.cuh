// The producers: a warp for the operands, a warp for their scales, filling the same ring of slots.
#pragma once

#include "deep_gemm/kernels/dealer.cuh"
#include "kernels/pipeline.cuh"
#include "kernels/tma.cuh"

namespace jax_ds::deep_gemm {

// The operands, by one thread. TMA counts its bytes on the slot's barrier.
template <Config kConfig>
class TileLoads {
 public:
  JAX_DS_DEVICE TileLoads(const Params& p, Storage<kConfig>& s)
      : p_(p), s_(s), ring_(s.ring), schedule_(p, s.groups) {}

  static constexpr int kAll = 0;

  // Fills the next kSlots slots, or those that are left to fill.
  template <int kSlots>
  JAX_DS_DEVICE void issue() {
    int slots = kSlots;  // no register for them where all are filled
    const auto goes_on = [&] { return kSlots == kAll || slots > 0; };
    constexpr int kLhsRows = LhsBox(kConfig);
    const u32 rank = kConfig.multicast > 1 ? cluster_ctarank() : 0;
    const u32 part = rank % kConfig.multicast;  // of the lhs tile
    const u16 sharers = ((1 << kConfig.multicast) - 1) << (rank - part);
    while (goes_on() && (k_ < end_ || next_tile())) {
      const int rhs_row = (kConfig.mode == kWgrad ? 0 : tile_.group * p_.n) + tile_.col;
      const int rows = IsRagged(kConfig) ? tile_.lhs_parts * kPart : kConfig.block_m;
      const u32 bytes = (rows + kConfig.block_n) * kBlockK;
      for (; k_ < end_ && goes_on(); --slots, k_ += kBlockK, ring_.advance()) {
        const int slot = ring_.slot();
        ring_.acquire();
        ring_.commit(bytes);
        tma_load_2d(s_.rhs[slot], &p_.rhs, ring_.full(), k_, rhs_row);
        for (int row = part * kLhsRows; row < rows; row += kConfig.multicast * kLhsRows) {
          u8* const lhs = s_.lhs[slot] + row * kBlockK;
          if constexpr (kConfig.multicast > 1) {
            // Each sharer brings its part of the lhs tile to all of them.
            tma_load_2d_multicast(lhs, &p_.lhs, ring_.full(), sharers, k_, tile_.lhs_row + row);
          } else {
            tma_load_2d(lhs, &p_.lhs, ring_.full(), k_, tile_.lhs_row + row);
          }
        }
      }
    }
  }

 private:
  JAX_DS_DEVICE bool next_tile() {
    if (!schedule_.next(tile_)) return false;
    k_ = tile_.k_begin * kBlockK;
    end_ = k_ + tile_.k_blocks * kBlockK;
    return true;
  }

  const Params& p_;
  Storage<kConfig>& s_;
  Pipeline<kConfig.stages> ring_;
  TileSchedule<kConfig> schedule_;
  Tile tile_;
  int k_ = 0, end_ = 0;  // where the next slot's part of K begins, where the tile's ends
};

// kCount floats to shared memory, kVector of them a lane and copy; zero from `limit` on, which is
// not read.
template <int kCount, int kVector>
JAX_DS_DEVICE void copy_row(u32 shared, const float* row, int limit) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kCount; i += 32 * kVector) {
    const int at = i + kVector * lane;
    if (at >= kCount) continue;
    if constexpr (kVector == 4) {
      cp_async_16(shared + 4 * at, row + at, at < limit);
    } else {
      cp_async_4(shared + 4 * at, row + at, at < limit);
    }
  }
}

// The same for a scale each column, in the order in which the lanes that hold them will read.
template <Config kConfig>
JAX_DS_DEVICE void copy_columns(u32 shared, const float* row, int limit) {
  const int lane = lane_id();
  const u32 place = lane % 4 * ScaleLane(kConfig) + lane / 4 * 2;
#pragma unroll
  for (int i = 0; i < kConfig.block_n; i += 64) {
    const int at = i + 2 * lane;
    if (at < kConfig.block_n) {
      cp_async_small<8>(shared + 4 * (place + i / 4), row + at, at < limit);
    }
  }
}

// Where the scales of a tile's first block of K lie, and how far on those of the next.
struct ScaleRows {
  const float *lhs, *rhs;
  int lhs_step, rhs_step;
  int lhs_limit, rhs_limit;  // of this row, from these pointers on
};

// The slots of one tile. Each lane's arrival on the slot's barrier follows its copies.
template <Config kConfig, int kVector>
JAX_DS_DEVICE void copy_scales(Storage<kConfig>& s, Pipeline<kConfig.stages>& ring, ScaleRows rows,
                               int blocks) {
  const int lane = lane_id();
  for (int i = 0; i < blocks; ++i, ring.advance()) {
    const int slot = ring.slot();
    ring.acquire();
    copy_row<LhsScaleSlots(kConfig), kVector>(shared_address(s.lhs_scales[slot]), rows.lhs,
                                              rows.lhs_limit);
    const u32 to = shared_address(s.rhs_scales[slot]);
    if constexpr (kConfig.mode == kWgrad) {
      copy_columns<kConfig>(to, rows.rhs, rows.rhs_limit);
    } else if (lane < ScaleUnits(kConfig)) {
      cp_async_4(to + 4 * lane, rows.rhs, rows.rhs_limit > 0);
    }
    __syncwarp();
    cp_async_mbarrier_arrive_noinc(shared_address(ring.full()));
    rows.lhs += rows.lhs_step;
    rows.rhs += rows.rhs_step;
  }
}

// A warp. TMA cannot copy the scales: their rows need not be multiples of 16 bytes.
template <Config kConfig>
JAX_DS_DEVICE void produce_scales(const Params& p, Storage<kConfig>& s) {
  constexpr bool kWide = kConfig.mode == kWgrad, kMask = kConfig.mode == kMasked;
  const int rhs_rows = kWide ? p.n : (p.n + 127) / 128;
  const int rhs_blocks = (p.k + kBlockK - 1) / kBlockK;

  Pipeline<kConfig.stages> ring(s.ring);
  TileSchedule<kConfig> schedule(p, s.groups);
  for (Tile tile; schedule.next(tile);) {
    const int rhs_row =
        kWide ? tile.col : (tile.col + static_cast<int>(lane_id()) * ScaleUnit(kConfig)) / 128;
    const int row = first_scale<kConfig>(p, tile.lhs_row - (kMask ? tile.group * p.m : 0));
    const int lhs_block = kMask ? tile.group * rhs_blocks + tile.k_begin : tile.k_begin;
    ScaleRows rows{p.lhs_scales + static_cast<i64>(lhs_block) * p.m + row,
                   p.rhs_scales,
                   p.m,
                   1,
                   p.m - row,
                   rhs_rows - rhs_row};
    if constexpr (kWide) {
      rows.rhs += static_cast<i64>(tile.k_begin) * rhs_rows + rhs_row;
      rows.rhs_step = rhs_rows;
    } else {
      rows.rhs += static_cast<i64>(tile.group * rhs_rows + rhs_row) * rhs_blocks + tile.k_begin;
    }
    if (p.m % 4 == 0) {
      copy_scales<kConfig, 4>(s, ring, rows, tile.k_blocks);
    } else {
      copy_scales<kConfig, 1>(s, ring, rows, tile.k_blocks);
    }
  }
}

}  // namespace jax_ds::deep_gemm
