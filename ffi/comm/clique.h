// XLA's communicator for a group of ranks, through the collectives extension of the FFI.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/nccl.h"
#include "support/status.h"
#include "xla/ffi/api/collectives_api.h"

namespace jax_ds::comm {

// How the extension's wrapper reports errors outside XLA.
struct ErrorPolicy {
  using Status = Error;
  template <typename T>
  using StatusOr = ErrorOr<T>;
  static Error Ok() { return Error::Success(); }
  static Error TakeError(const XLA_FFI_Api* api, XLA_FFI_Error* error);
};

using CommunicatorContext = xla::ffi::internal::CommunicatorContextBase<ErrorPolicy>;

// Bound as Ctx<xla::ffi::Extension<Collectives>>(). Later minor versions only add to the structure.
struct Collectives : xla::ffi::internal::CollectivesExtensionBase<CommunicatorContext> {
  static bool Support(int32_t major, int32_t minor) {
    return major == kMajorVersion && minor >= kMinorVersion;
  }
};

// The groups of ranks that exchange records, by position in the mesh's flat list of devices; every
// rank is in one. Groups of one rank need no communicator.
class Groups {
 public:
  // `ids`: the groups one after another, `num_ranks` each.
  static ErrorOr<Groups> Make(xla::ffi::Span<const int64_t> ids, int64_t num_ranks);

  // In the Prepare stage.
  Error Request(CommunicatorContext& context) const;

  // In the Initialize stage; null for groups of one rank.
  ErrorOr<NcclComm> Get(CommunicatorContext& context) const;

  int num_ranks() const { return static_cast<int>(groups_.front().size()); }

 private:
  std::vector<std::vector<int64_t>> groups_;
};

}  // namespace jax_ds::comm
