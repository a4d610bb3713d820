// Parameters of the low-latency calls, shared by kernels and host. Letters as in params.h; L
// experts a rank, each with `region` rows. Combine's are those of params.h.
#pragma once

#include "deep_ep/kernels/params.h"

namespace jax_ds::deep_ep {

// A call, or its first or second half.
enum class Half : int { kWhole, kStart, kFinish };

// What a first half hands on is the ticket, then from this byte on what dispatch's `needed` holds.
constexpr int kInFlightHeader = 16;

// rows[e, i] = x[i-th token that names expert e]
struct LowLatencyDispatchParams {
  comm::Link link;
  const int* axis_index;  // []
  int* ticket;            // [] the slot, from the first half to the second; null: whole
  const void* x;          // [T, H]
  const int* ids;         // [T, K]
  unsigned char* needed;  // bool [R, T]
  void* rows;             // [L, region, H]
  float* row_scales;      // [L, region, num_scales], null without
  int* group_sizes;       // [L]
  int* row_of;            // [B, J]
  int* column;            // [B, K]
  Record record;
  int hidden, num_tokens, top_k, columns, experts, region;
};

// Dynamic shared memory of slot_sets.cuh: bits and numbers of `sets` sets, and a list of slots.
constexpr int slot_sets_bytes(int sets, int num_slots) {
  const int groups = (num_slots + 31) / 32;
  return 2 * 4 * sets * groups + 2 * 32 * groups;
}

}  // namespace jax_ds::deep_ep
