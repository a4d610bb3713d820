// Combine in one kernel: tell the ranks the weights of this rank's tokens; add up a token's rows
// here and push the sum, rounded once, to the token's owner; add up, in rank order, what the ranks
// have sent for the own tokens.
#pragma once

#include "deep_ep/kernels/sum.cuh"

namespace jax_ds::deep_ep {

// What a warp knows of a slot, a lane for each column and for each id.
struct SlotInLanes {
  int row;       // of column `lane`, -1 for none
  int column;    // of id `lane`, -1 where it is not of this rank
  float weight;  // of id `lane`
};

template <bool kBfloat16>
struct CombineKernel {
  const CombineParams& p;
  const comm::Round& round;

  JAX_DS_DEVICE i64 bytes() const { return static_cast<i64>(p.record.vectors) * 16; }

  // Without weights the round is announced all the same: announcements are counted.
  JAX_DS_DEVICE void share_weights() const {
    const int width = p.weights != nullptr ? p.top_k : 0;
    share_notes(round, p.record, p.weights, p.num_tokens, width);
  }

  JAX_DS_DEVICE bool hear_weights(bool alive) const {
    return p.weights != nullptr ? round.hear(alive) : alive;
  }

  JAX_DS_DEVICE SlotInLanes fetch(int slot) const {
    const int lane = lane_id();
    const i64 i = static_cast<i64>(slot) * p.top_k + lane;
    const u32* const weights = notes_at(round, p.record, p.link.rank, p.num_tokens);
    return {row_in_lane(p.row_of, p.columns, slot), lane < p.top_k ? p.column[i] : -1,
            lane < p.top_k && p.weights != nullptr ? __uint_as_float(weights[i]) : 0.0f};
  }

  // Lane j's weight of column j: ids that share a column add theirs up.
  JAX_DS_DEVICE float weight_of_column(const SlotInLanes& slot) const {
    float sum = 0;
    for (int k = 0; k < p.top_k; ++k) {
      const int column = __shfl_sync(kAllLanes, slot.column, k);
      const float weight = __shfl_sync(kAllLanes, slot.weight, k);
      if (column == lane_id()) sum += weight;
    }
    return sum;
  }

  // Sums up part `part` of this rank's rows of a slot, into the owner's staging.
  JAX_DS_DEVICE void push_part(int slot, const SlotInLanes& in_lanes, float weight,
                               int part) const {
    const int owner = slot / p.num_tokens, t = slot % p.num_tokens;
    void* const to =
        record_at(round, p.record, owner, static_cast<i64>(p.link.rank) * p.num_tokens + t);
    const u32 mask = __ballot_sync(kAllLanes, in_lanes.row >= 0);
    const auto row = [&](int j) {
      return static_cast<const char*>(p.rows) + __shfl_sync(kAllLanes, in_lanes.row, j) * bytes();
    };
    if (p.weights == nullptr) {
      sum_part<kBfloat16>(to, p.record.vectors, part, mask, row);
    } else {
      sum_part<kBfloat16, true>(to, p.record.vectors, part, mask, row,
                                [&](int j) { return __shfl_sync(kAllLanes, weight, j); });
    }
  }

  // Every slot that holds a token: also one whose rows were all dropped is awaited.
  JAX_DS_DEVICE void push() const {
    const int parts = num_parts(p.record.vectors);
    for_each_ahead(
        p.link.num_ranks * p.num_tokens, [&](int slot) { return fetch(slot); },
        [&](int slot, const SlotInLanes& in_lanes) {
          const bool token = __any_sync(kAllLanes, in_lanes.column >= 0);
          const float weight = token ? weight_of_column(in_lanes) : 0;
          if (p.by_column != nullptr && lane_id() < p.columns) {
            p.by_column[static_cast<i64>(slot) * p.columns + lane_id()] = weight;
          }
          if (!token) return;
          for (int part = 0; part < parts; ++part) push_part(slot, in_lanes, weight, part);
        });
  }

  JAX_DS_DEVICE char* result(int t) const { return static_cast<char*>(p.y) + t * bytes(); }

  // Sums up what the ranks have sent for each of this rank's tokens, a part a warp.
  JAX_DS_DEVICE void gather() const {
    const int parts = num_parts(p.record.vectors);
    for_each_taken(
        &round.progress->taken[1], p.num_tokens * parts,
        [&](int i) { return ranks_of(p.needed, p.link.num_ranks, p.num_tokens, i / parts); },
        [&](int i, u32 ranks) {
          const int t = i / parts;
          sum_part<kBfloat16>(result(t), p.record.vectors, i % parts, ranks, [&](int r) {
            const i64 slot = static_cast<i64>(r) * p.num_tokens + t;
            return record_at(round, p.record, p.link.rank, slot);
          });
        });
  }

  JAX_DS_DEVICE void poison() const {
    for (int t = grid_warp(); t < p.num_tokens; t += grid_warps()) {
      fill(result(t), p.record.vectors, 0xffffffffu);
    }
  }

  // The second half of every combine.
  JAX_DS_DEVICE void receive(bool alive) const {
    if (round.receive(alive)) {
      gather();
    } else {
      poison();
    }
    round.end();
  }
};

template <bool kBfloat16>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineParams p) {
  const comm::Round round = comm::Round::next(p.link);
  const CombineKernel<kBfloat16> kernel{p, round};
  bool alive = round.begin(p.axis_index);
  if (alive) kernel.share_weights();
  alive = kernel.hear_weights(alive);
  if (alive) kernel.push();
  round.send();
  kernel.receive(alive);
}

}  // namespace jax_ds::deep_ep
