// Which quantizer runs for which attributes, and its grid: host arithmetic only.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "jit/spec.h"
#include "quantization/kernels/params.h"
#include "support/status.h"

namespace jax_ds::quantization {

enum class Input { kBfloat16, kFloat32 };

// The Input named by the attribute `input`: "bfloat16" or "float32".
ErrorOr<Input> ParseInput(std::string_view name);

constexpr int kBlock = 128;

// Along rows only: rows.cuh. Mirrors RowsConfig.
struct RowsPlan {
  Input input;
  bool swiglu;
  bool aligned;  // K is a multiple of 16

  static RowsPlan For(Input input, bool swiglu, int64_t k) { return {input, swiglu, k % 16 == 0}; }
  jit::KernelSpec Spec() const;
  int TileRows() const { return swiglu ? 8 : input == Input::kFloat32 ? 16 : 32; }
  static constexpr int kTileBlocks = 4;
  static constexpr int kThreads = 256;
  // Fills the sizes of `params`; returns the number of CTAs to launch for x: [batch, M, K].
  ErrorOr<unsigned int> Grid(int64_t batch, int64_t m, int64_t k, RowsParams* params) const;
};

enum class Blocks { kLines, kSquare, kSquareTransposed };

// The Blocks named by the attribute `blocks`: "lines", "square" or "square_transposed".
ErrorOr<Blocks> ParseBlocks(std::string_view name);

// Tiles of 128x128: lines.cuh or square.cuh. Mirrors LinesConfig and SquareConfig.
struct TilesPlan {
  Input input;
  Blocks blocks;
  bool swiglu;
  bool aligned;  // K and the tokens P of the columns are multiples of 16

  static TilesPlan For(Input input, Blocks blocks, bool swiglu, int64_t k, int64_t p) {
    return {input, blocks, swiglu, k % 16 == 0 && p % 16 == 0};
  }
  jit::KernelSpec Spec() const;
  static constexpr int kThreads = 256;
  // Fills the sizes of `params`; returns the number of CTAs to launch for x: [batch, M, K] and
  // columns of P tokens.
  ErrorOr<unsigned int> Grid(int64_t batch, int64_t m, int64_t k, int64_t p,
                             TilesParams* params) const;
};

// Every kernel the plans above can name.
std::vector<jit::KernelSpec> AllKernels();

}  // namespace jax_ds::quantization
