#include "quantization/plan.h"

#include <limits>
#include <string>

#include "support/shape.h"

namespace jax_ds::quantization {
namespace {

const std::string kSpace = "jax_ds::quantization::";

std::string Bool(bool value) { return value ? "true" : "false"; }

std::string Name(Input input) {
  return kSpace + "Input::" + (input == Input::kBfloat16 ? "kBfloat16" : "kFloat32");
}

// Grids and rows are 32-bit, and so are offsets within 128 rows of [M, 2K].
constexpr int64_t kMaxColumns = 1 << 22;

Error CheckSize(const char* what, int64_t size, int64_t limit = std::numeric_limits<int>::max()) {
  if (size >= 0 && size <= limit) return Error::Success();
  return InvalidArgument(std::string(what) + ": must be at most " + std::to_string(limit) +
                         ", got " + std::to_string(size));
}

}  // namespace

ErrorOr<Input> ParseInput(std::string_view name) {
  if (name == "bfloat16") return Input::kBfloat16;
  if (name == "float32") return Input::kFloat32;
  return InvalidArgument("input: must be bfloat16 or float32, got " + std::string(name));
}

ErrorOr<Blocks> ParseBlocks(std::string_view name) {
  if (name == "lines") return Blocks::kLines;
  if (name == "square") return Blocks::kSquare;
  if (name == "square_transposed") return Blocks::kSquareTransposed;
  return InvalidArgument("blocks: must be lines, square or square_transposed, got " +
                         std::string(name));
}

jit::KernelSpec RowsPlan::Spec() const {
  jit::KernelSpec spec;
  spec.file = "quantization/kernels/rows.cuh";
  spec.entry = kSpace + "quantize_rows<" + kSpace + "RowsConfig<" + Name(input) + ", " +
               Bool(swiglu) + ", " + Bool(aligned) + ">>";
  return spec;
}

ErrorOr<unsigned int> RowsPlan::Grid(int64_t batch, int64_t m, int64_t k,
                                     RowsParams* params) const {
  const int64_t row_tiles = CeilDiv(m, TileRows());
  const int64_t col_tiles = CeilDiv(Blocks128(k), kTileBlocks);
  const int64_t grid = batch * row_tiles * col_tiles;
  JAX_DS_RETURN_IF_ERROR(CheckSize("rows", m));
  JAX_DS_RETURN_IF_ERROR(CheckSize("columns", k, kMaxColumns));
  JAX_DS_RETURN_IF_ERROR(CheckSize("tiles", grid));
  params->m = static_cast<int>(m);
  params->k = static_cast<int>(k);
  params->kb = static_cast<int>(Blocks128(k));
  params->row_tiles = static_cast<int>(row_tiles);
  params->col_tiles = static_cast<int>(col_tiles);
  return static_cast<unsigned int>(grid);
}

jit::KernelSpec TilesPlan::Spec() const {
  jit::KernelSpec spec;
  const bool lines = blocks == Blocks::kLines;
  const std::string name = lines ? "lines" : "square", config = lines ? "Lines" : "Square";
  spec.file = "quantization/kernels/" + name + ".cuh";
  spec.entry = kSpace + "quantize_" + name + "<" + kSpace + config + "Config<" + Name(input) +
               ", " + Bool(lines ? swiglu : blocks == Blocks::kSquareTransposed) + ", " +
               Bool(aligned) + ">>";
  if (lines) spec.shared_bytes = lines_shared_bytes(input == Input::kBfloat16 ? 2 : 4, swiglu);
  return spec;
}

ErrorOr<unsigned int> TilesPlan::Grid(int64_t batch, int64_t m, int64_t k, int64_t p,
                                      TilesParams* params) const {
  const int64_t row_tiles = Blocks128(p), kb = Blocks128(k);
  const int64_t tiles = batch * row_tiles * kb;
  JAX_DS_RETURN_IF_ERROR(CheckSize("rows", m));
  JAX_DS_RETURN_IF_ERROR(CheckSize("columns", k, kMaxColumns));
  JAX_DS_RETURN_IF_ERROR(CheckSize("tokens", p));
  JAX_DS_RETURN_IF_ERROR(CheckSize("tiles", tiles));
  params->m = static_cast<int>(m);
  params->k = static_cast<int>(k);
  params->kb = static_cast<int>(kb);
  params->p = static_cast<int>(p);
  params->row_tiles = static_cast<int>(row_tiles);
  return static_cast<unsigned int>(tiles);
}

std::vector<jit::KernelSpec> AllKernels() {
  std::vector<jit::KernelSpec> specs;
  for (Input input : {Input::kBfloat16, Input::kFloat32}) {
    for (bool aligned : {true, false}) {
      for (bool swiglu : {false, true}) {
        specs.push_back(RowsPlan{input, swiglu, aligned}.Spec());
        specs.push_back(TilesPlan{input, Blocks::kLines, swiglu, aligned}.Spec());
      }
      specs.push_back(TilesPlan{input, Blocks::kSquare, false, aligned}.Spec());
      specs.push_back(TilesPlan{input, Blocks::kSquareTransposed, false, aligned}.Spec());
    }
  }
  return specs;
}

}  // namespace jax_ds::quantization
