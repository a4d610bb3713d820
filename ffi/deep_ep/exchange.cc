#include "deep_ep/exchange.h"

#include <limits>
#include <string>

#include "comm/device.h"
#include "deep_ep/stages.h"
#include "jit/compiler.h"

namespace jax_ds::deep_ep {

ErrorOr<std::unique_ptr<Exchange>> Exchange::Make(const ExchangeConfig& config) {
  JAX_DS_ASSIGN_OR_RETURN(comm::Groups groups, comm::Groups::Make(config.groups, config.num_ranks));
  const int64_t num_tokens = config.num_tokens;
  if (num_tokens < 1 || num_tokens > std::numeric_limits<int>::max() / config.num_ranks) {
    return InvalidArgument("num_tokens: must be at least 1 and below 2**31 on all ranks, got " +
                           std::to_string(num_tokens));
  }
  std::unique_ptr<Exchange> exchange(new Exchange(std::move(groups)));
  exchange->operation_ = config.operation;
  exchange->channel_ = config.channel;
  exchange->num_tokens_ = num_tokens;
  exchange->note_words_ = config.note_words;
  exchange->low_latency_ = config.low_latency;
  exchange->record_ = config.record;
  exchange->staging_bytes_ =
      StagingBytes(config.record, config.note_words, config.num_ranks, num_tokens);
  JAX_DS_ASSIGN_OR_RETURN(exchange->grid_, Grid(config.num_sms));
  JAX_DS_ASSIGN_OR_RETURN(exchange->kernel_, jit::GetKernel(config.spec));
  return exchange;
}

Error Exchange::Prepare(comm::CommunicatorContext& context) const {
  return groups_.Request(context);
}

Error Exchange::Initialize(int ordinal, comm::CommunicatorContext& context) {
  JAX_DS_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  JAX_DS_ASSIGN_OR_RETURN(const comm::DeviceRecord* record, comm::GetDeviceRecord(ordinal));
  JAX_DS_RETURN_IF_ERROR(comm::CheckDevice(*record));
  JAX_DS_RETURN_IF_ERROR(kernel_->Load(ordinal));
  JAX_DS_ASSIGN_OR_RETURN(comm::NcclComm communicator, groups_.Get(context));
  const int64_t bytes = comm::SizeClass(staging_bytes_);
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link,
                          comm::GetWindow({communicator, ordinal, channel_, operation_, bytes},
                                          static_cast<int>(num_ranks())));
  links_[ordinal].store(link, std::memory_order_release);
  return Error::Success();
}

ErrorOr<const comm::Link*> Exchange::link(int ordinal) const {
  JAX_DS_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  const comm::Link* link = links_[ordinal].load(std::memory_order_acquire);
  if (link == nullptr) return Internal("Execute ran before Initialize");
  return link;
}

Error CheckTokens(const char* name, const AnyBuffer& buffer, const Record& record, int64_t count,
                  int64_t more) {
  const int64_t payload = PayloadBytes(record);
  if (static_cast<int64_t>(buffer.size_bytes()) == count * payload + more) return Error::Success();
  const std::string behind = more == 0 ? "" : " and " + std::to_string(more) + " bytes behind them";
  return InvalidArgument(std::string(name) + ": must be " + std::to_string(count) + " tokens of " +
                         std::to_string(payload) + " bytes" + behind + ", got " +
                         std::to_string(buffer.size_bytes()) + " bytes");
}

}  // namespace jax_ds::deep_ep
