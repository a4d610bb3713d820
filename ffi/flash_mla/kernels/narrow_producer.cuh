// The narrow decode kernel: the loads, one warp.
#pragma once

#include "flash_mla/kernels/narrow_config.cuh"
#include "flash_mla/kernels/softmax.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
JAX_DS_DEVICE void load_block(const DecodeParams& p, NarrowShared<Config>& shared, PageRows& rows,
                              int block, Pipeline<Config::kStages>& ring) {
  rows.advance(block);
  ring.acquire();
  if (elect_one()) ring.commit(kKeyTiles * kTileBytes);
  for (int token = 0; token < kBlock; token += p.box_tokens) {
    const int row = rows.row((block * kBlock + token) / p.box_tokens);
    if (elect_one()) {
      tma_load_4d(shared.blocks[ring.slot()][token / kGroupRows], &p.kv_map, ring.full(), 0, 0, 0,
                  row / kGroupRows, kEvictFirst);
    }
  }
  ring.advance();
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
  Pipeline<Config::kStages> ring(shared.ring);
  u32 q_phase = 0;
  Items<Config> items(p, shared.schedule);
  for (Item item; items.next(item);) {
    if (item.empty()) continue;
    PageRows rows(p, item);
    // The first block before the query: its buffer may be in use by the previous item yet.
    load_block<Config>(p, shared, rows, item.first, ring);
    load_query<Config>(p, shared, item.request, q_phase);
    q_phase ^= 1;
    for (int block = item.first + 1; block < item.last; ++block) {
      load_block<Config>(p, shared, rows, block, ring);
    }
  }
}

}  // namespace jax_ds::flash_mla
