"""The products' custom calls: shapes, layouts and attributes.

Scales of 1x128 blocks are asked for column-major, so that whatever produces them writes them so:
the kernel reads the scales of neighbouring rows.

The kernels take the contracted dimension in multiples of 16 and the result's columns in multiples
of 8; other sizes are padded with zeros here, which copies the operands.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_ds._runtime.call import ffi_call
from jax_ds.deep_gemm import tuned
from jax_ds.quantization import Quantized

_TARGET = "jax_ds_gemm"
_MAX_GROUPS = 512
_CONTRACTED, _COLUMNS = 16, 8
_MAX_SIZE = 2**31 - 1


def unsupported(lhs: Quantized, rhs: Quantized, num_groups: int = 1) -> str | None:
    """Why the kernels cannot take these operands; None if they can."""
    if num_groups > _MAX_GROUPS:
        return f"there may be at most {_MAX_GROUPS} groups, got {num_groups}"
    for q in (lhs, rhs):
        rows = math.prod(q.shape[:-1])
        if max(rows, q.shape[-1]) > _MAX_SIZE:
            return f"operands may have at most {_MAX_SIZE} rows and columns, got shape {q.shape}"
    return None


def gemm(lhs: Quantized, rhs: Quantized, *, out_dtype: DTypeLike) -> Float[Array, "M N"]:
    """`lhs @ rhs.T`."""
    shape = (lhs.shape[0], rhs.shape[0])
    return _call("dense", lhs, rhs, None, None, shape, out_dtype)


def grouped_gemm(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: DTypeLike,
    zero_tail: bool,
) -> Float[Array, "M N"]:
    """Consecutive rows of lhs times the transpose of their group's matrix."""
    shape = (lhs.shape[0], rhs.shape[1])
    return _call("grouped", lhs, rhs, group_sizes, None, shape, out_dtype, zero_tail)


def masked_gemm(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: DTypeLike,
    zero_tail: bool,
    expected_rows: int,
) -> Float[Array, "G M N"]:
    """The first rows of every group times the transpose of its matrix."""
    shape = (*lhs.shape[:2], rhs.shape[1])
    return _call("masked", lhs, rhs, group_sizes, None, shape, out_dtype, zero_tail, expected_rows)


def wgrad(
    dy: Quantized, x: Quantized, accumulate: Float[Array, "N K"] | None, *, out_dtype: DTypeLike
) -> Float[Array, "N K"]:
    """`accumulate + dy @ x.T` over tokens."""
    shape = (dy.shape[0], x.shape[0])
    return _call("wgrad", dy, x, None, accumulate, shape, out_dtype)


def grouped_wgrad(
    dy: Quantized,
    x: Quantized,
    group_sizes: Int[Array, "G"],
    accumulate: Float[Array, "G N K"] | None,
    *,
    out_dtype: DTypeLike,
) -> Float[Array, "G N K"]:
    """`accumulate[g] + dy_g @ x_g.T` over the tokens of each group."""
    shape = (group_sizes.shape[0], dy.shape[0], x.shape[0])
    return _call("wgrad", dy, x, group_sizes, accumulate, shape, out_dtype)


def _call(
    mode: str,
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "G"] | None,
    accumulate: Float[Array, "..."] | None,
    shape: tuple[int, ...],
    out_dtype: DTypeLike,
    zero_tail: bool = True,
    expected_rows: int = 0,
) -> Any:
    dtype = jnp.dtype(out_dtype)
    if 0 in shape or lhs.shape[-1] == 0:
        return jnp.zeros(shape, dtype) if accumulate is None else accumulate
    columns = shape[-1]
    lhs = _padded(lhs, 1, per_row=True)
    rhs = _padded(rhs, _COLUMNS, per_row=mode == "wgrad")
    m, n, k = lhs.shape[-2], rhs.shape[-2], lhs.shape[-1]
    groups = 1 if group_sizes is None else group_sizes.shape[0]
    problem = tuned.Problem(
        mode, dtype.name, accumulate is not None, m, n, k, groups, expected_rows
    )
    if accumulate is not None:
        accumulate = _pad(accumulate, {-1: n})
    config = tuned.configuration(problem)
    shape = (*shape[:-1], n)
    out = launch(problem, config, lhs, rhs, group_sizes, accumulate, shape, zero_tail)
    return out[..., :columns]


def launch(
    problem: tuned.Problem,
    config: str,
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "G"] | None,
    accumulate: Float[Array, "..."] | None,
    shape: tuple[int, ...],
    zero_tail: bool = True,
) -> Array:
    """The custom call; `config` names a configuration, empty for the model's choice."""
    operands: list[Any] = [lhs.values, lhs.scales, rhs.values, rhs.scales]
    layouts: list[Any] = [None, _column_major(lhs.ndim), None, None]
    if problem.mode == "wgrad":
        layouts[3] = _column_major(rhs.ndim)
    for operand in (group_sizes, accumulate):
        if operand is not None:
            operands.append(operand)
            layouts.append(None)
    out: Array = ffi_call(
        _TARGET,
        [jax.ShapeDtypeStruct(shape, problem.output)],
        *operands,
        attributes={**dataclasses.asdict(problem), "zero_tail": zero_tail, "config": config},
        input_layouts=layouts,
        aliases=None if accumulate is None else {len(operands) - 1: 0},
    )[0]
    return out


def _padded(q: Quantized, rows: int, *, per_row: bool) -> Quantized:
    """Zeros up to a multiple of `rows` rows and of 16 columns, which share the last block."""
    r, c = q.shape[-2], q.shape[-1]
    r, c = -(-r // rows) * rows, -(-c // _CONTRACTED) * _CONTRACTED
    scales = _pad(q.scales, {-2: r}) if per_row else q.scales
    return Quantized(_pad(q.values, {-2: r, -1: c}), scales)


def _pad(x: Array, sizes: dict[int, int]) -> Array:
    """Zeros behind the axes named, up to their new sizes."""
    widths = [(0, 0)] * x.ndim
    for axis, size in sizes.items():
        widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _column_major(ndim: int) -> tuple[int, ...]:
    return (*range(ndim - 2), ndim - 1, ndim - 2)
