// Tiles of ragged groups, whose sizes only the device knows. A group's rows are cut into tiles of
// as many parts of 64 rows as can be, and a rest. The tiles of all groups are dealt to and fro,
// from the tallest to the lowest if they are sorted, so that all clusters get as much.
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

// One warp, after load_groups: how many tiles there are, if they come in the order of groups.
template <Config kConfig>
JAX_DS_DEVICE void count_tiles(const Params& p, Groups<kConfig>& s) {
  constexpr int kMost = kConfig.block_m / kPart;
  __syncwarp();
  int tiles = 0;
  for (int g = lane_id(); g < p.num_groups; g += 32) {
    tiles += Cut(group_parts<kConfig>(s.ends, g), kMost).count();
  }
  s.tiles = __reduce_add_sync(0xffffffffu, tiles) * cluster_columns<kConfig>(p);
  s.most = kMost;
}

// All threads: the order of tiles of at most `most` parts.
template <Config kConfig>
JAX_DS_DEVICE void sort_entries(const Params& p, Groups<kConfig>& s, int most) {
  constexpr int kMost = kConfig.block_m / kPart, kWarps = kConfig.threads() / 32;
  constexpr u32 kAll = 0xffffffffu;
  const int warp = warp_id(), lane = lane_id();
  for (int g = threadIdx.x; g < p.num_groups; g += kConfig.threads()) {
    const Cut cut(group_parts<kConfig>(s.ends, g), most);
    s.sizes[2 * g] = cut.whole > 0 ? most : 0;
    s.sizes[2 * g + 1] = cut.rest;
  }
  __syncthreads();
  const int entries = 2 * p.num_groups;
  for (int size = 1 + warp; size <= kMost; size += kWarps) {
    int place = 0;
    for (int i = lane; i < entries + lane; i += 32) {
      place += __popc(__ballot_sync(kAll, i < entries && s.sizes[i] > size));
    }
    for (int i = lane; i < entries + lane; i += 32) {
      const bool mine = i < entries && s.sizes[i] == size;
      const u32 all = __ballot_sync(kAll, mine);
      if (mine) s.order[place + __popc(all & ((1u << lane) - 1))] = i;
      place += __popc(all);
    }
  }
}

// All threads, after load_groups and a barrier; ends with one: chooses how tall tiles are, and
// sorts them. Warp i tries tiles of at most i + 1 parts, by how long they keep a cluster (seen: a
// tile of p parts, 4 at most, takes p + 2, not p); the last round is short of some tiles, the
// lowest.
template <Config kConfig>
JAX_DS_DEVICE void deal_groups(const Params& p, Groups<kConfig>& s) {
  constexpr int kMost = kConfig.block_m / kPart;
  constexpr u32 kAll = 0xffffffffu;
  const int warp = warp_id(), lane = lane_id(), columns = cluster_columns<kConfig>(p);
  if (warp < kMost) {
    const int clusters = gridDim.x / kConfig.cluster();
    int count = 0, parts = 0, lowest = warp + 1;
    for (int g = lane; g < p.num_groups; g += 32) {
      const int own = group_parts<kConfig>(s.ends, g);
      const Cut cut(own, warp + 1);
      count += cut.count();
      parts += own;
      if (cut.rest > 0) lowest = min(lowest, cut.rest);
    }
    count = __reduce_add_sync(kAll, count);
    parts = __reduce_add_sync(kAll, parts);
    lowest = __reduce_min_sync(kAll, lowest);
    const int tiles = count * columns, missing = (clusters - tiles % clusters) % clusters;
    s.counts[warp] = tiles;
    s.costs[warp] = (1.f * kMost * count + 2.f * parts) * columns + missing * (kMost + 2 * lowest);
  }
  __syncthreads();
  int most = kMost;
#pragma unroll
  for (int i = kMost - 1; i > 0; --i) most = s.costs[i - 1] < s.costs[most - 1] ? i : most;
  if (threadIdx.x == 0) {
    s.most = most;
    s.tiles = s.counts[most - 1];
  }
  sort_entries<kConfig>(p, s, most);
  __syncthreads();
}

// Every thread of the roles walks the same sequence.
template <Config kConfig>
class GroupSchedule {
 public:
  JAX_DS_DEVICE GroupSchedule(const Params& p, const Groups<kConfig>& s) : p_(p), s_(s) {}

  JAX_DS_DEVICE bool next(Tile& tile) {
    const int clusters = gridDim.x / kConfig.cluster(), cluster = blockIdx.x / kConfig.cluster();
    const int place = round_ % 2 ? clusters - 1 - cluster : cluster;
    const int index = round_ * clusters + place;
    if (index < s_.tiles) {
      ++round_;
      return find(tile, index);
    }
    if (!p_.zero_tail) return false;
    const int rounds = (s_.tiles + clusters - 1) / clusters;
    round_ = max(round_, rounds);  // the last may have none for this cluster
    return find_zeros(tile, (round_++ - rounds) * clusters + cluster);
  }

 private:
  static constexpr bool kMask = kConfig.mode == kMasked;

  JAX_DS_DEVICE int parts(int g) const { return group_parts<kConfig>(s_.ends, g); }

  // Indices grow.
  JAX_DS_DEVICE bool find(Tile& tile, int index) {
    const int columns = cluster_columns<kConfig>(p_), most = s_.most;
    while (true) {
      const int entry = SortsTiles(kConfig) ? s_.order[position_] : position_;
      const int g = entry / 2;
      const bool rest = entry % 2;
      const Cut cut(parts(g), most);
      const int count = rest ? cut.rest > 0 : cut.whole;
      if (index < first_ + count * columns) {
        // Bands of `band` tiles; inside a band column after column.
        index -= first_;
        const int begin = count > p_.band ? index / (p_.band * columns) * p_.band : 0;
        const int band = min(p_.band, count - begin);
        const int inside = index - begin * columns, column = inside / band;
        const int row = (rest ? cut.whole : begin + inside - column * band) * most * kPart;
        place(tile, g, column, row, (rest ? cut.rest : most) * kPart);
        return true;
      }
      first_ += count * columns;
      ++position_;
    }
  }

  // Rows of a group from `row` on.
  JAX_DS_DEVICE void place(Tile& tile, int g, int column, int row, int rows) const {
    const int base = kMask || g == 0 ? 0 : s_.ends[g - 1];
    const int left = s_.ends[g] - base - row;
    tile.group = g;
    tile.matrix = kMask ? g : 0;
    tile.lhs_row = (kMask ? g * p_.m : base) + row;
    tile.lhs_parts = rows / kPart;
    tile.out_row = base + row;
    tile.rows = min(rows, left);
    tile.out_end = tile.out_row + (kMask ? min(rows, p_.m - row) : tile.rows);
    tile.col = tile_column(column);
    tile.k_begin = 0;
    tile.k_blocks = (p_.k + kBlockK - 1) / kBlockK;
  }

  JAX_DS_DEVICE int tile_column(int column) const {
    const int rank = kConfig.multicast > 1 ? cluster_ctarank() : 0;
    return (column * kConfig.multicast + rank) * kConfig.block_n;
  }

  // Rows past the last group, or past each masked one's last tile: without K.
  JAX_DS_DEVICE bool find_zeros(Tile& tile, int index) const {
    const int columns = cluster_columns<kConfig>(p_);
    for (int g = 0; g < (kMask ? p_.num_groups : 1); ++g) {
      const int begin = kMask ? parts(g) * kPart : s_.ends[p_.num_groups - 1];
      const int tiles = (max(p_.m - begin, 0) + kConfig.block_m - 1) / kConfig.block_m * columns;
      if (index < tiles) {
        tile = {};
        tile.matrix = g;
        tile.out_row = begin + index / columns * kConfig.block_m;
        tile.out_end = min(p_.m, tile.out_row + kConfig.block_m);
        tile.col = tile_column(index % columns);
        return true;
      }
      index -= tiles;
    }
    return false;
  }

  const Params& p_;
  const Groups<kConfig>& s_;
  int round_ = 0;
  int position_ = 0, first_ = 0;  // in the order of entries; index of that entry's first tile
};

template <Config kConfig>
struct ScheduleOf {
  using Type = Schedule<kConfig>;
};

template <Config kConfig>
  requires(IsRagged(kConfig))
struct ScheduleOf<kConfig> {
  using Type = GroupSchedule<kConfig>;
};

template <Config kConfig>
using TileSchedule = typename ScheduleOf<kConfig>::Type;

}  // namespace jax_ds::deep_gemm
