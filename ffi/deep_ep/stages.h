// The state and the stages that all custom calls of this room share.
#pragma once

#include <memory>
#include <utility>

#include "deep_ep/exchange.h"
#include "jit/launch.h"
#include "support/room.h"
#include "support/shape.h"
#include "support/stages.h"

namespace jax_ds {

template <>
struct StageContext<comm::CommunicatorContext> {
  using Type = xla::ffi::Extension<comm::Collectives>;
};

}  // namespace jax_ds

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

template <auto execute>
Target ExchangeTarget(const char* name, XLA_FFI_Handler* instantiate) {
  return {name, instantiate, PrepareStage<PrepareExchange>, InitializeStage<InitializeExchange>,
          ExecuteStage<execute>};
}

inline int64_t PayloadBytes(const Record& record) { return record.vectors * int64_t{16}; }

// `name` must hold `count` tokens of the record's payload, and `more` bytes.
Error CheckTokens(const char* name, const AnyBuffer& buffer, const Record& record, int64_t count,
                  int64_t more = 0);

template <typename Params>
Error LaunchExchange(const Exchange& exchange, int32_t ordinal, cuda::Stream stream,
                     const Params& params) {
  return jit::Launch(exchange.kernel(), ordinal, stream, {{exchange.grid()}, {kThreads}, {}},
                     params);
}

}  // namespace jax_ds::deep_ep
