// Which decode kernel runs for which sizes, and how it is launched: host arithmetic only.
#pragma once

#include <cstdint>
#include <vector>

#include "flash_mla/kernels/params.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::flash_mla {

// Few query rows (tokens x heads) go to the kernel whose operands are swapped, which pays for
// multiples of eight rows; many to the one whose CTAs take 64 rows, two of them in a cluster that
// shares its loads where the number of such tiles is even.
struct DecodeConfig {
  bool narrow;
  int rows;  // query rows of a CTA
  int cluster;
  bool half;  // float16, not bfloat16
};

ErrorOr<DecodeConfig> PlanDecode(int64_t query_rows, bool half);

// Tokens that one TMA box brings: a page, or a CTA's share of a block if that is less.
int BoxTokens(const DecodeConfig& config, int64_t page_size);

// A part of the launch geometry is the workspace's: its rows hold parts of split requests.
struct DecodeLaunch {
  int num_groups;  // CTAs (or clusters) times row groups share out the blocks of the cache
  int row_groups;  // of the request's query rows
  int tile_rows;   // query rows of a row group
  unsigned int grid;
  unsigned int block;
  int64_t workspace_rows;
};

DecodeLaunch LaunchDecode(const DecodeConfig& config, int64_t query_rows, int multiprocessors);

// How the parts are put together: a CTA for each quarter of a row where many parts meet (latency),
// else a warp for each quarter where there are few rows, else a warp for each row.
enum class Combine : int { kRows, kQuarters, kMany };
inline constexpr Combine kCombines[] = {Combine::kRows, Combine::kQuarters, Combine::kMany};
struct CombineLaunch {
  Combine combine;
  unsigned int grid;
};
CombineLaunch LaunchCombine(const DecodeLaunch& decode, int64_t batch, int64_t query_rows);

jit::KernelSpec DecodeSpec(const DecodeConfig& config);
jit::KernelSpec CombineSpec(Combine combine, bool half);
jit::KernelSpec AppendSpec();
std::vector<jit::KernelSpec> AllDecodeKernels();

}  // namespace jax_ds::flash_mla
