// What prefill's kernels and the host code that plans and launches them share.
#pragma once

#include "flash_mla/kernels/prefill_packing.h"
#include "kernels/tensor_map.h"

namespace jax_ds::flash_mla {

// Which keys a query sees. In a packed batch a list in memory says so, causal or not.
enum PrefillMask : int { kFullMask = 0, kCausalMask = 1, kPackedMask = 2 };

// One compiled kernel. A structural type: it is the kernel's only template parameter.
struct PrefillConfig {
  int qk_dim;   // D: 64, 128 or 192
  int rope;     // columns of D that all heads of k share, in an array of their own: 0 or 64
  int v_dim;    // V: 64 or 128
  int mask;     // PrefillMask
  int block_n;  // keys of a tile
  int stages;   // tiles of keys, and of values, in flight
};

constexpr int kPrefillBlockM = kHeldRows;         // queries of a tile
constexpr int kPrefillBoxM = kPrefillBlockM / 2;  // of each math warpgroup
constexpr int kPrefillThreads = 384;

// The tiles of a launch: `rows` held rows (queries, or keys) of each of `heads` heads, 128 at a
// time, each to be taken past `others` rows of the other side.
struct PrefillWalk {
  int batch;
  int heads;
  int rows;
  int others;
  // Where CTAs draw their next tile, zero at first; null where tiles are dealt out beforehand.
  int* counter = nullptr;
  const int* packed = nullptr;  // this side's lists, PackedLayout; null unless the batch is packed
};

struct PrefillParams {
  TensorMap q;       // bf16 [B, Sq, H, D], box 64 queries x 64 columns
  TensorMap k;       // bf16 [B, Sk, Hk, D - rope], box block_n keys x 64 columns
  TensorMap k_rope;  // bf16 [B, Sk, 1, rope], likewise
  TensorMap v;       // bf16 [B, Sk, Hk, V], likewise
  void* out;         // bf16 [B, Sq, H, V]
  float* lse;        // float32 [B, Sq, H]
  PrefillWalk queries;
  int kv_heads;
  float scale_log2;  // softmax scale times log2(e)
};

// Dynamic shared memory of a launch: q, the rings, 2 KB of staging a math warp, barriers and tiles.
constexpr int PrefillSharedBytes(const PrefillConfig& c) {
  const int q = kPrefillBlockM * c.qk_dim * 2;
  const int ring = c.stages * c.block_n * (c.qk_dim + c.v_dim) * 2;
  return q + ring + 8 * 2048 + 1024;
}

}  // namespace jax_ds::flash_mla
