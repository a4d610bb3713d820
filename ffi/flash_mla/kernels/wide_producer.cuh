// The wide decode kernel: what all roles share, and the loads.
#pragma once

#include "flash_mla/kernels/softmax.cuh"
#include "flash_mla/kernels/wide_config.cuh"

namespace jax_ds::flash_mla {

// This CTA's place: group of the schedule, query rows.
template <typename Config>
JAX_DS_DEVICE Place place_of(const DecodeParams& p) {
  const int group = blockIdx.x / p.row_groups;
  return {group, (static_cast<int>(blockIdx.x) - group * p.row_groups) * Config::kRows};
}

// Where this CTA's rows of a part lie in the workspace.
template <typename Config>
JAX_DS_DEVICE i64 partial_row(const DecodeParams& p, const Place& place, int part_slot) {
  return static_cast<i64>(2 * place.group + part_slot) * p.row_groups * Config::kRows +
         place.first_row;
}

// Warp 0 finds the items, announces each to the other roles along with its query, and loads pages.
template <typename Config>
struct Producer {
  const DecodeParams& p;
  WideShared<Config>& shared;
  Progress at;

  // `tiles` column tiles from `tile` on, of all tokens of a block.
  JAX_DS_DEVICE void load(const TensorMap* map, u8* target, int tile, int tiles, u64* full,
                          const PageRows& rows, int block) const {
    if (elect_one()) mbarrier_arrive_expect_tx(full, tiles * kTileBytes);
    for (int token = 0; token < kBlock; token += p.box_tokens) {
      const int row = rows.row((block * kBlock + token) / p.box_tokens);
      u8* to = target + token / kGroupRows * tiles * kGroupTileBytes;
      if (elect_one()) tma_load_4d(to, map, full, 0, 0, tile, row / kGroupRows);
    }
  }

  // To L2: the rotary tile follows its values once there is room, and is then wanted at once.
  JAX_DS_DEVICE void prefetch(const PageRows& rows, int block, bool values) const {
    for (int token = 0; token < kBlock; token += p.box_tokens) {
      const int row = rows.row((block * kBlock + token) / p.box_tokens);
      if (!elect_one()) continue;
      if (values) tma_prefetch_4d(&p.kv_map, 0, 0, 0, row / kGroupRows);
      tma_prefetch_4d(&p.rope_map, 0, 0, kKeyTiles - 1, row / kGroupRows);
    }
  }

  JAX_DS_DEVICE void load_block(PageRows& rows, const Item& item, int block) {
    rows.advance(block);
    mbarrier_wait(&shared.values_empty[at.stage()], at.stage_phase() ^ 1);
    load(&p.kv_map, shared.values[at.stage()][0][0], 0, kValueTiles,
         &shared.values_full[at.stage()], rows, block);
    if (!Config::kPrefetch || block == item.first) prefetch(rows, block, false);
    // One CTA does it for all that share the block.
    if (Config::kPrefetch && block + 1 < item.last && shared.place.first_row == 0) {
      prefetch(rows, block + 1, true);
    }
    at.template advance_stage<Config::kStages>();
    mbarrier_wait(&shared.rope_empty[at.slot()], at.slot_phase() ^ 1);
    load(&p.rope_map, shared.rope[at.slot()], kKeyTiles - 1, 1, &shared.rope_full[at.slot()], rows,
         block);
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
    Items<Config> walk(p, shared.schedule);
    for (Item item; walk.next(item);) {
      if (item.empty()) continue;
      PageRows rows(p, item);
      load_query(item);
      for (int block = item.first; block < item.last; ++block) load_block(rows, item, block);
    }
    announce({.blocks = 0});
  }
};

// Warp 1 writes the results of requests without tokens and tells how requests were shared out.
template <typename Config>
JAX_DS_DEVICE void write_empty(const DecodeParams& p, WideShared<Config>& shared) {
  announce_parts<Config>(p, shared.schedule, shared.place.group);
  const int R = p.S * p.H;
  Items<Config> items(p, shared.schedule);
  for (Item item; items.next(item);) {
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

}  // namespace jax_ds::flash_mla
