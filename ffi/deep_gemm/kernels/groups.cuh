// Tiles of ragged groups, whose sizes only the device knows. A group's rows are cut into tiles of
// as many parts of 64 rows as can be, and a rest.
#pragma once

#include "deep_gemm/kernels/scheduler.cuh"
#include "deep_gemm/kernels/storage.cuh"

namespace jax_ds::deep_gemm {

constexpr int kPart = 64;  // rows

// Parts in `whole` tiles of `most` and, unless it is 0, one of `rest`.
struct Cut {
  int whole, rest;

  // Dividing by 1, 2, 3 or 4, which every tile does.
  JAX_DS_DEVICE Cut(int parts, int most)
      : whole(most == 3 ? static_cast<int>(static_cast<u32>(parts) / 3) : parts >> most / 2),
        rest(parts - whole * most) {}
  JAX_DS_DEVICE int count() const { return whole + (rest > 0 ? 1 : 0); }
};

template <Config kConfig>
JAX_DS_DEVICE int group_parts(const int* ends, int g) {
  const int begin = kConfig.mode == kGrouped && g > 0 ? ends[g - 1] : 0;
  return (ends[g] - begin + kPart - 1) / kPart;
}

template <Config kConfig>
JAX_DS_DEVICE int cluster_columns(const Params& p) {
  constexpr int kColumns = kConfig.block_n * kConfig.multicast;
  return (p.n + kColumns - 1) / kColumns;
}

// Where the tiles of ragged groups lie.
template <Config kConfig>
class GroupTiles {
 public:
  JAX_DS_DEVICE GroupTiles(const Params& p, const int* ends) : p_(p), ends_(ends) {}

  JAX_DS_DEVICE int columns() const { return cluster_columns<kConfig>(p_); }
  JAX_DS_DEVICE int parts(int g) const { return group_parts<kConfig>(ends_, g); }

  // The index-th of the group's tiles that are `height` parts high: `count` of them for every
  // column, from part `first` on.
  JAX_DS_DEVICE Spot spot(int index, int g, int first, int count, int height) const {
    // Bands of `band` tiles; inside a band column after column.
    const int begin = count > p_.band ? index / (p_.band * columns()) * p_.band : 0;
    const int band = min(p_.band, count - begin);
    const int inside = index - begin * columns(), column = inside / band;
    return {g, (first + (begin + inside - column * band) * height) * kPart, column, height};
  }

  // The index-th tile of the rows past the last group, or past each masked one's last tile. False
  // if there are not so many.
  JAX_DS_DEVICE bool zeros(Spot& spot, int index) const {
    for (int g = 0; g < (kMask ? p_.num_groups : 1); ++g) {
      const int begin = kMask ? parts(g) * kPart : ends_[p_.num_groups - 1];
      const int tiles = (max(p_.m - begin, 0) + kConfig.block_m - 1) / kConfig.block_m * columns();
      if (index < tiles) {
        spot = {g, begin + index / columns() * kConfig.block_m, index % columns(), 0};
        return true;
      }
      index -= tiles;
    }
    return false;
  }

  JAX_DS_DEVICE Tile tile(const Spot& spot) const {
    const int rank = kConfig.multicast > 1 ? cluster_ctarank() : 0;
    Tile tile = {};  // without K
    tile.matrix = kMask ? spot.group : 0;
    tile.col = (spot.column * kConfig.multicast + rank) * kConfig.block_n;
    if (spot.height == 0) {
      tile.out_row = spot.row;
      tile.out_end = min(p_.m, tile.out_row + kConfig.block_m);
      return tile;
    }
    const int g = spot.group, base = kMask || g == 0 ? 0 : ends_[g - 1];
    const int rows = spot.height * kPart;
    tile.group = g;
    tile.lhs_row = (kMask ? g * p_.m : base) + spot.row;
    tile.lhs_parts = spot.height;
    tile.out_row = base + spot.row;
    tile.rows = min(rows, ends_[g] - base - spot.row);
    tile.out_end = tile.out_row + (kMask ? min(rows, p_.m - spot.row) : tile.rows);
    tile.k_blocks = (p_.k + kBlockK - 1) / kBlockK;
    return tile;
  }

 private:
  static constexpr bool kMask = kConfig.mode == kMasked;

  const Params& p_;
  const int* ends_;
};

// One warp, after load_groups: how many tiles there are.
template <Config kConfig>
JAX_DS_DEVICE void count_tiles(const Params& p, Groups<kConfig>& s) {
  __syncwarp();
  int tiles = 0;
  for (int g = lane_id(); g < p.num_groups; g += 32) {
    tiles += Cut(group_parts<kConfig>(s.ends, g), kConfig.block_m / kPart).count();
  }
  s.tiles = __reduce_add_sync(0xffffffffu, tiles) * cluster_columns<kConfig>(p);
}

// Tiles in the order of groups, dealt to and fro. Every thread of the roles walks the same
// sequence.
template <Config kConfig>
class GroupSchedule {
 public:
  JAX_DS_DEVICE GroupSchedule(const Params& p, Groups<kConfig>& s)
      : p_(p), s_(s), tiles_(p, s.ends) {}

  JAX_DS_DEVICE bool next(Tile& tile) {
    const int clusters = gridDim.x / kConfig.cluster(), cluster = blockIdx.x / kConfig.cluster();
    const int place = round_ % 2 ? clusters - 1 - cluster : cluster;
    const int index = round_ * clusters + place;
    Spot spot;
    if (index < s_.tiles) {
      ++round_;
      spot = find(index);
    } else {
      if (!p_.zero_tail) return false;
      const int rounds = (s_.tiles + clusters - 1) / clusters;
      round_ = max(round_, rounds);  // the last may have none for this cluster
      if (!tiles_.zeros(spot, (round_++ - rounds) * clusters + cluster)) return false;
    }
    tile = tiles_.tile(spot);
    return true;
  }

 private:
  // Indices grow.
  JAX_DS_DEVICE Spot find(int index) {
    constexpr int kMost = kConfig.block_m / kPart;
    while (true) {
      const Cut cut(tiles_.parts(group_), kMost);
      const int count = rest_ ? cut.rest > 0 : cut.whole, tiles = count * tiles_.columns();
      if (index < first_ + tiles) {
        return tiles_.spot(index - first_, group_, rest_ ? cut.whole * kMost : 0, count,
                           rest_ ? cut.rest : kMost);
      }
      first_ += tiles;
      group_ += rest_;
      rest_ = !rest_;
    }
  }

  const Params& p_;
  const Groups<kConfig>& s_;
  const GroupTiles<kConfig> tiles_;
  int round_ = 0;
  // Whole tiles of this group, or its rest; index of their first.
  int group_ = 0, first_ = 0;
  bool rest_ = false;
};

}  // namespace jax_ds::deep_gemm
