#include "flash_mla/prefill_plan.h"

#include <algorithm>
#include <limits>
#include <string>

namespace jax_ds::flash_mla {
namespace {

struct HeadSizes {
  int qk_dim, rope, v_dim;
};

constexpr HeadSizes kHeadSizes[] = {{192, 64, 128}, {192, 0, 128}, {128, 0, 128}, {64, 0, 64}};

PrefillConfig Config(const HeadSizes& sizes, bool causal) {
  constexpr int kBlockN = 128, kStages = 2, kOrdered = 1;
  return {sizes.qk_dim, sizes.rope, sizes.v_dim, causal, kBlockN, kStages, kOrdered};
}

}  // namespace

ErrorOr<PrefillConfig> PlanPrefill(int64_t qk_dim, int64_t rope, int64_t v_dim, bool causal) {
  for (const HeadSizes& sizes : kHeadSizes) {
    if (sizes.qk_dim == qk_dim && sizes.rope == rope && sizes.v_dim == v_dim) {
      return Config(sizes, causal);
    }
  }
  return InvalidArgument("head sizes: no prefill kernel for " + std::to_string(qk_dim) + " (" +
                         std::to_string(rope) + " shared) and " + std::to_string(v_dim));
}

jit::KernelSpec PrefillSpec(const PrefillConfig& c) {
  const std::string space = "jax_ds::flash_mla::";
  std::string config;
  for (int field : {c.qk_dim, c.rope, c.v_dim, c.causal, c.block_n, c.stages, c.ordered}) {
    config += (config.empty() ? "" : ", ") + std::to_string(field);
  }
  jit::KernelSpec spec;
  spec.file = "flash_mla/kernels/prefill.cuh";
  spec.entry = space + "Prefill<" + space + "PrefillConfig{" + config + "}>";
  spec.shared_bytes = PrefillSharedBytes(c);
  return spec;
}

ErrorOr<PrefillLaunch> LaunchPrefill(int64_t batch, int64_t heads, int64_t queries,
                                     int multiprocessors) {
  const int64_t row_tiles = (queries + kPrefillBlockM - 1) / kPrefillBlockM;
  const int64_t tiles = batch * heads * row_tiles;
  if (tiles > std::numeric_limits<int>::max() / 2) {
    return InvalidArgument("q: too many tiles of 128 queries, " + std::to_string(tiles));
  }
  // With many tiles a CTA, head after head reads keys from memory once. With few, dealing the
  // longest of all first is what balances the CTAs.
  const bool many = tiles >= int64_t{16} * multiprocessors;
  return PrefillLaunch{many ? 1 : static_cast<int>(batch * heads),
                       static_cast<unsigned int>(std::min<int64_t>(tiles, multiprocessors))};
}

std::vector<jit::KernelSpec> AllPrefillKernels() {
  std::vector<jit::KernelSpec> specs;
  for (const HeadSizes& sizes : kHeadSizes) {
    for (bool causal : {true, false}) specs.push_back(PrefillSpec(Config(sizes, causal)));
  }
  return specs;
}

}  // namespace jax_ds::flash_mla
