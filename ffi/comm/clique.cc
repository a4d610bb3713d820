#include "comm/clique.h"

#include <string>

#include "comm/kernels/link.h"

namespace jax_ds::comm {
namespace {

constexpr auto kMode = xla::ffi::GroupMode::kFlattenedId;
// XLA's own collectives use the same communicator: all of ours run on their stream.
constexpr int64_t kCommunicationId = 0;

}  // namespace

Error ErrorPolicy::TakeError(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  std::string message = xla::ffi::internal::GetErrorMessage(api, error);
  xla::ffi::internal::DestroyError(api, error);
  return Internal("XLA's communicator: " + message);
}

ErrorOr<Groups> Groups::Make(xla::ffi::Span<const int64_t> ids, int64_t num_ranks) {
  if (num_ranks < 1 || num_ranks > kMaxRanks || ids.size() == 0 || ids.size() % num_ranks != 0) {
    return InvalidArgument("groups: must be groups of 1 to " + std::to_string(kMaxRanks) +
                           " ranks, got " + std::to_string(ids.size()) + " ids for groups of " +
                           std::to_string(num_ranks));
  }
  Groups groups;
  for (size_t at = 0; at < ids.size(); at += num_ranks) {
    groups.groups_.emplace_back(ids.begin() + at, ids.begin() + at + num_ranks);
  }
  return groups;
}

Error Groups::Request(CommunicatorContext& context) const {
  if (num_ranks() == 1) return Error::Success();
  return context.RequestCommunicator(kMode, groups_, kCommunicationId);
}

ErrorOr<NcclComm> Groups::Get(CommunicatorContext& context) const {
  if (num_ranks() == 1) return static_cast<NcclComm>(nullptr);
  JAX_DS_ASSIGN_OR_RETURN(XLA_FFI_Communicator * handle,
                          context.GetCommunicator(kMode, groups_, kCommunicationId));
  if (handle == nullptr) return Internal("XLA's communicator is null");
  return reinterpret_cast<NcclComm>(handle);
}

}  // namespace jax_ds::comm
