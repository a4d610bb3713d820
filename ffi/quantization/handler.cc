#include "quantization/handler.h"

#include <memory>
#include <string_view>

#include "jit/compiler.h"
#include "jit/launch.h"
#include "quantization/plan.h"
#include "support/shape.h"

namespace jax_ds::quantization {
namespace {

namespace ffi = xla::ffi;

DataType Type(Input input) {
  return input == Input::kBfloat16 ? DataType::BF16 : DataType::F32;
}

// ---- rows: x [..., M, K] -> values [..., M, K], scales [..., M, KB] ------------------------------

struct RowsState : Stateful<RowsState> {
  RowsPlan plan;
  int64_t k;  // of the values; x has 2K columns with SwiGLU
  bool column_scales;
  std::shared_ptr<const jit::Kernel> kernel;
};

ErrorOr<std::unique_ptr<RowsState>> InstantiateRows(std::string_view input, int64_t k, bool swiglu,
                                                    bool ue8m0, bool column_scales) {
  JAX_DS_ASSIGN_OR_RETURN(Input type, ParseInput(input));
  auto state = std::make_unique<RowsState>();
  state->plan = RowsPlan::For(type, swiglu, ue8m0, k);
  state->k = k;
  state->column_scales = column_scales;
  JAX_DS_ASSIGN_OR_RETURN(state->kernel, jit::GetKernel(state->plan.Spec()));
  return state;
}

Error InitializeRows(RowsState* state, int32_t ordinal) { return state->kernel->Load(ordinal); }

// `rest` may hold one operand, counts: int32 [...], the rows to quantize of each matrix.
Error ExecuteRows(RowsState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer x,
                  ffi::RemainingArgs rest, ffi::Result<AnyBuffer> values,
                  ffi::Result<AnyBuffer> scales) {
  const RowsPlan& plan = state->plan;
  const int64_t k = state->k, kb = (k + kBlock - 1) / kBlock;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("x", x, Type(plan.input), {-1, plan.swiglu ? 2 * k : k}));
  const int64_t m = x.dimensions()[x.dimensions().size() - 2], batch = LeadingSize(x, 2);
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("values", *values, DataType::F8E4M3FN, {m, k}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("scales", *scales, DataType::F32, {m, kb}));
  RowsParams params = {};
  params.x = x.untyped_data();
  params.values = values->untyped_data();
  params.scales = static_cast<float*>(scales->untyped_data());
  params.column_scales = state->column_scales;
  if (rest.size() > 0) {
    JAX_DS_ASSIGN_OR_RETURN(AnyBuffer counts, rest.get<AnyBuffer>(0));
    JAX_DS_RETURN_IF_ERROR(CheckBuffer("counts", counts, DataType::S32, {}));
    if (static_cast<int64_t>(counts.element_count()) != batch) {
      return InvalidArgument("counts: must have one element for each matrix");
    }
    params.counts = static_cast<const int*>(counts.untyped_data());
  }
  JAX_DS_ASSIGN_OR_RETURN(unsigned int grid, plan.Grid(batch, m, k, &params));
  return jit::Launch(*state->kernel, ordinal, stream, {{grid}, {RowsPlan::kThreads}, {}}, params);
}

XLA_FFI_DEFINE_HANDLER(kInstantiateRows, InstantiateRows,
                       ffi::Ffi::BindInstantiate()
                           .Attr<std::string_view>("input")
                           .Attr<int64_t>("k")
                           .Attr<bool>("swiglu")
                           .Attr<bool>("ue8m0")
                           .Attr<bool>("column_scales"));
XLA_FFI_DEFINE_HANDLER(
    kInitializeRows, InitializeRows,
    ffi::Ffi::BindInitialize().Ctx<ffi::State<RowsState>>().Ctx<ffi::DeviceOrdinal>());
XLA_FFI_DEFINE_HANDLER(kExecuteRows, ExecuteRows,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<RowsState>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::PlatformStream<cuda::Stream>>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .Ret<AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Room GetRoom() {
  return {"quantization",
          {{"jax_ds_quantize_rows_state", &RowsState::id, RowsState::info()}},
          {{"jax_ds_quantize_rows", kInstantiateRows, nullptr, kInitializeRows, kExecuteRows}},
          AllKernels()};
}

}  // namespace jax_ds::quantization
