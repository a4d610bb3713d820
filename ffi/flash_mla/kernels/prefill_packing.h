// Packed batches: several sequences, one after the other, in one row of tokens. What each row sees,
// and how rows are cut into tiles. Host-safe: a test compares with the definition.
//
// A tile is 128 consecutive rows. Long sequences start a tile of their own, so that their tiles are
// full; short ones that follow each other are cut as if they were one, and so are never a tile
// each. Padding before the first and after the last sequence counts as a sequence that sees nothing
// and is never mixed with others.
#pragma once

namespace jax_ds::flash_mla {

constexpr int kHeldRows = 128;

// Queries or keys: sequence n consists of rows [offsets[n], offsets[n + 1]).
struct PackedSide {
  const int* offsets;  // [sequences + 1], clamped here to [0, rows]
  int sequences;
  int rows;
};

struct PackedInterval {
  int first, last;  // [first, last) of the other side; both grow with the row
};

// ---- parts: padding (part 0), the sequences (parts 1 to N), padding (part N + 1) ----------------

constexpr int packed_parts(const PackedSide& side) { return side.sequences + 2; }

// First row of a part; of part N + 2, the number of rows.
constexpr int packed_begin(const PackedSide& side, int part) {
  if (part <= 0) return 0;
  if (part >= packed_parts(side)) return side.rows;
  const int offset = side.offsets[part - 1];
  return offset < 0 ? 0 : offset > side.rows ? side.rows : offset;
}

// The part that holds a row: of several that begin there, the last, as the others are empty.
constexpr int packed_part(const PackedSide& side, int row) {
  int low = 0, high = packed_parts(side) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (packed_begin(side, middle) <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

constexpr bool packed_long(const PackedSide& side, int part) {
  return packed_begin(side, part + 1) - packed_begin(side, part) >= kHeldRows;
}

// Whether a tile must begin where this part begins.
constexpr bool packed_anchor(const PackedSide& side, int part) {
  return part <= 1 || part > side.sequences || packed_long(side, part) ||
         packed_long(side, part - 1);
}

// ---- what a row sees ----------------------------------------------------------------------------

constexpr PackedInterval packed_nothing(const PackedSide& other, int part) {
  const int at = packed_begin(other, part == 0 ? 1 : part);
  return {at, at};
}

// The keys that query `row` sees.
constexpr PackedInterval packed_keys(const PackedSide& queries, const PackedSide& keys, bool causal,
                                     int row) {
  const int part = packed_part(queries, row);
  if (part == 0 || part > queries.sequences) return packed_nothing(keys, part);
  const int first = packed_begin(keys, part), end = packed_begin(keys, part + 1);
  // Aligned at the last query and the last key.
  const int own = causal ? end - (packed_begin(queries, part + 1) - 1 - row) : end;
  return {first, own < first ? first : own};
}

// The queries that see key `row`.
constexpr PackedInterval packed_queries(const PackedSide& queries, const PackedSide& keys,
                                        bool causal, int row) {
  const int part = packed_part(keys, row);
  if (part == 0 || part > keys.sequences) return packed_nothing(queries, part);
  const int first = packed_begin(queries, part), end = packed_begin(queries, part + 1);
  const int own = causal ? end - (packed_begin(keys, part + 1) - row) : first;
  return {own < first ? first : own, end};
}

// ---- lists in memory ----------------------------------------------------------------------------

// Tiles that `rows` rows can give: one for each full 128 rows, and one more for each stretch
// between anchors, of which long parts and the ends of runs of short ones make at most so many.
constexpr int packed_max_tiles(int rows) { return 3 * ((rows + kHeldRows - 1) / kHeldRows) + 5; }

// One side's lists, in 4-byte words from a start that is aligned to 16 bytes.
struct PackedLayout {
  int tiles;      // int4 {row, end, first, last} each: rows [row, end) see some of [first, last)
  int intervals;  // int2 for each row
  int starts;     // scratch
  int words;      // in all

  constexpr explicit PackedLayout(int rows)
      : tiles(4),
        intervals(tiles + 4 * packed_max_tiles(rows)),
        starts(intervals + 2 * rows),
        words((starts + packed_max_tiles(rows) + 3) / 4 * 4) {}
};

// The first words.
enum PackedHeader : int {
  kPackedTiles = 0,      // number of tiles
  kPackedCounter = 1,    // PrefillWalk::counter, zeroed
  kPackedOthersEnd = 2,  // rows of the other side from this one on are padding
};

struct PackParams {
  PackedSide queries, keys;
  int causal;
  int* lists;  // the queries', then the keys' where both are wanted
};

constexpr int kPackThreads = 1024;

}  // namespace jax_ds::flash_mla
