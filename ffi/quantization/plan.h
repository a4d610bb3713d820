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
  bool ue8m0;
  bool aligned;  // K is a multiple of 16

  static RowsPlan For(Input input, bool swiglu, bool ue8m0, int64_t k) {
    return {input, swiglu, ue8m0, k % 16 == 0};
  }
  jit::KernelSpec Spec() const;
  int TileRows() const { return input == Input::kFloat32 || swiglu ? 16 : 32; }
  static constexpr int kTileBlocks = 4;
  static constexpr int kThreads = 256;
  // Fills the sizes of `params`; returns the number of blocks to launch for B matrices [M, K].
  ErrorOr<unsigned int> Grid(int64_t batch, int64_t m, int64_t k, RowsParams* params) const;
};

// Every kernel the plans above can name.
std::vector<jit::KernelSpec> AllKernels();

}  // namespace jax_ds::quantization
