// Statuses instead of exceptions: every host function that can fail returns an Error or an ErrorOr.
#pragma once

#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

// A module compiled against newer headers is refused by older runtimes.
static_assert(XLA_FFI_API_MAJOR == 0 && XLA_FFI_API_MINOR <= 4,
              "build against the headers of jaxlib 0.11.2");

namespace jax_ds {

using xla::ffi::Error;
using xla::ffi::ErrorCode;
using xla::ffi::ErrorOr;

inline Error InvalidArgument(std::string message) {
  return Error(ErrorCode::kInvalidArgument, "jax_ds: " + std::move(message));
}
inline Error FailedPrecondition(std::string message) {
  return Error(ErrorCode::kFailedPrecondition, "jax_ds: " + std::move(message));
}
inline Error Internal(std::string message) {
  return Error(ErrorCode::kInternal, "jax_ds: " + std::move(message));
}

}  // namespace jax_ds

#define JAX_DS_CONCAT_INNER(a, b) a##b
#define JAX_DS_CONCAT(a, b) JAX_DS_CONCAT_INNER(a, b)

// Returns from the enclosing function if `expression` (an Error) is a failure.
#define JAX_DS_RETURN_IF_ERROR(expression)                                                        \
  do {                                                                                            \
    if (::jax_ds::Error jax_ds_error = (expression); jax_ds_error.failure()) return jax_ds_error; \
  } while (false)

// Declares `declaration` from the value of `expression` (an ErrorOr), or returns its error.
#define JAX_DS_ASSIGN_OR_RETURN(declaration, expression) \
  JAX_DS_ASSIGN_OR_RETURN_(JAX_DS_CONCAT(jax_ds_result_, __LINE__), declaration, expression)
#define JAX_DS_ASSIGN_OR_RETURN_(result, declaration, expression) \
  auto result = (expression);                                     \
  if (result.has_error()) return std::move(result).error();       \
  declaration = std::move(result).value()
