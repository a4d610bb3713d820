// Which prefill kernel runs for which attributes, and how it is launched: host arithmetic only.
#pragma once

#include <cstdint>
#include <vector>

#include "flash_mla/kernels/prefill_backward_config.h"
#include "flash_mla/kernels/prefill_config.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::flash_mla {

// What a call's attributes say. Other head sizes than 192/128, 128/128 and 64/64 have no kernel.
struct PrefillAttributes {
  int64_t qk_dim, rope, v_dim;  // columns of queries, of the part that all keys share, of values
  bool causal, packed;
};

ErrorOr<PrefillConfig> PlanPrefill(const PrefillAttributes& attributes);

// Of both kernels of the gradient.
ErrorOr<PrefillBackwardConfig> PlanPrefillBackward(const PrefillAttributes& attributes);

jit::KernelSpec PrefillSpec(const PrefillConfig& config);
jit::KernelSpec DqSpec(const PrefillBackwardConfig& config);
jit::KernelSpec DkvSpec(const PrefillBackwardConfig& config);
jit::KernelSpec PackSpec();

// CTAs that take tiles of 128 `rows` of each head, on a device of so many multiprocessors; of a
// packed batch, whose tiles only the device knows, as many as there can be.
ErrorOr<unsigned int> PrefillGrid(int64_t batch, int64_t heads, int64_t rows, bool packed,
                                  int multiprocessors);

std::vector<jit::KernelSpec> AllPrefillKernels();

}  // namespace jax_ds::flash_mla
