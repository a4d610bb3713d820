// What the decode kernels are given by value. Safe for the host: plan.cc sizes things from it.
//
// Sizes: B requests, S query tokens a request, H heads, R = S * H query rows a request (row = s * H
// + h), N page-table columns. A block is 64 tokens.
#pragma once

#include "kernels/tensor_map.h"

namespace jax_ds::flash_mla {

inline constexpr int kBlock = 64;      // tokens
inline constexpr int kKeyDim = 576;    // 512 latent + 64 rotary
inline constexpr int kValueDim = 512;  // the latent part of the key
inline constexpr int kTileCols = 64;   // 128 bytes, one swizzled row
inline constexpr int kKeyTiles = kKeyDim / kTileCols;
inline constexpr int kValueTiles = kValueDim / kTileCols;
inline constexpr int kTileBytes = kBlock * kTileCols * 2;
inline constexpr int kGroupRows = 8;  // of one swizzle pattern
inline constexpr int kGroupTileBytes = kGroupRows * kTileCols * 2;
inline constexpr int kGroups = kBlock / kGroupRows;

// Dynamic shared memory of the decode kernels: one CTA a multiprocessor. The wide one takes all
// there is; beside the narrow one, CTAs of the combining kernel find room and wait for its end.
inline constexpr int kWideSharedBytes = 232448;
constexpr int NarrowSharedBytes(int rows) {
  constexpr int kStages = 2;
  return kStages * kKeyTiles * kTileBytes + rows * kKeyTiles * kTileCols * 2 + 2048;
}
inline constexpr int kNarrowThreads = 288;
inline constexpr int kNarrowMaxRows = 32;
inline constexpr int kWideThreads = 512;
inline constexpr int kWideRows = 64;  // query rows of a CTA
// CTAs that the workspace has room for; with fewer multiprocessors there are fewer.
inline constexpr int kMaxCtas = 132;
inline constexpr int kAppendThreads = 96;  // 72 sixteen-byte pieces a token
inline constexpr int kCombineThreads = 256;

// How a request was shared out: parts 0 .. count - 1 were done by groups first_group, first_group +
// 1, ...
struct Parts {
  int first_group;
  int count;
};

struct DecodeParams {
  TensorMap q_map;  // [B * R, 576], boxes of 64 columns x the rows of a tile
  // [P * page_size / 8][9][8][64]: columns, rows of a group, column tiles, groups of eight rows,
  // so that a box reads memory in order. A box holds `box_tokens` tokens.
  TensorMap kv_map;
  TensorMap rope_map;     // the same tensor, one column tile a box; of the wide kernel
  const int* page_table;  // [B, N]
  const int* seq_lens;    // [B]
  void* out;              // [B, R, 512]
  float* lse;             // [B, R], natural logarithm
  float* partial_out;     // [slots, tile rows, 512] float32, normalised
  float* partial_lse;     // [slots, tile rows], base 2
  Parts* parts;           // [B]
  int B, S, H, N;
  int page_size;
  int box_tokens;  // a page, or a block if that is less
  int num_groups;  // groups of CTAs that share out the KV blocks
  int row_groups;  // CTAs of one group, each with its own query rows
  int causal;
  float scale_log2;  // softmax scale * log2(e)
};

struct CombineParams {
  const float* partial_out;
  const float* partial_lse;
  const Parts* parts;
  void* out;
  float* lse;
  int B, R;
  int tile_rows;  // rows a CTA of the decode kernel works on
  int row_groups;
};

struct AppendParams {
  const void* kv;         // [B, S, 576]
  void* pages;            // [P, page_size, 576]
  const int* page_table;  // [B, N]
  const int* seq_lens;    // [B], lengths after the append
  int B, S, N, P;
  int page_size;
};

}  // namespace jax_ds::flash_mla
