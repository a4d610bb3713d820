// What the prefill kernel and the host code that plans and launches it share.
#pragma once

#include "kernels/tensor_map.h"

namespace jax_ds::flash_mla {

// One compiled kernel. A structural type: it is the kernel's only template parameter.
struct PrefillConfig {
  int qk_dim;   // D: 64, 128 or 192
  int rope;     // columns of D that all heads of k share, in an array of their own: 0 or 64
  int v_dim;    // V: 64 or 128
  int causal;   // query i sees the keys up to i + Sk - Sq
  int block_n;  // keys of a tile
  int stages;   // tiles of keys, and of values, in flight
  int ordered;  // the two math warpgroups take turns at the tensor cores
};

constexpr int kPrefillBlockM = 128;  // queries of a tile, 64 for each math warpgroup
constexpr int kPrefillThreads = 384;

struct PrefillParams {
  TensorMap q;       // bf16 [B, Sq, H, D], box 128 queries x 64 columns
  TensorMap k;       // bf16 [B, Sk, Hk, D - rope], box block_n keys x 64 columns
  TensorMap k_rope;  // bf16 [B, Sk, 1, rope], likewise
  TensorMap v;       // bf16 [B, Sk, Hk, V], likewise
  void* out;         // bf16 [B, Sq, H, V]
  float* lse;        // float32 [B, Sq, H]
  int batch;
  int queries;  // Sq
  int keys;     // Sk
  int heads;    // H
  int kv_heads;
  int section;       // pairs of batch and head walked together, so that their keys stay in L2
  float scale_log2;  // softmax scale times log2(e)
};

// Dynamic shared memory of a launch: q, the rings, 2 KB of staging a math warp, the barriers.
constexpr int PrefillSharedBytes(const PrefillConfig& c) {
  const int q = kPrefillBlockM * c.qk_dim * 2;
  const int ring = c.stages * c.block_n * (c.qk_dim + c.v_dim) * 2;
  return q + ring + 8 * 2048 + 1024;
}

}  // namespace jax_ds::flash_mla
