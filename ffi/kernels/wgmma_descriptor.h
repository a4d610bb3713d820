// The descriptor by which wgmma finds an operand in shared memory. Host-safe: a test follows it to
// every element and compares with where TMA puts them.
#pragma once

namespace jax_ds::wgmma {

// Descriptor of a tile in either order, whose groups of eight rows lie `group_stride` bytes apart;
// `atom_stride` matters only to MN-major tiles wider than 64. Advance by bytes / 16: K-major, the
// next 16 elements of K are 32 bytes on; MN-major, two groups.
constexpr unsigned long long descriptor(unsigned int shared, unsigned int group_stride = 1024,
                                        unsigned int atom_stride = 16) {
  constexpr unsigned long long kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<unsigned long long>(group_stride >> 4) << 32 |
         static_cast<unsigned long long>(atom_stride >> 4) << 16 | ((shared & 0x3ffff) >> 4);
}

}  // namespace jax_ds::wgmma
