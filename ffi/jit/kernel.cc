#include "jit/kernel.h"

#include "support/driver.h"

namespace jax_ds::jit {

ErrorOr<cuda::Function> Kernel::LoadFunction() const {
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  cuda::Library library;
  cuda::Kernel kernel;
  cuda::Function function;
  JAX_DS_RETURN_IF_ERROR(
      driver->Check(driver->cuLibraryLoadData(&library, binary_.cubin.data(), nullptr, nullptr, 0,
                                              nullptr, nullptr, 0),
                    "cuLibraryLoadData"));
  JAX_DS_RETURN_IF_ERROR(driver->Check(
      driver->cuLibraryGetKernel(&kernel, library, binary_.symbol.c_str()), "cuLibraryGetKernel"));
  JAX_DS_RETURN_IF_ERROR(
      driver->Check(driver->cuKernelGetFunction(&function, kernel), "cuKernelGetFunction"));
  // Now, not lazily at the first launch: that may be inside a graph capture, where loading fails.
  JAX_DS_RETURN_IF_ERROR(driver->Check(driver->cuFuncLoad(function), "cuFuncLoad"));
  if (spec_.shared_bytes > 0) {
    JAX_DS_RETURN_IF_ERROR(driver->Check(
        driver->cuFuncSetAttribute(function, cuda::kMaxDynamicSharedSizeBytes, spec_.shared_bytes),
        "cuFuncSetAttribute"));
  }
  return function;
}

Error Kernel::Load(int ordinal) const {
  JAX_DS_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  if (functions_[ordinal].load(std::memory_order_acquire) != nullptr) return Error::Success();
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  return driver->WithContext(ordinal, [&]() -> Error {
    JAX_DS_ASSIGN_OR_RETURN(cuda::Function function, LoadFunction());
    // Where two threads load at once, either function serves; the other copy just stays loaded.
    functions_[ordinal].store(function, std::memory_order_release);
    return Error::Success();
  });
}

ErrorOr<cuda::Function> Kernel::function(int ordinal) const {
  JAX_DS_RETURN_IF_ERROR(Load(ordinal));
  return functions_[ordinal].load(std::memory_order_acquire);
}

}  // namespace jax_ds::jit
