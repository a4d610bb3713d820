// The narrow decode kernel: the output, one warpgroup.
#pragma once

#include "flash_mla/kernels/narrow_config.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
struct NarrowOutput {
  static constexpr int kRows = Config::kRows;
  static constexpr int kColumns = kRows / 4;
  using Element = typename Config::Element;
  using Out = float[kValueTiles][kRows / 2];  // O^T, by tiles of 64 latent columns

  const DecodeParams& p;
  NarrowShared<Config>& shared;
  const int warp = warp_id() % 4;

  Pipeline<Config::kStages> ring{shared.ring};

  // By factors of the query rows, in shared memory.
  static JAX_DS_DEVICE void scale(Out& out, const float (&factors)[kRows]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float factor = factors[Columns<Config>::row(c)];
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        out[tile][Columns<Config>::upper(c)] *= factor;
        out[tile][Columns<Config>::lower(c)] *= factor;
      }
    }
  }

  // O^T += V^T P^T.
  JAX_DS_DEVICE void multiply(Out& out) const {
    ring.wait();
    const auto& tiles = shared.blocks[ring.slot()][0];
    const u64 v = wgmma::descriptor(shared_address(tiles), kNarrowGroupStride);
    const u64 p_tile = wgmma::descriptor(shared_address(tiles[kKeyTiles - 1]), kNarrowGroupStride);
    wgmma::fence();
#pragma unroll
    for (int tile = 0; tile < kValueTiles; ++tile) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma::mma<wgmma::Major::kMN, wgmma::Major::kK>(
            Element{}, out[tile],
            v + tile * (kGroupTileBytes / 16) + step * (2 * kNarrowGroupStride / 16),
            p_tile + 2 * step, true);
      }
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  JAX_DS_DEVICE void release_block() {
    ring.release();
    ring.advance();
  }

  JAX_DS_DEVICE void store_partial(const Item& item, const Out& out) const {
    const int slot = (2 * blockIdx.x + item.part_slot) * kRows;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = Columns<Config>::row(c);
      if (row >= p.S * p.H) continue;
      float* target =
          p.partial_out + static_cast<i64>(slot + row) * kValueDim + 16 * warp + lane_id() / 4;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        target[64 * tile] = out[tile][Columns<Config>::upper(c)];
        target[64 * tile + 8] = out[tile][Columns<Config>::lower(c)];
      }
    }
  }

  JAX_DS_DEVICE void store_final(const Item& item, const Out& out) const {
    const int R = p.S * p.H;
    u16* out_rows = static_cast<u16*>(p.out) + static_cast<i64>(item.request) * R * kValueDim;
    const int column = 16 * warp + 2 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int row = 8 * i + lane_id() / 4;
#pragma unroll
      for (int tile = 0; tile < kValueTiles; ++tile) {
        const float* o = out[tile] + 4 * i;
        // Transposed: this lane then holds two neighbouring columns of one row.
        const u32 left = movmatrix_trans(wgmma::pack(Element{}, o[0], o[1]));
        const u32 right = movmatrix_trans(wgmma::pack(Element{}, o[2], o[3]));
        if (row < R) {
          u16* target = out_rows + row * kValueDim + column + 64 * tile;
          *reinterpret_cast<u32*>(target) = left;
          *reinterpret_cast<u32*>(target + 8) = right;
        }
      }
    }
  }

  JAX_DS_DEVICE void run() {
    Items<Config> items(p, shared.schedule);
    for (Item item; items.next(item);) {
      Out out;
#pragma unroll
      for (int i = 0; i < kValueTiles * (kRows / 2); ++i) {
        out[i / (kRows / 2)][i % (kRows / 2)] = 0.0f;
      }
      for (int block = item.first; block < item.last; ++block) {
        mbarrier_wait(&shared.p_full[ring.slot()], ring.state.phase);
        if (block != item.first && shared.moved[ring.slot()]) [[unlikely]] {
          scale(out, shared.factor[ring.slot()]);
        }
        multiply(out);
        if (block + 1 == item.last) scale(out, shared.inverse[ring.slot()]);
        release_block();
      }
      if (item.split) {
        store_partial(item, out);
      } else {
        store_final(item, out);
      }
    }
  }
};

}  // namespace jax_ds::flash_mla
