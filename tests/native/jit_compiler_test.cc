// Keys, and what happens without a compiler.
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "jit/compiler.h"
#include "tests/native/testing.h"

using jax_ds::jit::Compiler;
using jax_ds::jit::KernelSpec;
using jax_ds::testing::TemporaryFolder;

namespace {

std::string Key(const TemporaryFolder& root, const KernelSpec& spec,
                const std::string& nvrtc = "none") {
  Compiler compiler({root.path(), "", {root.path() + "/" + nvrtc}});
  auto key = compiler.Key(spec);
  return key.has_value() ? *key : key.error().message();
}

// Everything that decides the machine code changes the key; nothing else does.
void Keys() {
  TemporaryFolder root;
  root.Write("a.cuh", "#include \"b.cuh\"\nkernel");
  root.Write("b.cuh", "header");
  root.Write("none", "a compiler");
  const KernelSpec spec = {"a.cuh", "entry", {"-DX=1", "-DY"}, 0};
  const std::string key = Key(root, spec);
  CHECK_EQ(key.size(), 64u);
  CHECK_EQ(Key(root, spec), key);
  KernelSpec shared = spec;
  shared.shared_bytes = 1024;
  CHECK_EQ(Key(root, shared), key);

  std::set<std::string> keys = {key};
  KernelSpec changed = spec;
  changed.entry = "entr";
  keys.insert(Key(root, changed));
  changed = spec;
  changed.options = {"-DX=1-DY"};
  keys.insert(Key(root, changed));
  changed.options = {"-DY", "-DX=1"};
  keys.insert(Key(root, changed));
  root.Write("b.cuh", "header!");
  keys.insert(Key(root, spec));
  root.Write("b.cuh", "header");
  root.Write("a.cuh", "#include \"b.cuh\"\nkernel!");
  keys.insert(Key(root, spec));
  root.Write("a.cuh", "#include \"b.cuh\"\nkernel");
  root.Write("newer/none", "another compiler");
  keys.insert(Key(root, spec, "newer/none"));
  root.Write("newer/libnvrtc-builtins.so.13.9", "");
  keys.insert(Key(root, spec, "newer/none"));
  CHECK_EQ(keys.size(), 8u);
  CHECK_EQ(Key(root, spec), key);
}

void Missing() {
  TemporaryFolder root;
  root.Write("a.cuh", "kernel");
  Compiler compiler({root.path(), root.path() + "/cache", {root.path() + "/libnvrtc.so.13"}});
  for (int i = 0; i < 2; ++i) {
    auto kernel = compiler.Get({"a.cuh", "entry", {}, 0});
    CHECK(kernel.has_error());
    CHECK(kernel.error().message().find("pip install") != std::string::npos);
  }
}

// A kernel that some process has cached needs no compiler.
void Cached() {
  TemporaryFolder root;
  root.Write("a.cuh", "kernel");
  Compiler compiler({root.path(), root.path() + "/cache", {root.path() + "/libnvrtc.so.13"}});
  const KernelSpec spec = {"a.cuh", "entry", {}, 0};
  jax_ds::jit::DiskCache(root.path() + "/cache").Write(*compiler.Key(spec), {"code", "name", ""});
  auto kernel = compiler.Get(spec);
  CHECK(kernel.has_value());
  if (kernel.has_error()) return;
  CHECK_EQ((*kernel)->binary().cubin, "code");
  auto again = compiler.Get(spec);
  CHECK(again.has_value() && *again == *kernel);
  auto other = compiler.Get({"a.cuh", "entry", {}, 1024});
  CHECK(other.has_value() && *other != *kernel);
}

// However many threads ask for a kernel, one fetches it and all get the same.
void Threads() {
  TemporaryFolder root;
  root.Write("a.cuh", "kernel");
  Compiler compiler({root.path(), root.path() + "/cache", {root.path() + "/libnvrtc.so.13"}});
  const KernelSpec spec = {"a.cuh", "entry", {}, 0};
  const std::string code(1 << 20, 'x');
  jax_ds::jit::DiskCache(root.path() + "/cache").Write(*compiler.Key(spec), {code, "name", ""});
  std::vector<std::shared_ptr<const jax_ds::jit::Kernel>> kernels(8);
  std::vector<std::thread> threads;
  for (auto& kernel : kernels) {
    threads.emplace_back([&] {
      auto got = compiler.Get(spec);
      if (got.has_value()) kernel = *got;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(kernels.front() != nullptr);
  for (const auto& kernel : kernels) CHECK(kernel == kernels.front());
}

}  // namespace

int main() {
  Keys();
  Missing();
  Cached();
  Threads();
  return jax_ds::testing::failures;
}
