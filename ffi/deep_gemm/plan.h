// Which GEMM kernel runs for which sizes, and why: host arithmetic only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "deep_gemm/kernels/config.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::deep_gemm {

// One product. Sizes as in Params.
struct Problem {
  Mode mode;
  Output output;
  int64_t m, n, k, groups;
  int64_t expected_rows = 0;  // masked: of a group, as far as the caller knows; 0: a quarter of m
};

// What a configuration costs on a problem, by the model in plan.cc.
struct Estimate {
  double tensor_us;    // multiplying and promoting, in whole waves of tiles
  double l2_us;        // operand tiles from L2 to the multiprocessors
  double dram_us;      // every operand and result once
  double overhead_us;  // launch, first loads, last stores, adding splits
  double total_us() const;
};

struct Plan {
  Config config;
  Estimate estimate;

  jit::KernelSpec Spec() const;
  // What tells it from the other candidates of its mode: "256x128,math=2,lhs=2".
  std::string Name() const;
  // Row tiles that are walked together: L2 should hold their lhs and the rhs they meet.
  int Band() const;
  // An upper bound on the clusters that have work.
  int64_t Clusters(const Problem& problem) const;
};

ErrorOr<Mode> ParseMode(std::string_view name);
ErrorOr<Output> ParseOutput(std::string_view name, bool accumulate);

// The configuration of least estimated time on a GPU of `num_sms` multiprocessors, or the candidate
// of this name.
ErrorOr<Plan> Choose(const Problem& problem, int num_sms, std::string_view name = "");

// All candidates, best first by the model.
ErrorOr<std::vector<Plan>> Rank(const Problem& problem, int num_sms);

// A table with a line for each of them: what `deep_gemm.explain` prints.
ErrorOr<std::string> Explain(const Problem& problem, int num_sms);

// Every kernel that Choose can name.
std::vector<jit::KernelSpec> AllKernels();

}  // namespace jax_ds::deep_gemm
