// Operands of prefill's products in shared memory: slabs of 64 columns, each of `rows` rows of 128
// bytes in the swizzle that TMA writes, one slab after the other. Host-safe, for the test.
#pragma once

#include "kernels/wgmma_descriptor.h"

namespace jax_ds::flash_mla {

constexpr unsigned int kSlabRow = 128;  // bytes: 64 columns
constexpr unsigned int kSlabGroup = 8 * kSlabRow;

// `descriptor` moved on by `bytes`: an addition in its low word, whose address field has room.
constexpr unsigned long long advanced(unsigned long long descriptor, unsigned int bytes) {
  return (descriptor >> 32 << 32) | static_cast<unsigned int>(descriptor + bytes / 16);
}

// Step i of 16 columns, for a product over the columns (K-major): rows are rows of the result.
constexpr unsigned long long columns_operand(unsigned int slabs, int rows, int i) {
  return advanced(wgmma::descriptor(slabs, kSlabGroup), i / 4 * rows * kSlabRow + i % 4 * 32);
}

// Step i of 16 rows, for a product over the rows (MN-major): columns of all slabs are columns of
// the result.
constexpr unsigned long long rows_operand(unsigned int slabs, int rows, int i) {
  return advanced(wgmma::descriptor(slabs, kSlabGroup, rows * kSlabRow), i * 2 * kSlabGroup);
}

}  // namespace jax_ds::flash_mla
