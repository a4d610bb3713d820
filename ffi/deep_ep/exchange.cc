#include "deep_ep/exchange.h"

#include <limits>
#include <string>

#include "comm/device.h"
#include "jit/compiler.h"

namespace jax_ds::deep_ep {

ErrorOr<std::unique_ptr<Exchange>> Exchange::Make(comm::Operation operation,
                                                  xla::ffi::Span<const int64_t> groups,
                                                  int64_t num_ranks, int64_t channel,
                                                  int64_t num_tokens, int64_t num_sms,
                                                  const Record& record, jit::KernelSpec spec) {
  JAX_DS_ASSIGN_OR_RETURN(comm::Groups cliques, comm::Groups::Make(groups, num_ranks));
  if (num_tokens < 1 || num_tokens > std::numeric_limits<int>::max() / num_ranks) {
    return InvalidArgument("num_tokens: must be at least 1 and below 2**31 on all ranks, got " +
                           std::to_string(num_tokens));
  }
  std::unique_ptr<Exchange> exchange(new Exchange(std::move(cliques)));
  exchange->operation_ = operation;
  exchange->channel_ = channel;
  exchange->num_tokens_ = num_tokens;
  exchange->record_ = record;
  JAX_DS_ASSIGN_OR_RETURN(exchange->grid_, Grid(num_sms));
  JAX_DS_ASSIGN_OR_RETURN(exchange->kernel_, jit::GetKernel(spec));
  return exchange;
}

Error Exchange::Prepare(comm::CommunicatorContext& context) const {
  return groups_.Request(context);
}

Error Exchange::Initialize(int ordinal, comm::CommunicatorContext& context) {
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return Internal("device ordinal " + std::to_string(ordinal) + " is out of range");
  }
  JAX_DS_ASSIGN_OR_RETURN(const comm::DeviceRecord* record, comm::GetDeviceRecord(ordinal));
  JAX_DS_RETURN_IF_ERROR(comm::CheckDevice(*record));
  JAX_DS_RETURN_IF_ERROR(kernel_->Load(ordinal));
  JAX_DS_ASSIGN_OR_RETURN(comm::NcclComm communicator, groups_.Get(context));
  const int64_t bytes = comm::SizeClass(StagingBytes(record_, num_ranks(), num_tokens_));
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link,
                          comm::GetWindow({communicator, ordinal, channel_, operation_, bytes},
                                          static_cast<int>(num_ranks())));
  links_[ordinal].store(link, std::memory_order_release);
  return Error::Success();
}

ErrorOr<const comm::Link*> Exchange::link(int ordinal) const {
  const comm::Link* link = ordinal >= 0 && ordinal < kMaxDevices
                               ? links_[ordinal].load(std::memory_order_acquire)
                               : nullptr;
  if (link == nullptr) return Internal("Execute ran before Initialize");
  return link;
}

}  // namespace jax_ds::deep_ep
