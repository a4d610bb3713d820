// What every communicating call of this room has in common: groups, a window, a grid.
#pragma once

#include <cstdint>
#include <memory>

#include "comm/clique.h"
#include "comm/window.h"
#include "deep_ep/plan.h"
#include "jit/kernel.h"
#include "support/per_device.h"
#include "support/status.h"

namespace jax_ds::deep_ep {

// The attributes of a call, and what its plan makes of them.
struct ExchangeConfig {
  comm::Operation operation;
  xla::ffi::Span<const int64_t> groups;
  int64_t num_ranks, channel, num_tokens, num_sms;
  Record record;
  int64_t note_words;  // of each token, ahead of its record
  jit::KernelSpec spec;
  LowLatencySizes low_latency = {};  // of the low-latency calls
};

// Made by Instantiate, shared by all local devices of a program.
class Exchange {
 public:
  static ErrorOr<std::unique_ptr<Exchange>> Make(const ExchangeConfig& config);

  Error Prepare(comm::CommunicatorContext& context) const;

  // Finds or makes this device's window, and fails where an earlier wait of the device has expired.
  Error Initialize(int ordinal, comm::CommunicatorContext& context);

  // What Initialize found; takes no lock.
  ErrorOr<const comm::Link*> link(int ordinal) const;

  const jit::Kernel& kernel() const { return *kernel_; }
  unsigned int grid() const { return grid_; }
  const Record& record() const { return record_; }
  int64_t num_ranks() const { return groups_.num_ranks(); }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_slots() const { return num_ranks() * num_tokens_; }
  int64_t note_words() const { return note_words_; }
  const LowLatencySizes& low_latency() const { return low_latency_; }

 private:
  explicit Exchange(comm::Groups groups) : groups_(std::move(groups)) {}

  comm::Groups groups_;
  comm::Operation operation_;
  int64_t channel_, num_tokens_, note_words_, staging_bytes_;
  LowLatencySizes low_latency_;
  unsigned int grid_;
  Record record_;
  std::shared_ptr<const jit::Kernel> kernel_;
  PerDevice<const comm::Link*> links_ = {};
};

}  // namespace jax_ds::deep_ep
