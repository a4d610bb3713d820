// Decode's plans fit the GPU, the kernels and the workspace that Python provides.
#include <algorithm>
#include <cstdint>

#include "flash_mla/decode_plan.h"
#include "tests/native/testing.h"

namespace mla = jax_ds::flash_mla;

namespace {

constexpr int64_t kRows[] = {1, 2, 8, 9, 16, 20, 32, 33, 64, 65, 96, 128, 192, 256, 384, 512, 8192};

void Choice() {
  CHECK_EQ(mla::PlanDecode(1, false)->rows, 8);
  CHECK_EQ(mla::PlanDecode(20, false)->rows, 24);
  CHECK(mla::PlanDecode(32, false)->narrow);
  CHECK(!mla::PlanDecode(33, false)->narrow);
  CHECK(!mla::PlanDecode(64, true)->prefetch);
  CHECK(mla::PlanDecode(65, true)->prefetch);
  CHECK(mla::PlanDecode(0, false).has_error());
  CHECK(mla::PlanDecode(int64_t{1} << 25, false).has_error());
}

// Boxes of whole groups of eight rows, which neither leave a page nor a block.
void Boxes() {
  for (int64_t page : {-16, 0, 8, 48, 192, 256}) CHECK(!mla::IsPageSize(page));
  for (int64_t page : {16, 32, 64, 128}) {
    CHECK(mla::IsPageSize(page));
    const int tokens = mla::BoxTokens(page);
    CHECK(tokens % mla::kGroupRows == 0 && page % tokens == 0);
    CHECK_EQ(mla::kBlock % tokens, 0);
  }
}

void Geometry() {
  for (int64_t rows : kRows) {
    const mla::DecodeConfig config = *mla::PlanDecode(rows, false);
    for (int multiprocessors : {1, 2, 78, 114, 132, 160}) {
      const mla::DecodeLaunch launch = mla::LaunchDecode(config, rows, multiprocessors);
      // Every query row has a tile, and tiles are full but for the last.
      CHECK(int64_t{launch.row_groups} * launch.tile_rows >= rows);
      CHECK(int64_t{launch.row_groups - 1} * launch.tile_rows < rows);
      CHECK(launch.num_groups >= 1 && launch.num_groups <= mla::kMaxCtas);
      CHECK_EQ(launch.grid, static_cast<unsigned>(launch.num_groups * launch.row_groups));
      // One wave, unless the rows of a single request already need more.
      CHECK(launch.num_groups == 1 || static_cast<int>(launch.grid) <= multiprocessors);
      // jax_ds/flash_mla/ffi.py provides two parts for each of 132 CTAs.
      CHECK(launch.workspace_rows <= int64_t{2} * mla::kMaxCtas * config.rows);
      CHECK(launch.num_groups == 1 || launch.workspace_rows > 0);
    }
  }
}

void Combine() {
  const mla::DecodeConfig config = *mla::PlanDecode(16, false);
  const mla::DecodeLaunch launch = mla::LaunchDecode(config, 16, 132);
  const auto combine = [&](int64_t batch, int64_t rows) {
    return mla::LaunchCombine(launch, batch, rows);
  };
  CHECK(combine(1, 16).combine == mla::Combine::kMany);
  CHECK_EQ(combine(1, 16).grid, 64u);  // a CTA for a quarter of a row
  CHECK(combine(16, 16).combine == mla::Combine::kQuarters);
  CHECK_EQ(combine(16, 16).grid, 128u);  // a warp
  CHECK_EQ(combine(11, 3).grid, 17u);
  CHECK(combine(128, 16).combine == mla::Combine::kRows);
  CHECK_EQ(combine(128, 16).grid, 256u);
  CHECK_EQ(combine(512, 16).grid, 264u);  // they take several rows in turn
  const mla::DecodeConfig wide = *mla::PlanDecode(128, false);
  const auto shared = mla::LaunchCombine(mla::LaunchDecode(wide, 128, 132), 1, 128);
  CHECK(shared.combine == mla::Combine::kManyHalf);
}

void EveryChoiceIsListed() {
  const auto kernels = mla::AllDecodeKernels();
  auto listed = [&](const jax_ds::jit::KernelSpec& spec) {
    return std::count(kernels.begin(), kernels.end(), spec) == 1;
  };
  CHECK(listed(mla::AppendSpec()));
  for (bool half : {false, true}) {
    for (int64_t rows : kRows) CHECK(listed(mla::DecodeSpec(*mla::PlanDecode(rows, half))));
    for (mla::Combine combine : mla::kCombines) CHECK(listed(mla::CombineSpec(combine, half)));
  }
}

}  // namespace

int main() {
  Choice();
  Boxes();
  Geometry();
  Combine();
  EveryChoiceIsListed();
  return jax_ds::testing::failures;
}
