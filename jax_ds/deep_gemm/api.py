"""FP8 matrix products with fine-grained scales: dense, grouped, masked, and weight gradients.

For operands in blocks of 128 along the contracted dimension K (`jax_ds.quantization`),

    out[i, j] = sum_b lhs.scale[i, b] * rhs.scale[j, b] * sum_{k in block b} lhs[i, k] * rhs[j, k]

where the inner sum runs over e4m3 values and the outer one in float32. This promotion once per
128 values is what makes FP8 products accurate enough to train with (DeepSeek-V3 report, section
3.3.2; DeepGEMM). The result is rounded once, to `out_dtype`.

`group_sizes` means what it means in `jax.lax.ragged_dot`: int32 `[G]` on the device, consecutive
rows, zero allowed, no alignment. Under jit, sizes beyond the last row are cut off and negative
ones count as zero; sizes known while tracing that break the rule raise.

These functions take quantized operands and are not differentiable; `fp8_linear`,
`fp8_grouped_linear` and `bf16_grouped_gemm` are. Several devices' data belongs inside
`jax.shard_map`. Every function takes `implementation`: None, "xla" or "cuda". The kernels take K in
multiples of 16 and N in multiples of 8 as they are; other sizes are padded first, which copies
the operands. More than 512 groups are left to the portable products.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_ds._core.checks import (
    check,
    check_choice,
    check_dtype,
    check_dtype_choice,
    check_integer,
    check_rank,
    check_shape,
)
from jax_ds._core.gradients import without_gradient
from jax_ds._core.groups import check_group_sizes
from jax_ds._runtime.choose import Implementation, choose
from jax_ds.deep_gemm import ffi, xla
from jax_ds.quantization import Quantized
from jax_ds.quantization.types import check_quantized

_ROW_BLOCK = (1, 128)
_SQUARE_BLOCK = (128, 128)


def fp8_gemm(
    lhs: Quantized,
    rhs: Quantized,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation = None,
) -> Float[Array, "M N"]:
    """`lhs @ rhs.T`.

    Args:
      lhs: Quantized `[M, K]` in 1x128 blocks.
      rhs: Quantized `[N, K]` in 128x128 blocks.
      out_dtype: bfloat16 or float32.
      implementation: None, "xla" or "cuda".

    Returns:
      `out_dtype[M, N]`.

    Raises:
      ValueError, TypeError: for shapes, dtypes or scale layouts against these rules, or where
        differentiated.
      NotImplementedError: for "cuda" where the kernel cannot run.
    """
    _check_operand("lhs", lhs, 2, _ROW_BLOCK)
    _check_operand("rhs", rhs, 2, _SQUARE_BLOCK)
    _check_contracted(lhs, rhs)
    dtype = _out_dtype(out_dtype)
    portable = functools.partial(xla.gemm, out_dtype=dtype)
    cuda = functools.partial(ffi.gemm, out_dtype=dtype)
    reason = ffi.unsupported(lhs, rhs)
    return _run("fp8_gemm", _LINEAR, implementation, (lhs, rhs), portable, cuda, reason)


def fp8_grouped_gemm(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    zero_tail: bool = True,
    implementation: Implementation = None,
) -> Float[Array, "M N"]:
    """`out[i] = lhs[i] @ rhs[g].T` for the rows i of group g.

    Rows past `sum(group_sizes)` are not read: they may hold anything, NaN included.

    Args:
      lhs: Quantized `[M, K]` in 1x128 blocks, rows sorted by group.
      rhs: Quantized `[G, N, K]` in 128x128 blocks.
      group_sizes: int32 `[G]`, rows of each group.
      out_dtype: bfloat16 or float32.
      zero_tail: rows past the end are zero; False leaves them unspecified.
      implementation: None, "xla" or "cuda".

    Returns:
      `out_dtype[M, N]`.

    Raises:
      ValueError, TypeError: for shapes, dtypes or scale layouts against these rules, for sizes
        known while tracing that are negative or exceed M, or where differentiated.
      NotImplementedError: for "cuda" where the kernel cannot run.
    """
    _check_operand("lhs", lhs, 2, _ROW_BLOCK)
    _check_operand("rhs", rhs, 3, _SQUARE_BLOCK)
    _check_contracted(lhs, rhs)
    check_group_sizes(group_sizes, rhs.shape[0], lhs.shape[0])
    check_choice("zero_tail", zero_tail, (True, False))
    dtype = _out_dtype(out_dtype)
    portable = functools.partial(xla.grouped_gemm, out_dtype=dtype)
    cuda = functools.partial(ffi.grouped_gemm, out_dtype=dtype, zero_tail=zero_tail)
    reason = ffi.unsupported(lhs, rhs, rhs.shape[0])
    operands = (lhs, rhs, group_sizes)
    return _run("fp8_grouped_gemm", _GROUPED, implementation, operands, portable, cuda, reason)


def fp8_masked_gemm(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes: Int[Array, "G"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    zero_tail: bool = True,
    expected_rows: int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "G M N"]:
    """`out[g, i] = lhs[g, i] @ rhs[g].T` for `i < group_sizes[g]`: decoding's grouped product.

    Rows from `group_sizes[g]` on are not read: they may hold anything, NaN included.

    Args:
      lhs: Quantized `[G, M, K]` in 1x128 blocks.
      rhs: Quantized `[G, N, K]` in 128x128 blocks.
      group_sizes: int32 `[G]`, valid rows of each group, at most M (more counts as M).
      out_dtype: bfloat16 or float32.
      zero_tail: the other rows are zero; False leaves them unspecified.
      expected_rows: how many rows a group is likely to hold, a quarter of M by default, at most M
        (more counts as M). It only helps to choose the kernel's tiles.
      implementation: None, "xla" or "cuda".

    Returns:
      `out_dtype[G, M, N]`.

    Raises:
      ValueError, TypeError: for shapes, dtypes or scale layouts against these rules, for sizes
        known while tracing that are negative or exceed M, or where differentiated.
      NotImplementedError: for "cuda" where the kernel cannot run.
    """
    _check_operand("lhs", lhs, 3, _ROW_BLOCK)
    _check_operand("rhs", rhs, 3, _SQUARE_BLOCK)
    _check_contracted(lhs, rhs)
    rule = "must have as many groups as lhs"
    check(rhs.shape[0] == lhs.shape[0], "rhs", rule, f"{rhs.shape[0]} and {lhs.shape[0]}")
    check_group_sizes(group_sizes, rhs.shape[0], lhs.shape[1], masked=True)
    check_choice("zero_tail", zero_tail, (True, False))
    expected = 0
    if expected_rows is not None:
        expected = min(check_integer("expected_rows", expected_rows, 1), lhs.shape[1])
    dtype = _out_dtype(out_dtype)
    portable = functools.partial(xla.masked_gemm, out_dtype=dtype)
    cuda = functools.partial(
        ffi.masked_gemm, out_dtype=dtype, zero_tail=zero_tail, expected_rows=expected
    )
    reason = ffi.unsupported(lhs, rhs, rhs.shape[0])
    operands = (lhs, rhs, group_sizes)
    return _run("fp8_masked_gemm", _GROUPED, implementation, operands, portable, cuda, reason)


def fp8_wgrad(
    dy_columns: Quantized,
    x_columns: Quantized,
    accumulate: Float[Array, "N K"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
) -> Float[Array, "N K"]:
    """`accumulate + dY.T @ X`, contracted over tokens: the weight gradient of `y = x @ w.T`.

    Args:
      dy_columns: Quantized `[N, P]` in 1x128 blocks along tokens, as the second result of
        `quantization.quantize_1x128_both(dy)`.
      x_columns: Quantized `[K, P]`, likewise from x.
      accumulate: float32 `[N, K]` or None; updated in place where XLA can alias it.
      out_dtype: float32; or bfloat16, rounded from the float32 sum, without `accumulate`.
      implementation: None, "xla" or "cuda".

    Returns:
      `out_dtype[N, K]`.

    Raises:
      ValueError, TypeError: for shapes, dtypes or scale layouts against these rules, or where
        differentiated.
      NotImplementedError: for "cuda" where the kernel cannot run.
    """
    _check_columns(dy_columns, x_columns)
    shape = (dy_columns.shape[0], x_columns.shape[0])
    dtype = _check_accumulate(accumulate, shape, "N K", out_dtype)
    portable = functools.partial(xla.wgrad, out_dtype=dtype)
    cuda = functools.partial(ffi.wgrad, out_dtype=dtype)
    operands = (dy_columns, x_columns, accumulate)
    reason = ffi.unsupported(dy_columns, x_columns)
    return _run("fp8_wgrad", _LINEAR, implementation, operands, portable, cuda, reason)


def fp8_grouped_wgrad(
    dy_columns: Quantized,
    x_columns: Quantized,
    group_sizes: Int[Array, "G"],
    accumulate: Float[Array, "G N K"] | None = None,
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
) -> Float[Array, "G N K"]:
    """`accumulate[g] + dY_g.T @ X_g`, contracted over the tokens of each group.

    Group g's tokens start at column `sum_{i<g} 128 ceil(group_sizes[i]/128)` of both operands and
    are followed by zeros up to the next multiple of 128, as
    `quantization.quantize_1x128_both(.., group_sizes)` writes them. Columns past the last group
    are not read. An empty group's gradient is zero (or `accumulate[g]`).

    Args:
      dy_columns: Quantized `[N, P]` in 1x128 blocks along tokens, P a multiple of 128.
      x_columns: Quantized `[K, P]`, likewise.
      group_sizes: int32 `[G]`, tokens of each group before padding.
      accumulate: float32 `[G, N, K]` or None; updated in place where XLA can alias it.
      out_dtype: float32; or bfloat16, rounded from the float32 sum, without `accumulate`.
      implementation: None, "xla" or "cuda".

    Returns:
      `out_dtype[G, N, K]`.

    Raises:
      ValueError, TypeError: for shapes, dtypes or scale layouts against these rules, for sizes
        known while tracing that are negative or exceed P, or where differentiated.
      NotImplementedError: for "cuda" where the kernel cannot run.
    """
    _check_columns(dy_columns, x_columns)
    p = dy_columns.shape[1]
    check(p % 128 == 0, "dy_columns", "number of tokens must be a multiple of 128", p)
    check_group_sizes(group_sizes, None, p)
    shape = (group_sizes.shape[0], dy_columns.shape[0], x_columns.shape[0])
    dtype = _check_accumulate(accumulate, shape, "G N K", out_dtype)
    portable = functools.partial(xla.grouped_wgrad, out_dtype=dtype)
    cuda = functools.partial(ffi.grouped_wgrad, out_dtype=dtype)
    operands = (dy_columns, x_columns, group_sizes, accumulate)
    reason = ffi.unsupported(dy_columns, x_columns, group_sizes.shape[0])
    return _run("fp8_grouped_wgrad", _GROUPED, implementation, operands, portable, cuda, reason)


_LINEAR = "use fp8_linear, or apply jax.lax.stop_gradient before quantizing"
_GROUPED = "use fp8_grouped_linear, or apply jax.lax.stop_gradient before quantizing"


def _run(
    op: str,
    instead: str,
    implementation: Implementation,
    operands: tuple[Any, ...],
    portable: Callable[..., Any],
    cuda: Callable[..., Any],
    unsupported: str | None,
) -> Any:
    """Every product ends here."""

    def chosen(*operands: Any) -> Any:
        return choose(
            op, implementation, operands, xla=portable, cuda=cuda, unsupported=unsupported
        )

    return without_gradient(op, instead, chosen, *operands)


def _check_operand(argument: str, q: Quantized, rank: int, block: tuple[int, int]) -> None:
    if isinstance(q, Quantized):
        check_rank(f"{argument}.values", q.values, rank)
    check_quantized(argument, q, block)


def _check_contracted(lhs: Quantized, rhs: Quantized) -> None:
    rule = "last dimension must be lhs's K"
    check(rhs.shape[-1] == lhs.shape[-1], "rhs", rule, f"{rhs.shape[-1]} and {lhs.shape[-1]}")


def _check_columns(dy_columns: Quantized, x_columns: Quantized) -> None:
    _check_operand("dy_columns", dy_columns, 2, _ROW_BLOCK)
    _check_operand("x_columns", x_columns, 2, _ROW_BLOCK)
    rule = "must have as many tokens as dy_columns"
    got = f"{x_columns.shape[1]} and {dy_columns.shape[1]}"
    check(x_columns.shape[1] == dy_columns.shape[1], "x_columns", rule, got)


def _check_accumulate(
    accumulate: Array | None, shape: tuple[int, ...], letters: str, out_dtype: DTypeLike
) -> jnp.dtype:
    """The result's dtype."""
    dtype = _out_dtype(out_dtype)
    if accumulate is not None:
        check_dtype("accumulate", accumulate, jnp.float32)
        check_shape("accumulate", accumulate, shape, letters)
        rule = "must be float32 with accumulate"
        check(dtype == jnp.float32, "out_dtype", rule, dtype.name)
    return dtype


def _out_dtype(out_dtype: DTypeLike) -> jnp.dtype:
    return check_dtype_choice("out_dtype", out_dtype, jnp.bfloat16, jnp.float32)
