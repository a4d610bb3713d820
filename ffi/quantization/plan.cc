#include "quantization/plan.h"

#include <limits>
#include <string>

namespace jax_ds::quantization {
namespace {

constexpr char kSpace[] = "jax_ds::quantization::";

std::string Bool(bool value) { return value ? "true" : "false"; }

std::string Name(Input input) {
  return std::string(kSpace) + "Input::" + (input == Input::kBfloat16 ? "kBfloat16" : "kFloat32");
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grids and dimensions are 32-bit.
Error CheckSize(const char* what, int64_t size) {
  if (size >= 0 && size <= std::numeric_limits<int>::max()) return Error::Success();
  return InvalidArgument(std::string(what) + ": must be below 2**31, got " + std::to_string(size));
}

}  // namespace

ErrorOr<Input> ParseInput(std::string_view name) {
  if (name == "bfloat16") return Input::kBfloat16;
  if (name == "float32") return Input::kFloat32;
  return InvalidArgument("input: must be bfloat16 or float32, got " + std::string(name));
}

jit::KernelSpec RowsPlan::Spec() const {
  const std::string space = kSpace;
  jit::KernelSpec spec;
  spec.file = "quantization/kernels/rows.cuh";
  spec.entry = space + "quantize_rows<" + space + "RowsConfig<" + Name(input) + ", " +
               Bool(swiglu) + ", " + Bool(ue8m0) + ", " + Bool(aligned) + ">>";
  return spec;
}

ErrorOr<unsigned int> RowsPlan::Grid(int64_t batch, int64_t m, int64_t k,
                                     RowsParams* params) const {
  const int64_t row_tiles = CeilDiv(m, TileRows());
  const int64_t col_tiles = CeilDiv(CeilDiv(k, kBlock), kTileBlocks);
  const int64_t grid = batch * row_tiles * col_tiles;
  JAX_DS_RETURN_IF_ERROR(CheckSize("rows", m));
  JAX_DS_RETURN_IF_ERROR(CheckSize("columns", k));
  JAX_DS_RETURN_IF_ERROR(CheckSize("tiles", grid));
  params->m = static_cast<int>(m);
  params->k = static_cast<int>(k);
  params->kb = static_cast<int>(CeilDiv(k, kBlock));
  params->row_tiles = static_cast<int>(row_tiles);
  params->col_tiles = static_cast<int>(col_tiles);
  return static_cast<unsigned int>(grid);
}

std::vector<jit::KernelSpec> AllKernels() {
  std::vector<jit::KernelSpec> specs;
  for (Input input : {Input::kBfloat16, Input::kFloat32}) {
    for (bool swiglu : {false, true}) {
      for (bool ue8m0 : {false, true}) {
        for (bool aligned : {true, false}) {
          specs.push_back(RowsPlan{input, swiglu, ue8m0, aligned}.Spec());
        }
      }
    }
  }
  return specs;
}

}  // namespace jax_ds::quantization
