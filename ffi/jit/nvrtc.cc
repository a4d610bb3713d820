#include "jit/nvrtc.h"

#include <algorithm>
#include <filesystem>

#include "support/library.h"

namespace jax_ds::jit {
namespace {

namespace fs = std::filesystem;

constexpr char kCure[] = "pip install \"jax[cuda13]\" (or nvidia-cuda-nvrtc) to get it";

// libnvrtc loads its builtins by bare name, and the wheel's library has no RPATH: the file beside
// it must be in the process before it.
std::vector<std::string> BuiltinsBeside(const std::string& library) {
  std::vector<std::string> found;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(fs::path(library).parent_path(), ignored)) {
    std::string name = entry.path().filename().string();
    if (name.rfind("libnvrtc-builtins.so", 0) == 0) found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

const std::vector<std::string>& DefaultOptions() {
  static const auto* const options =
      new std::vector<std::string>{"--gpu-architecture=sm_90a", "-std=c++20", "-default-device",
                                   "-rdc=false", "--ptxas-options=-v"};
  return *options;
}

ErrorOr<Nvrtc> Nvrtc::Open(const std::vector<std::string>& candidates) {
  for (const std::string& path : candidates) {
    if (path.find('/') == std::string::npos) continue;
    std::vector<std::string> builtins = BuiltinsBeside(path);
    // Absent builtins show as NVRTC's own error at the first compilation.
    if (!builtins.empty()) (void)SharedLibrary::Open(builtins, "libnvrtc-builtins", kCure);
  }
  JAX_DS_ASSIGN_OR_RETURN(
      SharedLibrary library,
      SharedLibrary::Open(candidates, "NVRTC, the CUDA run-time compiler (libnvrtc.so.13),",
                          kCure));
  Nvrtc n;
  n.path_ = library.path();
#define JAX_DS_FIND(name) JAX_DS_RETURN_IF_ERROR(library.Find(#name, &n.name##_))
  JAX_DS_FIND(nvrtcGetErrorString);
  JAX_DS_FIND(nvrtcVersion);
  JAX_DS_FIND(nvrtcCreateProgram);
  JAX_DS_FIND(nvrtcDestroyProgram);
  JAX_DS_FIND(nvrtcCompileProgram);
  JAX_DS_FIND(nvrtcAddNameExpression);
  JAX_DS_FIND(nvrtcGetLoweredName);
  JAX_DS_FIND(nvrtcGetProgramLogSize);
  JAX_DS_FIND(nvrtcGetProgramLog);
  JAX_DS_FIND(nvrtcGetCUBINSize);
  JAX_DS_FIND(nvrtcGetCUBIN);
#undef JAX_DS_FIND
  JAX_DS_RETURN_IF_ERROR(n.Check(n.nvrtcVersion_(&n.major_, &n.minor_), "nvrtcVersion"));
  return n;
}

std::string Nvrtc::Identity(const std::vector<std::string>& candidates) {
  for (const std::string& path : candidates) {
    std::error_code error;
    auto bytes = fs::file_size(path, error);
    if (error) continue;
    // Patch releases share a version number; their files differ in size.
    std::string identity = "nvrtc " + std::to_string(bytes);
    for (const std::string& builtins : BuiltinsBeside(path)) {
      identity += " " + fs::path(builtins).filename().string();
    }
    return identity;
  }
  ErrorOr<Nvrtc> nvrtc = Open(candidates);
  if (nvrtc.has_error()) return "none";
  return "nvrtc " + std::to_string(nvrtc->major_) + "." + std::to_string(nvrtc->minor_);
}

Error Nvrtc::Check(Result result, const char* call) const {
  if (result == 0) return Error::Success();
  return Internal(std::string(call) + " failed: " + nvrtcGetErrorString_(result));
}

std::string Nvrtc::Log(Program program) const {
  size_t size = 0;
  if (nvrtcGetProgramLogSize_(program, &size) != 0 || size == 0) return "";
  std::string log(size, '\0');
  if (nvrtcGetProgramLog_(program, log.data()) != 0) return "";
  log.resize(size - 1);  // the terminator
  return log;
}

ErrorOr<Binary> Nvrtc::Compile(const KernelSpec& spec, const Source& source) const {
  std::vector<const char*> names, texts;
  for (const auto& [name, text] : source.headers) {
    names.push_back(name.c_str());
    texts.push_back(text.c_str());
  }
  Program program = nullptr;
  JAX_DS_RETURN_IF_ERROR(
      Check(nvrtcCreateProgram_(&program, source.main.c_str(), spec.file.c_str(),
                                static_cast<int>(names.size()), texts.data(), names.data()),
            "nvrtcCreateProgram"));
  ErrorOr<Binary> binary = CompileProgram(program, spec);
  nvrtcDestroyProgram_(&program);
  return binary;
}

ErrorOr<Binary> Nvrtc::CompileProgram(Program program, const KernelSpec& spec) const {
  JAX_DS_RETURN_IF_ERROR(
      Check(nvrtcAddNameExpression_(program, spec.entry.c_str()), "nvrtcAddNameExpression"));
  std::vector<const char*> options;
  for (const std::string& option : DefaultOptions()) options.push_back(option.c_str());
  for (const std::string& option : spec.options) options.push_back(option.c_str());
  Error compiled =
      Check(nvrtcCompileProgram_(program, static_cast<int>(options.size()), options.data()),
            "nvrtcCompileProgram");
  Binary binary;
  binary.log = Log(program);
  if (compiled.failure()) {
    return Internal("kernel " + spec.file + " (" + spec.entry + ") does not compile:\n" +
                    binary.log);
  }
  const char* symbol = nullptr;
  JAX_DS_RETURN_IF_ERROR(
      Check(nvrtcGetLoweredName_(program, spec.entry.c_str(), &symbol), "nvrtcGetLoweredName"));
  binary.symbol = symbol;
  size_t size = 0;
  JAX_DS_RETURN_IF_ERROR(Check(nvrtcGetCUBINSize_(program, &size), "nvrtcGetCUBINSize"));
  binary.cubin.resize(size);
  JAX_DS_RETURN_IF_ERROR(Check(nvrtcGetCUBIN_(program, binary.cubin.data()), "nvrtcGetCUBIN"));
  return binary;
}

}  // namespace jax_ds::jit
