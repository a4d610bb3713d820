#include "comm/device.h"

#include <atomic>
#include <memory>

#include "support/driver.h"
#include "support/per_device.h"

namespace jax_ds::comm {
namespace {

// Kept to the end of the process: XLA may replay a graph that holds these addresses.
PerDevice<const DeviceRecord*>& ProcessRecords() {
  static auto* const records = new PerDevice<const DeviceRecord*>{};
  return *records;
}

std::atomic<int64_t> timeout_ns{60'000'000'000};

ErrorOr<DeviceRecord> Make(int ordinal) {
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  DeviceRecord record = {};
  Error status = driver->WithContext(ordinal, [&]() -> Error {
    void* host = nullptr;
    cuda::DevicePtr dead = 0, failure = 0;
    JAX_DS_RETURN_IF_ERROR(driver->Check(
        driver->cuMemHostAlloc(&host, sizeof(Failure), cuda::kHostAllocPortableMapped),
        "cuMemHostAlloc"));
    JAX_DS_RETURN_IF_ERROR(driver->Check(driver->cuMemHostGetDevicePointer(&failure, host, 0),
                                         "cuMemHostGetDevicePointer"));
    JAX_DS_RETURN_IF_ERROR(driver->Check(driver->cuMemAlloc(&dead, 256), "cuMemAlloc"));
    JAX_DS_RETURN_IF_ERROR(driver->Check(driver->cuMemsetD8(dead, 0, 256), "cuMemsetD8"));
    *static_cast<Failure*>(host) = Failure{};
    record.dead = reinterpret_cast<unsigned int*>(dead);
    record.failure = static_cast<const Failure*>(host);
    record.failure_on_device = reinterpret_cast<Failure*>(failure);
    return Error::Success();
  });
  if (status.failure()) return status;
  return record;
}

bool Complete(const Failure& failure) {
  return __atomic_load_n(&failure.complete, __ATOMIC_ACQUIRE) != 0;
}

const char* Name(int operation) {
  switch (static_cast<Operation>(operation)) {
    case Operation::kDispatch:
      return "dispatch";
    case Operation::kCombine:
      return "combine";
    case Operation::kLowLatencyDispatch:
      return "low_latency_dispatch";
    case Operation::kLowLatencyCombine:
      return "low_latency_combine";
  }
  return "an unknown operation";
}

}  // namespace

void SetTimeout(std::chrono::nanoseconds timeout) { timeout_ns = timeout.count(); }

std::chrono::nanoseconds Timeout() { return std::chrono::nanoseconds(timeout_ns.load()); }

ErrorOr<const DeviceRecord*> GetDeviceRecord(int ordinal) {
  JAX_DS_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  std::atomic<const DeviceRecord*>& record = ProcessRecords()[ordinal];
  const DeviceRecord* first = record.load();
  if (first != nullptr) return first;
  JAX_DS_ASSIGN_OR_RETURN(DeviceRecord made, Make(ordinal));
  auto mine = std::make_unique<const DeviceRecord>(made);
  // No lock while CUDA allocates. Where two threads made one, the first serves both, and the
  // other's few bytes stay allocated.
  if (record.compare_exchange_strong(first, mine.get())) return mine.release();
  return first;
}

std::string Describe(const Failure& failure) {
  const std::string where = std::string("deep_ep.") + Name(failure.operation) + ", rank " +
                            std::to_string(failure.rank) + ", round " +
                            std::to_string(failure.round) + ": ";
  const std::string peer = std::to_string(failure.peer);
  if (failure.fault == static_cast<int>(Fault::kRankMismatch)) {
    return where + "NCCL numbers this rank " + peer + ", the mesh does not; report it";
  }
  if (failure.fault == static_cast<int>(Fault::kNoSlot)) {
    return where +
           "earlier rounds of this channel are started and not finished; finish one before " +
           "the next _start, or give it another channel. Restart all ranks";
  }
  return where + "waited in vain for rank " + peer + " (JAX_DS_TIMEOUT_S); did it stop, or make " +
         "other calls than this rank? Restart all ranks";
}

Error CheckDevice(const DeviceRecord& record) {
  if (!Complete(*record.failure)) return Error::Success();
  return Internal(Describe(*record.failure));
}

std::vector<std::string> Failures() {
  std::vector<std::string> failures;
  for (const auto& made : ProcessRecords()) {
    const DeviceRecord* record = made.load();
    if (record != nullptr && Complete(*record->failure)) {
      failures.push_back(Describe(*record->failure));
    }
  }
  return failures;
}

}  // namespace jax_ds::comm
