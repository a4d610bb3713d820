// Parameters of the quantizers, shared by kernels and host. B: batch, KB = ceil(K / 128).
#pragma once

namespace jax_ds::quantization {

// Dynamic shared memory of quantize_lines, bytes: the tile (gate and up with SwiGLU), column maxima
// and scales.
constexpr int lines_shared_bytes(int element_bytes, bool swiglu) {
  return 128 * 128 * element_bytes * (swiglu ? 2 : 1) + 11 * 128 * 4;
}

// 1x128 blocks along K of x: [B, M, K]; with SwiGLU, x: [B, M, 2K].
struct RowsParams {
  const void* x;        // bfloat16 or float32
  void* values;         // float8_e4m3fn [B, M, K]
  float* scales;        // [B, M, KB], column-major: [B, KB, M] in memory
  const int* num_rows;  // [B], rows to quantize, the others are not touched; null: all M
  int m, k, kb;
  int row_tiles, col_tiles;
  bool ue8m0;
};

// Tiles of 128x128 of x: [B, M, K]; with SwiGLU, x: [B, M, 2K].
struct TilesParams {
  const void* x;           // bfloat16 or float32
  void* row_values;        // float8_e4m3fn [B, M, K]
  float* row_scales;       // 1x128: column-major, as in RowsParams; square blocks: [B, MB, KB]
  void* column_values;     // float8_e4m3fn [B, K, P]
  float* column_scales;    // 1x128: [B, K, PB], column-major; square blocks: [B, KB, PB]
  const int* group_sizes;  // [B, G]: every group starts at a multiple of 128 tokens
  int num_groups;          // -1: no groups
  int m, k, kb;
  int p;          // tokens of the columns: a multiple of 128, or M for square blocks
  int row_tiles;  // ceil(P / 128)
  bool ue8m0;
};

}  // namespace jax_ds::quantization
