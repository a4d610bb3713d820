#include "jit/launch.h"

#include "support/driver.h"

namespace jax_ds::jit {
namespace {

// A launch configuration and the attributes it points to.
struct Configured {
  cuda::LaunchAttribute attributes[2];
  cuda::LaunchConfig config;

  Configured(const Kernel& kernel, cuda::Stream stream, const LaunchShape& shape)
      : config{shape.grid.x,
               shape.grid.y,
               shape.grid.z,
               shape.block.x,
               shape.block.y,
               shape.block.z,
               static_cast<unsigned int>(kernel.spec().shared_bytes),
               stream,
               attributes,
               0} {
    if (shape.cluster.x * shape.cluster.y * shape.cluster.z > 1) {
      cuda::LaunchAttribute& a = attributes[config.num_attributes++];
      a.id = cuda::kClusterDimension;
      a.value.cluster = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
    }
    if (shape.overlap_previous) {
      cuda::LaunchAttribute& a = attributes[config.num_attributes++];
      a.id = cuda::kProgrammaticStreamSerialization;
      a.value.flag = 1;
    }
  }
  Configured(const Configured&) = delete;
};

}  // namespace

Error LaunchRaw(const Kernel& kernel, int ordinal, cuda::Stream stream, const LaunchShape& shape,
                void** arguments) {
  // An empty grid is no launch, and CUDA refuses it.
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return Error::Success();
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(cuda::Function function, kernel.function(ordinal));
  Configured launch(kernel, stream, shape);
  return driver->Check(driver->cuLaunchKernelEx(&launch.config, function, arguments, nullptr),
                       kernel.spec().entry.c_str());
}

ErrorOr<int> MaxActiveClusters(const Kernel& kernel, int ordinal, const LaunchShape& shape) {
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(cuda::Function function, kernel.function(ordinal));
  Configured launch(kernel, nullptr, shape);
  int clusters = 0;
  // The driver's count of clusters refuses a launch without them.
  if (launch.config.num_attributes == 0) {
    JAX_DS_ASSIGN_OR_RETURN(int sms, driver->Multiprocessors(ordinal));
    JAX_DS_RETURN_IF_ERROR(driver->WithContext(ordinal, [&] {
      const int threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
      return driver->Check(driver->cuOccupancyMaxActiveBlocksPerMultiprocessor(
                               &clusters, function, threads, kernel.spec().shared_bytes),
                           "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    }));
    return clusters * sms;
  }
  JAX_DS_RETURN_IF_ERROR(driver->WithContext(ordinal, [&] {
    return driver->Check(driver->cuOccupancyMaxActiveClusters(&clusters, function, &launch.config),
                         "cuOccupancyMaxActiveClusters");
  }));
  return clusters;
}

}  // namespace jax_ds::jit
