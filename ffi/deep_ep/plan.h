// Layouts and grids of the communication kernels: host arithmetic only.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "deep_ep/kernels/low_latency_params.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::deep_ep {

// Warps work on one token each, with a lane for each rank, for each column and for each id.
constexpr int64_t kMaxColumns = 32;
// As many CTAs on one SM each keep eight ranks that share a GPU within its 132 SMs.
constexpr int64_t kDefaultSms = 16;
constexpr int64_t kMaxSms = 132;

// One token's record: `payload_bytes`, a multiple of 16, then `num_scales` floats; the next record
// starts at a multiple of 128 bytes.
ErrorOr<Record> MakeRecord(int64_t payload_bytes, int64_t num_scales);

// Bytes of staging: a record for each token of each rank, then `note_words` words for each.
int64_t StagingBytes(const Record& record, int64_t note_words, int64_t num_ranks,
                     int64_t num_tokens);

// CTAs to launch: `num_sms` of the caller, or 0 for kDefaultSms.
ErrorOr<unsigned int> Grid(int64_t num_sms);

jit::KernelSpec DispatchSpec();

// `dtype`: "bfloat16" or "float32", of the rows.
ErrorOr<jit::KernelSpec> CombineSpec(std::string_view dtype);

// ---- low latency

struct LowLatencySizes {
  int64_t num_ranks, num_tokens, top_k;
  int64_t experts;  // of a rank
  int64_t region;   // rows of an expert
  int64_t hidden;
  Half half = Half::kWhole;
  bool bfloat16 = true;  // what a dispatch is given, else float32

  int64_t columns() const { return top_k < experts ? top_k : experts; }
};

// A call must keep its sets of slots in shared memory, and count slots and rows in 32 bits.
Error CheckLowLatency(const LowLatencySizes& sizes);

// `dtype`: "bfloat16" or "float32", of the tokens that are sent.
ErrorOr<jit::KernelSpec> LowLatencyDispatchSpec(std::string_view dtype, bool quantize,
                                                const LowLatencySizes& sizes);
ErrorOr<jit::KernelSpec> LowLatencyCombineSpec(std::string_view dtype,
                                               const LowLatencySizes& sizes);

// Every kernel the functions above can name.
std::vector<jit::KernelSpec> AllKernels();

}  // namespace jax_ds::deep_ep
