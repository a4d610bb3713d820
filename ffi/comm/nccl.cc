#include "comm/nccl.h"

#include <dlfcn.h>

#include <chrono>
#include <mutex>
#include <thread>

#include "comm/device.h"
#include "support/library.h"

namespace jax_ds::comm {
namespace {

struct Candidates {
  std::mutex mutex;
  std::vector<std::string> paths;
};

Candidates& ProcessCandidates() {
  static Candidates* const candidates = new Candidates;
  return *candidates;
}

std::string Version(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace

void Nccl::SetCandidates(std::vector<std::string> paths) {
  Candidates& candidates = ProcessCandidates();
  std::lock_guard<std::mutex> lock(candidates.mutex);
  candidates.paths = std::move(paths);
}

ErrorOr<Nccl> Nccl::Open() {
  const char* const name = "libnccl.so.2";
  std::vector<std::string> paths;
  // A second copy would not know XLA's communicators: by its path only where none is loaded yet.
  if (dlopen(name, RTLD_NOW | RTLD_NOLOAD) == nullptr) {
    Candidates& candidates = ProcessCandidates();
    std::lock_guard<std::mutex> lock(candidates.mutex);
    paths = candidates.paths;
  }
  paths.push_back(name);
  JAX_DS_ASSIGN_OR_RETURN(
      SharedLibrary library,
      SharedLibrary::Open(paths, "NCCL (libnccl.so.2)", "pip install 'nvidia-nccl-cu13>=2.30.4'"));
  Nccl n;
  JAX_DS_RETURN_IF_ERROR(library.Find("ncclGetVersion", &n.ncclGetVersion));
  if (n.ncclGetVersion(&n.version) != kNcclSuccess || n.version < kOldestNccl) {
    return FailedPrecondition("NCCL is " + Version(n.version) + " (" + library.path() +
                              "), 2.30.4 or newer is needed: pip install -U nvidia-nccl-cu13");
  }
#define JAX_DS_FIND(name) JAX_DS_RETURN_IF_ERROR(library.Find(#name, &n.name))
  JAX_DS_FIND(ncclGetErrorString);
  JAX_DS_FIND(ncclCommGetAsyncError);
  JAX_DS_FIND(ncclCommUserRank);
  JAX_DS_FIND(ncclCommCount);
  JAX_DS_FIND(ncclMemAlloc);
  JAX_DS_FIND(ncclMemFree);
  JAX_DS_FIND(ncclAllReduce);
  JAX_DS_FIND(ncclCommWindowRegister);
  JAX_DS_FIND(ncclTeamLsa);
  JAX_DS_FIND(ncclGetLsaDevicePointer);
#undef JAX_DS_FIND
  return n;
}

ErrorOr<const Nccl*> Nccl::Get() {
  static const ErrorOr<Nccl>* const nccl = new ErrorOr<Nccl>(Open());
  if (nccl->has_error()) return nccl->error();
  return &nccl->value();
}

Error Nccl::Check(NcclResult result, const char* call) const {
  if (result == kNcclSuccess) return Error::Success();
  return Internal(std::string(call) + " failed: " + ncclGetErrorString(result));
}

Error Nccl::Finish(NcclComm communicator, NcclResult result, const char* call) const {
  const auto deadline = std::chrono::steady_clock::now() + Timeout();
  while (result == kNcclInProgress) {
    if (std::chrono::steady_clock::now() > deadline) {
      return Internal(std::string(call) + " did not finish within JAX_DS_TIMEOUT_S");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    NcclResult status = ncclCommGetAsyncError(communicator, &result);
    if (status != kNcclSuccess) result = status;
  }
  return Check(result, call);
}

}  // namespace jax_ds::comm
