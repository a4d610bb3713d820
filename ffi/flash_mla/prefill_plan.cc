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

PrefillConfig Config(const HeadSizes& sizes, PrefillMask mask) {
  constexpr int kBlockN = 128, kStages = 2;
  return {sizes.qk_dim, sizes.rope, sizes.v_dim, mask, kBlockN, kStages};
}

PrefillBackwardConfig BackwardConfig(const HeadSizes& sizes, PrefillMask mask) {
  constexpr int kWalked = 64, kStages = 3;
  return {sizes.qk_dim, sizes.rope, sizes.v_dim, mask, kWalked, kStages};
}

PrefillMask Mask(const PrefillAttributes& a) {
  return a.packed ? kPackedMask : a.causal ? kCausalMask : kFullMask;
}

ErrorOr<HeadSizes> FindHeadSizes(const PrefillAttributes& a) {
  for (const HeadSizes& sizes : kHeadSizes) {
    if (sizes.qk_dim == a.qk_dim && sizes.rope == a.rope && sizes.v_dim == a.v_dim) return sizes;
  }
  return InvalidArgument("head sizes: no prefill kernel for " + std::to_string(a.qk_dim) + " (" +
                         std::to_string(a.rope) + " shared) and " + std::to_string(a.v_dim));
}

ErrorOr<unsigned int> Grid(const char* what, int64_t tiles, int64_t most) {
  if (tiles > std::numeric_limits<int>::max() / 2) {
    return InvalidArgument(std::string("q: too many tiles of ") + what + ", " +
                           std::to_string(tiles));
  }
  return static_cast<unsigned int>(std::min(tiles, most));
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

jit::KernelSpec BackwardSpec(const std::string& file, const std::string& kernel,
                             const PrefillBackwardConfig& c) {
  return Spec(file, kernel, "PrefillBackwardConfig",
              {c.qk_dim, c.rope, c.v_dim, c.mask, c.walked, c.stages},
              PrefillBackwardSharedBytes(c));
}

}  // namespace

ErrorOr<PrefillConfig> PlanPrefill(const PrefillAttributes& attributes) {
  JAX_DS_ASSIGN_OR_RETURN(HeadSizes sizes, FindHeadSizes(attributes));
  return Config(sizes, Mask(attributes));
}

ErrorOr<PrefillBackwardConfig> PlanPrefillBackward(const PrefillAttributes& attributes) {
  JAX_DS_ASSIGN_OR_RETURN(HeadSizes sizes, FindHeadSizes(attributes));
  return BackwardConfig(sizes, Mask(attributes));
}

jit::KernelSpec PrefillSpec(const PrefillConfig& c) {
  return Spec("prefill.cuh", "Prefill", "PrefillConfig",
              {c.qk_dim, c.rope, c.v_dim, c.mask, c.block_n, c.stages}, PrefillSharedBytes(c));
}

jit::KernelSpec DqSpec(const PrefillBackwardConfig& c) {
  return BackwardSpec("prefill_dq.cuh", "PrefillDq", c);
}

jit::KernelSpec DkvSpec(const PrefillBackwardConfig& c) {
  return BackwardSpec("prefill_dkv.cuh", "PrefillDkv", c);
}

jit::KernelSpec PackSpec() {
  jit::KernelSpec spec;
  spec.file = "flash_mla/kernels/prefill_packing.cuh";
  spec.entry = "jax_ds::flash_mla::PrefillPack";
  return spec;
}

ErrorOr<unsigned int> PrefillGrid(int64_t batch, int64_t heads, int64_t rows, bool packed,
                                  int multiprocessors) {
  if (rows > std::numeric_limits<int>::max() / 8) {
    return InvalidArgument("q: too many rows, " + std::to_string(rows));
  }
  const int64_t of_head =
      packed ? packed_max_tiles(static_cast<int>(rows)) : (rows + kHeldRows - 1) / kHeldRows;
  return Grid("128 rows", batch * heads * of_head, multiprocessors);
}

std::vector<jit::KernelSpec> AllPrefillKernels() {
  std::vector<jit::KernelSpec> specs = {PackSpec()};
  for (const HeadSizes& sizes : kHeadSizes) {
    for (PrefillMask mask : {kCausalMask, kFullMask, kPackedMask}) {
      const PrefillBackwardConfig backward = BackwardConfig(sizes, mask);
      specs.push_back(PrefillSpec(Config(sizes, mask)));
      specs.push_back(DqSpec(backward));
      specs.push_back(DkvSpec(backward));
    }
  }
  return specs;
}

}  // namespace jax_ds::flash_mla
