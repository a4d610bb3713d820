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

constexpr int kL2Promotion128 = 2;

// A map of x: bf16 [B, S, H, D] for boxes of `rows` tokens and 64 columns of one head.
ErrorOr<TensorMap> HeadMap(const AnyBuffer& x, int rows) {
  auto dims = x.dimensions();
  const size_t n = dims.size();
  const int64_t tokens = dims[n - 3], heads = dims[n - 2], columns = dims[n - 1];
  return jit::EncodeTensorMap(jit::MapType::kBfloat16, x.untyped_data(),
                              {columns, heads, tokens, LeadingSize(x, 3)},
                              {columns * 2, heads * columns * 2, tokens * heads * columns * 2},
                              {64, 1, rows, 1}, {jit::Swizzle::k128B, kL2Promotion128});
}

// q: [..., Sq, H, D], k: [..., Sk, Hk, D - rope], v: [..., Sk, Hk, V]; `rest` may hold k_rope:
// [..., Sk, 1, rope] -> out: [..., Sq, H, V], lse: [..., Sq, H].
Error Execute(PrefillState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q, AnyBuffer k,
              AnyBuffer v, ffi::RemainingArgs rest, ffi::Result<AnyBuffer> out,
              ffi::Result<AnyBuffer> lse) {
  const PrefillConfig& c = state->config;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("q", q, DataType::BF16, {-1, -1, c.qk_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("k", k, DataType::BF16, {-1, -1, c.qk_dim - c.rope}));
  const size_t n = q.dimensions().size();
  const int64_t queries = q.dimensions()[n - 3], heads = q.dimensions()[n - 2];
  const int64_t keys = k.dimensions()[n - 3], kv_heads = k.dimensions()[n - 2];
  const int64_t batch = LeadingSize(q, 3);
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("v", v, DataType::BF16, {keys, kv_heads, c.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("out", *out, DataType::BF16, {queries, heads, c.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lse", *lse, DataType::F32, {queries, heads}));
  if (kv_heads == 0 || heads % kv_heads != 0 || LeadingSize(k, 3) != batch) {
    return InvalidArgument("k: heads must divide those of q, and the batch must be its own");
  }
  AnyBuffer rope = k;
  if (c.rope > 0) {
    JAX_DS_ASSIGN_OR_RETURN(rope, rest.get<AnyBuffer>(0));
    JAX_DS_RETURN_IF_ERROR(CheckBuffer("k_rope", rope, DataType::BF16, {keys, 1, c.rope}));
  }
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(int multiprocessors,
                          driver->DeviceAttribute(ordinal, cuda::kMultiprocessorCount));
  JAX_DS_ASSIGN_OR_RETURN(PrefillLaunch launch,
                          LaunchPrefill(batch, heads, queries, multiprocessors));
  PrefillParams params = {};
  JAX_DS_ASSIGN_OR_RETURN(params.q, HeadMap(q, kPrefillBlockM));
  JAX_DS_ASSIGN_OR_RETURN(params.k, HeadMap(k, c.block_n));
  JAX_DS_ASSIGN_OR_RETURN(params.k_rope, HeadMap(rope, c.block_n));
  JAX_DS_ASSIGN_OR_RETURN(params.v, HeadMap(v, c.block_n));
  params.out = out->untyped_data();
  params.lse = static_cast<float*>(lse->untyped_data());
  params.batch = static_cast<int>(batch);
  params.queries = static_cast<int>(queries);
  params.keys = static_cast<int>(keys);
  params.heads = static_cast<int>(heads);
  params.kv_heads = static_cast<int>(kv_heads);
  params.section = launch.section;
  params.scale_log2 = state->scale * 1.4426950408889634f;
  constexpr bool kOverlapPrevious = true;
  return jit::Launch(*state->kernel, ordinal, stream,
                     {{launch.grid}, {kPrefillThreads}, {}, kOverlapPrevious}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("qk_dim")
                           .Attr<int64_t>("rope")
                           .Attr<int64_t>("v_dim")
                           .Attr<bool>("causal")
                           .Attr<float>("scale"));
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

}  // namespace

StateType PrefillStateType() {
  return {"jax_ds_flash_mla_prefill_state", &PrefillState::id, PrefillState::info()};
}

Target PrefillTarget() {
  return {"jax_ds_flash_mla_prefill", kInstantiate, nullptr, kInitialize, kExecute};
}

}  // namespace jax_ds::flash_mla
