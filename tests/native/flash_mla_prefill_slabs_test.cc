// The descriptors of prefill's operands lead wgmma to every element where TMA has put it.
#include <cstdint>

#include "flash_mla/kernels/prefill_slabs.h"
#include "tests/native/testing.h"

namespace mla = jax_ds::flash_mla;

namespace {

constexpr uint32_t kBase = 5 * 1024;

// The 128-byte swizzle: within 1024 bytes, the row is added (without carry) to the piece of 16
// bytes.
uint32_t Swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Where TMA writes element (row, column) of slabs loaded as boxes of 64 columns by `rows` rows.
uint32_t Written(int rows, int row, int column) {
  return Swizzle(kBase + column / 64 * rows * 128 + row * 128 + column % 64 * 2);
}

// The canonical layouts of the PTX manual's "Asynchronous warpgroup level matrix shared memory
// layout", 128-byte swizzle, elements of two bytes: of the index that is contiguous in memory, 64
// to an atom; of the other, eight to a group.
struct Layout {
  uint32_t start, atom_stride, group_stride;

  explicit Layout(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        atom_stride((descriptor >> 16 & 0x3fff) << 4),
        group_stride((descriptor >> 32 & 0x3fff) << 4) {
    CHECK_EQ(descriptor >> 62, uint64_t{1});  // 128-byte swizzle
  }

  uint32_t KMajor(int mn, int k) const {
    return Swizzle(start + mn / 8 * group_stride + mn % 8 * 128 + k * 2);
  }
  uint32_t MnMajor(int mn, int k) const {
    return Swizzle(start + mn / 64 * atom_stride + k / 8 * group_stride + k % 8 * 128 +
                   mn % 64 * 2);
  }
};

void Columns(int rows, int width) {
  for (int i = 0; i < width / 16; ++i) {
    const Layout layout(mla::columns_operand(kBase, rows, i));
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < 16; ++k) {
        CHECK_EQ(layout.KMajor(row, k), Written(rows, row, i * 16 + k));
      }
    }
  }
}

void Rows(int rows, int width) {
  for (int i = 0; i < rows / 16; ++i) {
    const Layout layout(mla::rows_operand(kBase, rows, i));
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < width; ++column) {
        CHECK_EQ(layout.MnMajor(column, k), Written(rows, i * 16 + k, column));
      }
    }
  }
}

}  // namespace

int main() {
  // Rows of a tile: keys forward, keys and queries backward. Columns: 192, 128 or 64.
  for (int rows : {128, 64, 48}) {
    for (int width : {192, 128, 64}) {
      Columns(rows, width);
      Rows(rows, width);
    }
  }
  return jax_ds::testing::failures;
}
