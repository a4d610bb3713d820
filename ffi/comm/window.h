// Symmetric windows: memory of every rank that all ranks of a communicator can address.
#pragma once

#include <cstdint>

#include "comm/kernels/link.h"
#include "comm/nccl.h"
#include "support/status.h"

namespace jax_ds::comm {

// What a window is known by. Programs whose sizes fall in one class share it: each round uses its
// own layout of the staging, and a round begins only when the staging is free.
struct WindowKey {
  NcclComm communicator;  // null: one rank
  int ordinal;
  int64_t channel;
  Operation operation;
  int64_t bytes;  // of the staging of one slot, as SizeClass rounds them
};

// Slots of an operation's windows: two that take turns for low latency, one where memory counts.
int NumSlots(Operation operation);

// The staging's size, rounded up to 8 to 15 times a power of two: wastes at most an eighth.
int64_t SizeClass(int64_t bytes);

// The window of `key`, allocated and registered when first asked for. Then all ranks of the
// communicator must ask in the same order; if one of them cannot allocate, all get an error.
// For the Initialize stage: may block until the other ranks have come.
ErrorOr<const Link*> GetWindow(const WindowKey& key, int num_ranks);

}  // namespace jax_ds::comm
