// Quantization in blocks of 128x128, and optionally the same numbers transposed, from one read.
#pragma once

#include "quantization/kernels/tile.cuh"

namespace jax_ds::quantization {

template <Input kInput_, bool kTransposed_, bool kAligned_>
struct SquareConfig {
  static constexpr Input kInput = kInput_;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr bool kAligned = kAligned_;  // K and M are multiples of 16
  // CTAs an SM holds at once: as many as registers allow without spilling.
  static constexpr int kMinCtas = !kAligned ? 1 : kInput == Input::kBfloat16 ? 4 : 2;
};

// Four words of four bytes each, as a 4x4 matrix of bytes, transposed in place.
JAX_DS_DEVICE void transpose_words(u32& a, u32& b, u32& c, u32& d) {
  const u32 ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
  const u32 cd_low = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
  a = __byte_perm(ab_low, cd_low, 0x5410);
  b = __byte_perm(ab_low, cd_low, 0x7632);
  c = __byte_perm(ab_high, cd_high, 0x5410);
  d = __byte_perm(ab_high, cd_high, 0x7632);
}

template <class Config>
struct SquareKernel {
  using In = Segment<Config::kInput>;
  static constexpr bool kAligned = Config::kAligned;

  struct Shared {
    Transpose transpose;
    u32 amax[kTileThreads / 32];
  };

  static JAX_DS_DEVICE void load(In (&x)[4], const TilesParams& p, const Tile& tile) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int r = tile_group() * 4 + s;
      const i64 row = static_cast<i64>(tile.batch) * p.m + tile.first_row + r;
      x[s].clear();
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int column = tile.col_tile * kBlock + piece_column(piece);
        if (r >= tile.rows || column >= p.k) continue;
        const char* at = static_cast<const char*>(p.x) + (row * p.k + column) * In::W::kBytes;
        x[s].template load<kAligned>(piece, at, p.k - column);
      }
    }
  }

  // The tile's largest magnitude, in every thread.
  static JAX_DS_DEVICE u32 amax(const In (&x)[4], Shared& shared) {
    u32 m = max(max(x[0].amax(), x[1].amax()), max(x[2].amax(), x[3].amax()));
    m = __reduce_max_sync(0xffffffffu, m);
    if (threadIdx.x % 32 == 0) shared.amax[threadIdx.x / 32] = m;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kTileThreads / 32; ++warp) m = max(m, shared.amax[warp]);
    return m;
  }

  static JAX_DS_DEVICE void run(const TilesParams& p) {
    __shared__ Shared shared;
    const Tile tile = whole_tile(p);
    In x[4];
    load(x, p, tile);
    const float scale = scale_of(amax(x, shared), p.ue8m0);
    u32 values[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      quantize(x[s], scale, values[s]);
      store_row<kAligned>(p, tile, s, values[s]);
    }
    const i64 base = static_cast<i64>(tile.batch) * p.row_tiles * p.kb;
    if (threadIdx.x == 0) {
      p.row_scales[base + static_cast<i64>(tile.token_block) * p.kb + tile.col_tile] = scale;
    }
    if constexpr (Config::kTransposed) {
      if (threadIdx.x == 0) {
        p.column_scales[base + static_cast<i64>(tile.col_tile) * p.row_tiles + tile.token_block] =
            scale;
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        transpose_words(values[0][w], values[1][w], values[2][w], values[3][w]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          shared.transpose.at(w / 2, w % 2 * 4 + j) = values[j][w];
        }
      }
      __syncthreads();
      shared.transpose.store<kAligned>(p, tile, [](int) { return 0u; });
    }
  }
};

// x: [B, M, K] -> row_values [B, M, K], row_scales [B, MB, KB] and, transposed, the columns'
template <class Config>
__global__ void __launch_bounds__(kTileThreads, Config::kMinCtas)
    quantize_square(const TilesParams p) {
  SquareKernel<Config>::run(p);
}

}  // namespace jax_ds::quantization
