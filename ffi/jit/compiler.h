// From a kernel's specification to its machine code: source, key, cache, NVRTC.
#pragma once

#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "jit/cache.h"
#include "jit/kernel.h"
#include "jit/nvrtc.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::jit {

struct Environment {
  std::string source_root;         // the folder that mirrors ffi/
  std::string cache_dir;           // empty: no disk cache
  std::vector<std::string> nvrtc;  // libraries to try, full paths first
};

struct Compilation {
  std::shared_ptr<const Kernel> kernel;
  bool cached;  // read from disk
  double seconds;
};

// Hands out kernels, each compiled once per process however many threads ask, and once per cache
// folder however many processes do. Keyed by everything that decides the machine code; entries
// live as long as the compiler. No lock is held while compiling, reading or writing.
class Compiler {
 public:
  explicit Compiler(Environment environment)
      : environment_(std::move(environment)), cache_(environment_.cache_dir) {}

  ErrorOr<std::shared_ptr<const Kernel>> Get(const KernelSpec& spec);

  // Like Get, for reports: says where the kernel came from and how long it took, and compiles anew
  // unless `use_cache`.
  ErrorOr<Compilation> Compile(const KernelSpec& spec, bool use_cache);

  // Covers source, every included header, options, architecture and compiler version.
  ErrorOr<std::string> Key(const KernelSpec& spec);

  ErrorOr<const Nvrtc*> nvrtc();
  const Environment& environment() const { return environment_; }

 private:
  using Result = ErrorOr<std::shared_ptr<const Kernel>>;

  std::string KeyOf(const KernelSpec& spec, const Source& source);
  const std::string& CompilerIdentity();

  const Environment environment_;
  const DiskCache cache_;
  std::mutex mutex_;  // guards the map only
  std::unordered_map<std::string, std::shared_future<Result>> kernels_;
  std::once_flag identity_once_, nvrtc_once_;
  std::string identity_;
  std::unique_ptr<ErrorOr<Nvrtc>> nvrtc_;
};

// The process's compiler: set up once by Python before any handler is registered.
Error ConfigureCompiler(Environment environment);
ErrorOr<Compiler*> ProcessCompiler();

// What a handler's Instantiate calls.
ErrorOr<std::shared_ptr<const Kernel>> GetKernel(const KernelSpec& spec);

}  // namespace jax_ds::jit
