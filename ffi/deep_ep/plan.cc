#include "deep_ep/plan.h"

#include <string>

namespace jax_ds::deep_ep {
namespace {

const std::string kSpace = "jax_ds::deep_ep::";
constexpr int64_t kMaxRecord = 1 << 24;

jit::KernelSpec CombineSpec(bool bfloat16) {
  jit::KernelSpec spec;
  spec.file = "deep_ep/kernels/combine.cuh";
  spec.entry = kSpace + "combine<" + (bfloat16 ? "true" : "false") + ">";
  return spec;
}

}  // namespace

ErrorOr<Record> MakeRecord(int64_t payload_bytes, int64_t num_scales) {
  if (payload_bytes < 16 || payload_bytes % 16 != 0 || payload_bytes > kMaxRecord) {
    return InvalidArgument("hidden: a token must be a multiple of 16 bytes, got " +
                           std::to_string(payload_bytes));
  }
  if (num_scales < 0 || num_scales > kMaxRecord / 4) {
    return InvalidArgument("scales: too many, " + std::to_string(num_scales));
  }
  const int64_t stride = (payload_bytes + 4 * num_scales + 127) / 128 * 128;
  return Record{static_cast<int>(payload_bytes / 16), static_cast<int>(num_scales),
                static_cast<int>(stride)};
}

int64_t StagingBytes(const Record& record, int64_t num_ranks, int64_t num_tokens) {
  return record.stride * num_ranks * num_tokens;
}

ErrorOr<unsigned int> Grid(int64_t num_sms) {
  if (num_sms < 0 || num_sms > kMaxSms) {
    return InvalidArgument("num_sms: must be at most " + std::to_string(kMaxSms) + ", got " +
                           std::to_string(num_sms));
  }
  return static_cast<unsigned int>(num_sms == 0 ? kDefaultSms : num_sms);
}

jit::KernelSpec DispatchSpec() {
  jit::KernelSpec spec;
  spec.file = "deep_ep/kernels/dispatch.cuh";
  spec.entry = kSpace + "dispatch";
  return spec;
}

ErrorOr<jit::KernelSpec> CombineSpec(std::string_view dtype) {
  if (dtype != "bfloat16" && dtype != "float32") {
    return InvalidArgument("dtype: must be bfloat16 or float32, got " + std::string(dtype));
  }
  return CombineSpec(dtype == "bfloat16");
}

std::vector<jit::KernelSpec> AllKernels() {
  return {DispatchSpec(), CombineSpec(true), CombineSpec(false)};
}

}  // namespace jax_ds::deep_ep
