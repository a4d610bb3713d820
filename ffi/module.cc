// The Python module: hands out the rooms' handlers and kernels, sets up the compiler; nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <stdexcept>

#include "comm/device.h"
#include "comm/nccl.h"
#include "deep_ep/handler.h"
#include "deep_gemm/handler.h"
#include "deep_gemm/plan.h"
#include "flash_mla/handler.h"
#include "jit/compiler.h"
#include "quantization/handler.h"
#include "support/driver.h"
#include "support/room.h"

namespace nb = nanobind;

namespace jax_ds {
namespace {

// A room is added here, in pairs of include and line.
std::vector<Room> Rooms() {
  return {
      deep_gemm::GetRoom(),
      deep_ep::GetRoom(),
      flash_mla::GetRoom(),
      quantization::GetRoom(),
  };
}

// At the boundary to Python statuses become exceptions.
template <typename T>
T ValueOrThrow(ErrorOr<T> result) {
  if (result.has_error()) throw std::runtime_error(result.error().message());
  return std::move(result).value();
}

nb::dict Types() {
  nb::dict types;
  for (const Room& room : Rooms()) {
    for (const StateType& type : room.types) {
      nb::dict registration;
      registration["type_id"] = nb::capsule(type.id);
      registration["type_info"] = nb::capsule(const_cast<xla::ffi::TypeInfo*>(type.info));
      types[type.name] = registration;
    }
  }
  return types;
}

nb::dict Targets() {
  nb::dict targets;
  for (const Room& room : Rooms()) {
    for (const Target& target : room.targets) {
      nb::dict stages;
      auto add = [&](const char* stage, XLA_FFI_Handler* handler) {
        if (handler != nullptr) stages[stage] = nb::capsule(reinterpret_cast<void*>(handler));
      };
      add("instantiate", target.instantiate);
      add("prepare", target.prepare);
      add("initialize", target.initialize);
      add("execute", target.execute);
      targets[target.name] = stages;
    }
  }
  return targets;
}

nb::list Kernels() {
  nb::list kernels;
  for (const Room& room : Rooms()) {
    for (const jit::KernelSpec& spec : room.kernels)
      kernels.append(nb::make_tuple(room.name, spec));
  }
  return kernels;
}

nb::dict Report(const jit::Compilation& compilation) {
  const jit::Resources& r = compilation.kernel->resources();
  nb::dict report;
  report["cached"] = compilation.cached;
  report["seconds"] = compilation.seconds;
  report["registers"] = r.registers;
  report["static_shared"] = r.static_shared;
  report["dynamic_shared"] = compilation.kernel->spec().shared_bytes;
  report["stack"] = r.stack;
  report["spill_stores"] = r.spill_stores;
  report["spill_loads"] = r.spill_loads;
  report["remarks"] = r.remarks;
  report["clean"] = r.clean();
  report["cubin_bytes"] = compilation.kernel->binary().cubin.size();
  report["log"] = compilation.kernel->binary().log;
  return report;
}

nb::dict CompileKernel(const jit::KernelSpec& spec, bool use_cache) {
  jit::Compiler* compiler = ValueOrThrow(jit::ProcessCompiler());
  ErrorOr<jit::Compilation> compilation = [&] {
    nb::gil_scoped_release release;
    return compiler->Compile(spec, use_cache);
  }();
  return Report(ValueOrThrow(std::move(compilation)));
}

void GetKernel(const jit::KernelSpec& spec) {
  nb::gil_scoped_release release;
  ValueOrThrow(jit::GetKernel(spec));
}

// What a program's first use of a kernel costs on a GPU once it is compiled, in seconds: reading it
// from the disk cache, and loading its code.
nb::tuple LoadKernel(const jit::KernelSpec& spec, int ordinal) {
  jit::Compiler* compiler = ValueOrThrow(jit::ProcessCompiler());
  jit::Compilation compilation = ValueOrThrow(compiler->Compile(spec, /*use_cache=*/true));
  const auto start = std::chrono::steady_clock::now();
  Error error = compilation.kernel->Load(ordinal);
  if (error.failure()) throw std::runtime_error(error.message());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return nb::make_tuple(compilation.seconds, elapsed.count());
}

nb::tuple NvrtcVersion() {
  jit::Compiler* compiler = ValueOrThrow(jit::ProcessCompiler());
  const jit::Nvrtc* nvrtc = ValueOrThrow(compiler->nvrtc());
  return nb::make_tuple(nvrtc->major(), nvrtc->minor(), nvrtc->path());
}

nb::tuple DriverInfo() {
  const Driver* driver = ValueOrThrow(Driver::Get());
  int count = 0;
  driver->cuDeviceGetCount(&count);
  nb::list devices;
  for (int i = 0; i < count; ++i) {
    char name[256] = {};
    cuda::Device device;
    if (driver->cuDeviceGet(&device, i) != 0) continue;
    driver->cuDeviceGetName(name, sizeof(name), device);
    int major = ValueOrThrow(driver->DeviceAttribute(i, cuda::kComputeCapabilityMajor));
    int minor = ValueOrThrow(driver->DeviceAttribute(i, cuda::kComputeCapabilityMinor));
    devices.append(nb::make_tuple(nb::str(name), major, minor));
  }
  return nb::make_tuple(driver->version, devices);
}

void ConfigureCommunication(std::vector<std::string> nccl, double timeout_s) {
  comm::Nccl::SetCandidates(std::move(nccl));
  comm::SetTimeout(std::chrono::nanoseconds(static_cast<int64_t>(timeout_s * 1e9)));
}

int NcclVersion() { return ValueOrThrow(comm::Nccl::Get())->version; }

std::string ExplainGemm(const std::string& mode, const std::string& output, int64_t m, int64_t n,
                        int64_t k, int64_t groups, int64_t expected_rows, int num_sms) {
  const auto parsed_mode = ValueOrThrow(deep_gemm::ParseMode(mode));
  const auto parsed_output = ValueOrThrow(deep_gemm::ParseOutput(output, false));
  return ValueOrThrow(
      deep_gemm::Explain({parsed_mode, parsed_output, m, n, k, groups, expected_rows}, num_sms));
}

std::vector<std::pair<std::string, double>> GemmCandidates(const std::string& mode,
                                                           const std::string& output,
                                                           bool accumulate, int64_t m, int64_t n,
                                                           int64_t k, int64_t groups,
                                                           int64_t expected_rows, int num_sms) {
  const auto parsed_mode = ValueOrThrow(deep_gemm::ParseMode(mode));
  const auto parsed_output = ValueOrThrow(deep_gemm::ParseOutput(output, accumulate));
  std::vector<std::pair<std::string, double>> candidates;
  for (const auto& plan : ValueOrThrow(deep_gemm::Rank(
           {parsed_mode, parsed_output, m, n, k, groups, expected_rows}, num_sms))) {
    candidates.emplace_back(plan.Name(), plan.estimate.total_us());
  }
  return candidates;
}

}  // namespace
}  // namespace jax_ds

NB_MODULE(_jax_ds, m) {
  using namespace jax_ds;  // NOLINT: one function
  nb::class_<jit::KernelSpec>(m, "KernelSpec")
      .def(
          "__init__",
          [](jit::KernelSpec* self, std::string file, std::string entry,
             std::vector<std::string> options, int shared_bytes) {
            new (self) jit::KernelSpec{std::move(file), std::move(entry), std::move(options),
                                       shared_bytes};
          },
          nb::arg("file"), nb::arg("entry"), nb::arg("options") = std::vector<std::string>(),
          nb::arg("shared_bytes") = 0)
      .def_ro("file", &jit::KernelSpec::file)
      .def_ro("entry", &jit::KernelSpec::entry)
      .def_ro("options", &jit::KernelSpec::options)
      .def_ro("shared_bytes", &jit::KernelSpec::shared_bytes);
  m.def(
      "configure",
      [](std::string source_root, std::string cache_dir, std::vector<std::string> nvrtc) {
        Error error = jit::ConfigureCompiler(
            {std::move(source_root), std::move(cache_dir), std::move(nvrtc)});
        if (error.failure()) throw std::runtime_error(error.message());
      },
      nb::arg("source_root"), nb::arg("cache_dir"), nb::arg("nvrtc"),
      "Sets up the kernel compiler; once in a process.");
  m.def("configure_communication", &ConfigureCommunication, nb::arg("nccl"), nb::arg("timeout_s"),
        "Sets where NCCL may be and the longest wait for a peer; before any handler runs.");
  m.def("nccl", &NcclVersion, "10000 * major + 100 * minor + patch; an error if it is too old.");
  m.def("communication_failures", &comm::Failures,
        "What waits for peers on this process's GPUs have recorded, one sentence each.");
  m.def("types", &Types, "FFI state types: {name: registration}.");
  m.def("targets", &Targets, "FFI targets: {name: {stage: capsule}}.");
  m.def("kernels", &Kernels, "Every kernel configuration: [(room, KernelSpec)].");
  m.def("compile", &CompileKernel, nb::arg("spec"), nb::arg("use_cache") = true,
        "Compiles a kernel or reads it from the cache; a report of what it needs.");
  m.def("load", &LoadKernel, nb::arg("spec"), nb::arg("ordinal") = 0,
        "Loads a compiled kernel on a GPU: seconds of (reading the cache, loading the code).");
  m.def("get_kernel", &GetKernel, nb::arg("spec"),
        "What a handler's Instantiate stage does: one compilation however many threads ask.");
  m.def("explain_gemm", &ExplainGemm, nb::arg("mode"), nb::arg("output"), nb::arg("m"),
        nb::arg("n"), nb::arg("k"), nb::arg("groups"), nb::arg("expected_rows"), nb::arg("num_sms"),
        "The GEMM's candidate configurations and what the model expects of each, best first.");
  m.def("gemm_candidates", &GemmCandidates, nb::arg("mode"), nb::arg("output"),
        nb::arg("accumulate"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("groups"),
        nb::arg("expected_rows"), nb::arg("num_sms"),
        "[(configuration, expected us)] of the GEMM, best first.");
  m.def("nvrtc", &NvrtcVersion, "(major, minor, path) of the run-time compiler.");
  m.def("driver", &DriverInfo, "(version, [(name, major, minor)]) of driver and GPUs.");
}
