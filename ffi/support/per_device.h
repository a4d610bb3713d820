// A value for every local device: Initialize writes it, Execute reads it, without a lock.
#pragma once

#include <array>
#include <atomic>
#include <string>

#include "support/status.h"

namespace jax_ds {

constexpr int kMaxDevices = 64;

// By ordinal; zero at first.
template <typename T>
using PerDevice = std::array<std::atomic<T>, kMaxDevices>;

inline Error CheckOrdinal(int ordinal) {
  if (ordinal >= 0 && ordinal < kMaxDevices) return Error::Success();
  return Internal("device ordinal " + std::to_string(ordinal) + " is out of range");
}

}  // namespace jax_ds
