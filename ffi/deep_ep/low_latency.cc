#include "deep_ep/low_latency.h"

#include <string_view>
#include <utility>

#include "deep_ep/plan.h"
#include "deep_ep/stages.h"

namespace jax_ds::deep_ep {
namespace {

namespace ffi = xla::ffi;
using comm::Operation;

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

// Operands may be followed by more, which only order the call.
ErrorOr<AnyBuffer> Get(const ffi::RemainingArgs& operands, size_t i) {
  return operands.get<AnyBuffer>(i);
}

ErrorOr<AnyBuffer> Get(const ffi::RemainingRets& results, size_t i) {
  JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> result, results.get<AnyBuffer>(i));
  return *result;
}

// Checks operand or result `i`, and lets `to` point to it.
template <typename Buffers, typename T>
Error Take(const Buffers& buffers, size_t i, const char* name, DataType type,
           std::initializer_list<int64_t> dimensions, T** to) {
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer buffer, Get(buffers, i));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer(name, buffer, type, dimensions));
  *to = Pointer<T>(buffer);
  return Error::Success();
}

// Likewise with `count` tokens of the record's payload.
template <typename Buffers, typename T>
Error TakeRecords(const Buffers& buffers, size_t i, const char* name, const Record& record,
                  int64_t count, T** to) {
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer buffer, Get(buffers, i));
  JAX_DS_RETURN_IF_ERROR(CheckTokens(name, buffer, record, count));
  *to = Pointer<T>(buffer);
  return Error::Success();
}

// What a first half returns: the ticket, and from kInFlightHeader on what else is in `bytes`. It is
// as large as the portable implementation's; the rest is not touched.
template <typename Buffers>
Error TakeInFlight(const Buffers& buffers, size_t i, int64_t bytes, int** ticket) {
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer buffer, Get(buffers, i));
  if (static_cast<int64_t>(buffer.size_bytes()) < bytes) {
    return InvalidArgument("in_flight: too small");
  }
  *ticket = Pointer<int>(buffer);
  return Error::Success();
}

// ---- dispatch: x [T, H], ids [T, K] -> rows [L, region, H] and where they come from

Instantiated InstantiateDispatch(ffi::Span<const int64_t> groups, int64_t num_ranks,
                                 int64_t channel, int64_t num_tokens, int64_t num_sms,
                                 int64_t hidden, int64_t top_k, int64_t experts, int64_t region,
                                 std::string_view dtype, bool quantize,
                                 std::string_view half_name) {
  JAX_DS_ASSIGN_OR_RETURN(Half half, ToHalf(half_name));
  const LowLatencySizes sizes = {num_ranks, num_tokens, top_k, experts,
                                 region,    hidden,     half,  dtype == "bfloat16"};
  JAX_DS_RETURN_IF_ERROR(CheckLowLatency(sizes));
  JAX_DS_ASSIGN_OR_RETURN(jit::KernelSpec spec, LowLatencyDispatchSpec(dtype, quantize, sizes));
  JAX_DS_ASSIGN_OR_RETURN(Record record, MakeRecord(hidden * ElementBytes(dtype, quantize),
                                                    quantize ? Blocks128(hidden) : 0));
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

Error TakeTokens(const Exchange& exchange, const ffi::RemainingArgs& operands,
                 LowLatencyDispatchParams* params) {
  const int64_t num_tokens = exchange.num_tokens();
  const DataType type = exchange.low_latency().bfloat16 ? DataType::BF16 : DataType::F32;
  JAX_DS_RETURN_IF_ERROR(Take(operands, 0, "axis_index", DataType::S32, {}, &params->axis_index));
  JAX_DS_RETURN_IF_ERROR(Take(operands, 1, "x", type, {num_tokens, params->hidden}, &params->x));
  return Take(operands, 2, "expert_ids", DataType::S32, {num_tokens, params->top_k}, &params->ids);
}

// Results from `first` on.
Error TakeRows(const Exchange& exchange, const ffi::RemainingRets& results, size_t first,
               LowLatencyDispatchParams* params) {
  const LowLatencySizes& sizes = exchange.low_latency();
  const int64_t num_slots = exchange.num_slots(), num_rows = sizes.experts * sizes.region;
  const int64_t num_scales = params->record.num_scales;
  JAX_DS_RETURN_IF_ERROR(
      TakeRecords(results, first, "rows", params->record, num_rows, &params->rows));
  JAX_DS_RETURN_IF_ERROR(Take(results, first + 1, "group_sizes", DataType::S32, {sizes.experts},
                              &params->group_sizes));
  JAX_DS_RETURN_IF_ERROR(Take(results, first + 2, "row_of", DataType::S32,
                              {num_slots, params->columns}, &params->row_of));
  JAX_DS_RETURN_IF_ERROR(Take(results, first + 3, "column", DataType::S32,
                              {num_slots, params->top_k}, &params->column));
  if (num_scales == 0) return Error::Success();
  return Take(results, first + 4, "scales", DataType::F32, {num_rows, num_scales},
              &params->row_scales);
}

// Operands: axis_index, x, expert_ids; or in_flight. Results: needed (or in_flight), and the rows.
Error ExecuteDispatch(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                      ffi::RemainingArgs operands, ffi::RemainingRets results) {
  const Exchange& exchange = *state->exchange;
  const int64_t num_ranks = exchange.num_ranks(), num_tokens = exchange.num_tokens();
  JAX_DS_ASSIGN_OR_RETURN(LowLatencyDispatchParams params, DispatchSizes(exchange, ordinal));
  switch (exchange.low_latency().half) {
    case Half::kWhole:
      JAX_DS_RETURN_IF_ERROR(TakeTokens(exchange, operands, &params));
      JAX_DS_RETURN_IF_ERROR(
          Take(results, 0, "needed", DataType::PRED, {num_ranks, num_tokens}, &params.needed));
      JAX_DS_RETURN_IF_ERROR(TakeRows(exchange, results, 1, &params));
      break;
    case Half::kStart:
      JAX_DS_RETURN_IF_ERROR(TakeTokens(exchange, operands, &params));
      // One result, or XLA would await the call at once.
      JAX_DS_RETURN_IF_ERROR(
          TakeInFlight(results, 0, kInFlightHeader + num_ranks * num_tokens, &params.ticket));
      params.needed = reinterpret_cast<unsigned char*>(params.ticket) + kInFlightHeader;
      break;
    case Half::kFinish:
      JAX_DS_RETURN_IF_ERROR(TakeInFlight(operands, 0, kInFlightHeader, &params.ticket));
      JAX_DS_RETURN_IF_ERROR(TakeRows(exchange, results, 0, &params));
  }
  return LaunchExchange(exchange, ordinal, stream, params);
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

// ---- combine: rows [L, region, H], weights [T, K] -> y [T, H]

Instantiated InstantiateCombine(ffi::Span<const int64_t> groups, int64_t num_ranks, int64_t channel,
                                int64_t num_tokens, int64_t num_sms, int64_t hidden, int64_t top_k,
                                int64_t experts, int64_t region, std::string_view dtype,
                                std::string_view half_name) {
  JAX_DS_ASSIGN_OR_RETURN(Half half, ToHalf(half_name));
  const LowLatencySizes sizes = {num_ranks, num_tokens, top_k, experts, region, hidden, half};
  JAX_DS_RETURN_IF_ERROR(CheckLowLatency(sizes));
  JAX_DS_ASSIGN_OR_RETURN(jit::KernelSpec spec, LowLatencyCombineSpec(dtype, sizes));
  JAX_DS_ASSIGN_OR_RETURN(Record record, MakeRecord(hidden * ElementBytes(dtype, false), 0));
  return MakeState({Operation::kLowLatencyCombine, groups, num_ranks, channel, num_tokens, num_sms,
                    record, /*note_words=*/top_k, std::move(spec), sizes});
}

// Operands from 1 on.
Error TakeResults(const Exchange& exchange, const ffi::RemainingArgs& operands,
                  CombineParams* params) {
  const LowLatencySizes& sizes = exchange.low_latency();
  const int64_t num_slots = exchange.num_slots(), num_rows = sizes.experts * sizes.region;
  JAX_DS_RETURN_IF_ERROR(Take(operands, 1, "axis_index", DataType::S32, {}, &params->axis_index));
  JAX_DS_RETURN_IF_ERROR(
      Take(operands, 2, "row_of", DataType::S32, {num_slots, params->columns}, &params->row_of));
  JAX_DS_RETURN_IF_ERROR(
      Take(operands, 3, "column", DataType::S32, {num_slots, params->top_k}, &params->column));
  JAX_DS_RETURN_IF_ERROR(TakeRecords(operands, 4, "rows", params->record, num_rows, &params->rows));
  return Take(operands, 5, "weights", DataType::F32, {params->num_tokens, params->top_k},
              &params->weights);
}

// Operands: needed; axis_index, row_of, column, rows, weights; or in_flight. Result: y or
// in_flight.
Error ExecuteCombine(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                     ffi::RemainingArgs operands, ffi::RemainingRets results) {
  const Exchange& exchange = *state->exchange;
  const LowLatencySizes& sizes = exchange.low_latency();
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link, exchange.link(ordinal));
  CombineParams params = {};
  params.link = *link;
  params.record = exchange.record();
  params.num_tokens = Int(exchange.num_tokens());
  params.top_k = Int(sizes.top_k);
  params.columns = Int(sizes.columns());
  JAX_DS_RETURN_IF_ERROR(Take(operands, 0, "needed", DataType::PRED,
                              {exchange.num_ranks(), params.num_tokens}, &params.needed));
  if (sizes.half == Half::kFinish) {
    JAX_DS_RETURN_IF_ERROR(TakeInFlight(operands, 1, kInFlightHeader, &params.ticket));
  } else {
    JAX_DS_RETURN_IF_ERROR(TakeResults(exchange, operands, &params));
  }
  if (sizes.half == Half::kStart) {
    JAX_DS_RETURN_IF_ERROR(TakeInFlight(results, 0, kInFlightHeader, &params.ticket));
  } else {
    JAX_DS_RETURN_IF_ERROR(
        TakeRecords(results, 0, "y", params.record, params.num_tokens, &params.y));
  }
  return LaunchExchange(exchange, ordinal, stream, params);
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

}  // namespace

std::vector<Target> LowLatencyTargets() {
  std::vector<Target> targets;
  for (const char* name :
       {"jax_ds_deep_ep_low_latency_dispatch", "jax_ds_deep_ep_low_latency_dispatch_start",
        "jax_ds_deep_ep_low_latency_dispatch_finish"}) {
    targets.push_back(ExchangeTarget<ExecuteDispatch>(name, kInstantiateDispatch));
  }
  for (const char* name :
       {"jax_ds_deep_ep_low_latency_combine", "jax_ds_deep_ep_low_latency_combine_start",
        "jax_ds_deep_ep_low_latency_combine_finish"}) {
    targets.push_back(ExchangeTarget<ExecuteCombine>(name, kInstantiateCombine));
  }
  return targets;
}

}  // namespace jax_ds::deep_ep
