// The part of the CUDA driver's interface that we call, declared by us: no CUDA header is needed to
// build. Values and layouts are those of cuda.h, version 12.4 and later.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_ds::cuda {

using Result = int;  // CUresult; 0 is success
using Device = int;
using DevicePtr = unsigned long long;
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Library = struct CUlib_st*;
using Kernel = struct CUkern_st*;
using Function = struct CUfunc_st*;

enum DeviceAttribute : int {
  kMultiprocessorCount = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
};

constexpr unsigned int kHostAllocPortableMapped = 1 | 2;
constexpr unsigned int kNonBlockingStream = 1;

enum FunctionAttribute : int {
  kMaxDynamicSharedSizeBytes = 8,
};

enum LaunchAttributeId : int {
  kClusterDimension = 4,
  kProgrammaticStreamSerialization = 6,
};

union LaunchAttributeValue {
  char pad[64];
  struct {
    unsigned int x, y, z;
  } cluster;
  int flag;
};

struct alignas(8) LaunchAttribute {
  LaunchAttributeId id;
  char pad[4];
  LaunchAttributeValue value;
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, value) == 8);

struct LaunchConfig {
  unsigned int grid_x, grid_y, grid_z;
  unsigned int block_x, block_y, block_z;
  unsigned int shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned int num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32);

}  // namespace jax_ds::cuda
