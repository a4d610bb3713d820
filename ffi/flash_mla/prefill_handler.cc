#include "flash_mla/prefill_handler.h"

#include <memory>

#include "flash_mla/prefill_backward_handler.h"
#include "flash_mla/prefill_operands.h"
#include "jit/compiler.h"
#include "kernels/constants.h"
#include "support/stages.h"

namespace jax_ds::flash_mla {
namespace {

namespace ffi = xla::ffi;

// q, k, v, k_rope?, (cu_seqlens_q, cu_seqlens_k)? -> out [..., Sq, H, V], lse [..., Sq, H], lists?
struct PrefillState : Stateful<PrefillState> {
  PrefillAttributes attributes;
  PrefillConfig config;
  float scale;
  std::shared_ptr<const jit::Kernel> pack;  // null unless packed
  std::shared_ptr<const jit::Kernel> attend;
};

ErrorOr<std::unique_ptr<PrefillState>> Instantiate(int64_t qk_dim, int64_t rope, int64_t v_dim,
                                                   bool causal, bool packed, float scale) {
  auto state = std::make_unique<PrefillState>();
  state->attributes = {qk_dim, rope, v_dim, causal, packed};
  JAX_DS_ASSIGN_OR_RETURN(state->config, PlanPrefill(state->attributes));
  state->scale = scale;
  if (packed) {
    JAX_DS_ASSIGN_OR_RETURN(state->pack, jit::GetKernel(PackSpec()));
  }
  JAX_DS_ASSIGN_OR_RETURN(state->attend, jit::GetKernel(PrefillSpec(state->config)));
  return state;
}

Error Initialize(PrefillState* state, int32_t ordinal) {
  if (state->pack != nullptr) JAX_DS_RETURN_IF_ERROR(state->pack->Load(ordinal));
  return state->attend->Load(ordinal);
}

Error Execute(PrefillState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q, AnyBuffer k,
              AnyBuffer v, ffi::RemainingArgs rest, ffi::Result<AnyBuffer> out,
              ffi::Result<AnyBuffer> lse, ffi::RemainingRets lists) {
  const PrefillConfig& c = state->config;
  JAX_DS_ASSIGN_OR_RETURN(PrefillOperands o,
                          PrefillOperands::Make(state->attributes, ordinal, q, k, v, rest));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("out", *out, DataType::BF16, {o.queries, o.heads, c.v_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lse", *lse, DataType::F32, {o.queries, o.heads}));
  PrefillParams params = {};
  JAX_DS_ASSIGN_OR_RETURN(params.q, HeadMap(q, kPrefillBoxM));
  JAX_DS_ASSIGN_OR_RETURN(params.k, HeadMap(k, c.block_n));
  if (c.rope > 0) {
    JAX_DS_ASSIGN_OR_RETURN(params.k_rope, HeadMap(o.k_rope, c.block_n));
  }
  JAX_DS_ASSIGN_OR_RETURN(params.v, HeadMap(v, c.block_n));
  params.out = out->untyped_data();
  params.lse = static_cast<float*>(lse->untyped_data());
  params.queries = o.OverQueries();
  params.kv_heads = static_cast<int>(o.kv_heads);
  params.scale_log2 = state->scale * kLog2e;
  if (state->attributes.packed) {
    JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> memory, lists.get<AnyBuffer>(0));
    JAX_DS_RETURN_IF_ERROR(LaunchPack(*state->pack, ordinal, stream, o, state->attributes.causal,
                                      *memory, &params.queries, nullptr));
  }
  JAX_DS_ASSIGN_OR_RETURN(
      unsigned int grid,
      PrefillGrid(o.batch, o.heads, o.queries, state->attributes.packed, o.multiprocessors));
  return jit::Launch(*state->attend, ordinal, stream,
                     {{grid}, {kPrefillThreads}, {}, kOverlapPrevious}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, BindPrefillAttributes());

}  // namespace

std::vector<StateType> PrefillStateTypes() {
  return {{"jax_ds_flash_mla_prefill_state", &PrefillState::id, PrefillState::info()},
          PrefillBackwardStateType()};
}

std::vector<Target> PrefillTargets() {
  return {{"jax_ds_flash_mla_prefill", kInstantiate, nullptr, InitializeStage<Initialize>,
           ExecuteStage<Execute>},
          PrefillBackwardTarget()};
}

}  // namespace jax_ds::flash_mla
