// What the handlers of prefill and of its gradient share: operands, checked, and the lists of a
// packed batch.
#pragma once

#include "flash_mla/kernels/prefill_config.h"
#include "flash_mla/prefill_plan.h"
#include "jit/launch.h"
#include "jit/tensor_map.h"
#include "support/shape.h"

namespace jax_ds::flash_mla {

constexpr bool kOverlapPrevious = true;

// A map of x: bf16 [..., S, H, D] for boxes of `rows` tokens and 64 columns of one head.
ErrorOr<TensorMap> HeadMap(const AnyBuffer& x, int rows);

// q [..., Sq, H, D], k [..., Sk, Hk, D - rope], v [..., Sk, Hk, V]; where there is a shared part,
// k_rope [..., Sk, 1, rope]; of a packed batch, offsets [N + 1] of queries and of keys.
struct PrefillOperands {
  AnyBuffer q, k, v;
  AnyBuffer k_rope;  // k stands in for it where heads share nothing
  const int32_t* offsets[2] = {nullptr, nullptr};
  int sequences = 0;
  int64_t batch, queries, heads, keys, kv_heads;
  int multiprocessors;

  // Checks all. `rest` are the optional operands, in this order.
  static ErrorOr<PrefillOperands> Make(const PrefillAttributes& attributes, int ordinal,
                                       AnyBuffer q, AnyBuffer k, AnyBuffer v,
                                       const xla::ffi::RemainingArgs& rest);

  PrefillWalk OverQueries() const;
  PrefillWalk OverKeys() const;
};

// Of both handlers' Instantiate(qk_dim, rope, v_dim, causal, packed, scale).
inline auto BindPrefillAttributes() {
  return xla::ffi::Ffi::BindInstantiate()
      .Attr<int64_t>("qk_dim")
      .Attr<int64_t>("rope")
      .Attr<int64_t>("v_dim")
      .Attr<bool>("causal")
      .Attr<bool>("packed")
      .Attr<float>("scale");
}

// Writes the lists of a packed batch (prefill_packing.h) and points the walks to them: `keys` may
// be null.
Error LaunchPack(const jit::Kernel& kernel, int ordinal, cuda::Stream stream,
                 const PrefillOperands& operands, bool causal, const AnyBuffer& lists,
                 PrefillWalk* queries, PrefillWalk* keys);

}  // namespace jax_ds::flash_mla
