// Prefill's plans name kernels that fit an SM, and grids that fit the tiles.
#include <cstdint>
#include <set>
#include <string>

#include "flash_mla/prefill_plan.h"
#include "tests/native/testing.h"

namespace mla = jax_ds::flash_mla;

namespace {

constexpr int kSharedLimit = 232448;  // bytes a block can have on Hopper

mla::PrefillAttributes Attributes(int64_t qk_dim, int64_t rope, int64_t v_dim, bool causal = true,
                                  bool packed = false) {
  return {qk_dim, rope, v_dim, causal, packed};
}

void HeadSizes() {
  CHECK_EQ(mla::PlanPrefill(Attributes(192, 64, 128))->rope, 64);
  CHECK_EQ(mla::PlanPrefill(Attributes(128, 0, 128, false))->mask, mla::kFullMask);
  CHECK_EQ(mla::PlanPrefill(Attributes(128, 0, 128, true))->mask, mla::kCausalMask);
  // What a packed batch's queries see is a list, causal or not: one kernel.
  CHECK_EQ(mla::PlanPrefill(Attributes(128, 0, 128, true, true))->mask, mla::kPackedMask);
  CHECK_EQ(mla::PlanPrefill(Attributes(128, 0, 128, false, true))->mask, mla::kPackedMask);
  CHECK(mla::PlanPrefill(Attributes(192, 0, 192)).has_error());
  CHECK(mla::PlanPrefillBackward(Attributes(128, 64, 128)).has_error());
  CHECK_EQ(mla::PlanPrefillBackward(Attributes(64, 0, 64, true, true))->mask, mla::kPackedMask);
}

void EveryKernelFits() {
  std::set<std::string> entries;
  for (const jax_ds::jit::KernelSpec& spec : mla::AllPrefillKernels()) {
    CHECK(spec.shared_bytes >= 0 && spec.shared_bytes <= kSharedLimit);
    entries.insert(spec.entry);
  }
  CHECK_EQ(entries.size(), mla::AllPrefillKernels().size());
  CHECK(entries.count(mla::PrefillSpec(*mla::PlanPrefill(Attributes(192, 0, 128))).entry) == 1);
}

void Launches() {
  CHECK_EQ(*mla::PrefillGrid(2, 4, 300, false, 132), 24u);
  CHECK_EQ(*mla::PrefillGrid(2, 128, 4096, false, 132), 132u);
  CHECK_EQ(*mla::PrefillGrid(2, 128, 0, false, 132), 0u);  // no launch: nothing can be dealt out
  CHECK_EQ(*mla::PrefillGrid(0, 128, 300, false, 132), 0u);
  // The tiles of a packed batch are known on the device only: as many CTAs as there may be tiles.
  CHECK_EQ(*mla::PrefillGrid(1, 1, 128, true, 132), 8u);
  CHECK(mla::PrefillGrid(1 << 15, 128, 1 << 16, false, 132).has_error());
}

}  // namespace

int main() {
  HeadSizes();
  EveryKernelFits();
  Launches();
  return jax_ds::testing::failures;
}
