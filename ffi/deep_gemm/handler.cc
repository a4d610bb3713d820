#include "deep_gemm/handler.h"

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>

#include "deep_gemm/plan.h"
#include "jit/compiler.h"
#include "jit/launch.h"
#include "jit/tensor_map.h"
#include "support/driver.h"
#include "support/per_device.h"
#include "support/shape.h"
#include "support/stages.h"

namespace jax_ds::deep_gemm {
namespace {

namespace ffi = xla::ffi;

constexpr int kDefaultSms = 132;

struct GemmState : Stateful<GemmState> {
  Problem problem;
  Plan plan;
  bool zero_tail;
  std::shared_ptr<const jit::Kernel> kernel;
  // Clusters a device runs at once; asked when first initialized there.
  PerDevice<int> slots = {};

  jit::LaunchShape Shape(unsigned int clusters) const {
    const unsigned int cluster = plan.config.cluster();
    return {{clusters * cluster}, {static_cast<unsigned int>(plan.config.threads())}, {cluster}};
  }
};

// The multiprocessors the plan counts on: those of device 0, as all local devices share the plan.
int NumSms() {
  ErrorOr<const Driver*> driver = Driver::Get();
  if (driver.has_error()) return kDefaultSms;
  ErrorOr<int> count = (*driver)->DeviceAttribute(0, cuda::kMultiprocessorCount);
  return count.has_error() ? kDefaultSms : *count;
}

ErrorOr<std::unique_ptr<GemmState>> Instantiate(std::string_view mode, std::string_view output,
                                                int64_t m, int64_t n, int64_t k, int64_t groups,
                                                int64_t expected_rows, bool accumulate,
                                                bool zero_tail, std::string_view config) {
  auto state = std::make_unique<GemmState>();
  JAX_DS_ASSIGN_OR_RETURN(Mode parsed_mode, ParseMode(mode));
  JAX_DS_ASSIGN_OR_RETURN(Output parsed_output, ParseOutput(output, accumulate));
  state->problem = {parsed_mode, parsed_output, m, n, k, groups, expected_rows};
  state->zero_tail = zero_tail;
  JAX_DS_ASSIGN_OR_RETURN(state->plan, Choose(state->problem, NumSms(), config));
  JAX_DS_ASSIGN_OR_RETURN(state->kernel, jit::GetKernel(state->plan.Spec()));
  return state;
}

Error Initialize(GemmState* state, int32_t ordinal) {
  JAX_DS_RETURN_IF_ERROR(state->kernel->Load(ordinal));
  if (state->slots[ordinal].load(std::memory_order_relaxed) == 0) {
    JAX_DS_ASSIGN_OR_RETURN(int slots,
                            jit::MaxActiveClusters(*state->kernel, ordinal, state->Shape(1)));
    if (slots < 1) return Internal("no cluster of the GEMM kernel fits on this device");
    state->slots[ordinal].store(slots, std::memory_order_relaxed);
  }
  return Error::Success();
}

// Checks the operands against the problem; `batch` is how many of it they hold.
ErrorOr<int64_t> CheckOperands(const Problem& p, AnyBuffer lhs, AnyBuffer lhs_scales, AnyBuffer rhs,
                               AnyBuffer rhs_scales, AnyBuffer out) {
  const bool masked = p.mode == kMasked, wgrad = p.mode == kWgrad;
  const bool many_rhs = p.mode == kGrouped || masked, many_out = masked || (wgrad && p.groups > 1);
  const DataType e4m3 = DataType::F8E4M3FN, f32 = DataType::F32;
  const int64_t kb = Blocks128(p.k), rhs_rows = wgrad ? p.n : Blocks128(p.n);
  const int64_t lhs_groups = masked ? p.groups : 1, rhs_groups = many_rhs ? p.groups : 1;
  const int64_t out_groups = many_out ? p.groups : 1;
  const DataType out_type = p.output == kBfloat16 ? DataType::BF16 : f32;
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lhs", lhs, e4m3, {p.m, p.k}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("lhs_scales", lhs_scales, f32, {p.m, kb}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("rhs", rhs, e4m3, {p.n, p.k}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("rhs_scales", rhs_scales, f32, {rhs_rows, kb}));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("out", out, out_type, {p.m, p.n}));
  const int64_t batch = LeadingSize(lhs, 2) / lhs_groups;
  const bool agree = LeadingSize(lhs, 2) == batch * lhs_groups &&
                     LeadingSize(lhs_scales, 2) == batch * lhs_groups &&
                     LeadingSize(rhs, 2) == batch * rhs_groups &&
                     LeadingSize(rhs_scales, 2) == batch * rhs_groups &&
                     LeadingSize(out, 2) == batch * out_groups;
  if (!agree) return InvalidArgument("gemm operands: leading dimensions must agree");
  return batch;
}

// `rest` holds group_sizes, int32 [..., G], unless the product is one dense matrix; then, if the
// output is added to, its buffer once more (the two are aliased). Returns the sizes, or null.
ErrorOr<const int*> TakeRest(const Problem& p, ffi::RemainingArgs rest, const AnyBuffer& out,
                             int64_t batch) {
  const size_t adds = p.output == kFloat32Add ? 1 : 0;
  if (adds) {
    if (rest.size() == 0) return InvalidArgument("accumulate: missing");
    JAX_DS_ASSIGN_OR_RETURN(AnyBuffer sum, rest.get<AnyBuffer>(rest.size() - 1));
    if (sum.untyped_data() != out.untyped_data()) {
      return InvalidArgument("accumulate: must be aliased to the output");
    }
  }
  if (rest.size() <= adds) {
    if (p.mode == kGrouped || p.mode == kMasked) return InvalidArgument("group_sizes: missing");
    return nullptr;
  }
  JAX_DS_ASSIGN_OR_RETURN(AnyBuffer sizes, rest.get<AnyBuffer>(0));
  JAX_DS_RETURN_IF_ERROR(CheckBuffer("group_sizes", sizes, DataType::S32, {p.groups}));
  if (LeadingSize(sizes, 1) != batch) return InvalidArgument("group_sizes: wrong batch");
  return static_cast<const int*>(sizes.untyped_data());
}

// The tensor maps of one product.
Error EncodeMaps(const Problem& p, const Config& c, void* lhs, void* rhs, Params* params) {
  const bool many_rhs = p.mode == kGrouped || p.mode == kMasked;
  const int64_t lhs_rows = p.mode == kMasked ? p.m * p.groups : p.m;
  const int64_t rhs_rows = many_rhs ? p.n * p.groups : p.n;
  const int64_t matrices = p.mode == kMasked || p.mode == kWgrad ? p.groups : 1;
  const int out_bytes = OutputBytes(c);
  const jit::MapType out_type =
      p.output == kBfloat16 ? jit::MapType::kBfloat16 : jit::MapType::kFloat32;
  JAX_DS_ASSIGN_OR_RETURN(params->lhs,
                          jit::EncodeTensorMap(jit::MapType::kUint8, lhs, {p.k, lhs_rows}, {p.k},
                                               {kBlockK, LhsBox(c)}, {jit::Swizzle::k128B}));
  // Of few rows' weights L2 brings 128 bytes a miss, not 256: the next are asked for anyway.
  const int promotion = p.mode == kDense && c.block_m == 64 ? 2 : 3;
  JAX_DS_ASSIGN_OR_RETURN(
      params->rhs, jit::EncodeTensorMap(jit::MapType::kUint8, rhs, {p.k, rhs_rows}, {p.k},
                                        {kBlockK, c.block_n}, {jit::Swizzle::k128B, promotion}));
  JAX_DS_ASSIGN_OR_RETURN(
      params->out, jit::EncodeTensorMap(out_type, params->out_data, {p.n, p.m, matrices},
                                        {p.n * out_bytes, p.m * p.n * out_bytes},
                                        {128 / out_bytes, OutBox(c), 1}, {jit::Swizzle::k128B}));
  return Error::Success();
}

Error Execute(GemmState* state, int32_t ordinal, cuda::Stream stream, AnyBuffer lhs,
              AnyBuffer lhs_scales, AnyBuffer rhs, AnyBuffer rhs_scales, ffi::RemainingArgs rest,
              ffi::Result<AnyBuffer> out) {
  const Problem& p = state->problem;
  JAX_DS_RETURN_IF_ERROR(CheckOrdinal(ordinal));
  JAX_DS_ASSIGN_OR_RETURN(int64_t batch, CheckOperands(p, lhs, lhs_scales, rhs, rhs_scales, *out));
  JAX_DS_ASSIGN_OR_RETURN(const int* group_sizes, TakeRest(p, rest, *out, batch));

  Params params = {};
  params.num_groups = static_cast<int>(p.groups);
  params.m = static_cast<int>(p.m);
  params.n = static_cast<int>(p.n);
  params.k = static_cast<int>(p.k);
  params.band = state->plan.Band();
  params.zero_tail = state->zero_tail;
  const int64_t clusters = std::min<int64_t>(state->plan.Clusters(p),
                                             state->slots[ordinal].load(std::memory_order_relaxed));
  auto shape = state->Shape(static_cast<unsigned int>(clusters));
  // The kernel's beginning runs beside its predecessor's end; it waits before it reads anything.
  shape.overlap_previous = true;
  for (int64_t i = 0; i < batch; ++i) {
    auto part = [&](const AnyBuffer& buffer) {
      return static_cast<char*>(buffer.untyped_data()) + buffer.size_bytes() / batch * i;
    };
    params.lhs_scales = reinterpret_cast<const float*>(part(lhs_scales));
    params.rhs_scales = reinterpret_cast<const float*>(part(rhs_scales));
    params.out_data = part(*out);
    params.group_sizes = group_sizes == nullptr ? nullptr : group_sizes + i * p.groups;
    JAX_DS_RETURN_IF_ERROR(EncodeMaps(p, state->plan.config, part(lhs), part(rhs), &params));
    JAX_DS_RETURN_IF_ERROR(jit::Launch(*state->kernel, ordinal, stream, shape, params));
  }
  return Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<std::string_view>("mode")
                           .Attr<std::string_view>("output")
                           .Attr<int64_t>("m")
                           .Attr<int64_t>("n")
                           .Attr<int64_t>("k")
                           .Attr<int64_t>("groups")
                           .Attr<int64_t>("expected_rows")
                           .Attr<bool>("accumulate")
                           .Attr<bool>("zero_tail")
                           .Attr<std::string_view>("config"));
}  // namespace

Room GetRoom() {
  return {
      "deep_gemm",
      {{"jax_ds_gemm_state", &GemmState::id, GemmState::info()}},
      {{"jax_ds_gemm", kInstantiate, nullptr, InitializeStage<Initialize>, ExecuteStage<Execute>}},
      AllKernels()};
}

}  // namespace jax_ds::deep_gemm
