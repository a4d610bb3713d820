#include "flash_mla/prefill_handler.h"

#include <memory>

#include "flash_mla/prefill_plan.h"
#include "jit/compiler.h"
#include "jit/launch.h"
#include "jit/tensor_map.h"
#include "support/driver.h"
#include "support/shape.h"

namespace jax_ds::flash_mla {
namespace {

namespace ffi = xla::ffi;

constexpr int kL2Promotion128 = 2;
constexpr bool kOverlapPrevious = true;

// A map of x: bf16 [..., S, H, D] for boxes of `rows` tokens and 64 columns of one head.
ErrorOr<TensorMap> HeadMap(const AnyBuffer& x, int rows) {
  auto dims = x.dimensions();
  const size_t n = dims.size();
  const int64_t tokens = dims[n - 3], heads = dims[n - 2], columns = dims[n - 1];
  return jit::EncodeTensorMap(jit::MapType::kBfloat16, x.untyped_data(),
                              {columns, heads, tokens, LeadingSize(x, 3)},
                              {columns * 2, heads * columns * 2, tokens * heads * columns * 2},
                              {64, 1, rows, 1}, {jit::Swizzle::k128B, kL2Promotion128});
}

// Sizes of a call, checked: q [..., Sq, H, D], k [..., Sk, Hk, D - rope], v [..., Sk, Hk, V] and,
// where there is a shared part, k_rope [..., Sk, 1, rope].
struct Sizes {
  int64_t batch, queries, heads, keys, kv_heads;
  int multiprocessors;

  template <typename Params>
  void Fill(Params* params) const {
    params->batch = static_cast<int>(batch);
    params->queries = static_cast<int>(queries);
    params->keys = static_cast<int>(keys);
    params->heads = static_cast<int>(heads);
    params->kv_heads = static_cast<int>(kv_heads);
  }
};

template <typename Config>
ErrorOr<Sizes> CheckOperands(const Config& c, int ordinal, const AnyBuffer& q, const AnyBuffer& k,
                             const AnyBuffer& v, const AnyBuffer& rope) {
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("q", q, DataType::BF16, {-1, -1, c.qk_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("k", k, DataType::BF16, {-1, -1, c.qk_dim - c.rope}));
  const size_t n = q.dimensions().size();
  Sizes s;
  s.batch = LeadingSize(q, 3);
  s.queries = q.dimensions()[n - 3];
  s.heads = q.dimensions()[n - 2];
  s.keys = k.dimensions()[k.dimensions().size() - 3];
  s.kv_heads = k.dimensions()[k.dimensions().size() - 2];
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("v", v, DataType::BF16, {s.keys, s.kv_heads, c.v_dim}));
  if (c.rope > 0) {
    JAX_DS_RETURN_IF_ERROR(CheckBuffer("k_rope", rope, DataType::BF16, {s.keys, 1, c.rope}));
  }
  if (s.kv_heads == 0 || s.heads % s.kv_heads != 0 || LeadingSize(k, 3) != s.batch) {
    return InvalidArgument("k: heads must divide those of q, and the batch must be its own");
  }
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(s.multiprocessors,
                          driver->DeviceAttribute(ordinal, cuda::kMultiprocessorCount));
  return s;
}

// The optional last operand k_rope; k stands in for it, unread, where heads share nothing.
ErrorOr<AnyBuffer> Rope(int rope, const AnyBuffer& k, const ffi::RemainingArgs& rest) {
  if (rope == 0) return k;
  return rest.get<AnyBuffer>(0);
}

// ---- forward: q, k, v, k_rope? -> out [..., Sq, H, V], lse [..., Sq, H]
// ---------------------------

struct PrefillState : Stateful<PrefillState> {
  PrefillConfig config;
  float scale;
  std::shared_ptr<const jit::Kernel> kernel;
};

ErrorOr<std::unique_ptr<PrefillState>> Instantiate(int64_t qk_dim, int64_t rope, int64_t v_dim,
                                                   bool causal, float scale) {
  auto state = std::make_unique<PrefillState>();
  JAX_DS_ASSIGN_OR_RETURN(state->config, PlanPrefill(qk_dim, rope, v_dim, causal));
  state->scale = scale;
  JAX_DS_ASSIGN_OR_RETURN(state->kernel, jit::GetKernel(PrefillSpec(state->config)));
  return state;
}

Error Initialize(PrefillState* state, int32_t ordinal) { return state->kernel->Load(ordinal); }

Error Execute(PrefillState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q, AnyBuffer k,
              AnyBuffer v, ffi::RemainingArgs rest, ffi::Result<AnyBuffer> out,
              ffi::Result<AnyBuffer> lse) {
  const PrefillConfig& c = state->config;
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer rope, Rope(c.rope, k, rest));
  JAX_DS_ASSIGN_OR_RETURN(Sizes sizes, CheckOperands(c, ordinal, q, k, v, rope));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("out", *out, DataType::BF16, {sizes.queries, sizes.heads, c.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lse", *lse, DataType::F32, {sizes.queries, sizes.heads}));
  JAX_DS_ASSIGN_OR_RETURN(
      PrefillLaunch launch,
      LaunchPrefill(sizes.batch, sizes.heads, sizes.queries, sizes.multiprocessors));
  PrefillParams params = {};
  JAX_DS_ASSIGN_OR_RETURN(params.q, HeadMap(q, kPrefillBlockM));
  JAX_DS_ASSIGN_OR_RETURN(params.k, HeadMap(k, c.block_n));
  JAX_DS_ASSIGN_OR_RETURN(params.k_rope, HeadMap(rope, c.block_n));
  JAX_DS_ASSIGN_OR_RETURN(params.v, HeadMap(v, c.block_n));
  params.out = out->untyped_data();
  params.lse = static_cast<float*>(lse->untyped_data());
  sizes.Fill(&params);
  params.section = launch.section;
  params.scale_log2 = state->scale * 1.4426950408889634f;
  return jit::Launch(*state->kernel, ordinal, stream,
                     {{launch.grid}, {kPrefillThreads}, {}, kOverlapPrevious}, params);
}

// ---- backward: q, k, v, dout [..., Sq, H, V], lse and delta [..., H, Sq], k_rope?
// ---- -> dq, dk, dv, dk_rope? [..., Sk, Hk, rope], each head's part
// --------------------------------

struct BackwardState : Stateful<BackwardState> {
  PrefillBackwardPlan plan;
  float scale;
  std::shared_ptr<const jit::Kernel> dq, dkv;
};

ErrorOr<std::unique_ptr<BackwardState>> InstantiateBackward(int64_t qk_dim, int64_t rope,
                                                            int64_t v_dim, bool causal,
                                                            float scale) {
  auto state = std::make_unique<BackwardState>();
  JAX_DS_ASSIGN_OR_RETURN(state->plan, PlanPrefillBackward(qk_dim, rope, v_dim, causal));
  state->scale = scale;
  JAX_DS_ASSIGN_OR_RETURN(state->dq, jit::GetKernel(DqSpec(state->plan.dq)));
  JAX_DS_ASSIGN_OR_RETURN(state->dkv, jit::GetKernel(DkvSpec(state->plan.dkv)));
  return state;
}

Error InitializeBackward(BackwardState* state, int32_t ordinal) {
  JAX_DS_RETURN_IF_ERROR(state->dq->Load(ordinal));
  return state->dkv->Load(ordinal);
}

// Boxes of `query_rows` queries and `key_rows` keys: what a kernel holds and what it walks.
Error EncodeMaps(const AnyBuffer& q, const AnyBuffer& dout, const AnyBuffer& k,
                 const AnyBuffer& rope, const AnyBuffer& v, int query_rows, int key_rows,
                 PrefillBackwardParams* params) {
  JAX_DS_ASSIGN_OR_RETURN(params->q, HeadMap(q, query_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->dout, HeadMap(dout, query_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->k, HeadMap(k, key_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->k_rope, HeadMap(rope, key_rows));
  JAX_DS_ASSIGN_OR_RETURN(params->v, HeadMap(v, key_rows));
  return Error::Success();
}

Error ExecuteBackward(BackwardState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q,
                      AnyBuffer k, AnyBuffer v, AnyBuffer dout, AnyBuffer lse, AnyBuffer delta,
                      ffi::RemainingArgs rest, ffi::Result<AnyBuffer> dq, ffi::Result<AnyBuffer> dk,
                      ffi::Result<AnyBuffer> dv, ffi::RemainingRets rope_rets) {
  const PrefillBackwardConfig& c = state->plan.dq;
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer rope, Rope(c.rope, k, rest));
  JAX_DS_ASSIGN_OR_RETURN(Sizes s, CheckOperands(c, ordinal, q, k, v, rope));
  const DataType bf16 = DataType::BF16, f32 = DataType::F32;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dout", dout, bf16, {s.queries, s.heads, c.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lse", lse, f32, {s.heads, s.queries}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("delta", delta, f32, {s.heads, s.queries}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dq", *dq, bf16, {s.queries, s.heads, c.qk_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dk", *dk, bf16, {s.keys, s.kv_heads, c.qk_dim - c.rope}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("dv", *dv, bf16, {s.keys, s.kv_heads, c.v_dim}));
  PrefillBackwardParams params = {};
  if (c.rope > 0) {
    JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> dk_rope, rope_rets.get<AnyBuffer>(0));
    JAX_DS_RETURN_IF_ERROR(CheckBuffer("dk_rope", *dk_rope, bf16, {s.keys, s.kv_heads, c.rope}));
    params.dk_rope = dk_rope->untyped_data();
  }
  params.lse = static_cast<const float*>(lse.untyped_data());
  params.delta = static_cast<const float*>(delta.untyped_data());
  params.dq = dq->untyped_data();
  params.dk = dk->untyped_data();
  params.dv = dv->untyped_data();
  params.scale = state->scale;
  s.Fill(&params);

  JAX_DS_ASSIGN_OR_RETURN(PrefillLaunch over_queries,
                          LaunchPrefill(s.batch, s.heads, s.queries, s.multiprocessors));
  params.section = over_queries.section;
  JAX_DS_RETURN_IF_ERROR(EncodeMaps(q, dout, k, rope, v, kBackwardHeld, c.walked, &params));
  JAX_DS_RETURN_IF_ERROR(
      jit::Launch(*state->dq, ordinal, stream,
                  {{over_queries.grid}, {kBackwardThreads}, {}, kOverlapPrevious}, params));

  JAX_DS_ASSIGN_OR_RETURN(PrefillLaunch over_keys,
                          LaunchPrefill(s.batch, s.kv_heads, s.keys, s.multiprocessors));
  params.section = over_keys.section;
  JAX_DS_RETURN_IF_ERROR(
      EncodeMaps(q, dout, k, rope, v, state->plan.dkv.walked, kBackwardHeld, &params));
  return jit::Launch(*state->dkv, ordinal, stream,
                     {{over_keys.grid}, {kBackwardThreads}, {}, kOverlapPrevious}, params);
}

#define JAX_DS_PREFILL_ATTRIBUTES \
  ffi::Ffi::BindInstantiate()     \
      .Attr<int64_t>("qk_dim")    \
      .Attr<int64_t>("rope")      \
      .Attr<int64_t>("v_dim")     \
      .Attr<bool>("causal")       \
      .Attr<float>("scale")

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, JAX_DS_PREFILL_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER(
    kInitialize, Initialize,
    ffi::Ffi::BindInitialize().Ctx<ffi::State<PrefillState>>().Ctx<ffi::DeviceOrdinal>());
XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<PrefillState>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::PlatformStream<cuda::Stream>>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kInstantiateBackward, InstantiateBackward, JAX_DS_PREFILL_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER(
    kInitializeBackward, InitializeBackward,
    ffi::Ffi::BindInitialize().Ctx<ffi::State<BackwardState>>().Ctx<ffi::DeviceOrdinal>());
XLA_FFI_DEFINE_HANDLER(kExecuteBackward, ExecuteBackward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<BackwardState>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::PlatformStream<cuda::Stream>>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

std::vector<StateType> PrefillStateTypes() {
  return {{"jax_ds_flash_mla_prefill_state", &PrefillState::id, PrefillState::info()},
          {"jax_ds_flash_mla_prefill_backward_state", &BackwardState::id, BackwardState::info()}};
}

std::vector<Target> PrefillTargets() {
  return {{"jax_ds_flash_mla_prefill", kInstantiate, nullptr, kInitialize, kExecute},
          {"jax_ds_flash_mla_prefill_backward", kInstantiateBackward, nullptr, kInitializeBackward,
           kExecuteBackward}};
}

}  // namespace jax_ds::flash_mla
