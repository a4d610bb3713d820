#include "deep_ep/plan.h"

#include <limits>
#include <string>

namespace jax_ds::deep_ep {
namespace {

const std::string kSpace = "jax_ds::deep_ep::";
constexpr int64_t kMaxRecord = 1 << 24;

// What a thread block may use, less what kernels declare themselves.
constexpr int kMaxSharedBytes = 232448 - 1024;
constexpr int64_t kMaxListedSlots = 1 << 16;

jit::KernelSpec Spec(const std::string& file, const std::string& entry) {
  jit::KernelSpec spec;
  spec.file = "deep_ep/kernels/" + file + ".cuh";
  spec.entry = kSpace + entry;
  return spec;
}

std::string Name(bool value) { return value ? "true" : "false"; }

std::string Name(Half half) {
  const char* const names[] = {"kWhole", "kStart", "kFinish"};
  return kSpace + "Half::" + names[static_cast<int>(half)];
}

ErrorOr<bool> IsBfloat16(std::string_view dtype) {
  if (dtype == "bfloat16" || dtype == "float32") return dtype == "bfloat16";
  return InvalidArgument("dtype: must be bfloat16 or float32, got " + std::string(dtype));
}

jit::KernelSpec CombineSpec(bool bfloat16) {
  return Spec("combine", "combine<" + Name(bfloat16) + ">");
}

jit::KernelSpec LowLatencyDispatchSpec(bool bfloat16, bool quantize, Half half) {
  // What only moves bytes is one kernel for all dtypes.
  if (half == Half::kFinish) bfloat16 = quantize = true;
  const std::string input =
      std::string("jax_ds::quantization::Input::") + (bfloat16 ? "kBfloat16" : "kFloat32");
  return Spec("low_latency_dispatch",
              "low_latency_dispatch<" + input + ", " + Name(quantize) + ", " + Name(half) + ">");
}

jit::KernelSpec LowLatencyCombineSpec(bool bfloat16, Half half) {
  return Spec("low_latency_combine",
              "low_latency_combine<" + Name(bfloat16) + ", " + Name(half) + ">");
}

int SetsBytes(int64_t sets, const LowLatencySizes& sizes) {
  return slot_sets_bytes(static_cast<int>(sets),
                         static_cast<int>(sizes.num_ranks * sizes.num_tokens));
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

int64_t StagingBytes(const Record& record, int64_t note_words, int64_t num_ranks,
                     int64_t num_tokens) {
  return (record.stride + 4 * note_words) * num_ranks * num_tokens;
}

ErrorOr<unsigned int> Grid(int64_t num_sms) {
  if (num_sms < 0 || num_sms > kMaxSms) {
    return InvalidArgument("num_sms: must be at most " + std::to_string(kMaxSms) + ", got " +
                           std::to_string(num_sms));
  }
  return static_cast<unsigned int>(num_sms == 0 ? kDefaultSms : num_sms);
}

jit::KernelSpec DispatchSpec() { return Spec("dispatch", "dispatch"); }

ErrorOr<jit::KernelSpec> CombineSpec(std::string_view dtype) {
  JAX_DS_ASSIGN_OR_RETURN(bool bfloat16, IsBfloat16(dtype));
  return CombineSpec(bfloat16);
}

Error CheckLowLatency(const LowLatencySizes& sizes) {
  const int64_t slots = sizes.num_ranks * sizes.num_tokens;
  if (sizes.hidden < 16 || sizes.hidden % 16 != 0 || sizes.hidden > kMaxRecord / 4) {
    return InvalidArgument("hidden: must be a multiple of 16, got " + std::to_string(sizes.hidden));
  }
  if (sizes.top_k < 1 || sizes.top_k > kMaxColumns) {
    return InvalidArgument("expert_ids: must name 1 to 32 experts a token, got " +
                           std::to_string(sizes.top_k));
  }
  if (sizes.experts < 1 || sizes.experts > (1 << 12) || slots > kMaxListedSlots ||
      SetsBytes(sizes.experts + 1, sizes) > kMaxSharedBytes) {
    return InvalidArgument("low latency: " + std::to_string(sizes.experts) + " experts and " +
                           std::to_string(slots) + " tokens of all ranks are too many");
  }
  if (sizes.region < slots || sizes.experts * sizes.region > std::numeric_limits<int>::max()) {
    return InvalidArgument("region: must hold the tokens of all ranks, got " +
                           std::to_string(sizes.region));
  }
  return Error::Success();
}

ErrorOr<jit::KernelSpec> LowLatencyDispatchSpec(std::string_view dtype, bool quantize,
                                                const LowLatencySizes& sizes) {
  const Half half = sizes.half;
  bool bfloat16 = true;  // what finishes is given the dtype of the rows, which may be FP8
  if (half != Half::kFinish) {
    JAX_DS_ASSIGN_OR_RETURN(bfloat16, IsBfloat16(dtype));
  }
  jit::KernelSpec spec = LowLatencyDispatchSpec(bfloat16, quantize, half);
  if (half != Half::kStart) spec.shared_bytes = SetsBytes(sizes.experts + 1, sizes);
  return spec;
}

ErrorOr<jit::KernelSpec> LowLatencyCombineSpec(std::string_view dtype,
                                               const LowLatencySizes& sizes) {
  JAX_DS_ASSIGN_OR_RETURN(bool bfloat16, IsBfloat16(dtype));
  jit::KernelSpec spec = LowLatencyCombineSpec(bfloat16, sizes.half);
  if (sizes.half != Half::kFinish) spec.shared_bytes = SetsBytes(1, sizes);
  return spec;
}

std::vector<jit::KernelSpec> AllKernels() {
  std::vector<jit::KernelSpec> specs = {DispatchSpec(), CombineSpec(true), CombineSpec(false),
                                        LowLatencyDispatchSpec(true, true, Half::kFinish)};
  for (bool bfloat16 : {true, false}) {
    for (Half half : {Half::kWhole, Half::kStart}) {
      for (bool quantize : {true, false}) {
        specs.push_back(LowLatencyDispatchSpec(bfloat16, quantize, half));
      }
    }
    for (Half half : {Half::kWhole, Half::kStart, Half::kFinish}) {
      specs.push_back(LowLatencyCombineSpec(bfloat16, half));
    }
  }
  return specs;
}

}  // namespace jax_ds::deep_ep
