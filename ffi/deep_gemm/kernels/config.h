// What the GEMM kernel and the host code that plans and launches it share: the configuration, the
// arguments, the size of shared memory. No other header than the tensor map's.
#pragma once

#include "kernels/tensor_map.h"

namespace jax_ds::deep_gemm {

// What the rows of a tile are. Sizes: M rows of lhs and output, N columns, K contracted, G groups.
enum Mode : int {
  kDense,    // lhs [M, K] 1x128, rhs [N, K] 128x128
  kGrouped,  // lhs [M, K], consecutive rows a group; rhs [G, N, K]
  kMasked,   // lhs [G, M, K], the first group_sizes[g] rows of each g; rhs [G, N, K]
  kWgrad,    // lhs [M, T], rhs [N, T], both 1x128 along the tokens T; out [G, M, N]
};

enum Output : int { kBfloat16, kFloat32, kFloat32Add };

// One compiled kernel. A structural type: it is the kernel's only template parameter.
struct Config {
  int mode;
  int output;
  int block_m;    // rows of a CTA's tile: 64 or 128 for each math warpgroup, or 64 for each pair
  int block_n;    // columns of a CTA's tile
  int stages;     // slots of the operand ring
  int math;       // math warpgroups
  int multicast;  // CTAs of a cluster, side by side along N, that share the lhs tile
  int split;      // CTAs of a cluster that divide K and add their partial tiles
  int per_sm;     // CTAs meant to run together on an SM: 1 or 2
  int depth;      // k-blocks a warpgroup has in flight: it promotes one while the next multiplies

  // Math warpgroups that share their rows, and divide the CTA's blocks of K.
  constexpr int k_parts() const { return 64 * math > block_m ? 2 : 1; }
  constexpr int row_groups() const { return math / k_parts(); }
  constexpr int waves() const { return block_m / (64 * row_groups()); }
  constexpr int cluster() const { return multicast * split; }
  constexpr int math_threads() const { return 128 * math; }
  // Registers move from the producers to the math warpgroups where there are two with rows of their
  // own; that takes a whole warpgroup of producers.
  constexpr bool moves_registers() const { return math == 2 && k_parts() == 1 && per_sm == 1; }
  constexpr int threads() const { return math_threads() + (moves_registers() ? 128 : 64); }
  // What a thread has after that. Weight gradients keep the scales of all columns in registers.
  constexpr int math_registers() const { return mode == kWgrad ? 240 : 232; }
  constexpr int producer_registers() const { return mode == kWgrad ? 24 : 40; }
};

constexpr int kBlockK = 128;  // elements, and bytes, of K that share a scale: one stage
constexpr int kMaxGroups = 512;

struct Params {
  TensorMap lhs;            // e4m3 [rows, K], box [LhsBox, 128]
  TensorMap rhs;            // e4m3 [rhs rows, K], box [block_n, 128]
  TensorMap out;            // [matrices, M, N], box of 1 x OutBox rows x 128 bytes
  const float* lhs_scales;  // [K / 128, M], masked [G, K / 128, M]: columns contiguous
  const float* rhs_scales;  // [G, N / 128, K / 128]; wgrad: [T / 128, N]
  const int* group_sizes;   // [G]; unused when dense
  void* out_data;           // bfloat16 or float32 [out rows, N]
  int num_groups;           // G
  int m;                    // rows of lhs (masked: of one group); wgrad: rows of one group's output
  int n;
  int k;          // contracted elements; wgrad: tokens, all groups
  int band;       // row tiles that are walked together, so that L2 keeps both operands
  int zero_tail;  // grouped: write zeros to the rows past the last group; masked: likewise
};

// Whose groups end anywhere.
constexpr bool IsRagged(const Config& c) { return c.mode == kGrouped || c.mode == kMasked; }

// Whose tiles are dealt by a warp of its own, and posted on a board for the others. Masked products
// are too small for it to pay.
constexpr bool DealsTiles(const Config& c) { return c.mode == kGrouped && c.moves_registers(); }
constexpr int kBoard = 4;     // tiles
constexpr int kMaxSms = 144;  // of the largest Hopper

constexpr int RoundUp(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Columns that surely share a scale of rhs, counted from a tile's first: tiles start at multiples
// of block_n, scales change at multiples of 128.
constexpr int ScaleUnit(const Config& c) {
  int unit = 128;
  while (c.block_n % unit != 0) unit /= 2;
  return unit;
}

// Scales of rhs that a tile's columns have, where blocks of 128 columns share one: one a unit, so
// that no thread must find out in which block a unit lies.
constexpr int ScaleUnits(const Config& c) { return c.block_n / ScaleUnit(c); }

// Floats of one stage's scales of rhs. Weight gradients have one for each column: what a lane needs
// of them lies together, four lanes' shares in different banks.
constexpr int ScaleLane(const Config& c) { return c.block_n / 4 + 4; }
constexpr int RhsScaleSlots(const Config& c) {
  return c.mode == kWgrad ? 4 * ScaleLane(c) : RoundUp(ScaleUnits(c), 4);
}

// Scales of lhs in a stage. A group may begin at any row, copies of 16 bytes at every fourth.
constexpr int LhsScaleSlots(const Config& c) { return c.block_m + (c.mode == kGrouped ? 4 : 0); }

// Arrays have an element even where they are not needed.
constexpr int ArrayBytes(int bytes) { return bytes > 16 ? bytes : 16; }

// Bytes of the buffer in which a CTA receives the other splits' parts of its share of the tile.
constexpr int ReduceBytes(const Config& c) {
  return ArrayBytes(c.block_m * c.block_n * 4 / c.split * (c.split - 1));
}

// Bytes of the buffer in which a math warpgroup leaves its total to the one that shares its rows.
constexpr int JoinBytes(const Config& c) {
  return ArrayBytes(c.k_parts() > 1 ? c.block_m * c.block_n * 4 : 0);
}

// Tiles leave through shared memory by TMA. Large bfloat16 tiles do as a whole, 64 rows x 128 bytes
// a store, so that nobody waits for a store before the next tile is done. Others leave 16 rows x
// 128 bytes of a math warp at a time. The shares of split tiles are too narrow for that to pay, and
// few dense rows are a tile or two a CTA, beside which nothing else would run.
constexpr int kStagingBytes = 16 * 128;
constexpr int OutputBytes(const Config& c) { return c.output == kBfloat16 ? 2 : 4; }
constexpr bool StoresByTma(const Config& c) {
  return c.split == 1 && (c.mode != kDense || c.block_m > 64);
}
constexpr bool StagesWhole(const Config& c) {
  return StoresByTma(c) && c.output == kBfloat16 && c.row_groups() == 2;
}
constexpr int OutBoxes(const Config& c) { return (c.block_n + 63) / 64; }  // side by side
constexpr int OutBox(const Config& c) { return StagesWhole(c) ? 64 : 16; }
// How many pieces a warp has room for; more would cost the large float32 tiles a stage.
constexpr int StagingBuffers(const Config& c) {
  if (StagesWhole(c)) return c.waves() * OutBoxes(c);
  return !StoresByTma(c) ? 0 : c.block_m * c.block_n == 128 * 128 ? 2 : 1;
}
constexpr int StagingBytes(const Config& c) {  // of a warp
  return ArrayBytes(StagingBuffers(c) * kStagingBytes);
}

// Rows of lhs that one load brings.
constexpr int LhsBox(const Config& c) { return IsRagged(c) ? 64 : c.block_m / c.multicast; }

// Bytes of `Groups`: a number a group, and the board.
constexpr int GroupBytes(const Config& c) {
  if (c.mode == kDense) return 16;
  return kMaxGroups * 4 + (DealsTiles(c) ? kBoard * 32 : 16);
}

// Dynamic shared memory of a launch.
constexpr int SharedBytes(const Config& c) {
  const int tiles = (c.block_m + c.block_n) * kBlockK;
  const int scales = (LhsScaleSlots(c) + RhsScaleSlots(c)) * 4;
  const int barriers = 16 * c.stages + 16;
  const int buffers = 4 * c.math * StagingBytes(c) + ReduceBytes(c) + JoinBytes(c);
  return RoundUp(c.stages * (tiles + scales) + buffers + GroupBytes(c) + barriers, 1024);
}

}  // namespace jax_ds::deep_gemm
