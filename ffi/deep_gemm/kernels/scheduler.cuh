// Which tiles a CTA computes, in which order. Group sizes are read on the device, once.
#pragma once

#include "deep_gemm/kernels/storage.cuh"
#include "kernels/warp.cuh"

namespace jax_ds::deep_gemm {

// One output tile.
struct Tile {
  int group;
  int matrix;     // of the output; grouped rows are those of one
  int lhs_row;    // first row of lhs
  int lhs_parts;  // ragged: parts of 64 rows of lhs to load
  int out_row;    // first row of the output matrix
  int out_end;    // first row that is not to be stored
  int rows;       // valid ones, from out_row on; masked: the others are stored as zero
  int col;        // first column of the tile
  int k_begin;    // first of its 128-blocks of K (wgrad: of the tokens)
  int k_blocks;   // 0: the tile is zero
};

// The row of lhs whose scale comes first in a slot, for a tile that begins at `row`.
template <Config kConfig>
JAX_DS_DEVICE int first_scale(const Params& p, int row) {
  return kConfig.mode == kGrouped && p.m % 4 == 0 ? row / 4 * 4 : row;
}

// One warp fills ends[g]: masked: rows of group g; grouped: end of its rows; wgrad: end of its
// blocks of 128 tokens (one group of all, without sizes). Sizes are clamped to what the operands
// hold, so that no wrong size reads or writes out of bounds.
template <Config kConfig>
JAX_DS_DEVICE void load_groups(const Params& p, int* ends) {
  constexpr u32 kUnit = kConfig.mode == kWgrad ? kBlockK : 1;
  const u32 held = kConfig.mode == kWgrad ? p.k : p.m;
  const u32 limit = (held + kUnit - 1) / kUnit;
  u32 carry = 0;
  for (int base = 0; base < p.num_groups; base += 32) {
    const int g = base + lane_id();
    u32 size = held;
    if (p.group_sizes != nullptr) size = g < p.num_groups ? max(p.group_sizes[g], 0) : 0;
    size = min((size + kUnit - 1) / kUnit, limit);
    if constexpr (kConfig.mode != kMasked) {
      // Saturating, as sums of sizes may exceed 32 bits, but not those of two.
      const auto add = [=](u32 a, u32 b) { return min(a + b, limit); };
      size = add(carry, warp_inclusive_scan(size, add));
      carry = __shfl_sync(0xffffffffu, size, 31);
    }
    if (g < p.num_groups) ends[g] = size;
  }
}

// Tiles of matrices of equal size. Every thread of the roles walks the same sequence.
template <Config kConfig>
class Schedule {
 public:
  JAX_DS_DEVICE Schedule(const Params& p, const Groups<kConfig>& s)
      : p_(p), ends_(s.ends), index_(blockIdx.x / kConfig.cluster()) {}

  JAX_DS_DEVICE bool next(Tile& tile) {
    const int columns = (p_.n + kColumns - 1) / kColumns;
    const int tiles = (p_.m + kConfig.block_m - 1) / kConfig.block_m * columns;  // of a matrix
    const int matrix = kConfig.mode == kDense ? 0 : index_ / tiles;
    const int inside = index_ - matrix * tiles;
    if (kConfig.mode == kDense ? inside >= tiles : matrix >= p_.num_groups) return false;
    place(tile, matrix, inside, columns);
    index_ += gridDim.x / kConfig.cluster();
    return true;
  }

 private:
  static constexpr int kColumns = kConfig.block_n * kConfig.multicast;  // of a cluster

  JAX_DS_DEVICE void place(Tile& tile, int matrix, int index, int columns) const {
    const int rank = kConfig.cluster() > 1 ? cluster_ctarank() : 0;
    int row = 0, column = index;  // of a matrix with one row of tiles
    if (p_.m > kConfig.block_m) {
      // Bands of `band` row tiles; inside a band column after column. A tile that ends early is a
      // band of its own: among others it would always fall to the same CTAs.
      const int whole = p_.m / kConfig.block_m, first = index / (p_.band * columns) * p_.band;
      const int band = max(1, min(p_.band, whole - first));
      const bool last = index >= whole * columns;
      const int inside = index - (last ? whole : first) * columns;
      column = last ? inside : inside / band;
      row = (last ? whole : first + inside - column * band) * kConfig.block_m;
    }

    int k_blocks = (p_.k + kBlockK - 1) / kBlockK;
    int k_begin = 0;
    if constexpr (kConfig.mode == kWgrad) {
      k_begin = matrix == 0 ? 0 : ends_[matrix - 1];
      k_blocks = ends_[matrix] - k_begin;
    }
    tile.group = tile.matrix = matrix;
    tile.lhs_row = tile.out_row = row;
    tile.out_end = p_.m;
    tile.rows = p_.m - row;
    tile.col = column * kColumns + rank % kConfig.multicast * kConfig.block_n;
    if constexpr (kConfig.split > 1) {
      const int part = rank / kConfig.multicast;
      const int begin = k_blocks * part / kConfig.split;
      k_blocks = k_blocks * (part + 1) / kConfig.split - begin;
      k_begin += begin;
    }
    tile.k_begin = k_begin;
    tile.k_blocks = k_blocks;
  }

  const Params& p_;
  const int* ends_;
  int index_;
};

}  // namespace jax_ds::deep_gemm
