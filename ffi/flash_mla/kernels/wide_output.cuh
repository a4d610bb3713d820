// The wide decode kernel: the output, two warpgroups, each half of its columns.
#pragma once

#include "flash_mla/kernels/wide_producer.cuh"

namespace jax_ds::flash_mla {

template <typename Config>
struct WideOutput {
  using Element = typename Config::Element;

  const DecodeParams& p;
  WideShared<Config>& shared;
  const int half;                                        // of the columns
  const int row = 16 * (warp_id() % 4) + lane_id() / 4;  // and row + 8

  Progress at;

  JAX_DS_DEVICE void rescale(float (&out)[128]) const {
    if (shared.moved[at.slot()][row / 16] == 0) [[likely]]
      return;
    const float upper = power_of_two(shared.shift[at.slot()][row]);
    const float lower = power_of_two(shared.shift[at.slot()][row + 8]);
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] *= i % 4 < 2 ? upper : lower;
  }

  // As two products of 128 columns: ptxas gives one of 256 no registers in a CTA of 512 threads.
  JAX_DS_DEVICE void multiply(float (&out)[128]) const {
    const u64 probabilities = wgmma::descriptor(shared_address(shared.rope[at.slot()]));
    const u64 v = wgmma::descriptor(shared_address(shared.values[at.stage()][0][4 * half]),
                                    kWideGroupStride, kGroupTileBytes);
    float (&left)[64] = *reinterpret_cast<float (*)[64]>(&out[0]);
    float (&right)[64] = *reinterpret_cast<float (*)[64]>(&out[64]);
    wgmma::fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const u64 rows = v + step * (2 * kWideGroupStride / 16);
      wgmma::mma<wgmma::Major::kK, wgmma::Major::kMN>(Element{}, left, probabilities + 2 * step,
                                                      rows, true);
      wgmma::mma<wgmma::Major::kK, wgmma::Major::kMN>(Element{}, right, probabilities + 2 * step,
                                                      rows + 2 * kGroupTileBytes / 16, true);
    }
    wgmma::commit_group();
    wgmma::wait_group<0>();
  }

  JAX_DS_DEVICE void release_block() {
    mbarrier_arrive(&shared.values_empty[at.stage()]);
    mbarrier_arrive(&shared.rope_empty[at.slot()]);
    at.template advance_stage<Config::kStages>();
    at.advance_slot();
  }

  // Lanes that are neighbours swap pairs, so that each stores four columns and a quad 64 bytes in a
  // row: half as many requests to L2.
  static JAX_DS_DEVICE uint4 pair_up(const float* left, const float* right, float factor) {
    const bool odd = lane_id() & 1;
    const float x = __shfl_xor_sync(0xffffffffu, odd ? left[0] : right[0], 1) * factor;
    const float y = __shfl_xor_sync(0xffffffffu, odd ? left[1] : right[1], 1) * factor;
    const float u = (odd ? right[0] : left[0]) * factor, v = (odd ? right[1] : left[1]) * factor;
    return {__float_as_uint(odd ? x : u), __float_as_uint(odd ? y : v),
            __float_as_uint(odd ? u : x), __float_as_uint(odd ? v : y)};
  }

  JAX_DS_DEVICE void store_partial(const Announcement& item, const float (&out)[128], float upper,
                                   float lower) const {
    float* target = p.partial_out +
                    (partial_row<Config>(p, shared.place, item.part) + row) * kValueDim +
                    256 * half + 8 * (lane_id() % 2) + 2 * (lane_id() & 2);
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const float* left = out + 4 * i;
      const float* right = left + 4;
      st_global_v4(target + 8 * i, pair_up(left, right, upper));
      st_global_v4(target + 8 * kValueDim + 8 * i, pair_up(left + 2, right + 2, lower));
    }
  }

  // Four packed pairs a lane, one of each of four groups of eight columns, to eight columns of the
  // group that the lane's place in its quad names: a 4x4 transpose over the quad.
  static JAX_DS_DEVICE uint4 gather(u32 a, u32 b, u32 c, u32 d) {
    const bool odd = lane_id() & 1, high = lane_id() & 2;
    const u32 x = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
    const u32 y = __shfl_xor_sync(0xffffffffu, odd ? c : d, 1);
    (odd ? a : b) = x;
    (odd ? c : d) = y;
    const u32 z = __shfl_xor_sync(0xffffffffu, high ? a : c, 2);
    const u32 w = __shfl_xor_sync(0xffffffffu, high ? b : d, 2);
    (high ? a : c) = z;
    (high ? b : d) = w;
    return {a, b, c, d};
  }

  JAX_DS_DEVICE void store_final(const Announcement& item, const float (&out)[128], float upper,
                                 float lower) const {
    const int R = p.S * p.H;
    const int r = shared.place.first_row + row;
    u16* target = static_cast<u16*>(p.out) + (static_cast<i64>(item.request) * R + r) * kValueDim +
                  256 * half + 8 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      u32 a[4], b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* o = out + 4 * (i + j);
        a[j] = wgmma::pack(Element{}, o[0] * upper, o[1] * upper);
        b[j] = wgmma::pack(Element{}, o[2] * lower, o[3] * lower);
      }
      const uint4 first = gather(a[0], a[1], a[2], a[3]);
      const uint4 second = gather(b[0], b[1], b[2], b[3]);
      if (r < R) st_global_v4(target + 8 * i, first);
      if (r + 8 < R) st_global_v4(target + 8 * kValueDim + 8 * i, second);
    }
  }

  JAX_DS_DEVICE void run_item(const Announcement& item) {
    float out[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) out[i] = 0.0f;
    float upper = 0.0f, lower = 0.0f;
    const int blocks = item.blocks;
    for (int i = 0; i < blocks; ++i) {
      mbarrier_wait(&shared.go[at.slot()], at.slot_phase());
      mbarrier_wait(&shared.values_full[at.stage()], at.stage_phase());
      if (i != 0) rescale(out);
      multiply(out);
      // Read before the slot is released: the scores of the next item may overwrite it.
      if (i + 1 == blocks) {
        upper = shared.inverse[at.slot()][row];
        lower = shared.inverse[at.slot()][row + 8];
      }
      release_block();
    }
    if (item.part != kWhole) {
      store_partial(item, out, upper, lower);
    } else {
      store_final(item, out, upper, lower);
    }
  }

  JAX_DS_DEVICE void run() {
    for (;; at.advance_item()) {
      const u32 place = at.items() % Config::kAnnouncements;
      mbarrier_wait(&shared.announced[place], at.items() / Config::kAnnouncements % 2);
      const Announcement& item = shared.announcements[place];
      if (item.blocks == 0) break;
      at.template advance_stage<Config::kStages>();  // the query's
      run_item(item);
    }
  }
};

}  // namespace jax_ds::flash_mla
