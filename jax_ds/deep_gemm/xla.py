"""The portable products.

An e4m3 value is exact in bfloat16 and a product of two is exact in float32, so every 128-block of
the contracted dimension is one bfloat16 product accumulated in float32, then scaled and added to
the float32 total: the two-level accumulation of the kernels, at tensor-core speed where there are
tensor cores.

Grouped products walk over tiles of rows, each inside one group. The number of tiles is a device
value, so that empty capacity costs nothing and the work is that of the rows plus at most one
partial tile per group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int

from jax_ds._core.groups import BLOCK, group_bounds, padded_starts
from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.quantization import Quantized

_UNROLL = 8


def gemm(lhs: Quantized, rhs: Quantized, out_dtype: DTypeLike) -> Float[Array, "M N"]:
    """`lhs @ rhs.T`, lhs in 1x128 blocks, rhs in 128x128 blocks."""
    scales = _per_row(rhs.scales, rhs.shape[0])
    return _product(lhs.values, lhs.scales, rhs.values, scales).astype(out_dtype)


def grouped_gemm(
    lhs: Quantized, rhs: Quantized, group_sizes: Int[Array, "G"], out_dtype: DTypeLike
) -> Float[Array, "M N"]:
    """Rows of lhs times the transpose of their group's matrix; rows past the end are zero."""
    m, num_groups = lhs.shape[0], rhs.shape[0]
    starts, ends = group_bounds(group_sizes, m)
    return _tiled_gemm(lhs, rhs, starts, ends, _tile_rows(m, num_groups), out_dtype)


def masked_gemm(
    lhs: Quantized, rhs: Quantized, group_sizes: Int[Array, "G"], out_dtype: DTypeLike
) -> Float[Array, "G M N"]:
    """As `grouped_gemm`, where every group has M rows of its own of which the first count."""
    num_groups, m, k = lhs.shape
    flat = Quantized(lhs.values.reshape(-1, k), lhs.scales.reshape(num_groups * m, -1))
    starts, ends, rows = _masked_bounds(group_sizes, m)
    return _tiled_gemm(flat, rhs, starts, ends, rows, out_dtype).reshape(num_groups, m, -1)


def wgrad(
    dy: Quantized, x: Quantized, accumulate: Float[Array, "N K"] | None, out_dtype: DTypeLike
) -> Float[Array, "N K"]:
    """`dy @ x.T` over tokens, both in 1x128 blocks along tokens."""
    out = _product(dy.values, dy.scales, x.values, x.scales)
    return (out if accumulate is None else accumulate + out).astype(out_dtype)


def grouped_wgrad(
    dy: Quantized,
    x: Quantized,
    group_sizes: Int[Array, "G"],
    accumulate: Float[Array, "G N K"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "G N K"]:
    """Each block of 128 tokens adds to the group that owns it."""
    (n, p), k, num_groups = dy.shape, x.shape[0], group_sizes.shape[0]
    first, end = padded_starts(*group_bounds(group_sizes, p))
    first_blocks = first // BLOCK

    def add_block(i: Int[Array, ""], total: Float[Array, "G N K"]) -> Float[Array, "G N K"]:
        group = jnp.searchsorted(first_blocks, i, side="right") - 1
        dy_scale = jax.lax.dynamic_slice_in_dim(dy.scales, i, 1, axis=1)
        x_scale = jax.lax.dynamic_slice_in_dim(x.scales, i, 1, axis=1)
        dy_values = jax.lax.dynamic_slice_in_dim(dy.values, i * BLOCK, BLOCK, axis=1)
        x_values = jax.lax.dynamic_slice_in_dim(x.values, i * BLOCK, BLOCK, axis=1)
        # With a single block XLA folds the quantizer's transposes into the product, and its CPU
        # backend has no bfloat16 product of two transposed operands.
        partial = _dot(*jax.lax.optimization_barrier((dy_values, x_values)))
        here = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        here = here + partial * (dy_scale * x_scale.T)
        return jax.lax.dynamic_update_index_in_dim(total, here, group, 0)

    axes = varying_axes(dy, x, group_sizes, accumulate)
    total = jnp.zeros((num_groups, n, k), jnp.float32) if accumulate is None else accumulate
    total = to_varying(total, axes)
    if p > 0:
        num_blocks = jnp.minimum(end, p) // BLOCK
        total = jax.lax.fori_loop(0, num_blocks, add_block, total)
    return total.astype(out_dtype)


def bf16_grouped_gemm(
    lhs: BFloat16[Array, "M K"], rhs: BFloat16[Array, "G N K"], group_sizes: Int[Array, "G"]
) -> BFloat16[Array, "M N"]:
    """The unquantized grouped product in tiles of rows."""
    m, num_groups = lhs.shape[0], rhs.shape[0]
    starts, ends = group_bounds(group_sizes, m)
    return _bf16_tiled_gemm(lhs, rhs, starts, ends, _tile_rows(m, num_groups))


def bf16_masked_gemm(
    lhs: BFloat16[Array, "G M K"], rhs: BFloat16[Array, "G N K"], group_sizes: Int[Array, "G"]
) -> BFloat16[Array, "G M N"]:
    """As `bf16_grouped_gemm`, where every group has M rows of its own of which the first count."""
    num_groups, m, k = lhs.shape
    starts, ends, rows = _masked_bounds(group_sizes, m)
    flat = lhs.reshape(num_groups * m, k)
    return _bf16_tiled_gemm(flat, rhs, starts, ends, rows).reshape(num_groups, m, -1)


def bf16_grouped_wgrad(
    dy: BFloat16[Array, "M N"], x: BFloat16[Array, "M K"], group_sizes: Int[Array, "G"]
) -> Float[Array, "G N K"]:
    """`dy_g.T @ x_g` of every group, in tiles of rows."""
    (m, n), k, num_groups = dy.shape, x.shape[1], group_sizes.shape[0]
    starts, ends = group_bounds(group_sizes, m)
    rows = _tile_rows(m, num_groups)

    def add_tile(
        total: Float[Array, "G N K"], row: Int[Array, ""], owned: Array, group: Int[Array, ""]
    ) -> Float[Array, "G N K"]:
        # Zero both operands: a neighbour's NaN times zero is NaN.
        dy_tile, x_tile = (
            jnp.where(owned, jax.lax.dynamic_slice_in_dim(a, row, rows), jnp.bfloat16(0))
            for a in (dy, x)
        )
        here = jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        here = here + _dot(dy_tile.T, x_tile.T)
        return jax.lax.dynamic_update_index_in_dim(total, here, group, 0)

    total = jnp.zeros((num_groups, n, k), jnp.float32)
    total = to_varying(total, varying_axes(dy, x, group_sizes))
    return _for_tiles(total, starts, ends, m, rows, add_tile)


@jax.custom_batching.sequential_vmap  # its own rule lacks cases
def ragged_dot(
    lhs: BFloat16[Array, "M K"], rhs: BFloat16[Array, "G N K"], group_sizes: Int[Array, "G"]
) -> BFloat16[Array, "M N"]:
    """`bf16_grouped_gemm` through `jax.lax.ragged_dot_general`, for GPUs."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    starts, ends = group_bounds(group_sizes, lhs.shape[0])
    owned = (jnp.arange(lhs.shape[0]) < ends[-1])[:, None]
    out = jax.lax.ragged_dot_general(lhs, rhs, ends - starts, dims)
    return jnp.where(owned, out, jnp.bfloat16(0))


@jax.custom_batching.sequential_vmap  # its own rule lacks cases
def ragged_wgrad(
    dy: BFloat16[Array, "M N"], x: BFloat16[Array, "M K"], group_sizes: Int[Array, "G"]
) -> Float[Array, "G N K"]:
    """`bf16_grouped_wgrad` through `jax.lax.ragged_dot_general`, for GPUs."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    starts, ends = group_bounds(group_sizes, dy.shape[0])
    owned = (jnp.arange(dy.shape[0]) < ends[-1])[:, None]
    dy, x = (jnp.where(owned, a, jnp.bfloat16(0)) for a in (dy, x))
    return jax.lax.ragged_dot_general(
        dy, x, ends - starts, dims, preferred_element_type=jnp.float32
    )


def _masked_bounds(
    group_sizes: Int[Array, "G"], m: int
) -> tuple[Int[Array, "G"], Int[Array, "G"], int]:
    """First row and one past the last of every group among `G * M` rows, and rows of a tile."""
    starts = jnp.arange(group_sizes.shape[0], dtype=jnp.int32) * m
    # Capacities are far larger than counts: small tiles.
    return starts, starts + jnp.clip(group_sizes, 0, m), min(m, 64)


def _bf16_tiled_gemm(
    lhs: BFloat16[Array, "M K"],
    rhs: BFloat16[Array, "G N K"],
    starts: Int[Array, "G"],
    ends: Int[Array, "G"],
    rows: int,
) -> BFloat16[Array, "M N"]:
    def tile(row: Int[Array, ""], rows: int, group: Int[Array, ""]) -> Float[Array, "T N"]:
        return _dot(
            jax.lax.dynamic_slice_in_dim(lhs, row, rows),
            jax.lax.dynamic_index_in_dim(rhs, group, keepdims=False),
        )

    out = jnp.zeros((lhs.shape[0], rhs.shape[1]), jnp.bfloat16)
    out = to_varying(out, varying_axes(lhs, rhs, starts, ends))
    return _store_tiles(out, starts, ends, rows, tile)


def _tiled_gemm(
    lhs: Quantized,
    rhs: Quantized,
    starts: Int[Array, "G"],
    ends: Int[Array, "G"],
    rows: int,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    n = rhs.shape[1]

    def tile(row: Int[Array, ""], rows: int, group: Int[Array, ""]) -> Float[Array, "T N"]:
        lhs_values = jax.lax.dynamic_slice_in_dim(lhs.values, row, rows)
        lhs_scales = jax.lax.dynamic_slice_in_dim(lhs.scales, row, rows)
        rhs_values = jax.lax.dynamic_index_in_dim(rhs.values, group, keepdims=False)
        rhs_scales = jax.lax.dynamic_index_in_dim(rhs.scales, group, keepdims=False)
        return _product(lhs_values, lhs_scales, rhs_values, _per_row(rhs_scales, n))

    out = jnp.zeros((lhs.shape[0], n), out_dtype)
    out = to_varying(out, varying_axes(lhs, rhs, starts, ends))
    return _store_tiles(out, starts, ends, rows, tile)


def _store_tiles(
    out: Float[Array, "M N"],
    starts: Int[Array, "G"],
    ends: Int[Array, "G"],
    rows: int,
    tile: Callable[[Array, int, Array], Array],
) -> Float[Array, "M N"]:
    """Writes `tile(first row, rows, group)` into the rows of `out` that the group owns."""

    def store(out: Array, row: Array, owned: Array, group: Array) -> Array:
        old = jax.lax.dynamic_slice_in_dim(out, row, rows)
        new = jnp.where(owned, tile(row, rows, group).astype(out.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(out, new, row, 0)

    return _for_tiles(out, starts, ends, out.shape[0], rows, store)


def _for_tiles(
    carry: Array,
    starts: Int[Array, "G"],
    ends: Int[Array, "G"],
    num_rows: int,
    rows: int,
    body: Callable[[Array, Array, Array, Array], Array],
) -> Array:
    """Folds `body(carry, first row, owned [rows, 1], group)` over the tiles of all groups.

    A tile never crosses the last row of the array: the last one moves up and owns fewer rows.
    """
    if num_rows == 0:
        return carry
    tile_ends = jnp.cumsum((ends - starts + rows - 1) // rows, dtype=jnp.int32)

    def step(i: Array, carry: Array) -> Array:
        group = jnp.searchsorted(tile_ends, i, side="right")
        # Counted back from the group's last tile, which saves a table of first tiles.
        tiles_after = tile_ends[group] - i
        tiles = (ends[group] - starts[group] + rows - 1) // rows
        start = starts[group] + (tiles - tiles_after) * rows
        row = jnp.minimum(start, num_rows - rows)
        index = row + jnp.arange(rows, dtype=jnp.int32)
        owned = (index >= start) & (index < ends[group])
        return body(carry, row, owned[:, None], group)

    return jax.lax.fori_loop(0, tile_ends[-1], step, carry)


def _tile_rows(m: int, num_groups: int) -> int:
    """Rows of a tile: a power of two near the rows of a group, 16 to 128, at most M."""
    per_group = max(1, m // num_groups)
    return min(m, max(16, min(128, 1 << (per_group - 1).bit_length())))


def _product(
    lhs: Float[Array, "M K"],
    lhs_scales: Float[Array, "M B"],
    rhs: Float[Array, "N K"],
    rhs_scales: Float[Array, "N B"],
) -> Float[Array, "M N"]:
    """`(lhs * its scales) @ (rhs * its scales).T`, one scale per row and 128-block of K."""
    num_blocks = lhs_scales.shape[1]
    missing = num_blocks * BLOCK - lhs.shape[1]
    if missing:
        lhs, rhs = (jnp.pad(a, ((0, 0), (0, missing))) for a in (lhs, rhs))

    def add_block(i: Int[Array, ""], total: Float[Array, "M N"]) -> Float[Array, "M N"]:
        partial = _dot(
            jax.lax.dynamic_slice_in_dim(lhs, i * BLOCK, BLOCK, axis=1),
            jax.lax.dynamic_slice_in_dim(rhs, i * BLOCK, BLOCK, axis=1),
        )
        lhs_scale = jax.lax.dynamic_slice_in_dim(lhs_scales, i, 1, axis=1)
        rhs_scale = jax.lax.dynamic_slice_in_dim(rhs_scales, i, 1, axis=1)
        return total + partial * (lhs_scale * rhs_scale.T)

    total = jnp.zeros((lhs.shape[0], rhs.shape[0]), jnp.float32)
    total = to_varying(total, varying_axes(lhs, lhs_scales, rhs, rhs_scales))
    if num_blocks == 0:
        return total
    return jax.lax.fori_loop(0, num_blocks, add_block, total, unroll=_UNROLL)


def _dot(lhs: Float[Array, "M K"], rhs: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return jax.lax.dot_general(
        lhs.astype(jnp.bfloat16),
        rhs.astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _per_row(scales: Float[Array, "A B"], rows: int) -> Float[Array, "R B"]:
    """The scales of 128x128 blocks, repeated for every row."""
    return jnp.repeat(scales, BLOCK, axis=0)[:rows]
