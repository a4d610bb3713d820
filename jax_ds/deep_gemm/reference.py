"""The products' equations in float32, one 128-block of the contracted dimension after the other.

Operands are plain arrays: values of any dtype and their scales, one per row and block
(`[R, ceil(C/128)]`) or per 128x128 block (`[ceil(R/128), ceil(C/128)]`). What tests differentiate
is written in jnp, the rest in NumPy.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_EXACT = jax.lax.Precision.HIGHEST


def gemm(
    lhs: Float[np.ndarray, "M K"],
    lhs_scales: Float[np.ndarray, "M B"],
    rhs: Float[np.ndarray, "N K"],
    rhs_scales: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "M N"]:
    """`out[i, j] = sum_b lhs_scale[i, b] rhs_scale[j, b] sum_{k in b} lhs[i, k] rhs[j, k]`."""
    if rhs_scales.shape[0] != rhs.shape[0]:
        rhs_scales = rhs_scales[np.arange(rhs.shape[0]) // 128]
    out = np.zeros((lhs.shape[0], rhs.shape[0]), np.float32)
    for b in range(lhs_scales.shape[1]):
        block = slice(128 * b, 128 * b + 128)
        a, c = lhs[:, block].astype(np.float32), rhs[:, block].astype(np.float32)
        partial = a @ c.T
        out += lhs_scales[:, b][:, None] * rhs_scales[:, b][None, :] * partial
    return out


def grouped_gemm(
    lhs: Float[np.ndarray, "M K"],
    lhs_scales: Float[np.ndarray, "M B"],
    rhs: Float[np.ndarray, "G N K"],
    rhs_scales: Float[np.ndarray, "G A B"],
    group_sizes: Sequence[int],
) -> Float[np.ndarray, "M N"]:
    """Every group's rows times its own matrix; zero past the last group."""
    out = np.zeros((lhs.shape[0], rhs.shape[1]), np.float32)
    start = 0
    for g, size in enumerate(group_sizes):
        rows = slice(start, start + size)
        product = gemm(lhs[rows], lhs_scales[rows], rhs[g], rhs_scales[g])
        out[rows] = product
        start += size
    return out


def masked_gemm(
    lhs: Float[np.ndarray, "G M K"],
    lhs_scales: Float[np.ndarray, "G M B"],
    rhs: Float[np.ndarray, "G N K"],
    rhs_scales: Float[np.ndarray, "G A B"],
    group_sizes: Sequence[int],
) -> Float[np.ndarray, "G M N"]:
    """The first rows of every group times its matrix; zero past them."""
    out = np.zeros((*lhs.shape[:2], rhs.shape[1]), np.float32)
    for g, size in enumerate(group_sizes):
        product = gemm(lhs[g, :size], lhs_scales[g, :size], rhs[g], rhs_scales[g])
        out[g, :size] = product
    return out


def grouped_wgrad(
    dy: Float[np.ndarray, "N P"],
    dy_scales: Float[np.ndarray, "N B"],
    x: Float[np.ndarray, "K P"],
    x_scales: Float[np.ndarray, "K B"],
    group_sizes: Sequence[int],
) -> Float[np.ndarray, "G N K"]:
    """Every group's `dy @ x.T` over its tokens, which start at a multiple of 128."""
    out = []
    start = 0
    for size in group_sizes:
        tokens = slice(start, start + size)
        first = start // 128
        blocks = slice(first, first + -(-size // 128))
        out.append(gemm(dy[:, tokens], dy_scales[:, blocks], x[:, tokens], x_scales[:, blocks]))
        start = (first + -(-size // 128)) * 128
    return np.stack(out)


def linear(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """The unquantized `x @ w.T`, differentiable."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.einsum("mk,nk->mn", x, w, precision=_EXACT)


def grouped_linear(
    x: Float[Array, "M K"], w: Float[Array, "G N K"], group_sizes: Sequence[int]
) -> Float[Array, "M N"]:
    """The unquantized grouped product, differentiable; zero past the last group."""
    parts, start = [], 0
    for g, size in enumerate(group_sizes):
        parts.append(linear(x[start : start + size], w[g]))
        start += size
    parts.append(jnp.zeros((x.shape[0] - start, w.shape[1]), jnp.float32))
    return jnp.concatenate(parts)
