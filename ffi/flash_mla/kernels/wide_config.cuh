// Decode for many query rows: tiles, shared memory, barriers and registers.
//
// A CTA works on 64 query rows. Roles, a warpgroup each:
//   producer  pages into shared memory;
//   scores    S = Q K^T with most of Q in registers, softmax, P into shared memory;
//   output x2 O += P V, 256 of the 512 columns each. V is K's latent part, read in place.
// The tensor cores see, block after block, Q K_j^T while P_{j-1} V_{j-1} waits, then P_{j-1}
// V_{j-1} while the scores' softmax runs: `go` opens P_{j-1} V_{j-1} when Q K_j^T is all but done.
//
// P_j takes the place of K_j's rotary tile, which nobody reads after Q K_j^T. The first seven
// column tiles of an item's Q come through a value stage on their way to registers.
#pragma once

#include "flash_mla/kernels/schedule.cuh"
#include "kernels/mbarrier.cuh"
#include "kernels/tma.cuh"
#include "kernels/wgmma_bf16.cuh"

namespace jax_ds::flash_mla {

template <bool kPrefetch_, typename Element_>
struct WideConfig {
  using Element = Element_;
  // Whether the next block is fetched to L2 while one is loaded. It helps where the tensor cores
  // are the limit, and costs bandwidth where memory is.
  static constexpr bool kPrefetch = kPrefetch_;
  static constexpr int kRows = kWideRows;
  static constexpr int kThreads = kWideThreads;
  static constexpr int kStages = 3;  // of values: 64 tokens x 512 columns
  static constexpr int kRopeSlots = 2;
  static constexpr int kQueryRegTiles = 7;  // of which the last 16 columns go to shared memory
  static constexpr int kQueryFragments = 4 * kQueryRegTiles - 1;
  // P_{j-1} V_{j-1} opens when as many column tiles of Q K_j^T are through: it takes a while to
  // start.
  static constexpr int kOpenTile = 6;
  static constexpr int kQuerySharedTiles = kKeyTiles - kQueryRegTiles;
  // The producer is at most three stages ahead of the slowest role, which may still be storing.
  static constexpr int kAnnouncements = 4;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kScoresRegisters = 168;
  static constexpr int kOutputRegisters = 160;
  static constexpr int kOverhead = 2;
  static constexpr int kSlack = 16;
  static constexpr bool kDeals = true;

  static_assert(kProducerRegisters + kScoresRegisters + 2 * kOutputRegisters <= 512);
};

struct Place {
  int group;      // of the schedule
  int first_row;  // of the request's R query rows
};

// An item, as the roles need it.
struct Announcement {
  int request;
  int tokens;  // from the first block on, to the request's end
  int blocks;  // 0: there are no more items
  int part;    // slot of the part, or kWhole
};
inline constexpr int kWhole = -1;

template <typename Config>
struct alignas(1024) WideShared {
  // Groups of 8 tokens x 64 columns, about in the order in which memory holds them. The query on
  // its way to registers: column tiles of 64 rows.
  union {
    u8 values[Config::kStages][kGroups][kValueTiles][kGroupTileBytes];
    u8 query[Config::kStages][kValueTiles][kTileBytes];
  };
  u8 rope[Config::kRopeSlots][kTileBytes];      // 64 tokens x 64 columns, then P: 64 x 64
  u8 q[Config::kQuerySharedTiles][kTileBytes];  // 64 rows x 64 columns
  u8 q_fragment[2][64][16];  // 64 rows x 16 columns that find no room in registers, unswizzled
  u8 moved[Config::kRopeSlots][4];        // by warp: whether the output so far is to be scaled,
  u8 shift[Config::kRopeSlots][64];       // then by 2^-shift, by row
  float inverse[Config::kRopeSlots][64];  // 1 / row sum, after an item's last block
  u64 values_full[Config::kStages], values_empty[Config::kStages];
  u64 rope_full[Config::kRopeSlots], rope_empty[Config::kRopeSlots];
  u64 go[Config::kRopeSlots];
  u64 announced[Config::kAnnouncements];
  u64 q_empty;
  Schedule schedule;
  Place place;
  Announcement announcements[Config::kAnnouncements];
};

inline constexpr u32 kWideGroupStride = kValueTiles * kGroupTileBytes;

// Where a role is in the rings, in one register: the math warpgroups have none to spare.
struct Progress {
  u32 bits = 0;  // stage: 0-1, its phase: 2; rotary slot: 3, its phase: 4; items: 5 and up

  JAX_DS_DEVICE u32 stage() const { return bits & 3; }
  JAX_DS_DEVICE u32 stage_phase() const { return bits >> 2 & 1; }
  JAX_DS_DEVICE u32 slot() const { return bits >> 3 & 1; }
  JAX_DS_DEVICE u32 slot_phase() const { return bits >> 4 & 1; }
  JAX_DS_DEVICE u32 items() const { return bits >> 5; }

  template <int kStages>
  JAX_DS_DEVICE void advance_stage() {
    bits = stage() == kStages - 1 ? (bits & ~3u) ^ 4 : bits + 1;
  }
  // The slot's bit flips; its phase's where it returns to 0.
  JAX_DS_DEVICE void advance_slot() { bits ^= slot() == 1 ? 24 : 8; }
  JAX_DS_DEVICE void advance_item() { bits += 32; }
};

}  // namespace jax_ds::flash_mla
