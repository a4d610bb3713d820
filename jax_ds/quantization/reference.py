"""The definition of every quantizer in NumPy, one block at a time; tests compare bits with it.

NumPy neither fuses, reorders nor flushes subnormals, so this is the arithmetic as written.
"""

import math

import ml_dtypes
import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


def quantize_block(
    block: np.ndarray, scale_dtype: str = "float32"
) -> tuple[np.ndarray, np.float32]:
    """One block of any shape to its e4m3 values and its scale."""
    block = np.asarray(block, np.float32)
    amax = np.max(np.abs(block), initial=np.float32(0))
    scale = np.float32(1) if amax < 2.0**-107 else amax * np.float32(1 / 448)
    if scale_dtype == "ue8m0" and np.isfinite(scale):
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - 1 if mantissa == 0.5 else exponent)
    with np.errstate(invalid="ignore"):
        quotient = block / scale
    quotient = np.where(np.isnan(quotient), np.float32(np.nan), quotient)
    return quotient.astype(ml_dtypes.float8_e4m3fn), np.float32(scale)


def quantize_1x128(x: np.ndarray, scale_dtype: str = "float32") -> Pair:
    """x `[..., K]`: values `[..., K]`, scales `[..., ceil(K/128)]`."""
    rows = np.asarray(x, np.float32).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    values = np.zeros(rows.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((rows.shape[0], -(-x.shape[-1] // 128)), np.float32)
    for i, row in enumerate(rows):
        for b in range(scales.shape[1]):
            cut = slice(128 * b, 128 * b + 128)
            values[i, cut], scales[i, b] = quantize_block(row[cut], scale_dtype)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], scales.shape[1])


def quantize_128x128(w: np.ndarray, scale_dtype: str = "float32") -> Pair:
    """w `[..., N, K]`: values `[..., N, K]`, scales `[..., ceil(N/128), ceil(K/128)]`."""
    *batch, n, k = w.shape
    matrices = np.asarray(w, np.float32).reshape(math.prod(batch), n, k)
    values = np.zeros(matrices.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((len(matrices), -(-n // 128), -(-k // 128)), np.float32)
    for m, i, j in np.ndindex(scales.shape):
        cut = (m, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        values[cut], scales[m, i, j] = quantize_block(matrices[cut], scale_dtype)
    return values.reshape(w.shape), scales.reshape(*batch, *scales.shape[1:])


def quantize_columns(
    x: np.ndarray, group_sizes: list[int] | None, scale_dtype: str = "float32"
) -> Pair:
    """x `[M, K]` along tokens, every group from a multiple of 128 on: values `[K, P]`."""
    x = np.asarray(x, np.float32)
    sizes = [x.shape[0]] if group_sizes is None else list(group_sizes)
    p = (x.shape[0] + 127 * min(len(sizes), x.shape[0])) // 128 * 128
    padded = np.zeros((p, x.shape[1]), np.float32)
    source = target = 0
    for size in sizes:
        padded[target : target + size] = x[source : source + size]
        source += size
        target += -(-size // 128) * 128
    return quantize_1x128(padded.T, scale_dtype)


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """`silu(gate) * up`, gate first, in float64 rounded to float32."""
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up).astype(np.float32)


def dequantize(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values times their block's scale, for either block size."""
    values = np.asarray(values, np.float32)
    out = np.empty_like(values)
    per_row = scales.shape[:-1] == values.shape[:-1]
    for index in np.ndindex(values.shape):
        *lead, col = index
        row = lead if per_row else [*lead[:-1], lead[-1] // 128]
        out[index] = values[index] * scales[(*row, col // 128)]
    return out
