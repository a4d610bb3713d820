#include "support/driver.h"

#include "support/library.h"
#include "support/per_device.h"

namespace jax_ds {

ErrorOr<Driver> Driver::Open() {
  JAX_DS_ASSIGN_OR_RETURN(
      SharedLibrary library,
      SharedLibrary::Open({"libcuda.so.1"}, "the NVIDIA driver (libcuda.so.1)",
                          "run on a machine with an NVIDIA GPU and its driver, 580 or newer"));
  Driver d;
#define JAX_DS_FIND(name, symbol) JAX_DS_RETURN_IF_ERROR(library.Find(symbol, &d.name))
  JAX_DS_FIND(cuInit, "cuInit");
  JAX_DS_FIND(cuDriverGetVersion, "cuDriverGetVersion");
  JAX_DS_FIND(cuGetErrorName, "cuGetErrorName");
  JAX_DS_FIND(cuGetErrorString, "cuGetErrorString");
  JAX_DS_FIND(cuDeviceGet, "cuDeviceGet");
  JAX_DS_FIND(cuDeviceGetCount, "cuDeviceGetCount");
  JAX_DS_FIND(cuDeviceGetName, "cuDeviceGetName");
  JAX_DS_FIND(cuDeviceGetAttribute, "cuDeviceGetAttribute");
  JAX_DS_FIND(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  JAX_DS_FIND(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  JAX_DS_FIND(cuCtxPushCurrent, "cuCtxPushCurrent_v2");
  JAX_DS_FIND(cuCtxPopCurrent, "cuCtxPopCurrent_v2");
  JAX_DS_FIND(cuLibraryLoadData, "cuLibraryLoadData");
  JAX_DS_FIND(cuLibraryGetKernel, "cuLibraryGetKernel");
  JAX_DS_FIND(cuKernelGetFunction, "cuKernelGetFunction");
  JAX_DS_FIND(cuFuncLoad, "cuFuncLoad");
  JAX_DS_FIND(cuFuncSetAttribute, "cuFuncSetAttribute");
  JAX_DS_FIND(cuLaunchKernelEx, "cuLaunchKernelEx");
  JAX_DS_FIND(cuOccupancyMaxActiveClusters, "cuOccupancyMaxActiveClusters");
  JAX_DS_FIND(cuOccupancyMaxActiveBlocksPerMultiprocessor,
              "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  JAX_DS_FIND(cuMemAlloc, "cuMemAlloc_v2");
  JAX_DS_FIND(cuMemFree, "cuMemFree_v2");
  JAX_DS_FIND(cuMemHostAlloc, "cuMemHostAlloc");
  JAX_DS_FIND(cuMemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2");
  JAX_DS_FIND(cuMemsetD8, "cuMemsetD8_v2");
  JAX_DS_FIND(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
  JAX_DS_FIND(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
  JAX_DS_FIND(cuCtxSynchronize, "cuCtxSynchronize");
  JAX_DS_FIND(cuStreamCreate, "cuStreamCreate");
  JAX_DS_FIND(cuStreamSynchronize, "cuStreamSynchronize");
  JAX_DS_FIND(cuStreamDestroy, "cuStreamDestroy_v2");
  JAX_DS_FIND(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled");
#undef JAX_DS_FIND
  JAX_DS_RETURN_IF_ERROR(d.Check(d.cuInit(0), "cuInit"));
  JAX_DS_RETURN_IF_ERROR(d.Check(d.cuDriverGetVersion(&d.version), "cuDriverGetVersion"));
  return d;
}

ErrorOr<const Driver*> Driver::Get() {
  // Opened once and never closed: XLA itself keeps the driver open to the end of the process.
  static const ErrorOr<Driver>* const driver = new ErrorOr<Driver>(Open());
  if (driver->has_error()) return driver->error();
  return &driver->value();
}

Error Driver::Check(cuda::Result result, const char* call) const {
  if (result == 0) return Error::Success();
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  return Internal(std::string(call) + " failed: " + (name ? name : std::to_string(result)) +
                  (text ? std::string(", ") + text : ""));
}

ErrorOr<int> Driver::DeviceAttribute(int ordinal, cuda::DeviceAttribute attribute) const {
  cuda::Device device;
  int value = 0;
  JAX_DS_RETURN_IF_ERROR(Check(cuDeviceGet(&device, ordinal), "cuDeviceGet"));
  JAX_DS_RETURN_IF_ERROR(
      Check(cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute"));
  return value;
}

ErrorOr<int> Driver::Multiprocessors(int ordinal) const {
  static PerDevice<int> known = {};
  JAX_DS_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  int count = known[ordinal].load(std::memory_order_relaxed);
  if (count != 0) return count;
  JAX_DS_ASSIGN_OR_RETURN(count, DeviceAttribute(ordinal, cuda::kMultiprocessorCount));
  known[ordinal].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace jax_ds
