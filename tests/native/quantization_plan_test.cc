// The quantizers' grids cover everything once, and every choice is in the list that CI compiles.
#include <algorithm>

#include "quantization/plan.h"
#include "tests/native/testing.h"

namespace q = jax_ds::quantization;
using q::Blocks;
using q::Input;

namespace {

void Rows() {
  const q::RowsPlan plan = q::RowsPlan::For(Input::kBfloat16, false, 576);
  q::RowsParams params = {};
  auto grid = plan.Grid(3, 33, 576, &params);
  CHECK(grid.has_value());
  // Two tiles of 32 rows, two of 512 columns, three matrices.
  CHECK_EQ(*grid, 12u);
  CHECK_EQ(params.kb, 5);
  CHECK_EQ(params.row_tiles, 2);
  CHECK_EQ(params.col_tiles, 2);
  CHECK_EQ(*plan.Grid(1, 0, 576, &params), 0u);
}

void Tiles() {
  const q::TilesPlan plan = q::TilesPlan::For(Input::kFloat32, Blocks::kLines, false, 300, 384);
  CHECK(!plan.aligned);
  for (int64_t k : {1, 128, 300, 7168}) {
    for (int64_t p : {128, 384, 12800}) {
      q::TilesParams params = {};
      auto grid = plan.Grid(2, p, k, p, &params);
      CHECK(grid.has_value());
      CHECK_EQ(params.row_tiles, (p + 127) / 128);
      CHECK_EQ(params.kb, (k + 127) / 128);
      CHECK_EQ(*grid, 2u * params.row_tiles * params.kb);
    }
  }
}

void Limits() {
  q::RowsParams rows = {};
  q::TilesParams tiles = {};
  const q::RowsPlan plan = q::RowsPlan::For(Input::kBfloat16, false, 128);
  CHECK(plan.Grid(1, int64_t{1} << 31, 128, &rows).has_error());
  CHECK(plan.Grid(int64_t{1} << 28, 1024, 128, &rows).has_error());
  const q::TilesPlan square = q::TilesPlan::For(Input::kBfloat16, Blocks::kSquare, false, 128, 128);
  auto wide = square.Grid(1, 128, int64_t{1} << 23, 128, &tiles);
  CHECK(wide.has_error());
  CHECK(wide.error().message().find("columns: must be at most") != std::string::npos);
}

void EveryChoiceIsListed() {
  const auto kernels = q::AllKernels();
  auto listed = [&](const jax_ds::jit::KernelSpec& spec) {
    return std::count(kernels.begin(), kernels.end(), spec) == 1;
  };
  for (Input input : {Input::kBfloat16, Input::kFloat32}) {
    for (int64_t k : {1, 16, 130, 7168}) {
      for (bool swiglu : {false, true}) {
        CHECK(listed(q::RowsPlan::For(input, swiglu, k).Spec()));
        CHECK(listed(q::TilesPlan::For(input, Blocks::kLines, swiglu, k, 128).Spec()));
      }
      for (int64_t n : {1, 64, 4096}) {
        CHECK(listed(q::TilesPlan::For(input, Blocks::kSquare, false, k, n).Spec()));
        CHECK(listed(q::TilesPlan::For(input, Blocks::kSquareTransposed, false, k, n).Spec()));
      }
    }
  }
}

void Names() {
  CHECK(q::ParseInput("bfloat16").has_value() && *q::ParseInput("float32") == Input::kFloat32);
  CHECK_EQ(q::ParseInput("float16").error().message(),
           "jax_ds: input: must be bfloat16 or float32, got float16");
  CHECK(*q::ParseBlocks("square_transposed") == Blocks::kSquareTransposed);
  CHECK(q::ParseBlocks("round").has_error());
}

}  // namespace

int main() {
  Rows();
  Tiles();
  Limits();
  EveryChoiceIsListed();
  Names();
  return jax_ds::testing::failures;
}
