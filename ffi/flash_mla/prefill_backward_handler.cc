#include "flash_mla/prefill_backward_handler.h"

#include <memory>

#include "flash_mla/prefill_operands.h"
#include "jit/compiler.h"
#include "support/stages.h"

namespace jax_ds::flash_mla {
namespace {

namespace ffi = xla::ffi;

// q, k, v, out and dout [..., Sq, H, V], lse and dlse [..., Sq, H], k_rope?, offsets? -> dq, dk,
// dv, statistics (QueryStatisticsStride) and counters [2] as workspace, dk_rope? [..., Sk, Hk,
// rope], the part of each head, and lists?
struct BackwardState : Stateful<BackwardState> {
  PrefillAttributes attributes;
  PrefillBackwardPlan plan;
  float scale;
  std::shared_ptr<const jit::Kernel> pack;  // null unless packed
  std::shared_ptr<const jit::Kernel> delta, dq, dkv;
};

ErrorOr<std::unique_ptr<BackwardState>> Instantiate(int64_t qk_dim, int64_t rope, int64_t v_dim,
                                                    bool causal, bool packed, float scale) {
  auto state = std::make_unique<BackwardState>();
  state->attributes = {qk_dim, rope, v_dim, causal, packed};
  JAX_DS_ASSIGN_OR_RETURN(state->plan, PlanPrefillBackward(state->attributes));
  state->scale = scale;
  if (packed) {
    JAX_DS_ASSIGN_OR_RETURN(state->pack, jit::GetKernel(PackSpec()));
  }
  JAX_DS_ASSIGN_OR_RETURN(state->delta, jit::GetKernel(DeltaSpec(state->plan.dq)));
  JAX_DS_ASSIGN_OR_RETURN(state->dq, jit::GetKernel(DqSpec(state->plan.dq)));
  JAX_DS_ASSIGN_OR_RETURN(state->dkv, jit::GetKernel(DkvSpec(state->plan.dkv)));
  return state;
}

Error Initialize(BackwardState* state, int32_t ordinal) {
  if (state->pack != nullptr) JAX_DS_RETURN_IF_ERROR(state->pack->Load(ordinal));
  JAX_DS_RETURN_IF_ERROR(state->delta->Load(ordinal));
  JAX_DS_RETURN_IF_ERROR(state->dq->Load(ordinal));
  return state->dkv->Load(ordinal);
}

struct Cotangents {
  AnyBuffer out, dout, lse, dlse;
};

struct Results {
  AnyBuffer dq, dk, dv, statistics, counters;
};

Error CheckBuffers(const PrefillOperands& o, const PrefillAttributes& a, const Cotangents& in,
                   const Results& r) {
  const DataType bf16 = DataType::BF16, f32 = DataType::F32;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("out", in.out, bf16, {o.queries, o.heads, a.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dout", in.dout, bf16, {o.queries, o.heads, a.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lse", in.lse, f32, {o.queries, o.heads}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dlse", in.dlse, f32, {o.queries, o.heads}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dq", r.dq, bf16, {o.queries, o.heads, a.qk_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dk", r.dk, bf16, {o.keys, o.kv_heads, a.qk_dim - a.rope}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dv", r.dv, bf16, {o.keys, o.kv_heads, a.v_dim}));
  const int stride = QueryStatisticsStride(static_cast<int>(o.queries));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("statistics", r.statistics, f32, {o.heads, 2, stride}));
  return CheckBuffer("counters", r.counters, DataType::S32, {2});
}

Error LaunchDelta(const BackwardState& state, int ordinal, cuda::Stream stream,
                  const PrefillOperands& o, const Cotangents& in, const Results& r) {
  const PrefillDeltaParams params = {in.out.untyped_data(),
                                     in.dout.untyped_data(),
                                     static_cast<const float*>(in.lse.untyped_data()),
                                     static_cast<const float*>(in.dlse.untyped_data()),
                                     static_cast<float*>(r.statistics.untyped_data()),
                                     static_cast<unsigned int*>(r.counters.untyped_data()),
                                     static_cast<int>(o.batch),
                                     static_cast<int>(o.queries),
                                     static_cast<int>(o.heads)};
  JAX_DS_ASSIGN_OR_RETURN(unsigned int grid, DeltaGrid(o.batch, o.heads, o.queries));
  return jit::Launch(*state.delta, ordinal, stream, {{grid}, {kDeltaThreads}, {}, kOverlapPrevious},
                     params);
}

// Boxes of `query_rows` queries and `key_rows` keys: what a kernel holds and what it walks.
Error EncodeMaps(const PrefillOperands& o, const AnyBuffer& dout, const AnyBuffer& statistics,
                 int query_rows, int key_rows, PrefillBackwardParams* params) {
  JAX_DS_ASSIGN_OR_RETURN(params->q, HeadMap(o.q, query_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->dout, HeadMap(dout, query_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->k, HeadMap(o.k, key_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->k_rope, HeadMap(o.k_rope, key_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->v, HeadMap(o.v, key_rows));
  const int64_t stride = 4 * QueryStatisticsStride(static_cast<int>(o.queries));
  JAX_DS_ASSIGN_OR_RETURN(params->statistics,
                          jit::EncodeTensorMap(jit::MapType::kFloat32, statistics.untyped_data(),
                                               {o.queries, 2, o.batch * o.heads},
                                               {stride, 2 * stride}, {query_rows, 2, 1}));
  return Error::Success();
}

Error Execute(BackwardState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q, AnyBuffer k,
              AnyBuffer v, AnyBuffer out, AnyBuffer dout, AnyBuffer lse, AnyBuffer dlse,
              ffi::RemainingArgs rest, ffi::Result<AnyBuffer> dq, ffi::Result<AnyBuffer> dk,
              ffi::Result<AnyBuffer> dv, ffi::Result<AnyBuffer> statistics,
              ffi::Result<AnyBuffer> counters, ffi::RemainingRets optional) {
  const PrefillAttributes& a = state->attributes;
  const Cotangents in = {out, dout, lse, dlse};
  const Results results = {*dq, *dk, *dv, *statistics, *counters};
  JAX_DS_ASSIGN_OR_RETURN(PrefillOperands o, PrefillOperands::Make(a, ordinal, q, k, v, rest));
  JAX_DS_RETURN_IF_ERROR(CheckBuffers(o, a, in, results));
  PrefillBackwardParams params = {};
  size_t next = 0;
  if (a.rope > 0) {
    JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> dk_rope, optional.get<AnyBuffer>(next++));
    JAX_DS_RETURN_IF_ERROR(
        CheckBuffer("dk_rope", *dk_rope, DataType::BF16, {o.keys, o.kv_heads, a.rope}));
    params.dk_rope = dk_rope->untyped_data();
  }
  params.rows = static_cast<const float*>(statistics->untyped_data());
  params.dq = dq->untyped_data();
  params.dk = dk->untyped_data();
  params.dv = dv->untyped_data();
  params.scale = state->scale;
  params.queries = o.OverQueries();
  params.keys = o.OverKeys();
  params.queries.counter = static_cast<unsigned int*>(counters->untyped_data());
  params.keys.counter = params.queries.counter + 1;

  if (a.packed) {
    JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> lists, optional.get<AnyBuffer>(next++));
    JAX_DS_RETURN_IF_ERROR(LaunchPack(*state->pack, ordinal, stream, o, a.causal, *lists,
                                      &params.queries, &params.keys));
  }
  JAX_DS_RETURN_IF_ERROR(LaunchDelta(*state, ordinal, stream, o, in, results));

  JAX_DS_RETURN_IF_ERROR(
      EncodeMaps(o, dout, *statistics, kBackwardHeld, state->plan.dq.walked, &params));
  JAX_DS_ASSIGN_OR_RETURN(unsigned int over_queries,
                          PrefillGrid(o.batch, o.heads, o.queries, a.packed, o.multiprocessors));
  JAX_DS_RETURN_IF_ERROR(jit::Launch(*state->dq, ordinal, stream,
                                     {{over_queries}, {kBackwardThreads}, {}, kOverlapPrevious},
                                     params));

  JAX_DS_RETURN_IF_ERROR(
      EncodeMaps(o, dout, *statistics, state->plan.dkv.walked, kBackwardHeld, &params));
  JAX_DS_ASSIGN_OR_RETURN(unsigned int over_keys,
                          PrefillGrid(o.batch, o.kv_heads, o.keys, a.packed, o.multiprocessors));
  return jit::Launch(*state->dkv, ordinal, stream,
                     {{over_keys}, {kBackwardThreads}, {}, kOverlapPrevious}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, BindPrefillAttributes());

}  // namespace

StateType PrefillBackwardStateType() {
  return {"jax_ds_flash_mla_prefill_backward_state", &BackwardState::id, BackwardState::info()};
}

Target PrefillBackwardTarget() {
  return {"jax_ds_flash_mla_prefill_backward", kInstantiate, nullptr, InitializeStage<Initialize>,
          ExecuteStage<Execute>};
}

}  // namespace jax_ds::flash_mla
