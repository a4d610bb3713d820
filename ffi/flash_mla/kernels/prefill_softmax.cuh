// The softmax of prefill's forward kernel: scores of one block of keys after the other become
// probabilities, with one pass and no look ahead.
#pragma once

#include "flash_mla/kernels/prefill_common.cuh"

namespace jax_ds::flash_mla {

// Of the two rows r and r + 8 that this thread shares with the other three of its quad.
template <int kColumns>
struct OnlineSoftmax {
  // Probabilities are relative to a reference in units of log2. It follows the maximum only once it
  // lags by kLag: they stay below 2^kLag, which costs no precision, and results so far seldom have
  // to shrink. Bits of positive floats are ordered as integers and above those of negative ones, so
  // one instruction compares two scores with the limit: what passes it is known for sure.
  static constexpr float kLag = 8.0f;
  static constexpr int kLagBits = __builtin_bit_cast(int, kLag);
  static constexpr int kNothingSeen = -2147483647 - 1;  // every score passes it

  float reference[2] = {};
  int limit[2] = {kNothingSeen, kNothingSeen};
  float sum[2] = {};  // of this thread's columns only

  // Turns the scores of a tile's first block into probabilities: the references are its maxima. Of
  // a row that sees none of it yet, they stay unknown.
  JAX_DS_DEVICE void begin(float (&scores)[kColumns / 2], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = row_maximum(scores, half);
      if (top == -kInfinity) continue;
      reference[half] = top * scale_log2;
      limit[half] = kLagBits;
    }
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      scores[j] = ex2(scores[j] * scale_log2 - reference[j / 2 % 2]);
      sum[j / 2 % 2] += scores[j];
    }
  }

  // Turns scores into probabilities. True if results so far must shrink, and by how much.
  JAX_DS_DEVICE bool absorb(float (&scores)[kColumns / 2], float scale_log2, float (&shrink)[2]) {
    int top[2] = {kNothingSeen, kNothingSeen};
#pragma unroll
    for (int j = 0; j < kColumns / 2; j += 2) {
      const int half = j / 2 % 2;
      scores[j] = scores[j] * scale_log2 - reference[half];
      scores[j + 1] = scores[j + 1] * scale_log2 - reference[half];
      top[half] = max(max(top[half], __float_as_int(scores[j])), __float_as_int(scores[j + 1]));
    }
    const bool moves = __any_sync(0xffffffffu, top[0] >= limit[0] || top[1] >= limit[1]);
    if (moves) move(scores, shrink);
    float total[2] = {};
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      scores[j] = ex2(scores[j]);
      total[j / 2 % 2] += scores[j];
    }
    sum[0] += total[0];
    sum[1] += total[1];
    return moves;
  }

  // Sums over the quad; afterwards `sum` is the row's.
  JAX_DS_DEVICE void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    }
  }

 private:
  // Of the row that a quad shares.
  static JAX_DS_DEVICE float row_maximum(const float (&scores)[kColumns / 2], int half) {
    float top = -kInfinity;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    return fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  }

  // Lets the references follow, of rows where they lag.
  JAX_DS_DEVICE void move(float (&scores)[kColumns / 2], float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = row_maximum(scores, half);
      const bool first = limit[half] == kNothingSeen;
      float step = 0.0f;
      shrink[half] = 1.0f;
      if (first ? top > -kInfinity : top >= kLag) {
        const float next = reference[half] + top;
        step = next - reference[half];  // as rounded
        if (!first) shrink[half] = ex2(-step);
        reference[half] = next;
        limit[half] = kLagBits;
      }
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        scores[4 * j + 2 * half] -= step;
        scores[4 * j + 2 * half + 1] -= step;
      }
      sum[half] *= shrink[half];
    }
  }
};

}  // namespace jax_ds::flash_mla
