// The state and the stages that all custom calls of this room share.
#pragma once

#include <memory>
#include <utility>

#include "deep_ep/exchange.h"
#include "support/room.h"

namespace jax_ds::deep_ep {

struct ExchangeState : Stateful<ExchangeState> {
  explicit ExchangeState(std::unique_ptr<Exchange> exchange) : exchange(std::move(exchange)) {}
  std::unique_ptr<Exchange> exchange;
};

using Instantiated = ErrorOr<std::unique_ptr<ExchangeState>>;

inline Instantiated MakeState(const ExchangeConfig& config) {
  JAX_DS_ASSIGN_OR_RETURN(std::unique_ptr<Exchange> exchange, Exchange::Make(config));
  return std::make_unique<ExchangeState>(std::move(exchange));
}

inline Error PrepareExchange(ExchangeState* state, comm::CommunicatorContext context) {
  return state->exchange->Prepare(context);
}

inline Error InitializeExchange(ExchangeState* state, int32_t ordinal,
                                comm::CommunicatorContext context) {
  return state->exchange->Initialize(ordinal, context);
}

XLA_FFI_DEFINE_HANDLER(kPrepare, PrepareExchange,
                       xla::ffi::Ffi::BindPrepare()
                           .Ctx<xla::ffi::State<ExchangeState>>()
                           .Ctx<xla::ffi::Extension<comm::Collectives>>());
XLA_FFI_DEFINE_HANDLER(kInitialize, InitializeExchange,
                       xla::ffi::Ffi::BindInitialize()
                           .Ctx<xla::ffi::State<ExchangeState>>()
                           .Ctx<xla::ffi::DeviceOrdinal>()
                           .Ctx<xla::ffi::Extension<comm::Collectives>>());

// `name` must hold `count` tokens of the record's payload.
Error CheckTokens(const char* name, const xla::ffi::AnyBuffer& buffer, const Record& record,
                  int64_t count);

}  // namespace jax_ds::deep_ep
