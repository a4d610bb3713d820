#include "comm/window.h"

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "comm/device.h"
#include "support/driver.h"

namespace jax_ds::comm {
namespace {

using MapKey = std::tuple<NcclComm, int, int64_t, int, int64_t>;

// Windows live as long as the process: XLA keeps its communicators that long, and may replay a
// graph that holds their addresses.
struct Windows {
  std::mutex mutex;  // guards the map only, never held across a call of CUDA or NCCL
  std::map<MapKey, std::unique_ptr<const Link>> links;
};

Windows& ProcessWindows() {
  static Windows* const windows = new Windows;
  return *windows;
}

// Frees what a failed registration has allocated.
struct Allocation {
  const Driver* driver;
  const Nccl* nccl;  // null: one rank, from the driver
  void* memory = nullptr;
  ~Allocation() {
    if (memory == nullptr) return;
    if (nccl != nullptr) {
      nccl->ncclMemFree(memory);
    } else {
      driver->cuMemFree(reinterpret_cast<cuda::DevicePtr>(memory));
    }
  }
  void* Keep() {
    void* kept = memory;
    memory = nullptr;
    return kept;
  }
};

Error Zero(const Driver& driver, void* memory, size_t bytes) {
  return driver.Check(driver.cuMemsetD8(reinterpret_cast<cuda::DevicePtr>(memory), 0, bytes),
                      "cuMemsetD8");
}

// Zeroes the signals of every slot.
Error ZeroSignals(const Driver& driver, void* window, const Link& link) {
  for (int slot = 0; slot < link.num_slots; ++slot) {
    JAX_DS_RETURN_IF_ERROR(
        Zero(driver, static_cast<char*>(window) + slot * link.slot_bytes, kStagingOffset));
  }
  // Peers may signal as soon as the registration returns there.
  return driver.Check(driver.cuCtxSynchronize(), "cuCtxSynchronize");
}

// Whether every rank has its memory; all ranks take part whatever their own answer is.
ErrorOr<bool> Agree(const Driver& driver, const Nccl& nccl, NcclComm communicator, int* flag,
                    bool mine) {
  int value = mine ? 1 : 0;
  cuda::Stream stream = nullptr;
  JAX_DS_RETURN_IF_ERROR(
      driver.Check(driver.cuStreamCreate(&stream, cuda::kNonBlockingStream), "cuStreamCreate"));
  Error status = [&]() -> Error {
    const auto on_device = reinterpret_cast<cuda::DevicePtr>(flag);
    JAX_DS_RETURN_IF_ERROR(driver.Check(
        driver.cuMemcpyHtoDAsync(on_device, &value, sizeof(value), stream), "cuMemcpyHtoDAsync"));
    JAX_DS_RETURN_IF_ERROR(nccl.Finish(
        communicator, nccl.ncclAllReduce(flag, flag, 1, kNcclInt32, kNcclMin, communicator, stream),
        "ncclAllReduce"));
    JAX_DS_RETURN_IF_ERROR(driver.Check(
        driver.cuMemcpyDtoHAsync(&value, on_device, sizeof(value), stream), "cuMemcpyDtoHAsync"));
    return driver.Check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
  }();
  driver.cuStreamDestroy(stream);
  if (status.failure()) return status;
  return value == 1;
}

std::string Size(int64_t bytes) { return std::to_string((bytes >> 20) + 1) + " MiB"; }

size_t WindowBytes(const Link& link) { return link.num_slots * link.slot_bytes; }

Error Alone(const Driver& driver, Link* link) {
  Allocation window{&driver, nullptr};
  cuda::DevicePtr memory = 0;
  JAX_DS_RETURN_IF_ERROR(
      driver.Check(driver.cuMemAlloc(&memory, WindowBytes(*link)), "cuMemAlloc"));
  window.memory = reinterpret_cast<void*>(memory);
  JAX_DS_RETURN_IF_ERROR(ZeroSignals(driver, window.memory, *link));
  link->windows[0] = static_cast<char*>(window.Keep());
  return Error::Success();
}

// `flag` is a word of device memory.
Error Together(const Driver& driver, NcclComm communicator, int* flag, Link* link) {
  const size_t bytes = WindowBytes(*link);
  JAX_DS_ASSIGN_OR_RETURN(const Nccl* nccl, Nccl::Get());
  int count = 0;
  JAX_DS_RETURN_IF_ERROR(
      nccl->Check(nccl->ncclCommUserRank(communicator, &link->rank), "ncclCommUserRank"));
  JAX_DS_RETURN_IF_ERROR(nccl->Check(nccl->ncclCommCount(communicator, &count), "ncclCommCount"));
  if (count != link->num_ranks) {
    return Internal("XLA's communicator has " + std::to_string(count) + " ranks, not " +
                    std::to_string(link->num_ranks));
  }
  Allocation window{&driver, nccl};
  Error allocated = nccl->Check(nccl->ncclMemAlloc(&window.memory, bytes), "ncclMemAlloc");
  if (allocated.success()) allocated = ZeroSignals(driver, window.memory, *link);
  JAX_DS_ASSIGN_OR_RETURN(bool all, Agree(driver, *nccl, communicator, flag, allocated.success()));
  if (!all) {
    return Internal("a rank could not allocate its " + Size(bytes) + " symmetric buffer: " +
                    (allocated.failure() ? allocated.message() : "not this one") +
                    "; lower the tokens a rank or XLA_PYTHON_CLIENT_MEM_FRACTION");
  }
  NcclWindow handle = nullptr;
  JAX_DS_RETURN_IF_ERROR(
      nccl->Finish(communicator,
                   nccl->ncclCommWindowRegister(communicator, window.memory, bytes, &handle,
                                                kNcclWindowSymmetric),
                   "ncclCommWindowRegister"));
  // NCCL answers so where the ranks cannot address each other's memory.
  const char* const unreachable =
      "the ranks of this mesh axis cannot load and store each other's memory (are they on several "
      "hosts, or without NVLink?): use axis_name=(node, gpu) or implementation='xla'";
  if (handle == nullptr) return FailedPrecondition(unreachable);
  if (nccl->ncclTeamLsa(communicator).num_ranks != count) return FailedPrecondition(unreachable);
  for (int r = 0; r < count; ++r) {
    void* pointer = nullptr;
    JAX_DS_RETURN_IF_ERROR(nccl->Check(nccl->ncclGetLsaDevicePointer(handle, 0, r, &pointer),
                                       "ncclGetLsaDevicePointer"));
    if (pointer == nullptr) return FailedPrecondition(unreachable);
    link->windows[r] = static_cast<char*>(pointer);
  }
  window.Keep();
  return Error::Success();
}

ErrorOr<std::unique_ptr<const Link>> MakeWindow(const WindowKey& key, int num_ranks) {
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(const DeviceRecord* record, GetDeviceRecord(key.ordinal));
  auto link = std::make_unique<Link>();
  link->dead = record->dead;
  link->failure = record->failure_on_device;
  link->timeout_ns = static_cast<unsigned long long>(Timeout().count());
  link->operation = key.operation;
  link->num_ranks = num_ranks;
  link->num_slots = NumSlots(key.operation);
  link->slot_bytes = kStagingOffset + key.bytes;
  Error status = driver->WithContext(key.ordinal, [&]() -> Error {
    Allocation counters{driver, nullptr};
    cuda::DevicePtr memory = 0;
    JAX_DS_RETURN_IF_ERROR(driver->Check(driver->cuMemAlloc(&memory, 256), "cuMemAlloc"));
    counters.memory = reinterpret_cast<void*>(memory);
    JAX_DS_RETURN_IF_ERROR(
        key.communicator == nullptr
            ? Alone(*driver, link.get())
            : Together(*driver, key.communicator, static_cast<int*>(counters.memory), link.get()));
    JAX_DS_RETURN_IF_ERROR(Zero(*driver, counters.memory, sizeof(Counters)));
    JAX_DS_RETURN_IF_ERROR(driver->Check(driver->cuCtxSynchronize(), "cuCtxSynchronize"));
    link->counters = static_cast<Counters*>(counters.Keep());
    return Error::Success();
  });
  if (status.failure()) return status;
  return std::unique_ptr<const Link>(std::move(link));
}

}  // namespace

int NumSlots(Operation operation) {
  const bool low_latency =
      operation == Operation::kLowLatencyDispatch || operation == Operation::kLowLatencyCombine;
  return low_latency ? 2 : 1;
}

int64_t SizeClass(int64_t bytes) {
  int64_t unit = 1 << 19;
  while (15 * unit < bytes) unit *= 2;
  const int64_t units = (bytes + unit - 1) / unit;
  return (units < 8 ? 8 : units) * unit;
}

ErrorOr<const Link*> GetWindow(const WindowKey& key, int num_ranks) {
  Windows& windows = ProcessWindows();
  const MapKey at{key.communicator, key.ordinal, key.channel, static_cast<int>(key.operation),
                  key.bytes};
  {
    std::lock_guard<std::mutex> lock(windows.mutex);
    auto found = windows.links.find(at);
    if (found != windows.links.end()) return found->second.get();
  }
  // No other thread makes the same window: XLA runs one program at a time on a GPU's communicator.
  JAX_DS_ASSIGN_OR_RETURN(std::unique_ptr<const Link> made, MakeWindow(key, num_ranks));
  std::lock_guard<std::mutex> lock(windows.mutex);
  return windows.links.emplace(at, std::move(made)).first->second.get();
}

}  // namespace jax_ds::comm
