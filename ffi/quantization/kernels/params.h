// Parameters of the quantizers, shared by kernels and host.
#pragma once

namespace jax_ds::quantization {

// Quantizes each of B matrices x: [M, K] in 1x128 blocks along K. With SwiGLU, x: [M, 2K].
struct RowsParams {
  const void* x;         // bfloat16 or float32
  void* values;          // float8_e4m3fn [B, M, K]
  float* scales;         // [B, M, KB] or, column-major, [B, KB, M]
  const int* counts;     // [B], rows to quantize, the others are not touched; null: all M
  int m, k, kb;          // KB = ceil(K / 128)
  int row_tiles, col_tiles;
  bool column_scales;
};

// Quantizes tiles of 128x128: rows and columns of x: [M, K], or square blocks of B matrices.
struct TilesParams {
  const void* x;            // bfloat16 or float32; [M, 2K] with SwiGLU
  void* row_values;         // float8_e4m3fn [B, M, K]
  float* row_scales;        // 1x128: as in RowsParams; square: [B, MB, KB]
  void* column_values;      // float8_e4m3fn [B, K, P]
  float* column_scales;     // 1x128: [K, PB] or, column-major, [PB, K]; square: [B, KB, MB]
  const int* group_sizes;   // [G]: token blocks belong to groups; null: one group of M rows
  int m, k, p;              // P: tokens of the column output; multiple of 128 unless square
  int num_groups;
  int col_tiles;            // tiles along K
  int tiles_per_cta;        // of them, one CTA quantizes so many
  int row_tiles;            // tiles along the tokens
  bool row_scales_column_major, column_scales_column_major;
};

}  // namespace jax_ds::quantization
