// A kernel's source text with everything it includes.
#pragma once

#include <map>
#include <string>

#include "support/status.h"

namespace jax_ds::jit {

struct Source {
  std::string main;                            // text of the kernel's file
  std::map<std::string, std::string> headers;  // include name -> text, transitively
};

// Reads `file` (a path under `root`) and, transitively, every header it includes in quotes. Such
// includes are written relative to `root` ("kernels/ptx.cuh"), in kernels and host code alike.
// Includes in angle brackets are not followed: under NVRTC kernels have no system headers.
ErrorOr<Source> ReadSource(const std::string& root, const std::string& file);

}  // namespace jax_ds::jit
