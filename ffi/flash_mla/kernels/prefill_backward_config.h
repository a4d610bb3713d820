// What the kernels of prefill's gradient and the host code that plans and launches them share.
#pragma once

#include "flash_mla/kernels/prefill_config.h"

namespace jax_ds::flash_mla {

// One compiled kernel of either kind: head sizes and mask as in PrefillConfig.
struct PrefillBackwardConfig {
  int qk_dim;
  int rope;
  int v_dim;
  int mask;
  int walked;  // rows of the other side's tiles
  int stages;  // of the ring of those tiles
};

constexpr int kBackwardHeld = kHeldRows;  // rows of one side that a CTA holds
constexpr int kBackwardThreads = 384;

// What PrefillDq leaves of each query for PrefillDkv, [B, H, 2, stride]: lse in units of log2, +inf
// for a query that sees no key, and delta = dout . out - dlse. TMA wants a stride of 16 bytes.
constexpr int QueryStatisticsStride(int queries) { return (queries + 3) / 4 * 4; }

constexpr int kBackwardBox = 64;  // rows, by 64 columns, of all maps

// Of both kernels.
struct PrefillBackwardParams {
  TensorMap q;            // bf16 [B, Sq, H, D]
  TensorMap dout;         // bf16 [B, Sq, H, V]
  TensorMap k;            // bf16 [B, Sk, Hk, D - rope]
  TensorMap k_rope;       // bf16 [B, Sk, 1, rope]
  TensorMap v;            // bf16 [B, Sk, Hk, V]
  TensorMap statistics;   // float32 [B H, 2, Sq], box 1 x 2 x 64
  float* known;           // the same in memory
  const void* out;        // bf16 [B, Sq, H, V]
  const void* dout_rows;  // dout in memory
  const float* lse;       // [B, Sq, H]
  const float* dlse;      // likewise
  void* dq;               // bf16 [B, Sq, H, D]
  void* dk;               // bf16 [B, Sk, Hk, D - rope]
  void* dk_rope;          // bf16 [B, Sk, Hk, rope]: the part of each head
  void* dv;               // bf16 [B, Sk, Hk, V]
  PrefillWalk queries;    // the tiles of PrefillDq
  PrefillWalk keys;       // those of PrefillDkv
  float scale;
};

// Dynamic shared memory: the held side, the ring, 2 KB of staging a math warp, barriers and tiles.
constexpr int PrefillBackwardSharedBytes(const PrefillBackwardConfig& c) {
  const int row = (c.qk_dim + c.v_dim) * 2;
  return kBackwardHeld * row + c.stages * c.walked * (row + 8) + 8 * 2048 + 1024;
}

}  // namespace jax_ds::flash_mla
