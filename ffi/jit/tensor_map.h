// TMA descriptors, encoded on the host for every call: XLA moves buffers between calls.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/tensor_map.h"
#include "support/status.h"

namespace jax_ds::jit {

// Values of the driver's enumerations.
enum class MapType : int { kUint8 = 0, kInt32 = 3, kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9 };
enum class Swizzle : int { kNone = 0, k32B = 1, k64B = 2, k128B = 3 };

struct MapOptions {
  Swizzle swizzle = Swizzle::kNone;
  int l2_promotion = 3;  // 0: none, 1: 64 bytes, 2: 128, 3: 256
};

// Describes a tensor of `type` at `base` for boxes of `box` elements. Innermost dimension first:
// `dims` are sizes in elements, `strides` those of every dimension but the innermost, in bytes
// (multiples of 16). What a box reaches outside reads as zero and is not stored. The innermost side
// of a swizzled box spans at most the swizzle's bytes. A size of 0 is encoded as 1: the kernel must
// not touch it.
ErrorOr<TensorMap> EncodeTensorMap(MapType type, const void* base,
                                   std::initializer_list<int64_t> dims,
                                   std::initializer_list<int64_t> strides,
                                   std::initializer_list<int> box, MapOptions options = {});

}  // namespace jax_ds::jit
