// Combine in one kernel: add up a token's rows here, push the sum, rounded once, to the token's
// owner, and add up what the ranks have sent for the own tokens, in rank order.
#pragma once

#include "comm/kernels/round.cuh"
#include "deep_ep/kernels/records.cuh"

namespace jax_ds::deep_ep {

// Sixteen bytes of bfloat16 or float32 as floats, and back.
template <bool kBfloat16>
struct Piece {
  static constexpr int kSize = kBfloat16 ? 8 : 4;
  float value[kSize];

  JAX_DS_DEVICE void clear() {
#pragma unroll
    for (float& v : value) v = 0;
  }

  static JAX_DS_DEVICE float element(uint4 raw, int i) {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    if constexpr (!kBfloat16) return __uint_as_float(words[i]);
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }

  JAX_DS_DEVICE void add(uint4 raw) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) value[i] += element(raw, i);
  }

  JAX_DS_DEVICE void add(uint4 raw, float weight) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      value[i] = __fadd_rn(value[i], __fmul_rn(weight, element(raw, i)));
    }
  }

  JAX_DS_DEVICE uint4 rounded() const {
    if constexpr (kBfloat16) {
      return make_uint4(cvt_bf16x2(value[0], value[1]), cvt_bf16x2(value[2], value[3]),
                        cvt_bf16x2(value[4], value[5]), cvt_bf16x2(value[6], value[7]));
    } else {
      return make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]),
                        __float_as_uint(value[2]), __float_as_uint(value[3]));
    }
  }
};

template <bool kBfloat16>
struct CombineKernel {
  using Sum = Piece<kBfloat16>;
  static constexpr int kPieces = 4;  // in flight a lane

  const CombineParams& p;

  JAX_DS_DEVICE i64 bytes() const { return static_cast<i64>(p.record.vectors) * 16; }

  JAX_DS_DEVICE char* staged(int rank, i64 slot) const {
    return comm::Round::staging(p.link, rank) + slot * p.record.stride;
  }

  // Adds the records that `from(bit)` gives for the bits of `mask`, in the order of bits; with
  // `weight(bit)` where kWeighted.
  template <bool kWeighted, class From, class Weight>
  JAX_DS_DEVICE void sum(void* to, u32 mask, From from, Weight weight) const {
    const int lane = lane_id();
    for (int base = 0; base < p.record.vectors; base += 32 * kPieces) {
      Sum total[kPieces];
#pragma unroll
      for (int u = 0; u < kPieces; ++u) total[u].clear();
      for (u32 left = mask; left != 0; left &= left - 1) {
        const int bit = __ffs(left) - 1;
        const uint4* at = reinterpret_cast<const uint4*>(from(bit));
        const float w = weight(bit);
        uint4 raw[kPieces];
#pragma unroll
        for (int u = 0; u < kPieces; ++u) {
          const int i = base + 32 * u + lane;
          raw[u] = i < p.record.vectors ? ld_global_once_v4(at + i) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < kPieces; ++u) {
          if constexpr (kWeighted) {
            total[u].add(raw[u], w);
          } else {
            total[u].add(raw[u]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        const int i = base + 32 * u + lane;
        if (i < p.record.vectors) st_global_v4(static_cast<uint4*>(to) + i, total[u].rounded());
      }
    }
  }

  // Whether slot `slot` holds a token: also one whose rows were all dropped is awaited.
  JAX_DS_DEVICE bool holds_token(int slot) const {
    bool any = false;
    for (int k = lane_id(); k < p.top_k; k += 32) {
      any = any || p.column[static_cast<i64>(slot) * p.top_k + k] >= 0;
    }
    return __any_sync(kAllLanes, any);
  }

  // Sums up this rank's rows of each slot, into the owner's staging.
  JAX_DS_DEVICE void push() const {
    const int num_slots = p.link.num_ranks * p.num_tokens;
    int slot = grid_warp();
    bool token = slot < num_slots && holds_token(slot);
    for (; slot < num_slots; slot += grid_warps()) {
      const bool holds = token;
      const int following = slot + grid_warps();
      // Fetched early: most slots of a rank hold nothing.
      token = following < num_slots && holds_token(following);
      if (!holds) continue;
      const int mine = row_in_lane(p.row_of, p.columns, slot);
      const u32 mask = __ballot_sync(kAllLanes, mine >= 0);
      const int owner = slot / p.num_tokens, t = slot % p.num_tokens;
      void* to = staged(owner, static_cast<i64>(p.link.rank) * p.num_tokens + t);
      const auto row = [&](int j) {
        const i64 c = __shfl_sync(kAllLanes, mine, j);
        return static_cast<const char*>(p.rows) + c * bytes();
      };
      if (p.weights == nullptr) {
        sum<false>(to, mask, row, [](int) { return 1.0f; });
        continue;
      }
      const int lane = lane_id();
      const float weight =
          lane < p.columns ? p.weights[static_cast<i64>(slot) * p.columns + lane] : 0;
      sum<true>(to, mask, row, [&](int j) { return __shfl_sync(kAllLanes, weight, j); });
    }
  }

  JAX_DS_DEVICE void* result(int t) const { return static_cast<char*>(p.y) + t * bytes(); }

  // Sums up what the ranks have sent for each of this rank's tokens.
  JAX_DS_DEVICE void gather() const {
    for (int t = grid_warp(); t < p.num_tokens; t += grid_warps()) {
      const u32 ranks = ranks_of(p.needed, p.link.num_ranks, p.num_tokens, t);
      const auto part = [&](int r) {
        return staged(p.link.rank, static_cast<i64>(r) * p.num_tokens + t);
      };
      sum<false>(result(t), ranks, part, [](int) { return 1.0f; });
    }
  }

  JAX_DS_DEVICE void poison() const {
    for (int t = grid_warp(); t < p.num_tokens; t += grid_warps()) {
      fill(result(t), p.record.vectors, 0xffffffffu);
    }
  }

  JAX_DS_DEVICE void run() const {
    const comm::Round round(p.link);
    bool alive = round.begin(p.axis_index);
    if (alive) push();
    round.send();
    alive = round.receive(alive);
    if (alive) {
      gather();
    } else {
      poison();
    }
    round.end();
  }
};

template <bool kBfloat16>
__global__ void __launch_bounds__(kThreads, 1) combine(const __grid_constant__ CombineParams p) {
  CombineKernel<kBfloat16>{p}.run();
}

}  // namespace jax_ds::deep_ep
