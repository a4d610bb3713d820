// From accumulators to global memory. Rows at or past `row_end` and columns at or past `n` are not
// stored: a group may end anywhere.
#pragma once

#include "deep_gemm/kernels/scheduler.cuh"
#include "kernels/tma.cuh"

namespace jax_ds::deep_gemm {

// Where one warp's part of a tile lies: 16 rows of an output matrix from `row`, columns from `col`.
struct WarpTile {
  int matrix;
  int row;
  int row_end;
  int col;
};

// Lane i of four gets what lane j has in v[i], as v[j].
JAX_DS_DEVICE void transpose_quad(u32 (&v)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  u32 a = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1);
  u32 b = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
  (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
  a = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2);
  b = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
  (high ? v[0] : v[2]) = a, (high ? v[1] : v[3]) = b;
}

// Straight from the registers. Four lanes fill 32 bytes of float32, a whole sector; of bfloat16 it
// would be 16 a store, so they exchange four strips of 8 columns, and each stores one of them.
template <int kOutput, int kSize>
JAX_DS_DEVICE void store_registers(const Params& p, const float (&total)[kSize],
                                   const WarpTile& t) {
  static_assert(kOutput != kFloat32Add);
  const int lane = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = t.row + lane_id() / 4 + 8 * half;
    const i64 line = (static_cast<i64>(t.matrix) * p.m + row) * p.n;
    const auto at = [&](int strip, int i) { return total[4 * strip + 2 * half + i]; };
#pragma unroll
    for (int strip = 0; strip < kSize / 4; strip += 4) {
      if constexpr (kOutput == kBfloat16) {
        u32 v[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (strip + i < kSize / 4) v[i] = cvt_bf16x2(at(strip + i, 0), at(strip + i, 1));
        }
        transpose_quad(v);
        const int col = t.col + 8 * (strip + lane);
        if (row < t.row_end && strip + lane < kSize / 4 && col < p.n) {
          st_global_v4(static_cast<u16*>(p.out_data) + line + col, {v[0], v[1], v[2], v[3]});
        }
      } else {
#pragma unroll
        for (int i = strip; i < strip + 4 && i < kSize / 4; ++i) {
          const int col = t.col + 8 * i + 2 * lane;
          if (row >= t.row_end || col >= p.n) continue;
          st_global_v2_f32(static_cast<float*>(p.out_data) + line + col, at(i, 0), at(i, 1));
        }
      }
    }
  }
}

// One warp's staging buffers: 16 rows x 128 bytes in TMA's swizzle, units of 16 bytes exchanged by
// the row, so that neither side meets bank conflicts. Stores go on while the next tile is computed;
// a buffer is reused once TMA has read it. Lane 0 issues: bulk groups belong to a thread.
template <Config kConfig>
class Staging {
 public:
  static constexpr int kWidth = 128 / OutputBytes(kConfig);  // columns
  static constexpr int kBuffers = StagingBuffers(kConfig) > 0 ? StagingBuffers(kConfig) : 1;

  JAX_DS_DEVICE explicit Staging(u8* memory) : base_(memory) {}

  // Of this thread's elements `total` those of kColumns columns from kFirst on.
  template <int kFirst, int kColumns, int kSize>
  JAX_DS_DEVICE void store(const Params& p, const float (&total)[kSize], const WarpTile& t) {
    if (lane_id() == 0) bulk_wait_group_read<kBuffers - 1>();
    __syncwarp();
    u8* const buffer = base_ + next_ * kStagingBytes;
    write<kFirst, kColumns>(shared_address(buffer), total);
    // TMA clips at the end of a matrix, but knows nothing of groups inside one.
    const bool whole = kColumns == kWidth && (!IsRagged(kConfig) || t.row + 16 <= t.row_end);
    if (whole) fence_proxy_async_shared();
    __syncwarp();
    if (!whole) copy_rows<kColumns>(p, shared_address(buffer), t, t.col + kFirst);
    if (lane_id() == 0) {
      if constexpr (kConfig.output == kFloat32Add) {
        static_assert(kColumns == kWidth && !IsRagged(kConfig));
        tma_reduce_add_3d(&p.out, buffer, t.col + kFirst, t.row, t.matrix);
      } else if (whole) {
        tma_store_3d(&p.out, buffer, t.col + kFirst, t.row, t.matrix);
      }
      bulk_commit_group();
    }
    next_ = next_ + 1 == kBuffers ? 0 : next_ + 1;
  }

  template <int kFirst, int kColumns, int kSize>
  JAX_DS_DEVICE static void write(u32 buffer, const float (&d)[kSize]) {
    const u32 lane = lane_id();
    if constexpr (kConfig.output == kBfloat16) {
      // Matrix m of stmatrix: rows 8 (m % 2) on, the (m / 2)-th half of a strip of 16 columns.
      const u32 matrix = lane / 8, row = lane % 8 + 8 * (matrix % 2);
#pragma unroll
      for (int strip = 0; strip < kColumns / 16; ++strip) {
        const u32 unit = 2 * strip + matrix / 2;
        const int i = kFirst / 2 + 8 * strip;
        stmatrix_x4(buffer + row * 128 + ((unit ^ row % 8) << 4), cvt_bf16x2(d[i], d[i + 1]),
                    cvt_bf16x2(d[i + 2], d[i + 3]), cvt_bf16x2(d[i + 4], d[i + 5]),
                    cvt_bf16x2(d[i + 6], d[i + 7]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const u32 row = lane / 4, unit = 2 * j + lane % 4 / 2, half = lane % 2 * 8;
        const u32 place = buffer + row * 128 + ((unit ^ row) << 4) + half;
        const int i = kFirst / 2 + 4 * j;
        st_shared_v2_f32(place, d[i], d[i + 1]);
        st_shared_v2_f32(place + 8 * 128, d[i + 2], d[i + 3]);
      }
    }
  }

  // The rows before the end, eight lanes each.
  template <int kColumns>
  JAX_DS_DEVICE static void copy_rows(const Params& p, u32 buffer, const WarpTile& t, int col) {
    constexpr int kUnit = 16 / OutputBytes(kConfig);
    const int unit = lane_id() % 8;
    col += unit * kUnit;
    if (unit >= kColumns / kUnit || col >= p.n) return;
#pragma unroll
    for (int row = lane_id() / 8; row < 16; row += 4) {
      if (t.row + row >= t.row_end) return;
      const i64 line = static_cast<i64>(t.matrix) * p.m + t.row + row;
      const i64 place = (line * p.n + col) * OutputBytes(kConfig);
      st_global_v4(static_cast<u8*>(p.out_data) + place,
                   ld_shared_v4(buffer + row * 128 + ((unit ^ row % 8) << 4)));
    }
  }

 private:
  u8* base_;
  u32 next_ = 0;
};

// A warp's 16 rows of a box for each 64 columns, from the kBox-th on.
template <Config kConfig, int kBox = 0, int kSize>
JAX_DS_DEVICE void write_boxes(u32 memory, const float (&total)[kSize]) {
  if constexpr (kBox < OutBoxes(kConfig)) {
    constexpr int kLeft = kConfig.block_n - 64 * kBox, kColumns = kLeft < 64 ? kLeft : 64;
    Staging<kConfig>::template write<64 * kBox, kColumns>(memory + kBox * 4 * kStagingBytes, total);
    write_boxes<kConfig, kBox + 1>(memory, total);
  }
}

// A warpgroup's part of the tile, by boxes of 64 rows x 64 columns. `memory`: room for all of them.
template <Config kConfig, int kSize>
JAX_DS_DEVICE void store_whole(const Params& p, const float (&total)[kConfig.waves()][kSize],
                               const Tile& tile, int group, u8* memory) {
  constexpr int kColumns = OutBoxes(kConfig), kWaves = kConfig.waves();
  constexpr int kWhole = kConfig.block_n / 64, kRest = kConfig.block_n % 64;
  constexpr int kBoxBytes = 4 * kStagingBytes;
  const int lane = lane_id(), warp = warp_id() % 4, barrier = 1 + group;
  // A lane a box, as bulk groups belong to threads. It waits for its box of the tile before.
  const bool issues = warp == 0 && lane < kWaves * kColumns;
  if (issues) bulk_wait_group_read<0>();
  __syncwarp();
  bar_sync(barrier, 128);
  const u32 own = shared_address(memory) + warp * kStagingBytes;
  write_boxes<kConfig>(own, total[0]);
  if constexpr (kWaves > 1) write_boxes<kConfig>(own + kColumns * kBoxBytes, total[1]);
  fence_proxy_async_shared();
  bar_sync(barrier, 128);
#pragma unroll
  for (int wave = 0; wave < kWaves; ++wave) {
    const int row = tile.out_row + first_row<kConfig>(group, wave);
    // TMA clips at the end of a matrix, but knows nothing of groups inside one.
    const WarpTile t{tile.matrix, row + 16 * warp, tile.out_end, tile.col};
    if constexpr (kRest > 0) {  // a box would reach into the next tile
      Staging<kConfig>::template copy_rows<kRest>(p, own + (wave * kColumns + kWhole) * kBoxBytes,
                                                  t, tile.col + 64 * kWhole);
    }
    if (IsRagged(kConfig) && row + 64 > tile.out_end) {
#pragma unroll
      for (int box = 0; box < kWhole; ++box) {
        Staging<kConfig>::template copy_rows<64>(p, own + (wave * kColumns + box) * kBoxBytes, t,
                                                 tile.col + 64 * box);
      }
    } else if (issues && lane / kColumns == wave && lane % kColumns < kWhole) {
      const int col = tile.col + lane % kColumns * 64;
      tma_store_3d(&p.out, memory + lane * kBoxBytes, col, row, tile.matrix);
      bulk_commit_group();
    }
  }
}

// kFirst and what follows of the tile's columns.
template <Config kConfig, int kFirst = 0, int kSize>
JAX_DS_DEVICE void store_tile(const Params& p, const float (&total)[kSize], const WarpTile& t,
                              Staging<kConfig>& staging) {
  constexpr int kLeft = 2 * kSize - kFirst, kWidth = Staging<kConfig>::kWidth;
  if constexpr (!StoresByTma(kConfig)) {
    store_registers<kConfig.output>(p, total, t);
  } else if constexpr (kLeft > 0) {
    constexpr int kColumns = kLeft < kWidth ? kLeft : kWidth;
    staging.template store<kFirst, kColumns>(p, total, t);
    store_tile<kConfig, kFirst + kColumns>(p, total, t, staging);
  }
}

}  // namespace jax_ds::deep_gemm
