// A compiled kernel, and its function on each local device.
#pragma once

#include <string>

#include "jit/spec.h"
#include "support/cuda.h"
#include "support/per_device.h"
#include "support/status.h"

namespace jax_ds::jit {

// Made by Instantiate, shared by all local devices. Initialize calls Load, Execute calls Launch
// (launch.h). Loading and reading take no lock. Machine code stays loaded for the life of the
// process: XLA may still replay a graph that holds the function after the handler's state is gone.
class Kernel {
 public:
  Kernel(KernelSpec spec, Binary binary)
      : spec_(std::move(spec)), binary_(std::move(binary)), resources_(ParseLog(binary_.log)) {}

  // Loads the code into `ordinal`'s primary context and sets its shared-memory limit; idempotent.
  Error Load(int ordinal) const;

  // The loaded function, or loads it now.
  ErrorOr<cuda::Function> function(int ordinal) const;

  const KernelSpec& spec() const { return spec_; }
  const Binary& binary() const { return binary_; }
  const Resources& resources() const { return resources_; }

 private:
  ErrorOr<cuda::Function> LoadFunction() const;

  KernelSpec spec_;
  Binary binary_;
  Resources resources_;
  mutable PerDevice<cuda::Function> functions_ = {};
};

// The Initialize stage of a state that has one kernel.
template <typename State>
Error LoadKernel(State* state, int32_t ordinal) {
  return state->kernel->Load(ordinal);
}

}  // namespace jax_ds::jit
