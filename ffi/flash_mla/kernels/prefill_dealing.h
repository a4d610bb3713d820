// Which tiles a CTA takes where all lengths are known beforehand. Host-safe: a test deals them out.
#pragma once

namespace jax_ds::flash_mla {

// Tile `place` of a head, from the longest on; `place` is the number of tiles if there is none this
// time. No more tiles: head is -1.
struct DealtTile {
  int head, place;
};

// The tile that CTA `cta` of `ctas` takes in this round. There is a tile and a CTA: with nothing to
// deal out the grid is empty, and nothing is launched. A head's longest tile and its shortest are
// a pair, the next longest and the next shortest another: as much work each, whatever the mask.
// Pairs are dealt out head after head, so that CTAs read the same keys from L2 at the same time;
// but for the last pair of every CTA, and what is over, which go tile by tile, the longest first,
// every other round in reverse.
constexpr DealtTile dealt_tile(int round, int cta, int ctas, int heads, int tiles) {
  const int odd = tiles % 2, pairs = tiles / 2 + odd;  // the middle one, or the longest, is alone
  const int paired = pairs * heads / ctas - 1;         // pairs of this CTA
  if (round < 2 * paired) {
    const int pair = round / 2 * ctas + cta, place = pair % pairs;
    return {pair / pairs, round % 2 == 0 ? place : tiles - 1 + odd - place};
  }
  const int rest = paired > 0 ? paired * ctas : 0, later = round - (paired > 0 ? 2 * paired : 0);
  int head = rest / pairs, index = later * ctas + (later % 2 == 0 ? cta : ctas - 1 - cta);
  if (rest % pairs > 0) {
    // The middle of a head.
    const int first = rest % pairs, middle = tiles + odd - 2 * first;
    if (index < middle) return {head, first + index};
    index -= middle;
    ++head;
  }
  const int left = heads - head;
  if (index >= left * tiles) return {-1, 0};
  return {head + index % left, index / left};
}

}  // namespace jax_ds::flash_mla
