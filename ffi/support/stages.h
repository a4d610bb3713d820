// Handlers of a custom call's stages, bound as their functions' parameters say.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "support/cuda.h"
#include "support/status.h"

namespace jax_ds {

// What a parameter of a stage that is no buffer is bound to; specialise it for others.
template <typename Parameter>
struct StageContext;
template <typename State>
struct StageContext<State*> {
  using Type = xla::ffi::State<State>;
};
template <>
struct StageContext<cuda::Stream> {
  using Type = xla::ffi::PlatformStream<cuda::Stream>;
};
template <>
struct StageContext<int32_t> {
  using Type = xla::ffi::DeviceOrdinal;
};

template <typename Parameter, typename Binding>
auto BindParameter(Binding&& binding) {
  using namespace xla::ffi;
  if constexpr (std::is_same_v<Parameter, AnyBuffer>) {
    return std::move(binding).template Arg<AnyBuffer>();
  } else if constexpr (std::is_same_v<Parameter, RemainingArgs>) {
    return std::move(binding).RemainingArgs();
  } else if constexpr (std::is_same_v<Parameter, Result<AnyBuffer>>) {
    return std::move(binding).template Ret<AnyBuffer>();
  } else if constexpr (std::is_same_v<Parameter, RemainingRets>) {
    return std::move(binding).RemainingRets();
  } else {
    return std::move(binding).template Ctx<typename StageContext<Parameter>::Type>();
  }
}

template <typename First, typename... Rest, typename Binding>
auto BindParameters(Binding&& binding) {
  if constexpr (sizeof...(Rest) == 0) {
    return BindParameter<First>(std::move(binding));
  } else {
    return BindParameters<Rest...>(BindParameter<First>(std::move(binding)));
  }
}

template <xla::ffi::ExecutionStage stage, typename... Parameters>
auto MakeHandler(Error (*function)(Parameters...),
                 std::initializer_list<xla::ffi::Traits> traits = {}) {
  return BindParameters<Parameters...>(xla::ffi::Ffi::Bind<stage>()).To(function, traits);
}

// The handlers of functions `Error Initialize(State*, int32_t ordinal)` and `Error Execute(State*,
// int32_t ordinal, cuda::Stream, AnyBuffer lhs, ..., Result<AnyBuffer> out)`:
// `Target{"jax_ds_gemm", kInstantiate, nullptr, InitializeStage<Initialize>,
// ExecuteStage<Execute>}`. Instantiate binds names of attributes, so it spells them out.
template <auto function>
XLA_FFI_Error* PrepareStage(XLA_FFI_CallFrame* frame) {
  static auto* handler = MakeHandler<xla::ffi::ExecutionStage::kPrepare>(function).release();
  return handler->Call(frame);
}

template <auto function>
XLA_FFI_Error* InitializeStage(XLA_FFI_CallFrame* frame) {
  static auto* handler = MakeHandler<xla::ffi::ExecutionStage::kInitialize>(function).release();
  return handler->Call(frame);
}

// Every Execute may be captured in a command buffer.
template <auto function>
XLA_FFI_Error* ExecuteStage(XLA_FFI_CallFrame* frame) {
  static auto* handler = MakeHandler<xla::ffi::ExecutionStage::kExecute>(
                             function, {xla::ffi::Traits::kCmdBufferCompatible})
                             .release();
  return handler->Call(frame);
}

}  // namespace jax_ds
