// The run-time compiler, opened when first needed.
#pragma once

#include <string>
#include <vector>

#include "jit/source.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::jit {

// Options every kernel is compiled with. -rdc=true would disable setmaxnreg.
const std::vector<std::string>& DefaultOptions();

// Entry points of libnvrtc. Immutable once opened.
class Nvrtc {
 public:
  // Opens the first of `candidates` that loads.
  static ErrorOr<Nvrtc> Open(const std::vector<std::string>& candidates);

  // Names the compiler that Open(candidates) would use, for cache keys, without opening it where
  // the first candidate is a file: a start that finds every kernel in the cache never opens NVRTC.
  static std::string Identity(const std::vector<std::string>& candidates);

  // Compiles `source` to a cubin. Thread-safe; holds no lock of ours. A failed compilation's error
  // carries the log.
  ErrorOr<Binary> Compile(const KernelSpec& spec, const Source& source) const;

  int major() const { return major_; }
  int minor() const { return minor_; }
  const std::string& path() const { return path_; }

 private:
  using Program = struct _nvrtcProgram*;
  using Result = int;

  Error Check(Result result, const char* call) const;
  std::string Log(Program program) const;
  ErrorOr<Binary> CompileProgram(Program program, const KernelSpec& spec) const;

  std::string path_;
  int major_ = 0, minor_ = 0;
  const char* (*nvrtcGetErrorString_)(Result);
  Result (*nvrtcVersion_)(int*, int*);
  Result (*nvrtcCreateProgram_)(Program*, const char*, const char*, int, const char* const*,
                                const char* const*);
  Result (*nvrtcDestroyProgram_)(Program*);
  Result (*nvrtcCompileProgram_)(Program, int, const char* const*);
  Result (*nvrtcAddNameExpression_)(Program, const char*);
  Result (*nvrtcGetLoweredName_)(Program, const char*, const char**);
  Result (*nvrtcGetProgramLogSize_)(Program, size_t*);
  Result (*nvrtcGetProgramLog_)(Program, char*);
  Result (*nvrtcGetCUBINSize_)(Program, size_t*);
  Result (*nvrtcGetCUBIN_)(Program, char*);
};

}  // namespace jax_ds::jit
