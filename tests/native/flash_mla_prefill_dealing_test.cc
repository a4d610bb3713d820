// Dealt tiles: every one is taken once, and with many of them all CTAs get as much work.
#include <algorithm>
#include <vector>

#include "flash_mla/kernels/prefill_dealing.h"
#include "tests/native/testing.h"

namespace mla = jax_ds::flash_mla;

namespace {

// Work of the busiest CTA over that of the mean. A causal head's tiles take 1 to `tiles`.
double Deal(int heads, int tiles, int ctas) {
  std::vector<int> taken(heads * tiles), work(ctas);
  for (int cta = 0; cta < ctas; ++cta) {
    for (int round = 0;; ++round) {
      const mla::DealtTile tile = mla::dealt_tile(round, cta, ctas, heads, tiles);
      if (tile.head < 0) break;
      if (tile.place == tiles) continue;
      CHECK(tile.head < heads && tile.place >= 0 && tile.place < tiles);
      ++taken[tile.head * tiles + tile.place];
      work[cta] += tiles - tile.place;
    }
  }
  CHECK(std::all_of(taken.begin(), taken.end(), [](int times) { return times == 1; }));
  const double all = heads * tiles * (tiles + 1) / 2.0;
  return *std::max_element(work.begin(), work.end()) / (all / ctas);
}

void EveryTileOnce() {
  for (int heads : {1, 2, 7, 64}) {
    for (int tiles : {1, 2, 3, 8, 33}) {
      for (int ctas : {1, 5, 132}) Deal(heads, tiles, std::min(ctas, heads * tiles));
    }
  }
}

void Balance() {
  CHECK(Deal(256, 32, 132) < 1.005);
  CHECK(Deal(128, 128, 132) < 1.005);
  CHECK(Deal(128, 33, 132) < 1.02);
  CHECK(Deal(32, 64, 78) < 1.04);
}

}  // namespace

int main() {
  EveryTileOnce();
  Balance();
  return jax_ds::testing::failures;
}
