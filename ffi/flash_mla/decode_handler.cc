#include "flash_mla/decode_handler.h"

#include <future>
#include <iterator>
#include <memory>

#include "flash_mla/decode_plan.h"
#include "jit/compiler.h"
#include "jit/launch.h"
#include "jit/tensor_map.h"
#include "kernels/constants.h"
#include "support/driver.h"
#include "support/shape.h"
#include "support/stages.h"

namespace jax_ds::flash_mla {
namespace {

namespace ffi = xla::ffi;

// ---- decode: q [B, S, H, 576], pages [P, L, 576], table [B, N], lengths [B] -> out, lse, and as
// ---- workspace the parts of split requests, their lse, and how requests were shared out

struct DecodeState : Stateful<DecodeState> {
  DecodeConfig config;
  int64_t tokens, heads;
  bool causal;
  float scale;
  std::shared_ptr<const jit::Kernel> decode;
  std::shared_ptr<const jit::Kernel> combines[std::size(kCombines)];
};

ErrorOr<std::unique_ptr<DecodeState>> Instantiate(int64_t tokens, int64_t heads, bool half,
                                                  bool causal, float scale) {
  auto state = std::make_unique<DecodeState>();
  JAX_DS_ASSIGN_OR_RETURN(state->config, PlanDecode(tokens * heads, half));
  state->tokens = tokens;
  state->heads = heads;
  state->causal = causal;
  state->scale = scale;
  // Small ones beside the large one: what counts is when the last is compiled.
  std::future<ErrorOr<std::shared_ptr<const jit::Kernel>>> combines[std::size(kCombines)];
  for (Combine combine : kCombines) {
    combines[static_cast<int>(combine)] =
        std::async(std::launch::async, jit::GetKernel, CombineSpec(combine, half));
  }
  JAX_DS_ASSIGN_OR_RETURN(state->decode, jit::GetKernel(DecodeSpec(state->config)));
  for (Combine combine : kCombines) {
    const int i = static_cast<int>(combine);
    JAX_DS_ASSIGN_OR_RETURN(state->combines[i], combines[i].get());
  }
  return state;
}

Error Initialize(DecodeState* state, int32_t ordinal) {
  JAX_DS_RETURN_IF_ERROR(state->decode->Load(ordinal));
  for (const auto& kernel : state->combines) JAX_DS_RETURN_IF_ERROR(kernel->Load(ordinal));
  return Error::Success();
}

// Kernels count in 32 bits with a sign: rows of the cache and of the queries, and tokens of a
// request, of which a producer looks some blocks beyond the last.
constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxTokens = int64_t{1} << 30;

Error CheckPages(const AnyBuffer& pages, DataType element) {
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("kv_pages", pages, element, {-1, -1, kKeyDim}));
  const int64_t page_size = pages.dimensions()[1];
  if (IsPageSize(page_size)) return Error::Success();
  return InvalidArgument("kv_pages: page size must be 16, 32, 64 or 128, got " +
                         std::to_string(page_size));
}

Error CheckTable(const AnyBuffer& table, int64_t page_size) {
  const int64_t tokens = table.dimensions()[1] * page_size;
  if (tokens <= kMaxTokens) return Error::Success();
  return InvalidArgument("page_table: N times the page size must be at most 2^30, got " +
                         std::to_string(tokens));
}

struct Buffers {
  AnyBuffer q, pages, table, lengths;
  AnyBuffer out, lse, partial_out, partial_lse, parts;
};

Error CheckBuffers(const DecodeState& state, const Buffers& b) {
  const DataType element = state.config.half ? DataType::F16 : DataType::BF16;
  const int64_t S = state.tokens, H = state.heads;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("q", b.q, element, {-1, S, H, kKeyDim}));
  const int64_t B = b.q.dimensions()[0];
  JAX_DS_RETURN_IF_ERROR(CheckPages(b.pages, element));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("page_table", b.table, DataType::S32, {B, -1}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("seq_lens", b.lengths, DataType::S32, {B}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("out", b.out, element, {B, S, H, kValueDim}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lse", b.lse, DataType::F32, {B, S, H}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("partial_out", b.partial_out, DataType::F32, {-1, kValueDim}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("partial_lse", b.partial_lse, DataType::F32, {b.partial_out.dimensions()[0]}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("parts", b.parts, DataType::S32, {B, 2}));
  const int64_t page_size = b.pages.dimensions()[1];
  if (b.pages.dimensions()[0] * page_size >= kMaxRows || B * S * H >= kMaxRows) {
    return InvalidArgument("kv_pages, q: must have less than 2^31 rows");
  }
  return CheckTable(b.table, page_size);
}

Error EncodeMaps(const DecodeConfig& c, const Buffers& b, int box_tokens, DecodeParams* params) {
  const jit::MapType type = c.half ? jit::MapType::kFloat16 : jit::MapType::kBfloat16;
  // Fetching 256 bytes for every row of 128 costs a tenth of the memory's bandwidth.
  const jit::MapOptions options = {jit::Swizzle::k128B, /*l2_promotion=*/2};
  constexpr int64_t kRowBytes = kKeyDim * 2;
  const int64_t query_rows = LeadingSize(b.q, 1), rows = LeadingSize(b.pages, 1);
  JAX_DS_ASSIGN_OR_RETURN(params->q_map,
                          jit::EncodeTensorMap(type, b.q.untyped_data(), {kKeyDim, query_rows},
                                               {kRowBytes}, {kTileCols, c.rows}, options));
  // Groups of eight rows and column tiles as dimensions of their own: a box reads memory in order.
  const auto pages = [&](int tiles) {
    return jit::EncodeTensorMap(type, b.pages.untyped_data(),
                                {kTileCols, kGroupRows, kKeyTiles, rows / kGroupRows},
                                {kRowBytes, kTileCols * 2, kGroupRows * kRowBytes},
                                {kTileCols, kGroupRows, tiles, box_tokens / kGroupRows}, options);
  };
  JAX_DS_ASSIGN_OR_RETURN(params->kv_map, pages(c.narrow ? kKeyTiles : kValueTiles));
  if (!c.narrow) {
    JAX_DS_ASSIGN_OR_RETURN(params->rope_map, pages(1));
  }
  return Error::Success();
}

ErrorOr<DecodeParams> MakeParams(const DecodeState& state, const DecodeLaunch& launch,
                                 const Buffers& b) {
  DecodeParams params = {};
  const int64_t page_size = b.pages.dimensions()[1];
  params.page_size = static_cast<int>(page_size);
  params.box_tokens = BoxTokens(page_size);
  JAX_DS_RETURN_IF_ERROR(EncodeMaps(state.config, b, params.box_tokens, &params));
  params.page_table = static_cast<const int*>(b.table.untyped_data());
  params.seq_lens = static_cast<const int*>(b.lengths.untyped_data());
  params.out = b.out.untyped_data();
  params.lse = static_cast<float*>(b.lse.untyped_data());
  params.partial_out = static_cast<float*>(b.partial_out.untyped_data());
  params.partial_lse = static_cast<float*>(b.partial_lse.untyped_data());
  params.parts = static_cast<Parts*>(b.parts.untyped_data());
  params.B = static_cast<int>(b.q.dimensions()[0]);
  params.S = static_cast<int>(state.tokens);
  params.H = static_cast<int>(state.heads);
  params.N = static_cast<int>(b.table.dimensions()[1]);
  params.num_groups = launch.num_groups;
  params.row_groups = launch.row_groups;
  params.causal = state.causal;
  params.scale_log2 = state.scale * kLog2e;
  return params;
}

Error Execute(DecodeState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer q,
              AnyBuffer pages, AnyBuffer table, AnyBuffer lengths, ffi::Result<AnyBuffer> out,
              ffi::Result<AnyBuffer> lse, ffi::Result<AnyBuffer> partial_out,
              ffi::Result<AnyBuffer> partial_lse, ffi::Result<AnyBuffer> parts) {
  const Buffers buffers = {q,    pages,        table,        lengths, *out,
                           *lse, *partial_out, *partial_lse, *parts};
  JAX_DS_RETURN_IF_ERROR(CheckBuffers(*state, buffers));
  const int64_t query_rows = state->tokens * state->heads;
  JAX_DS_ASSIGN_OR_RETURN(const Driver* driver, Driver::Get());
  JAX_DS_ASSIGN_OR_RETURN(int multiprocessors, driver->Multiprocessors(ordinal));
  const DecodeLaunch launch = LaunchDecode(state->config, query_rows, multiprocessors);
  if (partial_out->dimensions()[0] < launch.workspace_rows) {
    return InvalidArgument("partial_out: needs " + std::to_string(launch.workspace_rows) +
                           " rows, got " + std::to_string(partial_out->dimensions()[0]));
  }
  JAX_DS_ASSIGN_OR_RETURN(DecodeParams params, MakeParams(*state, launch, buffers));
  JAX_DS_RETURN_IF_ERROR(jit::Launch(
      *state->decode, ordinal, stream,
      {.grid = {launch.grid}, .block = {launch.block}, .overlap_previous = true}, params));
  if (launch.num_groups == 1) return Error::Success();
  const CombineLaunch combine = LaunchCombine(launch, params.B, query_rows);
  const CombineParams combine_params = {params.partial_out,
                                        params.partial_lse,
                                        params.parts,
                                        params.out,
                                        params.lse,
                                        params.B,
                                        static_cast<int>(query_rows),
                                        launch.tile_rows,
                                        launch.row_groups};
  return jit::Launch(*state->combines[static_cast<int>(combine.combine)], ordinal, stream,
                     {.grid = {combine.grid}, .block = {kCombineThreads}, .overlap_previous = true},
                     combine_params);
}

// ---- append: pages [P, L, 576], kv [B, S, 576], table [B, N], lengths [B] -> pages, in place

struct AppendState : Stateful<AppendState> {
  std::shared_ptr<const jit::Kernel> kernel;
};

ErrorOr<std::unique_ptr<AppendState>> InstantiateAppend() {
  auto state = std::make_unique<AppendState>();
  JAX_DS_ASSIGN_OR_RETURN(state->kernel, jit::GetKernel(AppendSpec()));
  return state;
}

Error ExecuteAppend(AppendState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer pages,
                    AnyBuffer kv, AnyBuffer table, AnyBuffer lengths,
                    ffi::Result<AnyBuffer> updated) {
  const DataType element = pages.element_type();
  if (element != DataType::BF16 && element != DataType::F16) {
    return InvalidArgument("kv_pages: must be bfloat16 or float16");
  }
  JAX_DS_RETURN_IF_ERROR(CheckPages(pages, element));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("kv", kv, element, {-1, -1, kKeyDim}));
  const int64_t B = kv.dimensions()[0], S = kv.dimensions()[1];
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("page_table", table, DataType::S32, {B, -1}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("seq_lens", lengths, DataType::S32, {B}));
  if (updated->untyped_data() != pages.untyped_data()) {
    return InvalidArgument("kv_pages: the result must be the same buffer");
  }
  JAX_DS_RETURN_IF_ERROR(CheckTable(table, pages.dimensions()[1]));
  if (B * S >= kMaxRows) return InvalidArgument("kv: must have less than 2^31 rows");
  if (B * S == 0) return Error::Success();
  const AppendParams params = {kv.untyped_data(),
                               updated->untyped_data(),
                               static_cast<const int*>(table.untyped_data()),
                               static_cast<const int*>(lengths.untyped_data()),
                               static_cast<int>(B),
                               static_cast<int>(S),
                               static_cast<int>(table.dimensions()[1]),
                               static_cast<int>(pages.dimensions()[0]),
                               static_cast<int>(pages.dimensions()[1])};
  return jit::Launch(*state->kernel, ordinal, stream,
                     {{static_cast<unsigned int>(B * S)}, {kAppendThreads}}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("tokens")
                           .Attr<int64_t>("heads")
                           .Attr<bool>("half")
                           .Attr<bool>("causal")
                           .Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER(kInstantiateAppend, InstantiateAppend, ffi::Ffi::BindInstantiate());

}  // namespace

std::vector<StateType> DecodeStateTypes() {
  return {{"jax_ds_flash_mla_decode_state", &DecodeState::id, DecodeState::info()},
          {"jax_ds_flash_mla_append_state", &AppendState::id, AppendState::info()}};
}

std::vector<Target> DecodeTargets() {
  return {{"jax_ds_flash_mla_decode", kInstantiate, nullptr, InitializeStage<Initialize>,
           ExecuteStage<Execute>},
          {"jax_ds_flash_mla_append", kInstantiateAppend, nullptr,
           InitializeStage<jit::LoadKernel<AppendState>>, ExecuteStage<ExecuteAppend>}};
}

}  // namespace jax_ds::flash_mla
