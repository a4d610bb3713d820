// What all communication kernels of one GPU share: the dead word and the failure record.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "comm/kernels/link.h"
#include "support/status.h"

namespace jax_ds::comm {

// The longest wait for a peer. Set once by Python, before any handler runs.
void SetTimeout(std::chrono::nanoseconds timeout);
std::chrono::nanoseconds Timeout();

struct DeviceRecord {
  unsigned int* dead;          // device memory
  const Failure* failure;      // pinned host memory, as the host sees it
  Failure* failure_on_device;  // the same, as kernels do
};

// The record of a local GPU, made when first asked for; it lives as long as the process.
ErrorOr<const DeviceRecord*> GetDeviceRecord(int ordinal);

// An error if a wait of this GPU has ever expired.
Error CheckDevice(const DeviceRecord& record);

// The failures of all local GPUs, one sentence each.
std::vector<std::string> Failures();

std::string Describe(const Failure& failure);

}  // namespace jax_ds::comm
