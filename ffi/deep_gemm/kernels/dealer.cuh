// Dealing the tiles of ragged groups so that all clusters end together, whatever the groups' sizes.
//
// One warp of each CTA goes over all tiles in one order, gives each to the cluster that has least
// to do, and posts those of its own cluster for the other warps. It is the same arithmetic
// everywhere, so nothing needs to be exchanged. Tiles of a group follow one another: its weights
// are read from memory once, while they are in L2. Groups of few rows come last: their tiles are
// short.
#pragma once

#include "deep_gemm/kernels/groups.cuh"
#include "kernels/pipeline.cuh"

namespace jax_ds::deep_gemm {

// Seen: a tile of p parts, 4 at most, keeps a cluster for p + 2, not p. It need not be exact.
template <Config kConfig>
JAX_DS_DEVICE int tile_cost(int height) {
  return kConfig.block_m / kPart + 2 * height;
}

// One whole warp, which has few registers: hence loops that are not unrolled.
template <Config kConfig>
class Dealer {
 public:
  JAX_DS_DEVICE Dealer(const Params& p, Groups<kConfig>& s)
      : p_(p), s_(s), tiles_(p, s.ends), ring_(s.posted) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      loads_[i] = 32 * i + static_cast<int>(lane_id()) < clusters() ? 0 : kAll;
    }
  }

  // Groups of more rows than a tile first, the others by how many parts they have.
  JAX_DS_DEVICE void run() {
    const int most = tallest();
    for (int size = kMost + 1; size > 0; --size) {
      for (int base = 0; base < p_.num_groups; base += 32) {
        const int g = base + lane_id();
        const int parts = g < p_.num_groups ? tiles_.parts(g) : 0;
        for (u32 left = __ballot_sync(kAll, min(parts, kMost + 1) == size); left != 0;
             left &= left - 1) {
          const int lane = __ffs(left) - 1;
          const Cut cut(__shfl_sync(kAll, parts, lane), most);
          deal(base + lane, 0, cut.whole, most);
          if (cut.rest > 0) deal(base + lane, cut.whole * most, 1, cut.rest);
        }
      }
    }
    if (!posts()) return;
    Spot spot;
    for (int i = cluster(); p_.zero_tail && tiles_.zeros(spot, i); i += clusters()) post(spot);
    spot.height = -1;
    post(spot);
  }

 private:
  static constexpr u32 kAll = 0xffffffffu;
  static constexpr int kMost = kConfig.block_m / kPart;
  static constexpr int kWords = (kMaxSms / kConfig.cluster() + 31) / 32;

  JAX_DS_DEVICE static int clusters() { return gridDim.x / kConfig.cluster(); }
  JAX_DS_DEVICE static int cluster() { return blockIdx.x / kConfig.cluster(); }
  // The lane that knows what its own cluster has to do posts it.
  JAX_DS_DEVICE static bool posts() { return cluster() % 32 == lane_id(); }

  // Parts of whole tiles: as many as can be, or so few that there is a tile for each cluster, but
  // not more.
  JAX_DS_DEVICE int tallest() const {
    if (count(kMost) > clusters()) return kMost;
    int most = 1;
    while (count(most) > clusters()) ++most;
    return most;
  }

  JAX_DS_DEVICE int count(int most) const {
    int tiles = 0;
#pragma unroll 1
    for (int g = lane_id(); g < p_.num_groups; g += 32) {
      tiles += Cut(tiles_.parts(g), most).count();
    }
    return __reduce_add_sync(kAll, tiles) * tiles_.columns();
  }

  // Deals what GroupTiles::spot numbers.
  JAX_DS_DEVICE void deal(int g, int first, int count, int height) {
    const int tiles = count * tiles_.columns();
#pragma unroll 1
    for (int dealt = 0; dealt < tiles;) {
      u32 least = loads_[0];
#pragma unroll
      for (int i = 1; i < kWords; ++i) least = min(least, loads_[i]);
      least = __reduce_min_sync(kAll, least);
      // One for each cluster that has no more to do than this.
      int own = -1;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const u32 free = __ballot_sync(kAll, loads_[i] == least);
        const int index = dealt + __popc(free & ((1u << lane_id()) - 1));
        if (loads_[i] == least && index < tiles) {
          loads_[i] += tile_cost<kConfig>(height);
          if (32 * i + lane_id() == cluster()) own = index;
        }
        dealt += __popc(free);
      }
      if (own >= 0) post(tiles_.spot(own, g, first, count, height));
    }
  }

  JAX_DS_DEVICE void post(const Spot& spot) {
    ring_.acquire();
    s_.board[ring_.slot()] = spot;
    mbarrier_arrive(ring_.full());
    ring_.advance();
  }

  const Params& p_;
  Groups<kConfig>& s_;
  const GroupTiles<kConfig> tiles_;
  Pipeline<kBoard> ring_;
  u32 loads_[kWords];  // of the clusters 32 i + lane: what they have to do so far
};

// Reads them off the board; every thread of the roles does.
template <Config kConfig>
class PostedTiles {
 public:
  JAX_DS_DEVICE PostedTiles(const Params& p, Groups<kConfig>& s)
      : s_(s), tiles_(p, s.ends), ring_(s.posted) {}

  JAX_DS_DEVICE bool next(Tile& tile) {
    ring_.wait();
    const Spot spot = s_.board[ring_.slot()];
    ring_.release();
    ring_.advance();
    if (spot.height < 0) return false;
    tile = tiles_.tile(spot);
    return true;
  }

 private:
  Groups<kConfig>& s_;
  const GroupTiles<kConfig> tiles_;
  Pipeline<kBoard> ring_;
};

template <Config kConfig>
struct ScheduleOf {
  using Type = Schedule<kConfig>;
};

template <Config kConfig>
  requires(IsRagged(kConfig) && !DealsTiles(kConfig))
struct ScheduleOf<kConfig> {
  using Type = GroupSchedule<kConfig>;
};

template <Config kConfig>
  requires(DealsTiles(kConfig))
struct ScheduleOf<kConfig> {
  using Type = PostedTiles<kConfig>;
};

template <Config kConfig>
using TileSchedule = typename ScheduleOf<kConfig>::Type;

}  // namespace jax_ds::deep_gemm
