// Launching a kernel from a handler's Execute stage.
#pragma once

#include "jit/kernel.h"
#include "support/cuda.h"
#include "support/status.h"

namespace jax_ds::jit {

struct Dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

struct LaunchShape {
  Dim3 grid;
  Dim3 block;
  Dim3 cluster;
  // Programmatic dependent launch: this kernel may start before its predecessor in the stream has
  // ended, and must execute griddepcontrol.wait before it touches memory that one writes.
  bool overlap_previous = false;
};

// Launches with the dynamic shared memory of the kernel's specification. `arguments` point to the
// kernel's parameters in order. No lock, no allocation, no synchronisation; may be captured.
Error LaunchRaw(const Kernel& kernel, int ordinal, cuda::Stream stream, const LaunchShape& shape,
                void** arguments);

// Launches with `parameters` passed by value; their types must be exactly the kernel's.
template <typename... Parameters>
Error Launch(const Kernel& kernel, int ordinal, cuda::Stream stream, const LaunchShape& shape,
             const Parameters&... parameters) {
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  return LaunchRaw(kernel, ordinal, stream, shape, arguments);
}

// How many clusters of `shape` can be on the device at once (blocks, where the cluster is 1).
ErrorOr<int> MaxActiveClusters(const Kernel& kernel, int ordinal, const LaunchShape& shape);

}  // namespace jax_ds::jit
