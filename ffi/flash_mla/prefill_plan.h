// Which prefill kernel runs for which attributes, and how it is launched: host arithmetic only.
#pragma once

#include <cstdint>
#include <vector>

#include "flash_mla/kernels/prefill_backward_config.h"
#include "flash_mla/kernels/prefill_config.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::flash_mla {

// The kernel for queries and keys of `qk_dim` columns, the last `rope` of which all heads share,
// and values of `v_dim`. Other head sizes than 192/128, 128/128 and 64/64 have none.
ErrorOr<PrefillConfig> PlanPrefill(int64_t qk_dim, int64_t rope, int64_t v_dim, bool causal);

jit::KernelSpec PrefillSpec(const PrefillConfig& config);

// The two kernels of the gradient, for the same head sizes.
struct PrefillBackwardPlan {
  PrefillBackwardConfig dq, dkv;
};
ErrorOr<PrefillBackwardPlan> PlanPrefillBackward(int64_t qk_dim, int64_t rope, int64_t v_dim,
                                                 bool causal);

jit::KernelSpec DqSpec(const PrefillBackwardConfig& config);
jit::KernelSpec DkvSpec(const PrefillBackwardConfig& config);

// How to launch any of them over tiles of 128 `rows` of each head, on a device of so many
// multiprocessors.
struct PrefillLaunch {
  int section;  // pairs of batch and head whose tiles are walked together
  unsigned int grid;
};
ErrorOr<PrefillLaunch> LaunchPrefill(int64_t batch, int64_t heads, int64_t rows,
                                     int multiprocessors);

std::vector<jit::KernelSpec> AllPrefillKernels();

}  // namespace jax_ds::flash_mla
