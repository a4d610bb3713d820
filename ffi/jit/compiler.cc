#include "jit/compiler.h"

#include <atomic>
#include <chrono>

#include "jit/sha256.h"
#include "jit/source.h"

namespace jax_ds::jit {

const std::string& Compiler::CompilerIdentity() {
  std::call_once(identity_once_, [this] { identity_ = Nvrtc::Identity(environment_.nvrtc); });
  return identity_;
}

ErrorOr<const Nvrtc*> Compiler::nvrtc() {
  std::call_once(nvrtc_once_, [this] {
    nvrtc_ = std::make_unique<ErrorOr<Nvrtc>>(Nvrtc::Open(environment_.nvrtc));
  });
  if (nvrtc_->has_error()) return nvrtc_->error();
  return &nvrtc_->value();
}

std::string Compiler::KeyOf(const KernelSpec& spec, const Source& source) {
  // Every part is preceded by its length: no two different lists of parts give one string.
  std::string all;
  auto add = [&all](const std::string& part) { all += std::to_string(part.size()) + ':' + part; };
  add(CompilerIdentity());
  for (const std::string& option : DefaultOptions()) add(option);
  add("|");
  for (const std::string& option : spec.options) add(option);
  add("|");
  add(spec.file);
  add(spec.entry);
  add(source.main);
  for (const auto& [name, text] : source.headers) {
    add(name);
    add(text);
  }
  return Sha256(all);
}

ErrorOr<std::string> Compiler::Key(const KernelSpec& spec) {
  JAX_DS_ASSIGN_OR_RETURN(Source source, ReadSource(environment_.source_root, spec.file));
  return KeyOf(spec, source);
}

ErrorOr<Compilation> Compiler::Compile(const KernelSpec& spec, bool use_cache) {
  const auto start = std::chrono::steady_clock::now();
  auto finish = [&](Binary binary, bool cached) {
    std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return Compilation{std::make_shared<const Kernel>(spec, std::move(binary)), cached,
                       elapsed.count()};
  };
  JAX_DS_ASSIGN_OR_RETURN(Source source, ReadSource(environment_.source_root, spec.file));
  const std::string key = KeyOf(spec, source);
  if (use_cache) {
    if (auto binary = cache_.Read(key)) return finish(std::move(*binary), true);
  }
  JAX_DS_ASSIGN_OR_RETURN(const Nvrtc* compiler, nvrtc());
  if (!use_cache) {
    JAX_DS_ASSIGN_OR_RETURN(Binary binary, compiler->Compile(spec, source));
    return finish(std::move(binary), false);
  }
  DiskCache::Claim claim(cache_, key);
  // Another process may have compiled it while we waited for the claim.
  if (auto binary = cache_.Read(key)) return finish(std::move(*binary), true);
  JAX_DS_ASSIGN_OR_RETURN(Binary binary, compiler->Compile(spec, source));
  cache_.Write(key, binary);
  return finish(std::move(binary), false);
}

ErrorOr<std::shared_ptr<const Kernel>> Compiler::Get(const KernelSpec& spec) {
  JAX_DS_ASSIGN_OR_RETURN(std::string key, Key(spec));
  // Launches of one code with different shared memory need functions with different limits.
  key += ':' + std::to_string(spec.shared_bytes);
  std::promise<Result> promise;
  std::shared_future<Result> future;
  bool ours = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto [entry, inserted] = kernels_.try_emplace(key);
    if (inserted) entry->second = promise.get_future().share();
    future = entry->second;
    ours = inserted;
  }
  if (ours) {
    ErrorOr<Compilation> compiled = Compile(spec, /*use_cache=*/true);
    if (compiled.has_error()) {
      // Whoever waits now gets this error; whoever asks later tries again.
      std::lock_guard<std::mutex> lock(mutex_);
      kernels_.erase(key);
    }
    promise.set_value(compiled.has_error() ? Result(compiled.error()) : Result(compiled->kernel));
  }
  return future.get();
}

namespace {

// Set once, before any handler can run, and never freed: handlers may run until the process ends.
std::atomic<Compiler*> process_compiler{nullptr};

}  // namespace

Error ConfigureCompiler(Environment environment) {
  auto fresh = std::make_unique<Compiler>(std::move(environment));
  Compiler* expected = nullptr;
  if (!process_compiler.compare_exchange_strong(expected, fresh.get())) {
    return FailedPrecondition("the kernel compiler is configured already");
  }
  fresh.release();
  return Error::Success();
}

ErrorOr<Compiler*> ProcessCompiler() {
  Compiler* compiler = process_compiler.load();
  if (compiler == nullptr) return FailedPrecondition("the kernel compiler is not configured");
  return compiler;
}

ErrorOr<std::shared_ptr<const Kernel>> GetKernel(const KernelSpec& spec) {
  JAX_DS_ASSIGN_OR_RETURN(Compiler * compiler, ProcessCompiler());
  return compiler->Get(spec);
}

}  // namespace jax_ds::jit
