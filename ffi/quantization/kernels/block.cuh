// Elements, their largest magnitude, scales and FP8 values: the arithmetic all quantizers share.
//
//   scale = 1 if amax < 2^-107, else amax * float(1/448)     (ue8m0: rounded up to a power of two)
//   value = e4m3(x / scale), IEEE division, round to nearest even
#pragma once

#include "kernels/constants.h"
#include "kernels/ptx.cuh"
#include "quantization/kernels/params.h"

namespace jax_ds::quantization {

constexpr int kBlock = 128;
constexpr u32 kNaNBits = 0x7fc00000, kInfinityBits = 0x7f800000;
constexpr u32 kNaNCodes = 0x7f7f7f7f;  // four of e4m3fn

enum class Input { kBfloat16, kFloat32 };

// Magnitudes are compared as integers: bits without the sign are ordered like the numbers, with
// infinity above all finite ones and NaN above infinity, so that NaN propagates.
template <Input kInput>
struct Word;  // 32 bits of elements

template <>
struct Word<Input::kBfloat16> {
  static constexpr int kElements = 2;
  static constexpr int kBytes = 2;  // of one element
  static JAX_DS_DEVICE float element(u32 word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  static JAX_DS_DEVICE u32 magnitude(u32 word) { return word & 0x7fff7fffu; }
  static JAX_DS_DEVICE u32 max(u32 a, u32 b) {
    u32 m;
    asm("max.u16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
  }
  // max(m, magnitude(word)), in one piece: the compiler would keep the magnitudes of many words,
  // which several maxima share, for longer than registers last.
  static JAX_DS_DEVICE u32 accumulate(u32 m, u32 word) {
    u32 largest;
    asm("{\n"
        " .reg .b32 a;\n"
        " and.b32 a, %2, 0x7fff7fff;\n"
        " max.u16x2 %0, %1, a;\n"
        "}"
        : "=r"(largest)
        : "r"(m), "r"(word));
    return largest;
  }
  // The elements times 2^-64.
  static JAX_DS_DEVICE u32 prescale(u32 word) { return mul_bf16x2(word, 0x1f801f80u); }
  // The larger element's magnitude as float bits.
  static JAX_DS_DEVICE u32 fold(u32 magnitude) {
    return ::max(magnitude << 16, magnitude & 0xffff0000u);
  }
};

template <>
struct Word<Input::kFloat32> {
  static constexpr int kElements = 1;
  static constexpr int kBytes = 4;
  static JAX_DS_DEVICE float element(u32 word, int) { return __uint_as_float(word); }
  static JAX_DS_DEVICE u32 magnitude(u32 word) { return word & 0x7fffffffu; }
  static JAX_DS_DEVICE u32 max(u32 a, u32 b) { return ::max(a, b); }
  // One instruction, where magnitude and max are two.
  static JAX_DS_DEVICE u32 accumulate(u32 m, u32 word) {
    float largest;
    asm("{\n"
        " .reg .f32 a;\n"
        " abs.f32 a, %2;\n"
        " max.NaN.f32 %0, %1, a;\n"
        "}"
        : "=f"(largest)
        : "f"(__uint_as_float(m)), "f"(__uint_as_float(word)));
    return __float_as_uint(largest);
  }
  static JAX_DS_DEVICE u32 prescale(u32 word) {
    return __float_as_uint(__uint_as_float(word) * 0x1p-64f);
  }
  static JAX_DS_DEVICE u32 fold(u32 magnitude) { return magnitude; }
};

// Sixteen elements of one row: two pieces of eight consecutive ones.
template <Input kInput>
struct Segment {
  using W = Word<kInput>;
  static constexpr int kWords = 16 / W::kElements;
  u32 words[kWords];

  JAX_DS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  // `piece` 0 or 1 from `x`; kAligned: a multiple of 16 bytes, and all eight exist. Otherwise the
  // first `available` of them do.
  template <bool kAligned>
  JAX_DS_DEVICE void load(int piece, const void* x, int available) {
    u32* to = words + piece * kWords / 2;
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kWords / 2; i += 4) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[i]), "=r"(to[i + 1]), "=r"(to[i + 2]), "=r"(to[i + 3])
                     : "l"(static_cast<const char*>(x) + i * 4));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i >= available) break;
        if constexpr (kInput == Input::kBfloat16) {
          to[i / 2] |= static_cast<u32>(static_cast<const u16*>(x)[i]) << (i % 2 * 16);
        } else {
          to[i] = static_cast<const u32*>(x)[i];
        }
      }
    }
  }

  JAX_DS_DEVICE float at(int i) const {
    return W::element(words[i / W::kElements], i % W::kElements);
  }

  JAX_DS_DEVICE void prescale() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = W::prescale(words[i]);
  }

  // Largest magnitude of the sixteen, as float bits.
  JAX_DS_DEVICE u32 amax() const {
    u32 m = W::magnitude(words[0]);
#pragma unroll
    for (int i = 1; i < kWords; ++i) m = W::max(m, W::magnitude(words[i]));
    return W::fold(m);
  }
};

// silu(gate) * up in float32. Where exp overflows, silu is zero.
JAX_DS_DEVICE float swiglu(float gate, float up) {
  return gate * rcp(1.0f + ex2(gate * -kLog2e)) * up;
}

template <Input kInput>
JAX_DS_DEVICE Segment<Input::kFloat32> swiglu(const Segment<kInput>& gate,
                                              const Segment<kInput>& up) {
  Segment<Input::kFloat32> h;
#pragma unroll
  for (int i = 0; i < 16; ++i) h.words[i] = __float_as_uint(swiglu(gate.at(i), up.at(i)));
  return h;
}

// The scale of a block whose largest magnitude has the float bits `amax`.
JAX_DS_DEVICE float scale_of(u32 amax_bits, bool ue8m0) {
  const float amax = __uint_as_float(amax_bits);
  float scale = __fmul_rn(amax, 1.0f / 448);
  if (ue8m0) scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  if (amax < 0x1p-107f) scale = 1.0f;
  return amax_bits > kInfinityBits ? __uint_as_float(kNaNBits) : scale;
}

// Above 2^96 the lower part of a reciprocal would be subnormal: such scales, and what they divide,
// are multiplied by 2^-64 first.
constexpr float kPrescale = 0x1p-64f;
JAX_DS_DEVICE bool is_huge(float scale) {
  return scale > 0x1p96f && scale < __uint_as_float(kInfinityBits);
}

// A divisor d as its reciprocal. Exact: in two parts, 1/d = high + low to 2^-44, so that x * high +
// x * low rounds as the IEEE quotient does: for every pair of bfloat16 x and amax
// (test_division.py). Of pairs of float32 about one in 2^43 might give the FP8 code next to the
// right one. `low` is never negative, so that -0 stays -0. Otherwise in one part, two units in the
// last place off at most: for SwiGLU, whose x are not the same to the bit everywhere.
template <bool kExact>
struct Reciprocal {
  float high, low;

  static JAX_DS_DEVICE Reciprocal of(float d) {
    if constexpr (!kExact) return {rcp(d), 0.0f};
    // Certainly below 1/d: the approximation errs by one unit in the last place at most.
    const float high = __fmul_rn(rcp(d), 1.0f - 0x1p-21f);
    const float rest = __fmaf_rn(-d, high, 1.0f);
    const float low = __fmul_rn(__fmaf_rn(rest, rest, rest), high);
    // An infinite d makes finite x zero and infinite x NaN.
    return {high, high == 0.0f ? 0.0f : low};
  }

  JAX_DS_DEVICE float times(float x) const {
    return kExact ? __fmaf_rn(x, high, __fmul_rn(x, low)) : __fmul_rn(x, high);
  }
};

// Four floats as e4m3, the first in the lowest byte. Nothing here exceeds 448; NaN becomes 0x7f.
JAX_DS_DEVICE u32 cvt_e4m3x4(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return static_cast<u32>(low) | static_cast<u32>(high) << 16;
}

// The sixteen values of a segment, four words.
template <Input kInput>
JAX_DS_DEVICE void quantize(Segment<kInput>& x, float scale, u32 (&values)[4]) {
  if (is_huge(scale)) {
    scale *= kPrescale;
    x.prescale();
  }
  const auto r = Reciprocal<true>::of(scale);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = cvt_e4m3x4(r.times(x.at(4 * i)), r.times(x.at(4 * i + 1)), r.times(x.at(4 * i + 2)),
                           r.times(x.at(4 * i + 3)));
  }
}

// Eight bytes (two words) to `to`, of which the first `available` exist: all or none if aligned.
template <bool kAligned>
JAX_DS_DEVICE void store_piece(u8* to, const u32* words, int available) {
  if constexpr (kAligned) {
    // A predicate, not a branch: behind branches the compiler works out every address anew.
    asm volatile(
        "{\n"
        " .reg .pred p;\n"
        " setp.gt.s32 p, %3, 0;\n"
        " @p st.global.v2.b32 [%0], {%1, %2};\n"
        "}" ::"l"(to),
        "r"(words[0]), "r"(words[1]), "r"(available)
        : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < available) to[i] = static_cast<u8>(words[i / 4] >> (i % 4 * 8));
    }
  }
}

// The largest of `bits` among the eight threads of a row.
JAX_DS_DEVICE u32 max_over_eight(u32 bits) {
#pragma unroll
  for (int lane = 1; lane < 8; lane *= 2) {
    bits = ::max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
  }
  return bits;
}

// Where CTA number `index` is among [batch, row tile, column tile], column tiles first.
struct Place {
  int batch, row_tile, col_tile;
};
JAX_DS_DEVICE Place place_of(u32 index, u32 row_tiles, u32 col_tiles) {
  u32 batch = 0, row_tile = index / col_tiles;
  const u32 col_tile = index - row_tile * col_tiles;
  if (row_tile >= row_tiles) {  // seldom, and divisions are long
    batch = row_tile / row_tiles;
    row_tile -= batch * row_tiles;
  }
  return {static_cast<int>(batch), static_cast<int>(row_tile), static_cast<int>(col_tile)};
}

}  // namespace jax_ds::quantization
