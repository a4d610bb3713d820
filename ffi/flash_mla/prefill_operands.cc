#include "flash_mla/prefill_operands.h"

#include <algorithm>

#include "support/driver.h"

namespace jax_ds::flash_mla {
namespace {

constexpr int kL2Promotion128 = 2;

}  // namespace

ErrorOr<TensorMap> HeadMap(const AnyBuffer& x, int rows) {
  auto dims = x.dimensions();
  const size_t n = dims.size();
  const int64_t tokens = dims[n - 3], heads = dims[n - 2], columns = dims[n - 1];
  return jit::EncodeTensorMap(jit::MapType::kBfloat16, x.untyped_data(),
                              {columns, heads, tokens, LeadingSize(x, 3)},
                              {columns * 2, heads * columns * 2, tokens * heads * columns * 2},
                              {64, 1, rows, 1}, {jit::Swizzle::k128B, kL2Promotion128});
}

ErrorOr<PrefillOperands> PrefillOperands::Make(const PrefillAttributes& a, int ordinal, AnyBuffer q,
                                               AnyBuffer k, AnyBuffer v,
                                               const xla::ffi::RemainingArgs& rest) {
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("q", q, DataType::BF16, {-1, -1, a.qk_dim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("k", k, DataType::BF16, {-1, -1, a.qk_dim - a.rope}));
  PrefillOperands o = {q, k, v, k};
  const size_t n = q.dimensions().size();
  o.batch = LeadingSize(q, 3);
  o.queries = q.dimensions()[n - 3];
  o.heads = q.dimensions()[n - 2];
  o.keys = k.dimensions()[k.dimensions().size() - 3];
  o.kv_heads = k.dimensions()[k.dimensions().size() - 2];
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("v", v, DataType::BF16, {o.keys, o.kv_heads, a.v_dim}));
  if (o.kv_heads == 0 || o.heads % o.kv_heads != 0 || LeadingSize(k, 3) != o.batch) {
    return InvalidArgument("k: heads must divide those of q, and the batch must be its own");
  }
  size_t next = 0;
  if (a.rope > 0) {
    JAX_DS_ASSIGN_OR_RETURN(o.k_rope, rest.get<AnyBuffer>(next++));
    JAX_DS_RETURN_IF_ERROR(CheckBuffer("k_rope", o.k_rope, DataType::BF16, {o.keys, 1, a.rope}));
  }
  for (int side = 0; a.packed && side < 2; ++side) {
    JAX_DS_ASSIGN_OR_RETURN(AnyBuffer offsets, rest.get<AnyBuffer>(next++));
    JAX_DS_RETURN_IF_ERROR(CheckBuffer("cu_seqlens", offsets, DataType::S32, {-1}));
    const int sequences = static_cast<int>(offsets.element_count()) - 1;
    if (o.batch != 1 || sequences < 1 || (side == 1 && sequences != o.sequences)) {
      return InvalidArgument("cu_seqlens: needs a batch of 1, and as many keys' as queries'");
    }
    o.offsets[side] = static_cast<const int32_t*>(offsets.untyped_data());
    o.sequences = sequences;
  }
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(o.multiprocessors, driver->Multiprocessors(ordinal));
  return o;
}

PrefillWalk PrefillOperands::OverQueries() const {
  return {static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(queries),
          static_cast<int>(keys)};
}

PrefillWalk PrefillOperands::OverKeys() const {
  return {static_cast<int>(batch), static_cast<int>(kv_heads), static_cast<int>(keys),
          static_cast<int>(queries)};
}

Error LaunchPack(const jit::Kernel& kernel, int ordinal, cuda::Stream stream,
                 const PrefillOperands& o, bool causal, const AnyBuffer& lists,
                 PrefillWalk* queries, PrefillWalk* keys) {
  PrefillWalk* const sides[] = {queries, keys};
  int* const memory = static_cast<int*>(lists.untyped_data());
  int64_t words = 0;
  for (PrefillWalk* side : sides) {
    if (side == nullptr) continue;
    side->packed = memory + words;
    side->counter = memory + words + kPackedCounter;
    words += PackedLayout(side->rows).words;
  }
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lists", lists, DataType::S32, {words}));
  const PackParams params = {{o.offsets[0], o.sequences, static_cast<int>(o.queries)},
                             {o.offsets[1], o.sequences, static_cast<int>(o.keys)},
                             causal,
                             memory};
  const int64_t rows = keys != nullptr ? std::max(o.queries, o.keys) : o.queries;
  const unsigned int blocks =
      1 + static_cast<unsigned int>((rows + kPackThreads - 1) / kPackThreads);
  return jit::Launch(kernel, ordinal, stream,
                     {{blocks, keys != nullptr ? 2u : 1u}, {kPackThreads}, {}, kOverlapPrevious},
                     params);
}

}  // namespace jax_ds::flash_mla
