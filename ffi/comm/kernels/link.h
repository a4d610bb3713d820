// What a communication kernel knows of its peers, shared by kernels and host. R: ranks.
//
// A window is one symmetric allocation on every rank: Signals, then staging from kStagingOffset on.
// A round is one execution of the operation that owns the window; every rank takes part in every
// round, even with nothing to send. Rounds are counted in device memory, so a replayed graph
// behaves like a fresh launch. Signals are only added to.
//
//   sender:   wait consumed[peer] >= round - 1, store records into the peer's staging,
//             add 1 to the peer's arrived[me]
//   receiver: wait arrived[peer] >= round, read the staging, add 1 to the peer's consumed[me]
#pragma once

namespace jax_ds::comm {

constexpr int kMaxRanks = 32;
constexpr int kStagingOffset = 4096;

struct Signals {
  unsigned long long arrived[kMaxRanks];   // by source: rounds whose records lie here
  unsigned long long consumed[kMaxRanks];  // by destination: rounds of ours it has read
};
static_assert(sizeof(Signals) <= kStagingOffset, "signals precede the staging");

// One rank's own counters for one window, in its device memory.
struct Progress {
  unsigned long long round;  // completed
  unsigned int sent;         // CTAs that have sent in this round
  unsigned int left;         // CTAs that have finished this round
};

enum class Fault : int {
  kPeerMissing = 1,  // a wait for `peer` expired
  kRankMismatch,     // NCCL's rank (`peer`) is not the mesh's (`rank`)
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
  Progress* progress;
  unsigned int* dead;  // of the device: non-zero after the first failure
  Failure* failure;    // of the device
  unsigned long long timeout_ns;
  Operation operation;
  int rank;
  int num_ranks;
};

}  // namespace jax_ds::comm
