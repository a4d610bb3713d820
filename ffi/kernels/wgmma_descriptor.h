// The descriptor by which wgmma finds an operand in shared memory. Host-safe: a test follows it to
// every element and compares with where TMA puts them.
#pragma once

namespace jax_ds::wgmma {

// The lower half of a descriptor: all that differs between the tiles of one operand, so what loops
// should keep. It counts 16 bytes.
constexpr unsigned int low_word(unsigned int shared, unsigned int atom_stride = 16) {
  return atom_stride >> 4 << 16 | (shared & 0x3ffff) >> 4;
}

// The descriptor whose lower half that is, of a tile in the 128-byte swizzle.
constexpr unsigned long long with_low_word(unsigned int low, unsigned int group_stride = 1024) {
  constexpr unsigned long long kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<unsigned long long>(group_stride >> 4) << 32 | low;
}

// Descriptor of a tile in either order, whose groups of eight rows lie `group_stride` bytes apart;
// `atom_stride` matters only to MN-major tiles wider than 64. Advance by bytes / 16: K-major, the
// next 32 bytes of K are 2 further; MN-major, 16 rows of K are two groups.
constexpr unsigned long long descriptor(unsigned int shared, unsigned int group_stride = 1024,
                                        unsigned int atom_stride = 16) {
  return with_low_word(low_word(shared, atom_stride), group_stride);
}

}  // namespace jax_ds::wgmma
