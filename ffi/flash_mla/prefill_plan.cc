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

PrefillBackwardPlan BackwardPlan(const HeadSizes& sizes, bool causal) {
  // dk and dv of 192/128 leave registers for scores of 48 queries only.
  const int walked = sizes.qk_dim == 192 ? 48 : 64, stages = sizes.qk_dim == 192 ? 4 : 3;
  return {{sizes.qk_dim, sizes.rope, sizes.v_dim, causal, 64, 3},
          {sizes.qk_dim, sizes.rope, sizes.v_dim, causal, walked, stages}};
}

ErrorOr<HeadSizes> FindHeadSizes(int64_t qk_dim, int64_t rope, int64_t v_dim) {
  for (const HeadSizes& sizes : kHeadSizes) {
    if (sizes.qk_dim == qk_dim && sizes.rope == rope && sizes.v_dim == v_dim) return sizes;
  }
  return InvalidArgument("head sizes: no prefill kernel for " + std::to_string(qk_dim) + " (" +
                         std::to_string(rope) + " shared) and " + std::to_string(v_dim));
}

jit::KernelSpec Spec(const std::string& file, const std::string& kernel, const std::string& config,
                     std::initializer_list<int> fields, int shared_bytes) {
  const std::string space = "jax_ds::flash_mla::";
  std::string values;
  for (int field : fields) values += (values.empty() ? "" : ", ") + std::to_string(field);
  jit::KernelSpec spec;
  spec.file = "flash_mla/kernels/" + file;
  spec.entry = space + kernel + "<" + space + config + "{" + values + "}>";
  spec.shared_bytes = shared_bytes;
  return spec;
}

jit::KernelSpec BackwardSpec(const std::string& kernel, const PrefillBackwardConfig& c) {
  return Spec("prefill_backward.cuh", kernel, "PrefillBackwardConfig",
              {c.qk_dim, c.rope, c.v_dim, c.causal, c.walked, c.stages},
              PrefillBackwardSharedBytes(c));
}

}  // namespace

ErrorOr<PrefillConfig> PlanPrefill(int64_t qk_dim, int64_t rope, int64_t v_dim, bool causal) {
  JAX_DS_ASSIGN_OR_RETURN(HeadSizes sizes, FindHeadSizes(qk_dim, rope, v_dim));
  return Config(sizes, causal);
}

ErrorOr<PrefillBackwardPlan> PlanPrefillBackward(int64_t qk_dim, int64_t rope, int64_t v_dim,
                                                 bool causal) {
  JAX_DS_ASSIGN_OR_RETURN(HeadSizes sizes, FindHeadSizes(qk_dim, rope, v_dim));
  return BackwardPlan(sizes, causal);
}

jit::KernelSpec PrefillSpec(const PrefillConfig& c) {
  return Spec("prefill.cuh", "Prefill", "PrefillConfig",
              {c.qk_dim, c.rope, c.v_dim, c.causal, c.block_n, c.stages, c.ordered},
              PrefillSharedBytes(c));
}

jit::KernelSpec DqSpec(const PrefillBackwardConfig& c) { return BackwardSpec("PrefillDq", c); }

jit::KernelSpec DkvSpec(const PrefillBackwardConfig& c) { return BackwardSpec("PrefillDkv", c); }

ErrorOr<PrefillLaunch> LaunchPrefill(int64_t batch, int64_t heads, int64_t rows,
                                     int multiprocessors) {
  const int64_t row_tiles = (rows + kPrefillBlockM - 1) / kPrefillBlockM;
  const int64_t tiles = batch * heads * row_tiles;
  if (tiles > std::numeric_limits<int>::max() / 2) {
    return InvalidArgument("q: too many tiles of 128 rows, " + std::to_string(tiles));
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
    for (bool causal : {true, false}) {
      specs.push_back(PrefillSpec(Config(sizes, causal)));
      specs.push_back(DqSpec(BackwardPlan(sizes, causal).dq));
      specs.push_back(DkvSpec(BackwardPlan(sizes, causal).dkv));
    }
  }
  return specs;
}

}  // namespace jax_ds::flash_mla
