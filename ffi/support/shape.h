// The arithmetic of shapes, and the second check of what Python has checked with full wording: one
// line each in a handler.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "support/status.h"

namespace jax_ds {

using xla::ffi::AnyBuffer;
using xla::ffi::DataType;

// Sizes and pointers as kernels take them.
inline int Int(int64_t value) { return static_cast<int>(value); }

template <typename T>
T* Pointer(const AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of 128 that cover `size`: scales along a dimension.
inline int64_t Blocks128(int64_t size) { return CeilDiv(size, 128); }

// The product of all dimensions but the last `trailing`; leading ones are batch (vmap adds them).
inline int64_t LeadingSize(const AnyBuffer& buffer, size_t trailing) {
  int64_t size = 1;
  auto dims = buffer.dimensions();
  for (size_t i = 0; i + trailing < dims.size(); ++i) size *= dims[i];
  return size;
}

// `name` must have element type `type` and end in the dimensions `tail`; -1 accepts any size.
inline Error CheckBuffer(const char* name, const AnyBuffer& buffer, DataType type,
                         std::initializer_list<int64_t> tail) {
  auto dims = buffer.dimensions();
  bool fits = buffer.element_type() == type && dims.size() >= tail.size();
  size_t i = dims.size() - tail.size();
  if (fits) {
    for (int64_t want : tail) fits = fits && (want == -1 || dims[i] == want), ++i;
  }
  if (fits) return Error::Success();
  std::string want = "[...", got = "[";
  for (int64_t d : tail) want += ", " + std::to_string(d);
  for (int64_t d : dims) got += std::to_string(d) + ", ";
  return InvalidArgument(std::string(name) + ": must be " + want + "] of XLA type " +
                         std::to_string(static_cast<int>(type)) + ", got " + got + "] of type " +
                         std::to_string(static_cast<int>(buffer.element_type())));
}

}  // namespace jax_ds
