// 1x128 quantization along rows, optionally of silu(gate) * up: one pass over memory.
#pragma once

#include "quantization/kernels/block.cuh"

namespace jax_ds::quantization {

template <Input kInput_, bool kSwiglu_, bool kAligned_>
struct RowsConfig {
  static constexpr Input kInput = kInput_;
  static constexpr bool kSwiglu = kSwiglu_;    // x: [M, 2K], gate first
  static constexpr bool kAligned = kAligned_;  // K is a multiple of 16
  static constexpr int kThreads = 256;
  // Eight threads quantize a block, a warp four neighbouring blocks of a row.
  static constexpr int kTileBlocks = 4;
  // Each thread has so many rows in flight.
  static constexpr int kRowsPerThread = kSwiglu ? 1 : kInput == Input::kFloat32 ? 2 : 4;
  // CTAs an SM holds at once. With registers for more of SwiGLU's, the compiler puts loads behind
  // the arithmetic of others, and memory is asked for half as much at a time.
  static constexpr int kMinCtas = kSwiglu ? 5 : 4;
  static constexpr int kTileRows = kThreads / 32 * kRowsPerThread;
};

template <class Config>
struct RowsKernel {
  using In = Segment<Config::kInput>;
  static constexpr int kRows = Config::kRowsPerThread;
  static constexpr bool kAligned = Config::kAligned;

  static JAX_DS_DEVICE void load(In& x, const RowsParams& p, i64 offset, int column, bool valid) {
    x.clear();
    const char* at = static_cast<const char*>(p.x) + offset * In::W::kBytes;
    if (!valid) return;
    x.template load<kAligned>(0, at, p.k - column);
    x.template load<kAligned>(1, at + 8 * In::W::kBytes, p.k - column - 8);
  }

  static JAX_DS_DEVICE void store(u8* to, const u32 (&values)[4], int available) {
    if constexpr (kAligned) {
      *reinterpret_cast<uint4*>(to) = make_uint4(values[0], values[1], values[2], values[3]);
    } else {
      store_piece<false>(to, values, available);
      store_piece<false>(to + 8, values + 2, available - 8);
    }
  }

  static JAX_DS_DEVICE void run(const RowsParams& p) {
    __shared__ float scales[Config::kTileRows][Config::kTileBlocks];
    const Place place = place_of(blockIdx.x, p.row_tiles, p.col_tiles);
    const int row_tile = place.row_tile, col_tile = place.col_tile;
    const i64 batch = place.batch;
    const int rows = p.num_rows == nullptr ? p.m : min(p.m, p.num_rows[batch]);
    const int first_row = row_tile * Config::kTileRows;
    if (first_row >= rows) return;

    const int warp = threadIdx.x / 32, block = threadIdx.x % 32 / 8, lane = threadIdx.x % 8;
    const int column = (col_tile * Config::kTileBlocks + block) * kBlock + lane * 16;
    const int tile_row = warp * kRows;
    constexpr int kHalves = Config::kSwiglu ? 2 : 1;
    In x[kRows][kHalves];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + tile_row + r;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const i64 offset = ((batch * p.m + row) * kHalves + half) * p.k + column;
        load(x[r][half], p, offset, column, row < rows && column < p.k);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first_row + tile_row + r;
      u32 values[4];
      float scale;
      if constexpr (Config::kSwiglu) {
        auto h = swiglu(x[r][0], x[r][1]);
        scale = scale_of(max_over_eight(h.amax()), p.ue8m0);
        quantize(h, scale, values);
      } else {
        scale = scale_of(max_over_eight(x[r][0].amax()), p.ue8m0);
        quantize(x[r][0], scale, values);
      }
      if (lane == 0) scales[tile_row + r][block] = scale;
      if (row < rows && column < p.k) {
        store(static_cast<u8*>(p.values) + (batch * p.m + row) * p.k + column, values,
              p.k - column);
      }
    }
    __syncthreads();
    store_scales(p, scales, batch, first_row, rows, col_tile);
  }

  // Consecutive threads write consecutive addresses.
  static JAX_DS_DEVICE void store_scales(
      const RowsParams& p, const float (&scales)[Config::kTileRows][Config::kTileBlocks], i64 batch,
      int first_row, int rows, int col_tile) {
    if (threadIdx.x >= Config::kTileRows * Config::kTileBlocks) return;
    const int i = threadIdx.x;
    const int r = i % Config::kTileRows, b = i / Config::kTileRows;
    const int row = first_row + r, block = col_tile * Config::kTileBlocks + b;
    if (row >= rows || block >= p.kb) return;
    p.scales[(batch * p.kb + block) * p.m + row] = scales[r][b];
  }
};

// x: [B, M, K] -> values [B, M, K], scales
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinCtas)
    quantize_rows(const RowsParams p) {
  RowsKernel<Config>::run(p);
}

}  // namespace jax_ds::quantization
