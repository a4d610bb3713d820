// The CUDA driver library, opened when first needed.
#pragma once

#include <string>

#include "support/cuda.h"
#include "support/status.h"

namespace jax_ds {

// Entry points of libcuda.so.1. Immutable once opened.
struct Driver {
  // The process's driver; the first call opens and initialises it. Thread-safe. The error says
  // how to get a driver.
  static ErrorOr<const Driver*> Get();

  // Turns a driver result into a status that names the call.
  Error Check(cuda::Result result, const char* call) const;

  // Runs `body` (returning Error) with `ordinal`'s primary context current on this thread.
  template <typename Body>
  Error WithContext(int ordinal, Body body) const {
    cuda::Device device;
    cuda::Context context, popped;
    JAX_DS_RETURN_IF_ERROR(Check(cuDeviceGet(&device, ordinal), "cuDeviceGet"));
    JAX_DS_RETURN_IF_ERROR(
        Check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain"));
    Error status = Check(cuCtxPushCurrent(context), "cuCtxPushCurrent");
    if (status.success()) {
      status = body();
      cuCtxPopCurrent(&popped);
    }
    cuDevicePrimaryCtxRelease(device);
    return status;
  }

  ErrorOr<int> DeviceAttribute(int ordinal, cuda::DeviceAttribute attribute) const;

  // How many a device has; asked once, because handlers want it at every call.
  ErrorOr<int> Multiprocessors(int ordinal) const;

  int version = 0;  // 1000 * major + 10 * minor of the newest CUDA the driver supports

  cuda::Result (*cuInit)(unsigned int);
  cuda::Result (*cuDriverGetVersion)(int*);
  cuda::Result (*cuGetErrorName)(cuda::Result, const char**);
  cuda::Result (*cuGetErrorString)(cuda::Result, const char**);
  cuda::Result (*cuDeviceGet)(cuda::Device*, int);
  cuda::Result (*cuDeviceGetCount)(int*);
  cuda::Result (*cuDeviceGetName)(char*, int, cuda::Device);
  cuda::Result (*cuDeviceGetAttribute)(int*, cuda::DeviceAttribute, cuda::Device);
  cuda::Result (*cuDevicePrimaryCtxRetain)(cuda::Context*, cuda::Device);
  cuda::Result (*cuDevicePrimaryCtxRelease)(cuda::Device);
  cuda::Result (*cuCtxPushCurrent)(cuda::Context);
  cuda::Result (*cuCtxPopCurrent)(cuda::Context*);
  cuda::Result (*cuLibraryLoadData)(cuda::Library*, const void*, int*, void**, unsigned int, int*,
                                    void**, unsigned int);
  cuda::Result (*cuLibraryGetKernel)(cuda::Kernel*, cuda::Library, const char*);
  cuda::Result (*cuKernelGetFunction)(cuda::Function*, cuda::Kernel);
  cuda::Result (*cuFuncLoad)(cuda::Function);
  cuda::Result (*cuFuncSetAttribute)(cuda::Function, cuda::FunctionAttribute, int);
  cuda::Result (*cuLaunchKernelEx)(const cuda::LaunchConfig*, cuda::Function, void**, void**);
  cuda::Result (*cuOccupancyMaxActiveClusters)(int*, cuda::Function, const cuda::LaunchConfig*);
  cuda::Result (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int*, cuda::Function, int, size_t);
  cuda::Result (*cuMemAlloc)(cuda::DevicePtr*, size_t);
  cuda::Result (*cuMemFree)(cuda::DevicePtr);
  cuda::Result (*cuMemHostAlloc)(void**, size_t, unsigned int);
  cuda::Result (*cuMemHostGetDevicePointer)(cuda::DevicePtr*, void*, unsigned int);
  cuda::Result (*cuMemsetD8)(cuda::DevicePtr, unsigned char, size_t);
  cuda::Result (*cuMemcpyHtoDAsync)(cuda::DevicePtr, const void*, size_t, cuda::Stream);
  cuda::Result (*cuMemcpyDtoHAsync)(void*, cuda::DevicePtr, size_t, cuda::Stream);
  cuda::Result (*cuCtxSynchronize)();
  cuda::Result (*cuStreamCreate)(cuda::Stream*, unsigned int);
  cuda::Result (*cuStreamSynchronize)(cuda::Stream);
  cuda::Result (*cuStreamDestroy)(cuda::Stream);
  cuda::Result (*cuTensorMapEncodeTiled)(void* map, int data_type, unsigned int rank, void* base,
                                         const uint64_t* dims, const uint64_t* strides,
                                         const uint32_t* box, const uint32_t* element_strides,
                                         int interleave, int swizzle, int l2_promotion,
                                         int oob_fill);

 private:
  static ErrorOr<Driver> Open();
};

}  // namespace jax_ds
