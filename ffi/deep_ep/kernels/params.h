// Parameters of dispatch and combine, shared by kernels and host.
//
// T tokens a rank, K ids a token, J columns, H hidden, C rows; slot b = r * T + t of a rank's
// buffer belongs to token t of source rank r (B = R*T). jax_ds/deep_ep/plan.py defines the integer
// arrays. The staging holds B records and then, where a call has them, notes: K words for each
// token of each rank, in the order of slots.
#pragma once

#include "comm/kernels/link.h"

namespace jax_ds::deep_ep {

constexpr int kThreads = 512;

// A record: `vectors` pieces of 16 bytes, then `num_scales` floats; `stride` bytes in the staging.
// A warp moves a record part by part.
struct Record {
  int vectors;
  int num_scales;
  int stride;
};

// rows[c] = x[token of row c]
struct DispatchParams {
  comm::Link link;
  const int* axis_index;        // []
  const void* x;                // [T, H]
  const float* scales;          // [T, num_scales], null without
  const unsigned char* needed;  // bool [R, T]
  const int* row_source;        // [C]
  const int* row_of;            // [B, J]
  void* rows;                   // [C, H]
  float* row_scales;            // [C, num_scales], null without
  Record record;
  int num_tokens, columns, capacity;
};

// y[t] = sum over ranks of round(sum over columns of weight * row)
struct CombineParams {
  comm::Link link;
  const int* axis_index;        // []
  int* ticket;                  // [] the slot, from a first half to a second; null: whole
  const void* rows;             // [C, H]
  const float* weights;         // [T, K] of this rank's tokens, null: every row counts once
  const int* row_of;            // [B, J]
  const int* column;            // [B, K]: a slot with any column >= 0 holds a token
  const unsigned char* needed;  // bool [R, T]
  void* y;                      // [T, H]
  float* by_column;             // [B, J] the weights that came, as columns; null: not wanted
  Record record;
  int num_tokens, columns, top_k;
};

}  // namespace jax_ds::deep_ep
