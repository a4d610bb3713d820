// Packed batches: what rows see is what the mask says, and tiles cover every row once.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "flash_mla/kernels/prefill_packing.h"
#include "tests/native/testing.h"

namespace mla = jax_ds::flash_mla;

namespace {

struct Batch {
  std::vector<int> query_offsets, key_offsets;
  int query_rows, key_rows;

  mla::PackedSide queries() const { return Side(query_offsets, query_rows); }
  mla::PackedSide keys() const { return Side(key_offsets, key_rows); }

  static mla::PackedSide Side(const std::vector<int>& offsets, int rows) {
    return {offsets.data(), static_cast<int>(offsets.size()) - 1, rows};
  }
};

// The definition: query i sees key j.
bool Sees(const Batch& b, bool causal, int i, int j) {
  for (size_t n = 0; n + 1 < b.query_offsets.size(); ++n) {
    if (i < b.query_offsets[n] || i >= b.query_offsets[n + 1]) continue;
    if (j < b.key_offsets[n] || j >= b.key_offsets[n + 1]) continue;
    return !causal || j - b.key_offsets[n + 1] <= i - b.query_offsets[n + 1];
  }
  return false;
}

void Intervals(const Batch& b, bool causal) {
  const mla::PackedSide queries = b.queries(), keys = b.keys();
  mla::PackedInterval before = {0, 0};
  for (int i = 0; i < b.query_rows; ++i) {
    const mla::PackedInterval seen = mla::packed_keys(queries, keys, causal, i);
    for (int j = 0; j < b.key_rows; ++j) {
      CHECK((j >= seen.first && j < seen.last) == Sees(b, causal, i, j));
    }
    CHECK(seen.first >= before.first && seen.last >= before.last);
    before = seen;
  }
  before = {0, 0};
  for (int j = 0; j < b.key_rows; ++j) {
    const mla::PackedInterval seen = mla::packed_queries(queries, keys, causal, j);
    for (int i = 0; i < b.query_rows; ++i) {
      CHECK((i >= seen.first && i < seen.last) == Sees(b, causal, i, j));
    }
    CHECK(seen.first >= before.first && seen.last >= before.last);
    before = seen;
  }
}

// Tiles as prefill_packing.cuh cuts them, one part after the other.
std::vector<int> Starts(const mla::PackedSide& side) {
  std::vector<int> starts;
  int anchor = 0;
  for (int part = 0; part < mla::packed_parts(side); ++part) {
    const int begin = mla::packed_begin(side, part), end = mla::packed_begin(side, part + 1);
    if (mla::packed_anchor(side, part)) anchor = begin;
    for (int row = begin; row < end; ++row) {
      if ((row - anchor) % mla::kHeldRows == 0) starts.push_back(row);
    }
  }
  return starts;
}

void Tiles(const mla::PackedSide& side) {
  const std::vector<int> starts = Starts(side);
  CHECK(static_cast<int>(starts.size()) <= mla::packed_max_tiles(side.rows));
  CHECK(side.rows == 0 || (!starts.empty() && starts[0] == 0));
  for (size_t t = 0; t < starts.size(); ++t) {
    const int end = t + 1 < starts.size() ? starts[t + 1] : side.rows;
    CHECK(end > starts[t] && end - starts[t] <= mla::kHeldRows);
  }
  // A long sequence has tiles of its own, all full but the last; padding is never mixed with it.
  for (int part = 0; part < mla::packed_parts(side); ++part) {
    const int begin = mla::packed_begin(side, part), end = mla::packed_begin(side, part + 1);
    const bool padding = part == 0 || part == mla::packed_parts(side) - 1;
    if (end == begin || (!padding && !mla::packed_long(side, part))) continue;
    const auto first = std::find(starts.begin(), starts.end(), begin);
    CHECK(first != starts.end());
    CHECK(end == side.rows || std::find(first, starts.end(), end) != starts.end());
    for (int row = begin; row < end; row += mla::kHeldRows) {
      CHECK(std::find(first, starts.end(), row) != starts.end());
    }
  }
}

void Random() {
  std::mt19937 random(3);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (int trial = 0; trial < 60; ++trial) {
    const int longest = trial % 3 == 0 ? 3 : trial % 3 == 1 ? 60 : 400;
    Batch b = {{below(4)}, {below(200)}, 0, 0};
    for (int n = 1 + below(6); n > 0; --n) {
      b.query_offsets.push_back(b.query_offsets.back() + below(longest));
      b.key_offsets.push_back(b.key_offsets.back() + below(longest));
    }
    b.query_rows = b.query_offsets.back() + below(150);
    b.key_rows = b.key_offsets.back() + below(3);
    Intervals(b, true);
    Intervals(b, false);
    Tiles(b.queries());
    Tiles(b.keys());
  }
}

// The most tiles: every other sequence is just long enough to have one of its own.
void ManyTiles() {
  std::vector<int> offsets = {1};
  for (int n = 0; n < 40; ++n) offsets.push_back(offsets.back() + (n % 2 ? 1 : 129));
  Tiles(Batch::Side(offsets, offsets.back() + 1));
}

// Whatever the offsets hold, no row outside the arrays is named.
void Nonsense() {
  const std::vector<int> offsets = {-5, 900, 3, 1 << 30, -(1 << 30), 40};
  const mla::PackedSide side = Batch::Side(offsets, 77);
  for (int row = 0; row < 77; ++row) {
    for (bool causal : {false, true}) {
      const mla::PackedInterval seen = mla::packed_keys(side, side, causal, row);
      CHECK(seen.first >= 0 && seen.last <= 77);
    }
  }
}

// Python allocates by the same count: jax_ds/flash_mla/ffi.py.
void Layout() {
  for (int rows : {1, 127, 128, 129, 8192}) {
    const mla::PackedLayout layout(rows);
    CHECK_EQ(layout.tiles % 4, 0);
    CHECK_EQ(layout.intervals % 2, 0);
    CHECK_EQ(layout.words % 4, 0);
    CHECK_EQ(layout.words, (4 + 5 * (3 * ((rows + 127) / 128) + 5) + 2 * rows + 3) / 4 * 4);
  }
}

}  // namespace

int main() {
  Random();
  ManyTiles();
  Nonsense();
  Layout();
  return jax_ds::testing::failures;
}
