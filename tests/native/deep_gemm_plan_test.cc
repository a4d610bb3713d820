// Every configuration the plan can choose is launchable, and the choices follow from the sizes.
#include <set>
#include <string>

#include "deep_gemm/plan.h"
#include "tests/native/testing.h"

using namespace jax_ds::deep_gemm;  // NOLINT: one file

namespace {

constexpr int kSms = 132;

Plan Chosen(const Problem& problem, int num_sms = kSms) {
  auto plan = Choose(problem, num_sms);
  CHECK(plan.has_value());
  return *plan;
}

std::set<std::string> Entries() {
  std::set<std::string> entries;
  for (const auto& spec : AllKernels()) entries.insert(spec.entry);
  return entries;
}

// What the kernel asserts, and what a launch needs.
void Launchable(const Plan& plan, const std::set<std::string>& entries) {
  const Config& c = plan.config;
  CHECK(entries.count(plan.Spec().entry) == 1);
  CHECK_EQ(plan.Spec().shared_bytes, SharedBytes(c));
  CHECK(SharedBytes(c) <= (c.per_sm == 1 ? 232448 : 115712));
  CHECK(c.stages > c.depth && c.stages <= 16);
  CHECK(c.block_m % (64 * c.row_groups()) == 0 && c.waves() <= 2);
  CHECK(c.k_parts() == 1 || c.stages % (2 * c.depth) == 0);
  CHECK(c.block_m / c.multicast % 8 == 0);
  CHECK(c.cluster() <= 8 && c.threads() <= 512);
  CHECK(ScaleUnits(c) <= 16);
  CHECK(plan.Band() >= 1 && plan.estimate.total_us() > 0);
}

void EveryChoice() {
  const auto entries = Entries();
  CHECK_EQ(entries.size(), AllKernels().size());
  for (Mode mode : {kDense, kGrouped, kMasked, kWgrad}) {
    for (Output output : {kBfloat16, kFloat32, kFloat32Add}) {
      if (mode != kWgrad && output == kFloat32Add) continue;
      for (int64_t m : {1, 63, 64, 65, 128, 129, 500, 4097, 100000}) {
        for (int64_t n : {8, 136, 2112, 4096, 32768}) {
          for (int64_t k : {16, 144, 1536, 16384}) {
            for (int64_t groups : {1, 7, 512}) {
              const Problem problem = {mode, output, m, n, k, mode == kDense ? 1 : groups};
              const Plan plan = Chosen(problem);
              Launchable(plan, entries);
              Launchable(Chosen(problem, 78), entries);
              CHECK(plan.Clusters(problem) >= 1);
            }
          }
        }
      }
    }
  }
}

// Few rows leave SMs idle unless K is divided; many rows never divide it.
void Rules() {
  CHECK(Chosen({kDense, kBfloat16, 64, 2112, 7168, 1}).config.split > 1);
  CHECK_EQ(Chosen({kDense, kBfloat16, 8192, 8192, 8192, 1}).config.split, 1);
  CHECK(Chosen({kDense, kBfloat16, 8192, 8192, 8192, 1}).config.block_m >= 128);
  CHECK_EQ(Chosen({kDense, kBfloat16, 1, 512, 7168, 1}).config.block_m, 64);
  CHECK_EQ(Chosen({kGrouped, kBfloat16, 1024, 4096, 7168, 256}).config.block_m, 64);
  CHECK_EQ(Chosen({kWgrad, kFloat32Add, 4096, 7168, 32768, 4}).config.block_n, 160);
  CHECK_EQ(Chosen({kWgrad, kFloat32, 7168, 4096, 4096, 1}).config.block_m, 256);
  CHECK_EQ(Chosen({kWgrad, kFloat32, 128, 32768, 4096, 1}).config.block_m, 128);
  const auto text = Explain({kDense, kBfloat16, 64, 2112, 7168, 1}, kSms);
  CHECK(text.has_value() && text->find("64x64") != std::string::npos);
}

// A name finds its candidate, and no two candidates of a mode share one.
void Names() {
  for (Mode mode : {kDense, kGrouped, kMasked, kWgrad}) {
    const Problem problem = {mode, mode == kWgrad ? kFloat32 : kBfloat16, 300, 512, 1024, 2};
    std::set<std::string> names;
    const auto ranked = Rank(problem, kSms);
    CHECK(ranked.has_value());
    for (const Plan& plan : *ranked) {
      names.insert(plan.Name());
      const auto named = Choose(problem, kSms, plan.Name());
      CHECK(named.has_value() && named->Spec() == plan.Spec());
    }
    CHECK_EQ(names.size(), ranked->size());
    CHECK(Choose(problem, kSms, "3x5").has_error());
  }
}

// Every row tile of every group, however the rows divide.
void Bounds() {
  const Problem grouped = {kGrouped, kBfloat16, 1000, 192, 256, 10};
  const Plan plan = Chosen(grouped);
  const int64_t columns = 192 / plan.config.block_n / plan.config.multicast;
  CHECK(plan.Clusters(grouped) >= (1000 / plan.config.block_m + 9) * columns);
}

void Errors() {
  CHECK(Choose({kDense, kBfloat16, 0, 8, 16, 1}, kSms).has_error());
  CHECK(Choose({kDense, kBfloat16, int64_t{1} << 31, 8, 16, 1}, kSms).has_error());
  CHECK(Choose({kGrouped, kBfloat16, 8, 8, 16, 513}, kSms).has_error());
  CHECK(ParseMode("sparse").has_error());
  CHECK(ParseOutput("bfloat16", true).has_error());
  CHECK(ParseOutput("float16", false).has_error());
}

}  // namespace

int main() {
  EveryChoice();
  Rules();
  Names();
  Bounds();
  Errors();
  return jax_ds::testing::failures;
}
