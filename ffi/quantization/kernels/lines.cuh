// 1x128 quantization along rows and, transposed, along columns (tokens), from one read of x;
// optionally of silu(gate) * up.
//
// Every thread copies its own elements of the tile to shared memory asynchronously, a row at a
// time, and reads them there twice; the transpose takes the place of the first half once that is
// read. Few registers and little shared memory, so that several CTAs share an SM: one computes
// while others load.
#pragma once

#include "quantization/kernels/tile.cuh"

namespace jax_ds::quantization {

template <Input kInput_, bool kSwiglu_, bool kAligned_>
struct LinesConfig {
  static constexpr Input kInput = kInput_;
  static constexpr bool kSwiglu = kSwiglu_;    // x: [M, 2K], gate first
  static constexpr bool kAligned = kAligned_;  // K is a multiple of 16
  // CTAs an SM holds at once, as far as shared memory and registers allow.
  static constexpr int kMinCtas = !kAligned || (kInput == Input::kFloat32 && kSwiglu) ? 1
                                  : kInput == Input::kFloat32 || kSwiglu              ? 3
                                                                                      : 4;
};

template <class Config>
struct LinesKernel {
  static constexpr bool kAligned = Config::kAligned;
  static constexpr bool kSwiglu = Config::kSwiglu;
  static constexpr int kHalves = kSwiglu ? 2 : 1;
  static constexpr int kWarps = kTileThreads / 32;
  static constexpr int kWarpRows = kBlock / kWarps;
  // What is quantized: the input, or SwiGLU's result in float32.
  static constexpr Input kStored = kSwiglu ? Input::kFloat32 : Config::kInput;
  using In = Segment<Config::kInput>;
  using Stored = Segment<kStored>;
  using W = Word<kStored>;
  using Divisor = Reciprocal<!kSwiglu>;
  static constexpr int kPieceBytes = 8 * In::W::kBytes;  // of the input

  struct Shared {
    union {
      alignas(16) char x[2][kHalves][kBlock][kBlock / 2 * In::W::kBytes];  // by piece
      Transpose transpose;  // takes the place of piece 0
    };
    alignas(16) u32 amax[kWarps][kBlock];
    alignas(16) float high[kBlock], low[kBlock], prescale[kBlock];
  };
  static_assert(sizeof(Shared) <= lines_shared_bytes(In::W::kBytes, kSwiglu));

  // A warp holds sixteen rows, and has nothing to do where the tile has none of them.
  static JAX_DS_DEVICE bool is_idle(const Tile& tile) {
    return static_cast<int>(threadIdx.x) / 32 * kWarpRows >= tile.rows;
  }

  static JAX_DS_DEVICE char* piece_address(Shared& shared, int half, int s, int piece) {
    return shared.x[piece][half][tile_group() * 4 + s] + tile_lane() * 8 * In::W::kBytes;
  }

  // Starts copying this thread's elements; what lies outside x becomes zero.
  static JAX_DS_DEVICE void start_load(const TilesParams& p, const Tile& tile, Shared& shared) {
    if (is_idle(tile)) return;
    const char* const tile_x = static_cast<const char*>(p.x) +
                               tile.origin(p, static_cast<i64>(kHalves) * p.k) * In::W::kBytes;
    const int available = p.k - tile.col_tile * kBlock;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int r = tile_group() * 4 + s;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const char* const from_row =
            tile_x + static_cast<i64>((r * kHalves + half) * p.k + piece_column(0)) * In::W::kBytes;
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
          const int in_piece = r < tile.rows ? available - piece_column(piece) : 0;
          const char* const from = from_row + piece * 64 * In::W::kBytes;
          char* const to = piece_address(shared, half, s, piece);
          if constexpr (kAligned) {
#pragma unroll
            for (int b = 0; b < kPieceBytes; b += 16) {
              cp_async_16(shared_address(to) + b, from + b, in_piece > 0);
            }
          } else {
            copy_piece(to, from, in_piece);
          }
        }
      }
      cp_async_commit_group();
    }
  }

  // Eight elements, of which the first `available` exist, one by one.
  static JAX_DS_DEVICE void copy_piece(char* to, const char* from, int available) {
    In x;
    x.clear();
    x.template load<false>(0, from, available);
#pragma unroll
    for (int i = 0; i < In::kWords / 2; ++i) reinterpret_cast<u32*>(to)[i] = x.words[i];
  }

  static JAX_DS_DEVICE void read_piece(u32* words, const char* from) {
#pragma unroll
    for (int i = 0; i < kPieceBytes / 16; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  }

  // The row `s` of this thread as it was loaded.
  static JAX_DS_DEVICE In read_input(Shared& shared, int half, int s) {
    In x;
    read_piece(x.words, piece_address(shared, half, s, 0));
    read_piece(x.words + In::kWords / 2, piece_address(shared, half, s, 1));
    return x;
  }

  // One piece of row `s` of what is quantized. SwiGLU's results took the place of gate and up.
  static JAX_DS_DEVICE void read_stored(Shared& shared, int s, int piece,
                                        u32 (&words)[Stored::kWords / 2]) {
    if constexpr (!kSwiglu) {
      read_piece(words, piece_address(shared, 0, s, piece));
    } else {
      // Four float32 take the place of eight bfloat16, eight that of eight float32.
      constexpr int kFirst = kPieceBytes / 4;
      read_piece(words, piece_address(shared, 0, s, piece));
      if constexpr (kFirst < 8) {
        read_piece(words + kFirst, piece_address(shared, 1, s, piece));
      }
    }
  }

  static JAX_DS_DEVICE void write_stored(Shared& shared, int s, const Stored& h) {
    constexpr int kFirst = kPieceBytes / 4;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        char* to = i < kFirst ? piece_address(shared, 0, s, piece) + i * 4
                              : piece_address(shared, 1, s, piece) + (i - kFirst) * 4;
        const u32* w = h.words + piece * 8 + i;
        *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  // The row `s` of what is quantized; with SwiGLU computed here, and left where gate and up were.
  static JAX_DS_DEVICE Stored make_stored(Shared& shared, int s) {
    if constexpr (kSwiglu) {
      const Stored h = swiglu(read_input(shared, 0, s), read_input(shared, 1, s));
      write_stored(shared, s, h);
      return h;
    } else {
      return read_input(shared, 0, s);
    }
  }

  // Of the eight threads that share rows, each gets the largest magnitude of row owned_row().
  static JAX_DS_DEVICE int owned_row() { return tile_lane() % 2 * 2 + tile_lane() / 2 % 2; }
  static JAX_DS_DEVICE u32 reduce_rows(const u32 (&amax)[4]) {
    // Each exchange halves the rows a thread looks after.
    const bool upper = tile_lane() % 2, odd = tile_lane() / 2 % 2;
    u32 a = upper ? amax[2] : amax[0], b = upper ? amax[3] : amax[1];
    a = max(a, __shfl_xor_sync(0xffffffffu, upper ? amax[0] : amax[2], 1));
    b = max(b, __shfl_xor_sync(0xffffffffu, upper ? amax[1] : amax[3], 1));
    u32 m = max(odd ? b : a, __shfl_xor_sync(0xffffffffu, odd ? a : b, 2));
    return max(m, __shfl_xor_sync(0xffffffffu, m, 4));
  }
  // What the thread that owns row `s` holds in `value`.
  static JAX_DS_DEVICE float from_owner(float value, int s) {
    return __shfl_sync(0xffffffffu, value, s / 2 + s % 2 * 2, 8);
  }

  // The largest magnitudes of the tile's columns, warp by warp, to shared memory.
  static JAX_DS_DEVICE void reduce_columns(u32 (&m)[Stored::kWords], Shared& shared) {
#pragma unroll
    for (int i = 0; i < Stored::kWords; ++i) {
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

  // A thread reads only what it has copied itself: no barrier.
  static JAX_DS_DEVICE void wait_for_row(int s) {
    if (s == 0) cp_async_wait_group<3>();
    if (s == 1) cp_async_wait_group<2>();
    if (s == 2) cp_async_wait_group<1>();
    if (s == 3) cp_async_wait_group<0>();
  }

  // The scale of the row this thread owns, also to global memory; the columns' maxima to shared.
  static JAX_DS_DEVICE float row_scale(const TilesParams& p, const Tile& tile, Shared& shared) {
    u32 column_amax[Stored::kWords], row_amax[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      wait_for_row(s);
      const Stored x = make_stored(shared, s);
      u32 m = 0;
#pragma unroll
      for (int i = 0; i < Stored::kWords; ++i) {
        m = W::accumulate(m, x.words[i]);
        column_amax[i] = W::accumulate(s == 0 ? 0 : column_amax[i], x.words[i]);
      }
      row_amax[s] = W::fold(m);
    }
    reduce_columns(column_amax, shared);
    const float scale = scale_of(reduce_rows(row_amax), p.ue8m0);
    const int r = tile_group() * 4 + owned_row();
    if (tile_lane() < 4 && r < tile.rows) {
      const i64 line = static_cast<i64>(tile.batch) * p.kb + tile.col_tile;
      p.row_scales[line * p.m + tile.first_row + r] = scale;
    }
    return scale;
  }

  // Scales of the columns, to shared and global memory; whether this thread's is huge.
  static JAX_DS_DEVICE bool column_scales(const TilesParams& p, const Tile& tile, Shared& shared) {
    if (threadIdx.x >= kBlock) return false;
    const int c = threadIdx.x;
    u32 m = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp * kWarpRows < tile.rows) m = max(m, shared.amax[warp][c]);
    }
    const float scale = scale_of(m, p.ue8m0);
    store_column_scale(p, tile, tile.col_tile * kBlock + c, scale);
    const Divisor r = Divisor::of(is_huge(scale) ? scale * kPrescale : scale);
    shared.prescale[c] = is_huge(scale) ? kPrescale : 1.0f;
    shared.high[c] = r.high;
    shared.low[c] = r.low;
    return is_huge(scale);
  }

  static JAX_DS_DEVICE void store_column_scale(const TilesParams& p, const Tile& tile, int column,
                                               float scale) {
    if (column >= p.k) return;
    const i64 line = static_cast<i64>(tile.batch) * p.row_tiles + tile.token_block;
    p.column_scales[line * p.k + column] = scale;
  }

  // The reciprocals of this thread's four rows.
  struct RowScales {
    Divisor reciprocal[4];
    float own_prescale;

    JAX_DS_DEVICE explicit RowScales(float own_scale)
        : own_prescale(is_huge(own_scale) ? kPrescale : 1.0f) {
      const Divisor own = Divisor::of(own_scale * own_prescale);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        reciprocal[s] = {from_owner(own.high, s), kSwiglu ? 0.0f : from_owner(own.low, s)};
      }
    }
  };

  // Quantizes one piece from one conversion of each element: rows to global memory, of each of the
  // eight columns a word. Only tiles with a huge scale (kHuge) pay for prescaling.
  template <bool kHuge>
  static JAX_DS_DEVICE void quantize_piece(const TilesParams& p, const Tile& tile, Shared& shared,
                                           int piece, const RowScales& row, u32 (&columns)[8]) {
    u32 x[4][Stored::kWords / 2], values[4][2];
#pragma unroll
    for (int s = 0; s < 4; ++s) read_stored(shared, s, piece, x[s]);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float v[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[s][j] = W::element(x[s][(i + j) / W::kElements], (i + j) % W::kElements);
        }
        const float f = kHuge ? from_owner(row.own_prescale, s) : 1.0f;
        auto value = [&](int j) { return row.reciprocal[s].times(kHuge ? v[s][j] * f : v[s][j]); };
        values[s][i / 4] = cvt_e4m3x4(value(0), value(1), value(2), value(3));
      }
      const int first = piece_column(piece) + i;
      const float4 high = *reinterpret_cast<const float4*>(&shared.high[first]);
      const float4 low = *reinterpret_cast<const float4*>(&shared.low[first]);
      const Divisor column[4] = {
          {high.x, low.x}, {high.y, low.y}, {high.z, low.z}, {high.w, low.w}};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float f = kHuge ? shared.prescale[first + j] : 1.0f;
        auto value = [&](int s) { return column[j].times(kHuge ? v[s][j] * f : v[s][j]); };
        columns[i + j] = cvt_e4m3x4(value(0), value(1), value(2), value(3));
      }
    }
    u8* const to = static_cast<u8*>(p.row_values) + tile.origin(p, p.k) + piece_column(piece);
    const int available = p.k - tile.col_tile * kBlock - piece_column(piece);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int r = tile_group() * 4 + s;
      store_piece<kAligned>(to + r * p.k, values[s], r < tile.rows ? available : 0);
    }
  }

  // All results of a tile once the scales are known.
  template <bool kHuge>
  static JAX_DS_DEVICE void quantize_tile(const TilesParams& p, const Tile& tile, Shared& shared,
                                          float own_scale) {
    const bool idle = is_idle(tile);
    const RowScales row(own_scale);
    constexpr int kUnrolled = kHuge ? 1 : 2;  // huge scales are rare: little code, not fast code
#pragma unroll kUnrolled
    for (int piece = 0; piece < 2; ++piece) {
      u32 columns[8];
      if (!idle) quantize_piece<kHuge>(p, tile, shared, piece, row, columns);
      // Everyone has read piece 0: from here on its place belongs to the transpose.
      if (piece == 0) __syncthreads();
      if (idle) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        shared.transpose.at(piece, j) = columns[j];
      }
    }
    __syncthreads();
    // Zeros, which divided by a scale of NaN are NaN.
    shared.transpose.template store<kAligned>(
        p, tile, [&](int c) { return isnan(shared.high[c]) ? kNaNCodes : 0u; });
  }

  // What a token block without tokens holds: zeros, with scale 1.
  static JAX_DS_DEVICE void zero_columns(const TilesParams& p, const Tile& tile, Shared& shared) {
    if (threadIdx.x < kBlock) {
      store_column_scale(p, tile, tile.col_tile * kBlock + threadIdx.x, 1.0f);
    }
    shared.transpose.template store<kAligned>(p, tile, [](int) { return 0u; });
  }

  static JAX_DS_DEVICE void run(const TilesParams& p) {
    extern __shared__ __align__(16) char raw[];
    Shared& shared = *reinterpret_cast<Shared*>(raw);
    const Tile tile = find_tile(p);
    // Others write the padding after the last group, while they wait for what they load.
    if (tile.token_block >= tile.used_blocks) return;
    float scale = 1.0f;
    start_load(p, tile, shared);
    Tile padding = tile;
    padding.rows = 0;
#pragma unroll 1
    for (padding.token_block += tile.used_blocks; padding.token_block < p.row_tiles;
         padding.token_block += tile.used_blocks) {
      zero_columns(p, padding, shared);
    }
    // Groups past the last row hold blocks without rows.
    if (tile.rows <= 0) return zero_columns(p, tile, shared);
    if (!is_idle(tile)) scale = row_scale(p, tile, shared);
    __syncthreads();
    const bool huge = column_scales(p, tile, shared) || is_huge(scale);
    if (__syncthreads_or(huge)) {
      quantize_tile<true>(p, tile, shared, scale);
    } else {
      quantize_tile<false>(p, tile, shared, scale);
    }
  }
};

// x: [B, M, K] or, with SwiGLU, [B, M, 2K] -> row_values [B, M, K], column_values [B, K, P], scales
template <class Config>
__global__ void __launch_bounds__(kTileThreads, Config::kMinCtas)
    quantize_lines(const TilesParams p) {
  LinesKernel<Config>::run(p);
}

}  // namespace jax_ds::quantization
