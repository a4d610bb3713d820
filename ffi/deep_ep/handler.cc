#include "deep_ep/handler.h"

#include <memory>
#include <string_view>
#include <utility>

#include "deep_ep/low_latency.h"
#include "deep_ep/plan.h"
#include "deep_ep/stages.h"

namespace jax_ds::deep_ep {
namespace {

namespace ffi = xla::ffi;
using comm::Operation;

Error CheckColumns(int64_t columns) {
  if (columns >= 1 && columns <= kMaxColumns) return Error::Success();
  return InvalidArgument("row_of: must have 1 to 32 columns, got " + std::to_string(columns));
}

// ---- dispatch: x [T, H] (and scales [T, KB]) -> rows [C, H] (and scales [C, KB]) ----------------

Instantiated InstantiateDispatch(ffi::Span<const int64_t> groups, int64_t num_ranks,
                                 int64_t channel, int64_t num_tokens, int64_t token_bytes,
                                 int64_t num_scales, int64_t num_sms) {
  JAX_DS_ASSIGN_OR_RETURN(Record record, MakeRecord(token_bytes, num_scales));
  return MakeState({Operation::kDispatch, groups, num_ranks, channel, num_tokens, num_sms, record,
                    /*note_words=*/0, DispatchSpec()});
}

Error TakeScales(const Record& record, int64_t num_tokens, int64_t capacity,
                 const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                 DispatchParams* params) {
  if (record.num_scales == 0) return Error::Success();
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer scales, args.get<AnyBuffer>(0));
  JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> row_scales, rets.get<AnyBuffer>(0));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("x.scales", scales, DataType::F32, {num_tokens, record.num_scales}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("rows.scales", *row_scales, DataType::F32, {capacity, record.num_scales}));
  params->scales = Pointer<const float>(scales);
  params->row_scales = Pointer<float>(*row_scales);
  return Error::Success();
}

Error ExecuteDispatch(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                      AnyBuffer axis_index, AnyBuffer needed, AnyBuffer row_source,
                      AnyBuffer row_of, AnyBuffer x, ffi::RemainingArgs args,
                      ffi::Result<AnyBuffer> rows, ffi::RemainingRets rets) {
  const Exchange& exchange = *state->exchange;
  const Record& record = exchange.record();
  const int64_t num_tokens = exchange.num_tokens();
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link, exchange.link(ordinal));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("axis_index", axis_index, DataType::S32, {}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("needed", needed, DataType::PRED, {exchange.num_ranks(), num_tokens}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("row_source", row_source, DataType::S32, {-1}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("row_of", row_of, DataType::S32, {exchange.num_slots(), -1}));
  const int64_t capacity = row_source.dimensions()[0], columns = row_of.dimensions()[1];
  JAX_DS_RETURN_IF_ERROR(CheckColumns(columns));
  JAX_DS_RETURN_IF_ERROR(CheckTokens("x", x, record, num_tokens));
  JAX_DS_RETURN_IF_ERROR(CheckTokens("rows", *rows, record, capacity));
  DispatchParams params = {};
  params.link = *link;
  params.axis_index = Pointer<const int>(axis_index);
  params.x = x.untyped_data();
  params.needed = Pointer<const unsigned char>(needed);
  params.row_source = Pointer<const int>(row_source);
  params.row_of = Pointer<const int>(row_of);
  params.rows = rows->untyped_data();
  params.record = record;
  params.num_tokens = Int(num_tokens);
  params.columns = Int(columns);
  params.capacity = Int(capacity);
  JAX_DS_RETURN_IF_ERROR(TakeScales(record, num_tokens, capacity, args, rets, &params));
  return LaunchExchange(exchange, ordinal, stream, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiateDispatch, InstantiateDispatch,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const int64_t>>("groups")
                           .Attr<int64_t>("num_ranks")
                           .Attr<int64_t>("channel")
                           .Attr<int64_t>("num_tokens")
                           .Attr<int64_t>("token_bytes")
                           .Attr<int64_t>("num_scales")
                           .Attr<int64_t>("num_sms"));

// ---- combine: rows [C, H] (and weights [T, K]) -> y [T, H] (and behind it those weights [B, J]) -

Instantiated InstantiateCombine(ffi::Span<const int64_t> groups, int64_t num_ranks, int64_t channel,
                                int64_t num_tokens, int64_t token_bytes, int64_t top_k,
                                std::string_view dtype, int64_t num_sms) {
  if (top_k < 1 || top_k > kMaxColumns) {
    return InvalidArgument("column: must have 1 to 32 columns, got " + std::to_string(top_k));
  }
  JAX_DS_ASSIGN_OR_RETURN(Record record, MakeRecord(token_bytes, 0));
  JAX_DS_ASSIGN_OR_RETURN(jit::KernelSpec spec, CombineSpec(dtype));
  return MakeState({Operation::kCombine, groups, num_ranks, channel, num_tokens, num_sms, record,
                    /*note_words=*/top_k, std::move(spec)});
}

// `rest` may hold one operand, the weights. Then they are sent to where the rows are, and are a
// result too, in one buffer with y: XLA awaits a call of two results at once.
Error ExecuteCombine(ExchangeState* state, int32_t ordinal, cuda::Stream stream,
                     AnyBuffer axis_index, AnyBuffer needed, AnyBuffer row_of, AnyBuffer column,
                     AnyBuffer rows, ffi::RemainingArgs rest, ffi::Result<AnyBuffer> y) {
  const Exchange& exchange = *state->exchange;
  const Record& record = exchange.record();
  const int64_t num_tokens = exchange.num_tokens(), num_slots = exchange.num_slots();
  JAX_DS_ASSIGN_OR_RETURN(const comm::Link* link, exchange.link(ordinal));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("axis_index", axis_index, DataType::S32, {}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("needed", needed, DataType::PRED, {exchange.num_ranks(), num_tokens}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("row_of", row_of, DataType::S32, {num_slots, -1}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("column", column, DataType::S32, {num_slots, exchange.note_words()}));
  const int64_t columns = row_of.dimensions()[1];
  JAX_DS_RETURN_IF_ERROR(CheckColumns(columns));
  JAX_DS_RETURN_IF_ERROR(CheckTokens("rows", rows, record, LeadingSize(rows, 1)));
  const int64_t by_column_bytes = rest.size() > 0 ? 4 * num_slots * columns : 0;
  JAX_DS_RETURN_IF_ERROR(CheckTokens("y", *y, record, num_tokens, by_column_bytes));
  CombineParams params = {};
  params.link = *link;
  params.axis_index = Pointer<const int>(axis_index);
  params.rows = rows.untyped_data();
  params.row_of = Pointer<const int>(row_of);
  params.column = Pointer<const int>(column);
  params.needed = Pointer<const unsigned char>(needed);
  params.y = y->untyped_data();
  params.record = record;
  params.num_tokens = Int(num_tokens);
  params.columns = Int(columns);
  params.top_k = Int(exchange.note_words());
  if (rest.size() > 0) {
    JAX_DS_ASSIGN_OR_RETURN(AnyBuffer weights, rest.get<AnyBuffer>(0));
    JAX_DS_RETURN_IF_ERROR(
        CheckBuffer("weights", weights, DataType::F32, {num_tokens, params.top_k}));
    params.weights = Pointer<const float>(weights);
    params.by_column =
        reinterpret_cast<float*>(Pointer<char>(*y) + num_tokens * PayloadBytes(record));
  }
  return LaunchExchange(exchange, ordinal, stream, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiateCombine, InstantiateCombine,
                       ffi::Ffi::BindInstantiate()
                           .Attr<ffi::Span<const int64_t>>("groups")
                           .Attr<int64_t>("num_ranks")
                           .Attr<int64_t>("channel")
                           .Attr<int64_t>("num_tokens")
                           .Attr<int64_t>("token_bytes")
                           .Attr<int64_t>("top_k")
                           .Attr<std::string_view>("dtype")
                           .Attr<int64_t>("num_sms"));

}  // namespace

Room GetRoom() {
  Room room = {"deep_ep",
               {{"jax_ds_deep_ep_exchange", &ExchangeState::id, ExchangeState::info()}},
               {ExchangeTarget<ExecuteDispatch>("jax_ds_deep_ep_dispatch", kInstantiateDispatch),
                ExchangeTarget<ExecuteCombine>("jax_ds_deep_ep_combine", kInstantiateCombine)},
               AllKernels()};
  for (const Target& target : LowLatencyTargets()) room.targets.push_back(target);
  return room;
}

}  // namespace jax_ds::deep_ep
