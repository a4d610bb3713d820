// Which decode kernel runs for which sizes, and how it is launched: host arithmetic only.
#pragma once

#include <cstdint>
#include <vector>

#include "flash_mla/kernels/params.h"
#include "jit/spec.h"
#include "support/status.h"

namespace jax_ds::flash_mla {

// Few query rows (tokens x heads) go to the kernel whose operands are swapped, which pays for
// multiples of eight rows; many to the one whose CTAs take 64 rows. Where several of those share
// the cache, the tensor cores are the limit, and the next block is fetched to L2 ahead of its load.
struct DecodeConfig {
  bool narrow;
  int rows;  // query rows of a CTA
  bool prefetch;
  bool half;  // float16, not bfloat16
};

ErrorOr<DecodeConfig> PlanDecode(int64_t query_rows, bool half);

// Whether pages may hold so many tokens; jax_ds/flash_mla/checks.py has the same list.
bool IsPageSize(int64_t tokens);

// Tokens that one TMA box brings: a page, or a block if that is less.
int BoxTokens(int64_t page_size);

// A part of the launch geometry is the workspace's: its rows hold parts of split requests.
struct DecodeLaunch {
  int num_groups;  // of CTAs share out the blocks of the cache
  int row_groups;  // CTAs of a group, each with its share of a request's query rows
  int tile_rows;   // query rows of a row group
  unsigned int grid;
  unsigned int block;
  int64_t workspace_rows;
};

DecodeLaunch LaunchDecode(const DecodeConfig& config, int64_t query_rows, int multiprocessors);

// How the parts are put together: a CTA for each quarter of a row where many parts meet (latency),
// else a warp for each quarter where there are few rows, else a warp for each row.
enum class Combine : int { kRows, kQuarters, kManyHalf, kMany };
inline constexpr Combine kCombines[] = {Combine::kRows, Combine::kQuarters, Combine::kManyHalf,
                                        Combine::kMany};
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
