#include "deep_ep/low_latency.h"

#include <string_view>
#include <utility>

#include "deep_ep/plan.h"
#include "deep_ep/stages.h"
#include "jit/launch.h"
#include "support/shape.h"

namespace jax_ds::deep_ep {
namespace {

namespace ffi = xla::ffi;
using comm::Operation;

int Int(int64_t value) { return static_cast<int>(value); }

template <typename T>
T* Pointer(const AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

ErrorOr<Half> ToHalf(std::string_view half) {
  if (half == "whole") return Half::kWhole;
  if (half == "start") return Half::kStart;
  if (half == "finish") return Half::kFinish;
  return InvalidArgument("half: must be whole, start or finish, got " + std::string(half));
}

// Of a token's values as they are sent.
int64_t ElementBytes(std::string_view dtype, bool quantize) {
  return quantize ? 1 : dtype == "bfloat16" ? 2 : 4;
}

// The ticket is the first word of what a first half returns; the rest of it is not touched.
Error CheckTicket(const AnyBuffer& in_flight) {
  if (in_flight.size_bytes() >= 4) return Error::Success();
  return InvalidArgument("in_flight: too small");
}

template <typename Params>
Error LaunchOn(const Exchange& exchange, int32_t ordinal, cuda::Stream stream,
               const Params& params) {
  return jit::Launch(exchange.kernel(), ordinal, stream, {{exchange.grid()}, {kThreads}, {}},
                     params);
}

// Calls may have more operands, which only order them.

// ---- dispatch: x [T, H], ids [T, K] -> rows [L, region, H] and where they come from

Instantiated InstantiateDispatch(ffi::Span<const int64_t> groups, int64_t num_ranks,
                                 int64_t channel, int64_t num_tokens, int64_t num_sms,
                                 int64_t hidden, int64_t top_k, int64_t experts, int64_t region,
                                 std::string_view dtype, bool quantize,
                                 std::string_view half_name) {
  const LowLatencySizes sizes = {num_ranks, num_tokens, top_k, experts, region, hidden};
  JAX_DS_RETURN_IF_ERROR(CheckLowLatency(sizes));
  JAX_DS_ASSIGN_OR_RETURN(Half half, ToHalf(half_name));
  JAX_DS_ASSIGN_OR_RETURN(jit::KernelSpec spec,
                          LowLatencyDispatchSpec(dtype, quantize, half, sizes));
  JAX_DS_ASSIGN_OR_RETURN(Record record, MakeRecord(hidden * ElementBytes(dtype, quantize),
                                                    quantize ? (hidden + 127) / 128 : 0));
  return MakeState({Operation::kLowLatencyDispatch, groups, num_ranks, channel, num_tokens, num_sms,
                    record, /*note_words=*/top_k, std::move(spec), sizes});
}

ErrorOr<LowLatencyDispatchParams> DispatchSizes(const Exchange& exchange, int32_t ordinal) {
  const LowLatencySizes& sizes = exchange.low_latency();
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link, exchange.link(ordinal));
  LowLatencyDispatchParams params = {};
  params.link = *link;
  params.record = exchange.record();
  params.hidden = Int(sizes.hidden);
  params.num_tokens = Int(exchange.num_tokens());
  params.top_k = Int(sizes.top_k);
  params.columns = Int(sizes.columns());
  params.experts = Int(sizes.experts);
  params.region = Int(sizes.region);
  return params;
}

Error TakeTokens(const Exchange& exchange, const AnyBuffer& axis_index, const AnyBuffer& x,
                 const AnyBuffer& ids, const AnyBuffer& needed, LowLatencyDispatchParams* params) {
  const int64_t num_tokens = exchange.num_tokens();
  const auto dims = x.dimensions();
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("axis_index", axis_index, DataType::S32, {}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("x", x, x.element_type(), {num_tokens, params->hidden}));
  if (dims.size() != 2) return InvalidArgument("x: must have two dimensions");
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("expert_ids", ids, DataType::S32, {num_tokens, params->top_k}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("needed", needed, DataType::PRED, {exchange.num_ranks(), num_tokens}));
  params->axis_index = Pointer<int>(axis_index);
  params->x = x.untyped_data();
  params->ids = Pointer<int>(ids);
  params->needed = Pointer<unsigned char>(needed);
  return Error::Success();
}

Error TakeRows(const Exchange& exchange, const AnyBuffer& rows, const AnyBuffer& group_sizes,
               const AnyBuffer& row_of, const AnyBuffer& column, const ffi::RemainingRets& rest,
               LowLatencyDispatchParams* params) {
  const int64_t num_slots = exchange.num_slots(), experts = params->experts;
  const int64_t num_rows = experts * params->region;
  JAX_DS_RETURN_IF_ERROR(CheckTokens("rows", rows, params->record, num_rows));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("group_sizes", group_sizes, DataType::S32, {experts}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("row_of", row_of, DataType::S32, {num_slots, params->columns}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("column", column, DataType::S32, {num_slots, params->top_k}));
  params->rows = rows.untyped_data();
  params->group_sizes = Pointer<int>(group_sizes);
  params->row_of = Pointer<int>(row_of);
  params->column = Pointer<int>(column);
  if (params->record.num_scales == 0) return Error::Success();
  JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> scales, rest.get<AnyBuffer>(0));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("scales", *scales, DataType::F32, {num_rows, params->record.num_scales}));
  params->row_scales = Pointer<float>(*scales);
  return Error::Success();
}

Error ExecuteDispatch(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                      AnyBuffer axis_index, AnyBuffer x, AnyBuffer ids, ffi::RemainingArgs,
                      ffi::Result<AnyBuffer> needed, ffi::Result<AnyBuffer> rows,
                      ffi::Result<AnyBuffer> group_sizes, ffi::Result<AnyBuffer> row_of,
                      ffi::Result<AnyBuffer> column, ffi::RemainingRets rest) {
  const Exchange& exchange = *state->exchange;
  JAX_DS_ASSIGN_OR_RETURN(LowLatencyDispatchParams params, DispatchSizes(exchange, ordinal));
  JAX_DS_RETURN_IF_ERROR(TakeTokens(exchange, axis_index, x, ids, *needed, &params));
  JAX_DS_RETURN_IF_ERROR(TakeRows(exchange, *rows, *group_sizes, *row_of, *column, rest, &params));
  return LaunchOn(exchange, ordinal, stream, params);
}

Error ExecuteDispatchStart(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                           AnyBuffer axis_index, AnyBuffer x, AnyBuffer ids, ffi::RemainingArgs,
                           ffi::Result<AnyBuffer> needed, ffi::Result<AnyBuffer> in_flight) {
  const Exchange& exchange = *state->exchange;
  JAX_DS_ASSIGN_OR_RETURN(LowLatencyDispatchParams params, DispatchSizes(exchange, ordinal));
  JAX_DS_RETURN_IF_ERROR(TakeTokens(exchange, axis_index, x, ids, *needed, &params));
  JAX_DS_RETURN_IF_ERROR(CheckTicket(*in_flight));
  params.ticket = Pointer<int>(*in_flight);
  return LaunchOn(exchange, ordinal, stream, params);
}

Error ExecuteDispatchFinish(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                            AnyBuffer in_flight, ffi::RemainingArgs, ffi::Result<AnyBuffer> rows,
                            ffi::Result<AnyBuffer> group_sizes, ffi::Result<AnyBuffer> row_of,
                            ffi::Result<AnyBuffer> column, ffi::RemainingRets rest) {
  const Exchange& exchange = *state->exchange;
  JAX_DS_ASSIGN_OR_RETURN(LowLatencyDispatchParams params, DispatchSizes(exchange, ordinal));
  JAX_DS_RETURN_IF_ERROR(TakeRows(exchange, *rows, *group_sizes, *row_of, *column, rest, &params));
  JAX_DS_RETURN_IF_ERROR(CheckTicket(in_flight));
  params.ticket = Pointer<int>(in_flight);
  return LaunchOn(exchange, ordinal, stream, params);
}

// What the three calls' Execute stages have in common.
auto BindDispatch() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<ExchangeState>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::PlatformStream<cuda::Stream>>();
}

XLA_FFI_DEFINE_HANDLER(kInstantiateDispatch, InstantiateDispatch,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const int64_t>>("groups")
                           .Attr<int64_t>("num_ranks")
                           .Attr<int64_t>("channel")
                           .Attr<int64_t>("num_tokens")
                           .Attr<int64_t>("num_sms")
                           .Attr<int64_t>("hidden")
                           .Attr<int64_t>("top_k")
                           .Attr<int64_t>("experts")
                           .Attr<int64_t>("region")
                           .Attr<std::string_view>("dtype")
                           .Attr<bool>("quantize")
                           .Attr<std::string_view>("half"));
XLA_FFI_DEFINE_HANDLER(kExecuteDispatch, ExecuteDispatch,
                       BindDispatch()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteDispatchStart, ExecuteDispatchStart,
                       BindDispatch()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteDispatchFinish, ExecuteDispatchFinish,
                       BindDispatch()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- combine: rows [L, region, H], weights [T, K] -> y [T, H]

Instantiated InstantiateCombine(ffi::Span<const int64_t> groups, int64_t num_ranks, int64_t channel,
                                int64_t num_tokens, int64_t num_sms, int64_t hidden, int64_t top_k,
                                int64_t experts, int64_t region, std::string_view dtype,
                                std::string_view half_name) {
  const LowLatencySizes sizes = {num_ranks, num_tokens, top_k, experts, region, hidden};
  JAX_DS_RETURN_IF_ERROR(CheckLowLatency(sizes));
  JAX_DS_ASSIGN_OR_RETURN(Half half, ToHalf(half_name));
  JAX_DS_ASSIGN_OR_RETURN(jit::KernelSpec spec, LowLatencyCombineSpec(dtype, half, sizes));
  JAX_DS_ASSIGN_OR_RETURN(Record record, MakeRecord(hidden * ElementBytes(dtype, false), 0));
  return MakeState({Operation::kLowLatencyCombine, groups, num_ranks, channel, num_tokens, num_sms,
                    record, /*note_words=*/top_k, std::move(spec), sizes});
}

ErrorOr<CombineParams> CombineSizes(const Exchange& exchange, int32_t ordinal,
                                    const AnyBuffer& needed) {
  const LowLatencySizes& sizes = exchange.low_latency();
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link, exchange.link(ordinal));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("needed", needed, DataType::PRED, {exchange.num_ranks(), exchange.num_tokens()}));
  CombineParams params = {};
  params.link = *link;
  params.needed = Pointer<unsigned char>(needed);
  params.record = exchange.record();
  params.num_tokens = Int(exchange.num_tokens());
  params.top_k = Int(sizes.top_k);
  params.columns = Int(sizes.columns());
  return params;
}

Error TakeResults(const Exchange& exchange, const AnyBuffer& axis_index, const AnyBuffer& row_of,
                  const AnyBuffer& column, const AnyBuffer& rows, const AnyBuffer& weights,
                  CombineParams* params) {
  const int64_t num_slots = exchange.num_slots();
  const LowLatencySizes& sizes = exchange.low_latency();
  const int64_t num_rows = sizes.experts * sizes.region;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("axis_index", axis_index, DataType::S32, {}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("row_of", row_of, DataType::S32, {num_slots, params->columns}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("column", column, DataType::S32, {num_slots, params->top_k}));
  JAX_DS_RETURN_IF_ERROR(CheckTokens("rows", rows, params->record, num_rows));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("weights", weights, DataType::F32, {params->num_tokens, params->top_k}));
  params->axis_index = Pointer<int>(axis_index);
  params->row_of = Pointer<int>(row_of);
  params->column = Pointer<int>(column);
  params->rows = rows.untyped_data();
  params->weights = Pointer<float>(weights);
  return Error::Success();
}

Error ExecuteCombine(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                     AnyBuffer axis_index, AnyBuffer needed, AnyBuffer row_of, AnyBuffer column,
                     AnyBuffer rows, AnyBuffer weights, ffi::RemainingArgs,
                     ffi::Result<AnyBuffer> y) {
  const Exchange& exchange = *state->exchange;
  JAX_DS_ASSIGN_OR_RETURN(CombineParams params, CombineSizes(exchange, ordinal, needed));
  JAX_DS_RETURN_IF_ERROR(TakeResults(exchange, axis_index, row_of, column, rows, weights, &params));
  JAX_DS_RETURN_IF_ERROR(CheckTokens("y", *y, params.record, params.num_tokens));
  params.y = y->untyped_data();
  return LaunchOn(exchange, ordinal, stream, params);
}

Error ExecuteCombineStart(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                          AnyBuffer axis_index, AnyBuffer needed, AnyBuffer row_of,
                          AnyBuffer column, AnyBuffer rows, AnyBuffer weights, ffi::RemainingArgs,
                          ffi::Result<AnyBuffer> in_flight) {
  const Exchange& exchange = *state->exchange;
  JAX_DS_ASSIGN_OR_RETURN(CombineParams params, CombineSizes(exchange, ordinal, needed));
  JAX_DS_RETURN_IF_ERROR(TakeResults(exchange, axis_index, row_of, column, rows, weights, &params));
  JAX_DS_RETURN_IF_ERROR(CheckTicket(*in_flight));
  params.ticket = Pointer<int>(*in_flight);
  return LaunchOn(exchange, ordinal, stream, params);
}

Error ExecuteCombineFinish(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                           AnyBuffer needed, AnyBuffer in_flight, ffi::RemainingArgs,
                           ffi::Result<AnyBuffer> y) {
  const Exchange& exchange = *state->exchange;
  JAX_DS_ASSIGN_OR_RETURN(CombineParams params, CombineSizes(exchange, ordinal, needed));
  JAX_DS_RETURN_IF_ERROR(CheckTicket(in_flight));
  JAX_DS_RETURN_IF_ERROR(CheckTokens("y", *y, params.record, params.num_tokens));
  params.ticket = Pointer<int>(in_flight);
  params.y = y->untyped_data();
  return LaunchOn(exchange, ordinal, stream, params);
}

auto BindCombine() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<ExchangeState>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::PlatformStream<cuda::Stream>>();
}

auto BindCombineWithRows() {
  return BindCombine()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .RemainingArgs()
      .Ret<AnyBuffer>();
}

XLA_FFI_DEFINE_HANDLER(kInstantiateCombine, InstantiateCombine,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const int64_t>>("groups")
                           .Attr<int64_t>("num_ranks")
                           .Attr<int64_t>("channel")
                           .Attr<int64_t>("num_tokens")
                           .Attr<int64_t>("num_sms")
                           .Attr<int64_t>("hidden")
                           .Attr<int64_t>("top_k")
                           .Attr<int64_t>("experts")
                           .Attr<int64_t>("region")
                           .Attr<std::string_view>("dtype")
                           .Attr<std::string_view>("half"));
XLA_FFI_DEFINE_HANDLER(kExecuteCombine, ExecuteCombine, BindCombineWithRows(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteCombineStart, ExecuteCombineStart, BindCombineWithRows(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(
    kExecuteCombineFinish, ExecuteCombineFinish,
    BindCombine().Arg<AnyBuffer>().Arg<AnyBuffer>().RemainingArgs().Ret<AnyBuffer>(),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace

std::vector<Target> LowLatencyTargets() {
  const auto target = [](const char* name, XLA_FFI_Handler* instantiate, XLA_FFI_Handler* execute) {
    return Target{name, instantiate, kPrepare, kInitialize, execute};
  };
  return {
      target("jax_ds_deep_ep_low_latency_dispatch", kInstantiateDispatch, kExecuteDispatch),
      target("jax_ds_deep_ep_low_latency_dispatch_start", kInstantiateDispatch,
             kExecuteDispatchStart),
      target("jax_ds_deep_ep_low_latency_dispatch_finish", kInstantiateDispatch,
             kExecuteDispatchFinish),
      target("jax_ds_deep_ep_low_latency_combine", kInstantiateCombine, kExecuteCombine),
      target("jax_ds_deep_ep_low_latency_combine_start", kInstantiateCombine, kExecuteCombineStart),
      target("jax_ds_deep_ep_low_latency_combine_finish", kInstantiateCombine,
             kExecuteCombineFinish)};
}

}  // namespace jax_ds::deep_ep
