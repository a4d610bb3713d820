// Prefill's plans name kernels that fit an SM, and every tile is dealt out exactly once.
#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

#include "flash_mla/prefill_plan.h"
#include "tests/native/testing.h"

namespace mla = jax_ds::flash_mla;

namespace {

constexpr int kSharedLimit = 232448;  // bytes a block can have on Hopper

void HeadSizes() {
  CHECK_EQ(mla::PlanPrefill(192, 64, 128, true)->rope, 64);
  CHECK_EQ(mla::PlanPrefill(128, 0, 128, false)->causal, 0);
  CHECK(mla::PlanPrefill(192, 0, 192, true).has_error());
  CHECK(mla::PlanPrefillBackward(128, 64, 128, true).has_error());
  // dk and dv of 192/128 fill the registers: fewer queries at a time.
  CHECK_EQ(mla::PlanPrefillBackward(192, 64, 128, true)->dkv.walked, 48);
  CHECK_EQ(mla::PlanPrefillBackward(64, 0, 64, true)->dkv.walked, 64);
}

void EveryKernelFits() {
  std::set<std::string> entries;
  for (const jax_ds::jit::KernelSpec& spec : mla::AllPrefillKernels()) {
    CHECK(spec.shared_bytes > 0 && spec.shared_bytes <= kSharedLimit);
    entries.insert(spec.entry);
  }
  CHECK_EQ(entries.size(), mla::AllPrefillKernels().size());
  CHECK(entries.count(mla::PrefillSpec(*mla::PlanPrefill(192, 0, 128, true)).entry) == 1);
}

void Launches() {
  // Few tiles: the longest of all heads first, in one section.
  CHECK_EQ(mla::LaunchPrefill(2, 4, 300, 132)->section, 8);
  CHECK_EQ(mla::LaunchPrefill(2, 4, 300, 132)->grid, 24u);
  // Many: head after head.
  CHECK_EQ(mla::LaunchPrefill(2, 128, 4096, 132)->section, 1);
  CHECK_EQ(mla::LaunchPrefill(2, 128, 4096, 132)->grid, 132u);
  CHECK(mla::LaunchPrefill(1 << 15, 128, 1 << 16, 132).has_error());
}

// The order that head_tile in kernels/prefill_common.cuh walks: no tile twice, none left out.
void Coverage() {
  for (int heads : {1, 3, 8, 96}) {
    for (int rows : {1, 128, 129, 1500}) {
      const mla::PrefillLaunch launch = *mla::LaunchPrefill(1, heads, rows, 132);
      const int row_tiles = (rows + 127) / 128, grid = static_cast<int>(launch.grid);
      std::vector<int> seen(heads * row_tiles);
      for (int cta = 0; cta < grid; ++cta) {
        for (int round = 0;; ++round) {
          const int index = round * grid + (round % 2 == 0 ? cta : grid - 1 - cta);
          if (index >= heads * row_tiles) break;
          const int first = index / (launch.section * row_tiles) * launch.section;
          const int inside = index - first * row_tiles;
          const int width = std::min(launch.section, heads - first);
          ++seen[(first + inside % width) * row_tiles + inside / width];
        }
      }
      CHECK(std::count(seen.begin(), seen.end(), 1) == static_cast<int64_t>(seen.size()));
    }
  }
}

}  // namespace

int main() {
  HeadSizes();
  EveryKernelFits();
  Launches();
  Coverage();
  return jax_ds::testing::failures;
}
