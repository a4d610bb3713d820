// What a communication kernel knows of its peers, shared by kernels and host. R: ranks.
//
// A window is one symmetric allocation on every rank, of one or two slots: Signals, then staging
// from kStagingOffset on. A round is one execution, in one slot, of the operation that owns the
// window; every rank takes part in every round, even with nothing to send. Rounds are counted in
// device memory, slot by slot, so a replayed graph behaves like a fresh launch. Signals are only
// added to.
//
//   sender:   wait until consumed[peer] counts all CTAs of the rounds before,
//             store notes into the peer's staging, add 1 to the peer's announced[me],
//             store records into the peer's staging, add 1 to the peer's arrived[me]
//   receiver: wait until announced[peer] counts this round, read the notes,
//             wait until arrived[peer] counts all CTAs of this round, read the records,
//             add 1 to the peer's consumed[me]
//
// Each CTA signals for itself, so none waits for another of its grid; all ranks use as many CTAs in
// a round. Notes for a rank are one CTA's.
//
// With two slots that take turns, the sender's wait is for the round before the last, which is
// long over: consecutive rounds need no barrier.
#pragma once

namespace jax_ds::comm {

constexpr int kMaxRanks = 32;
constexpr int kMaxSlots = 2;
constexpr int kStagingOffset = 4096;

struct Signals {
  unsigned long long announced[kMaxRanks];  // by source: rounds whose notes lie here
  unsigned long long arrived[kMaxRanks];    // by source: CTAs whose records lie here
  unsigned long long consumed[kMaxRanks];   // by destination: CTAs that have read ours
};
static_assert(sizeof(Signals) <= kStagingOffset, "signals precede the staging");

// One rank's own counters for one slot of a window, in its device memory.
struct Progress {
  unsigned long long round;    // completed
  unsigned long long ctas;     // in the completed rounds
  unsigned long long started;  // round + 1 while a round is under way
  unsigned int sent;           // CTAs that have sent in this round
  unsigned int left;           // CTAs that have finished this round
  unsigned int taken[2];       // pieces of work that warps have taken in it: to send, to receive
};

struct Counters {
  Progress slots[kMaxSlots];
  unsigned int next;  // the slot whose turn it is
};

enum class Fault : int {
  kPeerMissing = 1,  // a wait for `peer` expired
  kRankMismatch,     // NCCL's rank (`peer`) is not the mesh's (`rank`)
  kNoSlot,           // unfinished rounds hold all slots
};

// What the first failed wait of a device records, in pinned host memory.
struct Failure {
  unsigned int complete;  // written last
  int fault;              // Fault
  int operation;          // comm::Operation
  int rank;
  int peer;
  unsigned long long round;
};

enum class Operation : int { kDispatch, kCombine, kLowLatencyDispatch, kLowLatencyCombine };

struct Link {
  char* windows[kMaxRanks];  // every rank's window in this GPU's address space
  Counters* counters;
  unsigned int* dead;  // of the device: non-zero after the first failure
  Failure* failure;    // of the device
  unsigned long long timeout_ns;
  long long slot_bytes;  // from one slot of a window to the next
  Operation operation;
  int num_slots;
  int rank;
  int num_ranks;
};

}  // namespace jax_ds::comm
