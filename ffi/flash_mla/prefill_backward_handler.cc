#include "flash_mla/prefill_backward_handler.h"

#include <memory>

#include "flash_mla/prefill_operands.h"
#include "jit/compiler.h"
#include "support/stages.h"

namespace jax_ds::flash_mla {
namespace {

namespace ffi = xla::ffi;

// q, k, v, out and dout [..., Sq, H, V], lse and dlse [..., Sq, H], k_rope?, offsets? -> dq, dk,
// dv, statistics (QueryStatisticsStride) and a counter [1] as workspace, dk_rope? [..., Sk, Hk,
// rope], the part of each head, and lists?
struct BackwardState : Stateful<BackwardState> {
  PrefillAttributes attributes;
  PrefillBackwardConfig config;
  float scale;
  std::shared_ptr<const jit::Kernel> pack;  // null unless packed
  std::shared_ptr<const jit::Kernel> dq, dkv;
};

ErrorOr<std::unique_ptr<BackwardState>> Instantiate(int64_t qk_dim, int64_t rope, int64_t v_dim,
                                                    bool causal, bool packed, float scale) {
  auto state = std::make_unique<BackwardState>();
  state->attributes = {qk_dim, rope, v_dim, causal, packed};
  JAX_DS_ASSIGN_OR_RETURN(state->config, PlanPrefillBackward(state->attributes));
  state->scale = scale;
  if (packed) {
    JAX_DS_ASSIGN_OR_RETURN(state->pack, jit::GetKernel(PackSpec()));
  }
  JAX_DS_ASSIGN_OR_RETURN(state->dq, jit::GetKernel(DqSpec(state->config)));
  JAX_DS_ASSIGN_OR_RETURN(state->dkv, jit::GetKernel(DkvSpec(state->config)));
  return state;
}

Error Initialize(BackwardState* state, int32_t ordinal) {
  if (state->pack != nullptr) JAX_DS_RETURN_IF_ERROR(state->pack->Load(ordinal));
  JAX_DS_RETURN_IF_ERROR(state->dq->Load(ordinal));
  return state->dkv->Load(ordinal);
}

struct Cotangents {
  AnyBuffer out, dout, lse, dlse;
};

struct Results {
  AnyBuffer dq, dk, dv, statistics, counter;
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
  return CheckBuffer("counter", r.counter, DataType::S32, {1});
}

Error EncodeMaps(const PrefillOperands& o, int64_t rope, const AnyBuffer& dout,
                 const AnyBuffer& statistics, PrefillBackwardParams* params) {
  JAX_DS_ASSIGN_OR_RETURN(params->q, HeadMap(o.q, kBackwardBox));
  JAX_DS_ASSIGN_OR_RETURN(params->dout, HeadMap(dout, kBackwardBox));
  JAX_DS_ASSIGN_OR_RETURN(params->k, HeadMap(o.k, kBackwardBox));
  if (rope > 0) {
    JAX_DS_ASSIGN_OR_RETURN(params->k_rope, HeadMap(o.k_rope, kBackwardBox));
  }
  JAX_DS_ASSIGN_OR_RETURN(params->v, HeadMap(o.v, kBackwardBox));
  const int64_t stride = 4 * QueryStatisticsStride(static_cast<int>(o.queries));
  JAX_DS_ASSIGN_OR_RETURN(params->statistics,
                          jit::EncodeTensorMap(jit::MapType::kFloat32, statistics.untyped_data(),
                                               {o.queries, 2, o.batch * o.heads},
                                               {stride, 2 * stride}, {kBackwardBox, 2, 1}));
  return Error::Success();
}

Error Execute(BackwardState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q, AnyBuffer k,
              AnyBuffer v, AnyBuffer out, AnyBuffer dout, AnyBuffer lse, AnyBuffer dlse,
              ffi::RemainingArgs rest, ffi::Result<AnyBuffer> dq, ffi::Result<AnyBuffer> dk,
              ffi::Result<AnyBuffer> dv, ffi::Result<AnyBuffer> statistics,
              ffi::Result<AnyBuffer> counter, ffi::RemainingRets optional) {
  const PrefillAttributes& a = state->attributes;
  const Cotangents in = {out, dout, lse, dlse};
  const Results results = {*dq, *dk, *dv, *statistics, *counter};
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
  params.known = static_cast<float*>(statistics->untyped_data());
  params.out = out.untyped_data();
  params.dout_rows = dout.untyped_data();
  params.lse = static_cast<const float*>(lse.untyped_data());
  params.dlse = static_cast<const float*>(dlse.untyped_data());
  params.dq = dq->untyped_data();
  params.dk = dk->untyped_data();
  params.dv = dv->untyped_data();
  params.scale = state->scale;
  params.queries = o.OverQueries();
  params.keys = o.OverKeys();
  params.keys.counter = static_cast<int*>(counter->untyped_data());

  if (a.packed) {
    JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> lists, optional.get<AnyBuffer>(next++));
    JAX_DS_RETURN_IF_ERROR(LaunchPack(*state->pack, ordinal, stream, o, a.causal, *lists,
                                      &params.queries, &params.keys));
  }

  JAX_DS_RETURN_IF_ERROR(EncodeMaps(o, a.rope, dout, *statistics, &params));
  JAX_DS_ASSIGN_OR_RETURN(unsigned int over_queries,
                          PrefillGrid(o.batch, o.heads, o.queries, a.packed, o.multiprocessors));
  JAX_DS_RETURN_IF_ERROR(jit::Launch(*state->dq, ordinal, stream,
                                     {{over_queries}, {kBackwardThreads}, {}, kOverlapPrevious},
                                     params));

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
