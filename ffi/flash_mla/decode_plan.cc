#include "flash_mla/decode_plan.h"

#include <algorithm>
#include <string>

#include "support/shape.h"

namespace jax_ds::flash_mla {
namespace {

constexpr char kSpace[] = "jax_ds::flash_mla::";

// Parts that the combining kernel for many takes: of all groups, or of about half as many, which
// leaves registers for twice as many rows. Its eight warps share them.
constexpr int kParts = 136, kHalfOfParts = 72;
static_assert(kParts >= kMaxCtas && kParts % 8 == 0 && kHalfOfParts % 8 == 0);

std::string Element(bool half) { return half ? "jax_ds::wgmma::F16" : "jax_ds::wgmma::Bf16"; }

}  // namespace

ErrorOr<DecodeConfig> PlanDecode(int64_t query_rows, bool half) {
  if (query_rows < 1 || query_rows > int64_t{1} << 24) {
    return InvalidArgument("q: tokens times heads must lie in [1, 2^24], got " +
                           std::to_string(query_rows));
  }
  if (query_rows <= kNarrowMaxRows) {
    return DecodeConfig{true, static_cast<int>(CeilDiv(query_rows, 8) * 8), false, half};
  }
  return DecodeConfig{false, kWideRows, query_rows > kWideRows, half};
}

bool IsPageSize(int64_t tokens) {
  return tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128;
}

int BoxTokens(int64_t page_size) { return static_cast<int>(std::min<int64_t>(page_size, kBlock)); }

DecodeLaunch LaunchDecode(const DecodeConfig& c, int64_t query_rows, int multiprocessors) {
  DecodeLaunch launch;
  launch.tile_rows = c.rows;
  launch.row_groups = static_cast<int>(CeilDiv(query_rows, launch.tile_rows));
  launch.num_groups = std::max(1, std::min(multiprocessors, kMaxCtas) / launch.row_groups);
  launch.grid = static_cast<unsigned int>(launch.num_groups * launch.row_groups);
  launch.block = c.narrow ? kNarrowThreads : kWideThreads;
  // One group alone splits nothing.
  launch.workspace_rows = launch.num_groups == 1 ? 0
                                                 : int64_t{2} * launch.num_groups *
                                                       launch.row_groups * launch.tile_rows;
  return launch;
}

CombineLaunch LaunchCombine(const DecodeLaunch& decode, int64_t batch, int64_t query_rows) {
  constexpr int kManyParts = 16;
  constexpr int kFewRows = 512;
  constexpr int kWarps = kCombineThreads / 32;
  // As many as run at once; each takes several rows where there are more.
  constexpr int64_t kCtas = 2 * kMaxCtas;
  const int64_t rows = batch * query_rows;
  if (decode.num_groups >= kManyParts * batch) {
    const bool half = decode.num_groups <= kHalfOfParts;
    return {half ? Combine::kManyHalf : Combine::kMany, static_cast<unsigned int>(4 * rows)};
  }
  const bool few = rows <= kFewRows;
  const int64_t ctas = std::min(kCtas, CeilDiv(few ? 4 * rows : rows, kWarps));
  return {few ? Combine::kQuarters : Combine::kRows, static_cast<unsigned int>(ctas)};
}

jit::KernelSpec DecodeSpec(const DecodeConfig& c) {
  const std::string space = kSpace;
  const std::string name = c.narrow ? "Narrow" : "Wide";
  jit::KernelSpec spec;
  spec.file = std::string("flash_mla/kernels/") + (c.narrow ? "narrow.cuh" : "wide.cuh");
  spec.entry = space + (c.narrow ? "decode_narrow<" : "decode_wide<") + space + name + "Config<" +
               std::to_string(c.narrow ? c.rows : static_cast<int>(c.prefetch)) + ", " +
               Element(c.half) + ">>";
  spec.shared_bytes = c.narrow ? NarrowSharedBytes(c.rows) : kWideSharedBytes;
  return spec;
}

jit::KernelSpec CombineSpec(Combine combine, bool half) {
  jit::KernelSpec spec;
  spec.file = "flash_mla/kernels/combine.cuh";
  static constexpr const char* kNames[] = {"few", "few", "many", "many"};
  const std::string sizes[] = {"1", "4", std::to_string(kHalfOfParts), std::to_string(kParts)};
  const int i = static_cast<int>(combine);
  spec.entry =
      std::string(kSpace) + "combine_" + kNames[i] + "<" + Element(half) + ", " + sizes[i] + ">";
  return spec;
}

jit::KernelSpec AppendSpec() {
  jit::KernelSpec spec;
  spec.file = "flash_mla/kernels/append.cuh";
  spec.entry = std::string(kSpace) + "append";
  return spec;
}

std::vector<jit::KernelSpec> AllDecodeKernels() {
  std::vector<jit::KernelSpec> specs = {AppendSpec()};
  for (bool half : {false, true}) {
    for (int rows = 8; rows <= kNarrowMaxRows; rows += 8) {
      specs.push_back(DecodeSpec({true, rows, false, half}));
    }
    for (bool prefetch : {false, true}) {
      specs.push_back(DecodeSpec({false, kWideRows, prefetch, half}));
    }
    for (Combine combine : kCombines) specs.push_back(CombineSpec(combine, half));
  }
  return specs;
}

}  // namespace jax_ds::flash_mla
