// Sums of records by warps: float32 additions in a given order, rounded once.
#pragma once

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

// Adds part `part` of the records that `from(bit)` gives for the bits of `mask`, in the order of
// bits; with `weight(bit)` where kWeighted.
template <bool kBfloat16, bool kWeighted, class From, class Weight>
JAX_DS_DEVICE void sum_part(void* to, int vectors, int part, u32 mask, From from, Weight weight) {
  const int first = part * 32 * kPieces + lane_id();
  Piece<kBfloat16> total[kPieces];
#pragma unroll
  for (int u = 0; u < kPieces; ++u) total[u].clear();
  for (u32 left = mask; left != 0; left &= left - 1) {
    const int bit = __ffs(left) - 1;
    const uint4* at = reinterpret_cast<const uint4*>(from(bit));
    const float w = weight(bit);
    uint4 raw[kPieces];
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int i = first + 32 * u;
      raw[u] = i < vectors ? ld_global_once_v4(at + i) : make_uint4(0, 0, 0, 0);
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
    const int i = first + 32 * u;
    if (i < vectors) st_global_v4(static_cast<uint4*>(to) + i, total[u].rounded());
  }
}

template <bool kBfloat16, class From>
JAX_DS_DEVICE void sum_part(void* to, int vectors, int part, u32 mask, From from) {
  sum_part<kBfloat16, false>(to, vectors, part, mask, from, [](int) { return 1.0f; });
}

}  // namespace jax_ds::deep_ep
