// What the two kernels of prefill's gradient and the host code that plans and launches them share.
#pragma once

#include "kernels/tensor_map.h"

namespace jax_ds::flash_mla {

// One compiled kernel of either kind: head sizes and mask as in PrefillConfig.
struct PrefillBackwardConfig {
  int qk_dim;
  int rope;
  int v_dim;
  int causal;
  int walked;  // rows of the other side's tiles
  int stages;  // of the ring of those tiles
};

constexpr int kBackwardHeld = 128;  // rows of one side that a CTA holds
constexpr int kBackwardThreads = 384;

// Boxes are 64 columns by 128 rows of what a kernel holds, by `walked` rows of the rest.
struct PrefillBackwardParams {
  TensorMap q;         // bf16 [B, Sq, H, D]
  TensorMap dout;      // bf16 [B, Sq, H, V]
  TensorMap k;         // bf16 [B, Sk, Hk, D - rope]
  TensorMap k_rope;    // bf16 [B, Sk, 1, rope]
  TensorMap v;         // bf16 [B, Sk, Hk, V]
  const float* lse;    // [B, H, Sq]; +inf for a query that sees no key
  const float* delta;  // [B, H, Sq]: dout . out - dlse
  void* dq;            // bf16 [B, Sq, H, D]
  void* dk;            // bf16 [B, Sk, Hk, D - rope]
  void* dk_rope;       // bf16 [B, Sk, Hk, rope]: the part of each head
  void* dv;            // bf16 [B, Sk, Hk, V]
  int batch;
  int queries;
  int keys;
  int heads;
  int kv_heads;
  int section;  // pairs of batch and head walked together
  float scale;
};

// Dynamic shared memory: the held side, the ring, 2 KB of staging a math warp, the barriers.
constexpr int PrefillBackwardSharedBytes(const PrefillBackwardConfig& c) {
  const int row = (c.qk_dim + c.v_dim) * 2;
  return kBackwardHeld * row + c.stages * c.walked * (row + 8) + 8 * 2048 + 1024;
}

}  // namespace jax_ds::flash_mla
