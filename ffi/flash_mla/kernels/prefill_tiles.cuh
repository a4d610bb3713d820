// What prefill's forward and backward kernels share: which tiles a CTA takes, what rows see of each
// other, and how they are posted.
#pragma once

#include "flash_mla/kernels/prefill_common.cuh"
#include "flash_mla/kernels/prefill_config.h"
#include "flash_mla/kernels/prefill_dealing.h"
#include "kernels/pipeline.cuh"

namespace jax_ds::flash_mla {

// The side that a kernel holds while it walks the other.
enum class Side { kQueries, kKeys };

// Rows [row, end) of one head, at most 128, which see rows of the other side only from `first` to
// before `last`. No more tiles: head is -1.
struct HeldTile {
  int batch, head;
  int row, end;
  int first, last;
};

// ---- what a row sees ----------------------------------------------------------------------------

constexpr int kNever = 1 << 30;  // past every row

// The rows of the other side that a held row sees: [first, last). A bound that hides nothing is
// not looked at.
template <Side kHeld, int kMask>
struct Interval {
  static constexpr bool kFromFirst = kMask == kPackedMask || kHeld == Side::kKeys;
  static constexpr bool kToLast = kMask == kPackedMask || kHeld == Side::kQueries;
  int first, last;

  JAX_DS_DEVICE bool sees(int row) const {
    return (!kFromFirst || row >= first) && (!kToLast || row < last);
  }
  JAX_DS_DEVICE bool sees_all(int row, int rows) const {
    return (!kFromFirst || row >= first) && (!kToLast || row + rows <= last);
  }
};

// Both ends grow with the row.
template <Side kHeld, int kMask>
JAX_DS_DEVICE Interval<kHeld, kMask> row_interval(const PrefillWalk& w, int row) {
  if constexpr (kMask == kPackedMask) {
    const int* intervals = w.packed + PackedLayout(w.rows).intervals;
    const int2 at = reinterpret_cast<const int2*>(intervals)[row];
    return {at.x, at.y};
  } else if constexpr (kHeld == Side::kQueries) {
    // Aligned at the last query and the last key.
    return {0, kMask == kCausalMask ? min(w.others, row + 1 + w.others - w.rows) : w.others};
  } else {
    // Queries past the last one are zeros, which add nothing: no need to hide them.
    return {kMask == kCausalMask ? max(0, row - (w.rows - w.others)) : 0, w.others};
  }
}

// What every one of a warpgroup's 64 rows sees: where nothing needs to be hidden.
template <Side kHeld, int kMask>
JAX_DS_DEVICE Interval<kHeld, kMask> common_interval(const PrefillWalk& w, const HeldTile& tile,
                                                     int row) {
  const int first_row = min(row, tile.end - 1), last_row = min(row + 63, tile.end - 1);
  return {row_interval<kHeld, kMask>(w, last_row).first,
          row_interval<kHeld, kMask>(w, first_row).last};
}

// What any of them sees: outside of it nothing needs to be done. The tile may end before them.
template <Side kHeld, int kMask>
JAX_DS_DEVICE Interval<kHeld, kMask> joint_interval(const PrefillWalk& w, const HeldTile& tile,
                                                    int row) {
  if (row >= tile.end) return {kNever, 0};
  const int last_row = min(row + 63, tile.end - 1);
  return {row_interval<kHeld, kMask>(w, row).first, row_interval<kHeld, kMask>(w, last_row).last};
}

// Replaces a thread's elements of a 64 x kColumns tile, whose columns are rows of the other side
// from `first` on, where its own two rows do not see them.
template <int kColumns, Side kHeld, int kMask>
JAX_DS_DEVICE void hide(float (&d)[kColumns / 2], int first,
                        const Interval<kHeld, kMask> (&seen)[2], float instead) {
  const int column = first + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!seen[i / 2].sees(column + 8 * j + i % 2)) d[4 * j + i] = instead;
    }
  }
}

// Number of blocks of `size` rows of the other side that a tile is taken past: one, all hidden,
// where its rows see nothing.
JAX_DS_DEVICE int walked_blocks(const HeldTile& tile, int size) {
  return max(1, (tile.last - tile.first + size - 1) / size);
}

// ---- dealing ------------------------------------------------------------------------------------

// The tiles of this CTA, one after the other; one thread.
template <Side kHeld, int kMask>
class Dealer {
 public:
  JAX_DS_DEVICE explicit Dealer(const PrefillWalk& walk) : w(walk) {
    of_head = kMask == kPackedMask ? w.packed[kPackedTiles] : (w.rows + kHeldRows - 1) / kHeldRows;
    heads = w.batch * w.heads;
    const int last_heads = (8 * static_cast<int>(gridDim.x) + of_head - 1) / max(1, of_head);
    together = min(heads, last_heads);
  }

  JAX_DS_DEVICE HeldTile next() {
    DealtTile dealt;
    do {
      dealt = kDrawn ? draw() : dealt_tile(round, blockIdx.x, gridDim.x, heads, of_head);
      ++round;
      if (dealt.head < 0) return {0, -1, 0, 0, 0, 0};
    } while (dealt.place == of_head);
    HeldTile tile = at(dealt.place);
    // TMA reads what is known of each query from a multiple of 16 bytes on.
    if (kHeld == Side::kKeys) tile.first &= ~3;
    tile.batch = dealt.head / w.heads;
    tile.head = dealt.head % w.heads;
    return tile;
  }

 private:
  // Tiles of a packed batch are of any length, and CTAs are not equally fast over keys.
  static constexpr bool kDrawn = kMask == kPackedMask || kHeld == Side::kKeys;

  // Drawn from the counter. Head after head, but for the last ones, of eight tiles a CTA: they are
  // dealt together, the longest of all first, so that CTAs end together.
  JAX_DS_DEVICE DealtTile draw() {
    const int grid = gridDim.x, alone = heads - together;
    const int index = round == 0 ? blockIdx.x : grid + atomicAdd(w.counter, 1);
    if (index >= heads * of_head) return {-1, 0};
    if (index < alone * of_head) return {index / of_head, index % of_head};
    const int inside = index - alone * of_head;
    return {alone + inside % together, inside / together};
  }

  // The head's tile in this place, from the longest on.
  JAX_DS_DEVICE HeldTile at(int place) const {
    if constexpr (kMask == kPackedMask) {
      const int* tiles = w.packed + PackedLayout(w.rows).tiles;
      const int4 t = reinterpret_cast<const int4*>(tiles)[place];
      return {0, 0, t.x, t.y, t.z, t.w};
    }
    const bool last_is_longest = kHeld == Side::kQueries && kMask == kCausalMask;
    const int row = (last_is_longest ? of_head - 1 - place : place) * kHeldRows;
    const int end = min(w.rows, row + kHeldRows);
    return {0,
            0,
            row,
            end,
            row_interval<kHeld, kMask>(w, row).first,
            row_interval<kHeld, kMask>(w, end - 1).last};
  }

  const PrefillWalk& w;
  int heads, of_head;  // all of them, and tiles of each
  int round = 0;
  int together;  // heads drawn from as one
};

// ---- the way out --------------------------------------------------------------------------------

// Writes columns [kFrom, kFrom + kColumns) of a warp's 16 rows, those from `row` on, as the tile's
// head of x: bf16 [B, S, H, kColumns]. One slab is turned around while the one before it leaves.
template <int kFrom, int kColumns, int kRegisters>
JAX_DS_DEVICE void store_rows(const float (&d)[kRegisters], u32 staging, void* x,
                              const PrefillWalk& w, const HeldTile& tile, int row) {
  constexpr int kSlabs = kColumns / 64;
  const i64 stride = static_cast<i64>(w.heads) * kColumns;
  const int own = row + static_cast<int>(lane_id()) / 8;
  u16* out = static_cast<u16*>(x) + (static_cast<i64>(tile.batch) * w.rows + own) * stride +
             tile.head * kColumns + lane_id() % 8 * 8;
  uint4 pieces[2][4];
#pragma unroll
  for (int slab = 0; slab <= kSlabs; ++slab) {
    if (slab < kSlabs) turn_slab(d, kFrom / 64 + slab, staging, pieces[slab % 2]);
    if (slab == 0) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      st_global_v4_if(own + 4 * i < tile.end, out + (slab - 1) * 64 + 4 * i * stride,
                      pieces[(slab - 1) % 2][i]);
    }
  }
}

// ---- telling the rest of the CTA ----------------------------------------------------------------

struct TileBoard {
  static constexpr int kStages = 2;
  static constexpr int kReaders = 9;  // warps: the producer's and eight for math
  HeldTile tiles[kStages];
  PipelineBarriers<kStages> barriers;

  JAX_DS_DEVICE void init() { barriers.init(1, kReaders); }
};

// Posts the tiles of this CTA, then one without a head; one thread of a warp of its own. A tile is
// taken no sooner than there is room for it, one ahead of the math: who draws further ahead may get
// a long tile while others run out of work.
template <Side kHeld, int kMask>
JAX_DS_DEVICE void post_tiles(const PrefillWalk& walk, TileBoard& board) {
  Dealer<kHeld, kMask> dealer(walk);
  Pipeline<TileBoard::kStages> ring(board.barriers);
  bool more = true;
  while (more) {
    ring.acquire();
    const HeldTile tile = dealer.next();
    board.tiles[ring.slot()] = tile;
    mbarrier_arrive(ring.full());
    ring.advance();
    more = tile.head >= 0;
  }
}

// Reads tiles off the board. Of a warp: all of it, or the one thread of it that works. All state
// is one number, which lives as long as the kernel.
template <bool kWholeWarp>
class TileReader {
 public:
  JAX_DS_DEVICE explicit TileReader(TileBoard& b) : board(b) {}

  // Goes on to the next tile, which stays on the board until the one after it is asked for.
  JAX_DS_DEVICE bool next() {
    if (count > 0) {
      if (kWholeWarp) __syncwarp();
      if (!kWholeWarp || lane_id() == 0) mbarrier_arrive(&board.barriers.empty[slot()]);
    }
    ++count;
    mbarrier_wait(&board.barriers.full[slot()], (count - 1) / TileBoard::kStages % 2);
    return uniform(posted().head) >= 0;
  }

  // On the board: costs a load wherever it is used, and no registers.
  JAX_DS_DEVICE const HeldTile& posted() const { return board.tiles[slot()]; }

  // In registers, uniform ones.
  JAX_DS_DEVICE HeldTile tile() const {
    const HeldTile& t = posted();
    return {uniform(t.batch), uniform(t.head),  uniform(t.row),
            uniform(t.end),   uniform(t.first), uniform(t.last)};
  }

  // Of a barrier that completes once for every tile.
  JAX_DS_DEVICE u32 phase() const { return (count - 1) % 2; }

 private:
  JAX_DS_DEVICE u32 slot() const { return (count - 1) % TileBoard::kStages; }
  static JAX_DS_DEVICE int uniform(int value) { return kWholeWarp ? warp_uniform(value) : value; }

  TileBoard& board;
  u32 count = 0;
};

// ---- roles --------------------------------------------------------------------------------------

// What a CTA's warps do: one thread of warp 8 produces, one of warp 9 posts tiles, warps 0 to 7, as
// two warpgroups, consume with kRegisters a thread. More registers in all than a launch of 384
// threads is given are never there, and asking for them hangs.
template <Side kHeld, int kMask, int kRegisters, typename Produce, typename Consume>
JAX_DS_DEVICE void run_roles(const PrefillWalk& walk, TileBoard& board, Produce produce,
                             Consume consume) {
  constexpr int kGiven = 65536 / 384 / 8 * 8, kOthers = 3 * kGiven - 2 * kRegisters;
  static_assert(kRegisters % 8 == 0 && kOthers >= 24);
  const u32 warp = warp_id();
  if (warp >= 8) {
    setmaxnreg_dec<kOthers>();
    if (warp == 8 && elect_one()) produce();
    if (warp == 9 && elect_one()) post_tiles<kHeld, kMask>(walk, board);
  } else {
    setmaxnreg_inc<kRegisters>();
    consume();
  }
}

}  // namespace jax_ds::flash_mla
