#include "quantization/handler.h"

#include <memory>
#include <string>
#include <string_view>

#include "jit/compiler.h"
#include "jit/launch.h"
#include "quantization/plan.h"
#include "support/shape.h"
#include "support/stages.h"

namespace jax_ds::quantization {
namespace {

namespace ffi = xla::ffi;

DataType Type(Input input) { return input == Input::kBfloat16 ? DataType::BF16 : DataType::F32; }

// The matrices' rows: the last dimension but one.
int64_t Rows(const AnyBuffer& x) { return x.dimensions()[x.dimensions().size() - 2]; }

// An int32 operand [..., tail] with one entry (or row of `tail`) for each of `batch` matrices.
ErrorOr<const int*> Counts(const char* name, const ffi::RemainingArgs& rest, int64_t tail,
                           int64_t batch) {
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer counts, rest.get<AnyBuffer>(0));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer(name, counts, DataType::S32, {}));
  if (static_cast<int64_t>(counts.element_count()) != batch * tail) {
    return InvalidArgument(std::string(name) + ": must have one entry for each matrix");
  }
  return static_cast<const int*>(counts.untyped_data());
}

// ---- rows: x [..., M, K] -> values [..., M, K], scales [..., M, KB] -----------------------------

struct RowsState : Stateful<RowsState> {
  RowsPlan plan;
  int64_t k;  // of the values; x has 2K columns with SwiGLU
  bool ue8m0;
  std::shared_ptr<const jit::Kernel> kernel;
};

ErrorOr<std::unique_ptr<RowsState>> InstantiateRows(std::string_view input, int64_t k, bool swiglu,
                                                    bool ue8m0) {
  JAX_DS_ASSIGN_OR_RETURN(Input type, ParseInput(input));
  auto state = std::make_unique<RowsState>();
  state->plan = RowsPlan::For(type, swiglu, k);
  state->k = k;
  state->ue8m0 = ue8m0;
  JAX_DS_ASSIGN_OR_RETURN(state->kernel, jit::GetKernel(state->plan.Spec()));
  return state;
}

// `rest` may hold one operand, num_rows: int32 [...], the rows to quantize of each matrix.
Error ExecuteRows(RowsState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer x,
                  ffi::RemainingArgs rest, ffi::Result<AnyBuffer> values,
                  ffi::Result<AnyBuffer> scales) {
  const RowsPlan& plan = state->plan;
  const int64_t k = state->k;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("x", x, Type(plan.input), {-1, plan.swiglu ? 2 * k : k}));
  const int64_t m = Rows(x), batch = LeadingSize(x, 2);
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("values", *values, DataType::F8E4M3FN, {m, k}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("scales", *scales, DataType::F32, {m, Blocks128(k)}));
  RowsParams params = {};
  params.x = x.untyped_data();
  params.values = values->untyped_data();
  params.scales = Pointer<float>(*scales);
  params.ue8m0 = state->ue8m0;
  if (rest.size() > 0) {
    JAX_DS_ASSIGN_OR_RETURN(params.num_rows, Counts("num_rows", rest, 1, batch));
  }
  JAX_DS_ASSIGN_OR_RETURN(unsigned int grid, plan.Grid(batch, m, k, &params));
  return jit::Launch(*state->kernel, ordinal, stream, {{grid}, {RowsPlan::kThreads}, {}}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiateRows, InstantiateRows,
                       ffi::Ffi::BindInstantiate()
                           .Attr<std::string_view>("input")
                           .Attr<int64_t>("k")
                           .Attr<bool>("swiglu")
                           .Attr<bool>("ue8m0"));

// ---- tiles: x [..., M, K] -> rows: values, scales; columns: values [..., K, P], scales ----------

struct TilesState : Stateful<TilesState> {
  TilesPlan plan;
  int64_t k, p;
  bool ue8m0;
  std::shared_ptr<const jit::Kernel> kernel;
};

// `p`: tokens of the columns; for square blocks M.
ErrorOr<std::unique_ptr<TilesState>> InstantiateTiles(std::string_view input,
                                                      std::string_view blocks, int64_t k, int64_t p,
                                                      bool swiglu, bool ue8m0) {
  JAX_DS_ASSIGN_OR_RETURN(Input type, ParseInput(input));
  JAX_DS_ASSIGN_OR_RETURN(Blocks kind, ParseBlocks(blocks));
  if (swiglu && kind != Blocks::kLines) {
    return InvalidArgument("swiglu: only blocks=lines can be fused with it");
  }
  if (kind == Blocks::kLines && p % kBlock != 0) {
    return InvalidArgument("p: tokens of the columns must be a multiple of 128, got " +
                           std::to_string(p));
  }
  auto state = std::make_unique<TilesState>();
  state->plan = TilesPlan::For(type, kind, swiglu, k, p);
  state->k = k;
  state->p = p;
  state->ue8m0 = ue8m0;
  JAX_DS_ASSIGN_OR_RETURN(state->kernel, jit::GetKernel(state->plan.Spec()));
  return state;
}

// The columns' results, which square blocks without a transpose do not have.
Error TakeColumns(const TilesState& state, const ffi::RemainingRets& rets, TilesParams* params) {
  const bool square = state.plan.blocks != Blocks::kLines;
  const int64_t k = state.k, p = state.p;
  JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> values, rets.get<AnyBuffer>(0));
  JAX_DS_ASSIGN_OR_RETURN(ffi::Result<AnyBuffer> scales, rets.get<AnyBuffer>(1));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("columns.values", *values, DataType::F8E4M3FN, {k, p}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("columns.scales", *scales, DataType::F32,
                                     {square ? Blocks128(k) : k, Blocks128(p)}));
  params->column_values = values->untyped_data();
  params->column_scales = Pointer<float>(*scales);
  return Error::Success();
}

// `rest` may hold one operand, group_sizes: int32 [..., G]; `columns` values and scales.
Error ExecuteTiles(TilesState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer x,
                   ffi::RemainingArgs rest, ffi::Result<AnyBuffer> values,
                   ffi::Result<AnyBuffer> scales, ffi::RemainingRets columns) {
  const TilesPlan& plan = state->plan;
  const bool square = plan.blocks != Blocks::kLines;
  const int64_t k = state->k;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("x", x, Type(plan.input), {-1, plan.swiglu ? 2 * k : k}));
  const int64_t m = Rows(x), batch = LeadingSize(x, 2);
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("values", *values, DataType::F8E4M3FN, {m, k}));
  JAX_DS_RETURN_IF_ERROR(
      CheckBuffer("scales", *scales, DataType::F32, {square ? Blocks128(m) : m, Blocks128(k)}));
  TilesParams params = {};
  params.x = x.untyped_data();
  params.row_values = values->untyped_data();
  params.row_scales = Pointer<float>(*scales);
  params.ue8m0 = state->ue8m0;
  if (plan.blocks != Blocks::kSquare) {
    JAX_DS_RETURN_IF_ERROR(TakeColumns(*state, columns, &params));
  }
  const bool grouped = rest.size() > 0;
  params.num_groups = -1;
  if (grouped) {
    JAX_DS_ASSIGN_OR_RETURN(AnyBuffer sizes, rest.get<AnyBuffer>(0));
    params.num_groups = Int(sizes.dimensions().back());
    JAX_DS_ASSIGN_OR_RETURN(params.group_sizes,
                            Counts("group_sizes", rest, params.num_groups, batch));
  } else if (state->p != (square ? m : Blocks128(m) * kBlock)) {
    return InvalidArgument("p: must be the rows of x, rounded up to 128 unless square");
  }
  JAX_DS_ASSIGN_OR_RETURN(unsigned int grid, plan.Grid(batch, m, k, state->p, &params));
  return jit::Launch(*state->kernel, ordinal, stream, {{grid}, {TilesPlan::kThreads}, {}}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiateTiles, InstantiateTiles,
                       ffi::Ffi::BindInstantiate()
                           .Attr<std::string_view>("input")
                           .Attr<std::string_view>("blocks")
                           .Attr<int64_t>("k")
                           .Attr<int64_t>("p")
                           .Attr<bool>("swiglu")
                           .Attr<bool>("ue8m0"));

}  // namespace

Room GetRoom() {
  return {"quantization",
          {{"jax_ds_quantize_rows_state", &RowsState::id, RowsState::info()},
           {"jax_ds_quantize_tiles_state", &TilesState::id, TilesState::info()}},
          {{"jax_ds_quantize_rows", kInstantiateRows, nullptr,
            InitializeStage<jit::LoadKernel<RowsState>>, ExecuteStage<ExecuteRows>},
           {"jax_ds_quantize_tiles", kInstantiateTiles, nullptr,
            InitializeStage<jit::LoadKernel<TilesState>>, ExecuteStage<ExecuteTiles>}},
          AllKernels()};
}

}  // namespace jax_ds::quantization
