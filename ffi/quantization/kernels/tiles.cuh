// Quantization of 128x128 tiles: square blocks, or 1x128 blocks along rows and, transposed, along
// columns (tokens). Everything is written from one read of x.
#pragma once

#include "quantization/kernels/block.cuh"
#include "quantization/kernels/groups.cuh"

namespace jax_ds::quantization {

enum class Blocks {
  kLines,             // 1x128 along rows, and along columns, transposed
  kSquare,            // 128x128
  kSquareTransposed,  // 128x128, and the same numbers transposed
};

template <Input kInput_, Blocks kBlocks_, bool kSwiglu_, bool kAligned_>
struct TilesConfig {
  static constexpr Input kInput = kInput_;
  static constexpr Blocks kBlocks = kBlocks_;
  static constexpr bool kSwiglu = kSwiglu_;    // x: [M, 2K], gate first
  static constexpr bool kAligned = kAligned_;  // K is a multiple of 16, and P
  static constexpr int kThreads = 256;
  // CTAs an SM holds at once, as far as registers allow without spilling.
  static constexpr int kMinCtas = kInput_ == Input::kBfloat16 && kAligned_ ? 2 : 1;
};

// Thread (group g = 0..31, lane l = 0..7) holds four rows, 4g to 4g+3, and sixteen columns: 8l to
// 8l+7 and 64 + 8l to 64 + 8l+7. Four rows of a column make one word of the transpose.
template <class Config>
struct TilesKernel {
  static constexpr Input kStored = Config::kSwiglu ? Input::kFloat32 : Config::kInput;
  static constexpr bool kAligned = Config::kAligned;
  static constexpr bool kSquare = Config::kBlocks != Blocks::kLines;
  static constexpr int kWarps = Config::kThreads / 32;
  using In = Segment<Config::kInput>;
  using Stored = Segment<kStored>;
  using W = Word<kStored>;

  struct Shared {
    // [column][group of four tokens]; 16-byte chunks are permuted so that neither the writes (a
    // word for each of 8 columns apart) nor the reads (16 bytes) meet in a bank.
    alignas(16) u32 transposed[kBlock][32];
    alignas(16) u32 amax[kWarps][kBlock];  // columns; square blocks use [0][warp]
    alignas(16) float scale[kBlock], reciprocal[kBlock];
    GroupScratch groups;
  };

  // One tile's place.
  struct Tile {
    i64 batch;
    int first_row, rows;  // of x; rows <= 128
    int token_block;
    int col_tile;
  };

  static JAX_DS_DEVICE int group() { return threadIdx.x / 8; }
  static JAX_DS_DEVICE int lane() { return threadIdx.x % 8; }
  static JAX_DS_DEVICE int piece_column(int piece) { return piece * 64 + lane() * 8; }

  static JAX_DS_DEVICE void load(In& x, const TilesParams& p, i64 row_offset, int col_tile,
                                 bool valid) {
    x.clear();
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const int column = col_tile * kBlock + piece_column(piece);
      if (!valid || column >= p.k) continue;
      const char* at = static_cast<const char*>(p.x) + (row_offset + column) * In::W::kBytes;
      x.template load<kAligned>(piece, at, p.k - column);
    }
  }

  static JAX_DS_DEVICE void load_tile(Stored (&x)[4], const TilesParams& p, const Tile& tile) {
    constexpr int kHalves = Config::kSwiglu ? 2 : 1;
    In in[4][kHalves];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int r = group() * 4 + s;
      const i64 row = tile.batch * p.m + tile.first_row + r;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        load(in[s][half], p, (row * kHalves + half) * p.k, tile.col_tile, r < tile.rows);
      }
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if constexpr (Config::kSwiglu) {
        x[s] = swiglu(in[s][0], in[s][1]);
      } else {
        x[s] = in[s][0];
      }
    }
  }

  // One row's sixteen values to row_values.
  static JAX_DS_DEVICE void store_row(const TilesParams& p, const Tile& tile, int s,
                                      const u32 (&values)[4]) {
    const int r = group() * 4 + s;
    if (r >= tile.rows) return;
    const i64 row = tile.batch * p.m + tile.first_row + r;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const int column = tile.col_tile * kBlock + piece_column(piece);
      if (column >= p.k) continue;
      store_piece<kAligned>(static_cast<u8*>(p.row_values) + row * p.k + column,
                            values + piece * 2, p.k - column);
    }
  }

  static JAX_DS_DEVICE void quantize_rows(const Stored (&x)[4], const TilesParams& p,
                                          const Tile& tile) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const Scale scale = Scale::of(max_over_eight(x[s].amax()), p.ue8m0);
      u32 values[4];
      quantize(x[s], scale, values);
      store_row(p, tile, s, values);
      const int r = group() * 4 + s;
      if (lane() != 0 || r >= tile.rows) continue;
      const i64 row = tile.first_row + r, base = tile.batch * p.m * p.kb;
      p.row_scales[base + (p.column_major_row_scales
                               ? static_cast<i64>(tile.col_tile) * p.m + row
                               : row * p.kb + tile.col_tile)] = scale.value;
    }
  }

  // The largest magnitudes of the tile's columns, warp by warp, to shared memory.
  static JAX_DS_DEVICE void column_amax(const Stored (&x)[4], Shared& shared) {
    u32 m[Stored::kWords];
#pragma unroll
    for (int i = 0; i < Stored::kWords; ++i) {
      m[i] = W::max(W::max(W::magnitude(x[0].words[i]), W::magnitude(x[1].words[i])),
                    W::max(W::magnitude(x[2].words[i]), W::magnitude(x[3].words[i])));
      m[i] = W::max(m[i], __shfl_xor_sync(0xffffffffu, m[i], 8));
      m[i] = W::max(m[i], __shfl_xor_sync(0xffffffffu, m[i], 16));
    }
    if (threadIdx.x % 32 >= 8) return;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      u32 bits[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bits[j] = __float_as_uint(W::element(m[(i + j) / W::kElements], (i + j) % W::kElements));
      }
      *reinterpret_cast<uint4*>(&shared.amax[threadIdx.x / 32][piece_column(i / 8) + i % 8]) =
          make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }

  // Scales of the columns, to shared and global memory.
  static JAX_DS_DEVICE void column_scales(const TilesParams& p, const Tile& tile, Shared& shared) {
    if (threadIdx.x >= kBlock) return;
    const int c = threadIdx.x;
    u32 m = shared.amax[0][c];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) m = max(m, shared.amax[warp][c]);
    const Scale scale = Scale::of(m, p.ue8m0);
    shared.scale[c] = scale.value;
    shared.reciprocal[c] = scale.reciprocal;
    const i64 column = tile.col_tile * kBlock + c;
    if (column >= p.k) return;
    const i64 base = tile.batch * p.k * p.row_tiles;
    p.column_scales[base + (p.column_major_column_scales
                                ? static_cast<i64>(tile.token_block) * p.k + column
                                : column * p.row_tiles + tile.token_block)] = scale.value;
  }

  static JAX_DS_DEVICE u32& transposed(Shared& shared, int column, int group) {
    return shared.transposed[column][(group / 4 ^ column / 8 % 8) * 4 + group % 4];
  }

  static JAX_DS_DEVICE void quantize_columns(const Stored (&x)[4], Shared& shared) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = piece_column(i / 8) + i % 8;
      const Scale scale = Scale::of_value(shared.scale[column], shared.reciprocal[column]);
      transposed(shared, column, group()) =
          cvt_e4m3x4(scale.divide(x[0].at(i)), scale.divide(x[1].at(i)), scale.divide(x[2].at(i)),
                     scale.divide(x[3].at(i)));
    }
  }

  // The tile's transpose from shared memory to column_values.
  static JAX_DS_DEVICE void store_columns(const TilesParams& p, const Tile& tile, Shared& shared) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int index = i * Config::kThreads + threadIdx.x;
      const int c = index / 8, chunk = index % 8;
      const i64 column = tile.col_tile * kBlock + c;
      const i64 token = static_cast<i64>(tile.token_block) * kBlock + chunk * 16;
      if (column >= p.k || token >= p.p) continue;
      const uint4 words = *reinterpret_cast<const uint4*>(&transposed(shared, c, chunk * 4));
      u8* to = static_cast<u8*>(p.column_values) + (tile.batch * p.k + column) * p.p + token;
      if constexpr (kAligned) {
        *reinterpret_cast<uint4*>(to) = words;
      } else {
        const u32 w[4] = {words.x, words.y, words.z, words.w};
        const int available = static_cast<int>(p.p - token);
        store_piece<false>(to, w, available);
        store_piece<false>(to + 8, w + 2, available - 8);
      }
    }
  }

  static JAX_DS_DEVICE void lines(const TilesParams& p, const Tile& tile, Shared& shared) {
    Stored x[4];
    load_tile(x, p, tile);
    column_amax(x, shared);
    quantize_rows(x, p, tile);
    __syncthreads();
    column_scales(p, tile, shared);
    __syncthreads();
    quantize_columns(x, shared);
    __syncthreads();
    store_columns(p, tile, shared);
  }

  static JAX_DS_DEVICE void square(const TilesParams& p, const Tile& tile, Shared& shared) {
    Stored x[4];
    load_tile(x, p, tile);
    u32 m = max(max(x[0].amax(), x[1].amax()), max(x[2].amax(), x[3].amax()));
    m = __reduce_max_sync(0xffffffffu, m);
    if (threadIdx.x % 32 == 0) shared.amax[0][threadIdx.x / 32] = m;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) m = max(m, shared.amax[0][warp]);
    const Scale scale = Scale::of(m, p.ue8m0);
    u32 values[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      quantize(x[s], scale, values[s]);
      store_row(p, tile, s, values[s]);
    }
    if (threadIdx.x == 0) {
      const i64 base = tile.batch * p.row_tiles * p.kb;
      p.row_scales[base + static_cast<i64>(tile.token_block) * p.kb + tile.col_tile] = scale.value;
      if constexpr (Config::kBlocks == Blocks::kSquareTransposed) {
        p.column_scales[base + static_cast<i64>(tile.col_tile) * p.row_tiles + tile.token_block] =
            scale.value;
      }
    }
    if constexpr (Config::kBlocks == Blocks::kSquareTransposed) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        transpose_words(values[0][w], values[1][w], values[2][w], values[3][w]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          transposed(shared, piece_column(w / 2) + w % 2 * 4 + j, group()) = values[j][w];
        }
      }
      __syncthreads();
      store_columns(p, tile, shared);
    }
    // The next tile's maxima replace this one's.
    __syncthreads();
  }

  // Four words of four bytes each, as a 4x4 matrix of bytes, transposed in place.
  static JAX_DS_DEVICE void transpose_words(u32& a, u32& b, u32& c, u32& d) {
    const u32 ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
    const u32 cd_low = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
    a = __byte_perm(ab_low, cd_low, 0x5410);
    b = __byte_perm(ab_low, cd_low, 0x7632);
    c = __byte_perm(ab_high, cd_high, 0x5410);
    d = __byte_perm(ab_high, cd_high, 0x7632);
  }

  static JAX_DS_DEVICE void run(const TilesParams& p) {
    __shared__ Shared shared;
    Tile tile;
    const int cta_column = blockIdx.x % p.cta_columns;
    tile.token_block = blockIdx.x / p.cta_columns % p.row_tiles;
    tile.batch = blockIdx.x / p.cta_columns / p.row_tiles;
    if (p.num_groups < 0) {
      tile.first_row = tile.token_block * kBlock;
      tile.rows = min(kBlock, p.m - tile.first_row);
    } else {
      const TokenBlock found = find_rows(p.group_sizes + tile.batch * p.num_groups, p.num_groups,
                                         p.m, tile.token_block, shared.groups);
      tile.first_row = found.first_row;
      tile.rows = found.rows;
    }
    const int first = cta_column * p.col_tiles_per_cta;
    const int end = min(first + p.col_tiles_per_cta, p.kb);
    for (tile.col_tile = first; tile.col_tile < end; ++tile.col_tile) {
      if constexpr (kSquare) {
        square(p, tile, shared);
      } else {
        lines(p, tile, shared);
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinCtas) quantize_tiles(const TilesParams p) {
  TilesKernel<Config>::run(p);
}

}  // namespace jax_ds::quantization
