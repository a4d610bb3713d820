// A CTA's 128x128 tile: who holds which elements, where its results go.
//
// Thread (group g = 0..31, lane l = 0..7) owns four rows, 4g to 4g+3, and sixteen columns: 8l to
// 8l+7 and 64+8l to 64+8l+7. Its four rows of a column make one word of the transpose.
#pragma once

#include "quantization/kernels/block.cuh"
#include "quantization/kernels/groups.cuh"

namespace jax_ds::quantization {

constexpr int kTileThreads = 256;

struct Tile {
  int batch;
  int first_row, rows;  // of x; rows <= 128
  int token_block;
  int col_tile;
  int used_blocks;  // token blocks up to the last group's end, at least one

  // Offset of the tile's first element in a [B, M, width] array. Within a tile 32 bits suffice:
  // the host keeps K below 2^22.
  JAX_DS_DEVICE i64 origin(const TilesParams& p, i64 width) const {
    return (static_cast<i64>(batch) * p.m + first_row) * width + col_tile * kBlock;
  }
};

JAX_DS_DEVICE int tile_group() { return threadIdx.x / 8; }
JAX_DS_DEVICE int tile_lane() { return threadIdx.x % 8; }
// First column of the thread's piece 0 or 1.
JAX_DS_DEVICE int piece_column(int piece) { return piece * 64 + tile_lane() * 8; }

// One row's sixteen values to row_values; `s` is the row's number among the thread's four.
template <bool kAligned>
JAX_DS_DEVICE void store_row(const TilesParams& p, const Tile& tile, int s,
                             const u32 (&values)[4]) {
  const int r = tile_group() * 4 + s;
  u8* const tile_values = static_cast<u8*>(p.row_values) + tile.origin(p, p.k);
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    const int available = p.k - tile.col_tile * kBlock - piece_column(piece);
    store_piece<kAligned>(tile_values + (r * p.k + piece_column(piece)), values + piece * 2,
                          r < tile.rows ? available : 0);
  }
}

// A tile of bytes, transposed: [column][group of four tokens]. Chunks of 16 bytes are permuted so
// that neither the writes (a word in each of eight distant columns) nor the reads (16 bytes) meet
// in a bank.
struct Transpose {
  alignas(16) u32 words[kBlock][32];

  // The word of this thread's four rows and of column `j` of its eight in `piece`.
  JAX_DS_DEVICE u32& at(int piece, int j) {
    const int group = tile_group();
    u32* const first = words[piece_column(piece)];
    return first[(group / 4 ^ tile_lane()) * 4 + group % 4 + j * 32];
  }

  // All threads, after a barrier: to column_values. Chunks of sixteen tokens of which the tile has
  // none are not read here: they are four words of padding(column).
  template <bool kAligned, class Padding>
  JAX_DS_DEVICE void store(const TilesParams& p, const Tile& tile, Padding padding) {
    const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const int token = tile.token_block * kBlock + chunk * 16;
    const i64 first_column = static_cast<i64>(tile.batch) * p.k + tile.col_tile * kBlock + first;
    u8* to = static_cast<u8*>(p.column_values) + first_column * p.p + token;
    constexpr int kStep = kTileThreads / 8;
#pragma unroll
    for (int i = 0; i < kBlock / kStep; ++i, to += static_cast<i64>(kStep) * p.p) {
      const int c = i * kStep + first;
      if (tile.col_tile * kBlock + c >= p.k || token >= p.p) continue;
      uint4 four;
      if (chunk * 16 < tile.rows) {
        const int permuted = chunk ^ first / 8 ^ i % 2 * (kStep / 8);  // c / 8 % 8 in parts
        four = *reinterpret_cast<const uint4*>(&words[c][permuted * 4]);
      } else {
        four.x = four.y = four.z = four.w = padding(c);
      }
      if constexpr (kAligned) {
        *reinterpret_cast<uint4*>(to) = four;
      } else {
        const u32 w[4] = {four.x, four.y, four.z, four.w};
        const int available = p.p - token;
        store_piece<false>(to, w, available);
        store_piece<false>(to + 8, w + 2, available - 8);
      }
    }
  }
};

// The tile of this CTA where there are no groups.
JAX_DS_DEVICE Tile whole_tile(const TilesParams& p) {
  const Place place = place_of(blockIdx.x, p.row_tiles, p.kb);
  Tile tile;
  tile.batch = place.batch;
  tile.token_block = place.row_tile;
  tile.col_tile = place.col_tile;
  tile.first_row = tile.token_block * kBlock;
  tile.rows = min(kBlock, p.m - tile.first_row);
  tile.used_blocks = p.row_tiles;
  return tile;
}

// The tile of this CTA; the whole warp calls it.
JAX_DS_DEVICE Tile find_tile(const TilesParams& p) {
  Tile tile = whole_tile(p);
  if (p.num_groups < 0) return tile;
  const TokenBlock found =
      find_rows(p.group_sizes + tile.batch * p.num_groups, p.num_groups, p.m, tile.token_block);
  tile.first_row = found.first_row;
  tile.rows = found.rows;
  tile.used_blocks = max(found.used_blocks, 1);
  return tile;
}

}  // namespace jax_ds::quantization
