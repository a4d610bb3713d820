"""Fine-grained FP8 quantization: one float32 scale per 1x128 or 128x128 block.

One definition holds in every implementation, bit by bit (SwiGLU: within one FP8 code, because
`exp` differs between processors). For every block of x, taken in float32:

    amax  = max |x|
    scale = amax * float32(1/448)     scale_dtype="ue8m0": rounded up to a power of two
    value = float8_e4m3fn(x / scale)  IEEE division, rounded to nearest even

- A block with amax below 2**-107, a zero block above all, has scale 1 and values of zero.
- A block that holds a NaN has scale NaN and NaN values; one that holds an infinity has scale inf
  (finite values become 0, infinite ones NaN). Either way it dequantizes to NaN throughout: e4m3fn
  has no infinity, and a saturated one would pass for a number.
- The last block of a dimension that is no multiple of 128 is smaller.

The method is that of the DeepSeek-V3 report (section 3.3.2, "fine-grained quantization").
Functions of several devices' data belong inside `jax.shard_map`. None is differentiable: see
`deep_gemm.fp8_linear` for a product with gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_ds._core.checks import (
    check,
    check_choice,
    check_dtype,
    check_rank,
    format_shape,
)
from jax_ds._core.gradients import without_gradient
from jax_ds._core.groups import check_group_sizes
from jax_ds._runtime.choose import Implementation, choose
from jax_ds.quantization import ffi, xla
from jax_ds.quantization.types import Quantized, check_quantized
from jax_ds.quantization.xla import ScaleDtype

_INSTEAD = "use deep_gemm.fp8_linear, or apply jax.lax.stop_gradient to the operand"


def quantize_1x128(
    x: Float[Array, "... K"],
    num_rows: Int[Array, ""] | None = None,
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> Quantized:
    """Quantizes activations in blocks of 128 along the last dimension.

    `scales[..., b] = max_j |x[..., 128 b + j]| / 448`, `values = x / scales`; the module says it
    exactly.

    Args:
      x: bfloat16 or float32 `[..., K]`.
      num_rows: int32 `[]`, on the device: x is `[M, K]` and rows from `num_rows` on are not read;
        what they quantize to is unspecified. None: all rows.
      scale_dtype: "float32", or "ue8m0" for float32 scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      values float8_e4m3fn `[..., K]`, scales float32 `[..., ceil(K/128)]`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules, or where
        differentiated.
    """
    _check_input("x", x, 1, scale_dtype)
    _check_num_rows("x", x, num_rows)

    def portable(x: Array, num_rows: Array | None) -> Quantized:
        del num_rows  # rows are independent, so the unused ones can be anything
        return xla.quantize_1x128(x, scale_dtype)

    cuda = functools.partial(ffi.quantize_rows, scale_dtype=scale_dtype)
    return _run("quantize_1x128", implementation, (x, num_rows), portable, cuda)


def quantize_128x128(
    w: Float[Array, "... N K"],
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> Quantized:
    """Quantizes weights in blocks of 128x128 over the last two dimensions.

    `scales[..., a, b] = max_ij |w[..., 128 a + i, 128 b + j]| / 448`, `values = w / scales`.

    Args:
      w: bfloat16 or float32 `[..., N, K]`.
      scale_dtype: "float32", or "ue8m0" for float32 scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      values float8_e4m3fn `[..., N, K]`, scales float32 `[..., ceil(N/128), ceil(K/128)]`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules, or where
        differentiated.
    """
    _check_input("w", w, 2, scale_dtype)
    portable = functools.partial(xla.quantize_128x128, scale_dtype=scale_dtype)
    cuda = functools.partial(ffi.quantize_square, scale_dtype=scale_dtype)
    return _run("quantize_128x128", implementation, (w,), portable, cuda)


def quantize_1x128_both(
    x: Float[Array, "M K"],
    group_sizes: Int[Array, "G"] | None = None,
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> tuple[Quantized, Quantized]:
    """Quantizes activations along K and, transposed, along tokens, in one pass over x.

    The rows feed the forward product and the gradient of the input; the columns feed the weight
    gradient (`deep_gemm.fp8_wgrad`, `deep_gemm.fp8_grouped_wgrad`), which contracts tokens.
    Group g's tokens start at column `sum_{i<g} 128 ceil(group_sizes[i]/128)` and are followed by
    zeros up to the next multiple of 128; everything after the last group is zero, with scale 1.

    Args:
      x: bfloat16 or float32 `[M, K]`.
      group_sizes: int32 `[G]`, consecutive rows per group as in `jax.lax.ragged_dot`, zero
        allowed. Under jit, sizes beyond M rows are cut off and negative ones count as zero.
        Rows past the last group do not reach the columns, whatever they hold. None: one group
        of M rows.
      scale_dtype: "float32", or "ue8m0" for float32 scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      rows: values `[M, K]`, scales `[M, ceil(K/128)]`; unspecified past the last group.
      columns: values `[K, P]`, scales `[K, P/128]`, `P = padded_tokens(M, G)`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules, for sizes known
        while tracing that are negative or exceed M, or where differentiated.
    """
    _check_input("x", x, 1, scale_dtype)
    check_rank("x", x, 2)
    if group_sizes is not None:
        check_group_sizes(group_sizes, None, x.shape[0])
    portable = functools.partial(xla.quantize_1x128_both, scale_dtype=scale_dtype)
    cuda = functools.partial(ffi.quantize_lines, scale_dtype=scale_dtype)
    return _run("quantize_1x128_both", implementation, (x, group_sizes), portable, cuda)


def quantize_128x128_both(
    w: Float[Array, "... N K"],
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> tuple[Quantized, Quantized]:
    """Quantizes weights as `quantize_128x128` does and writes the transpose too.

    The first feeds the forward product, the second the gradient of the input. Both hold the same
    numbers: `second.values = first.values.T`, `second.scales = first.scales.T`.

    Args:
      w: bfloat16 or float32 `[..., N, K]`.
      scale_dtype: "float32", or "ue8m0" for float32 scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      Quantized `[..., N, K]` and Quantized `[..., K, N]`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules, or where
        differentiated.
    """
    _check_input("w", w, 2, scale_dtype)
    portable = functools.partial(xla.quantize_128x128_both, scale_dtype=scale_dtype)
    cuda = functools.partial(ffi.quantize_square_transposed, scale_dtype=scale_dtype)
    return _run("quantize_128x128_both", implementation, (w,), portable, cuda)


def swiglu_quantize_1x128(
    gate_up: Float[Array, "M 2F"],
    num_rows: Int[Array, ""] | None = None,
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> Quantized:
    """`quantize_1x128(silu(gate) * up)` in one pass, where `gate, up = split(gate_up, 2)`.

    silu and the product are computed in float32 and not rounded before quantizing.

    Args:
      gate_up: bfloat16 or float32 `[M, 2F]`, gate first.
      num_rows: int32 `[]`: rows from `num_rows` on are not read; what they quantize to is
        unspecified. None: all rows.
      scale_dtype: "float32", or "ue8m0" for float32 scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      values float8_e4m3fn `[M, F]`, scales float32 `[M, ceil(F/128)]`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules, or where
        differentiated.
    """
    _check_gate_up(gate_up, scale_dtype)
    _check_num_rows("gate_up", gate_up, num_rows)

    def portable(gate_up: Array, num_rows: Array | None) -> Quantized:
        del num_rows
        return xla.quantize_1x128(xla.swiglu(gate_up), scale_dtype)

    cuda = functools.partial(ffi.quantize_rows, scale_dtype=scale_dtype, swiglu=True)
    return _run("swiglu_quantize_1x128", implementation, (gate_up, num_rows), portable, cuda)


def swiglu_quantize_1x128_both(
    gate_up: Float[Array, "M 2F"],
    group_sizes: Int[Array, "G"] | None = None,
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> tuple[Quantized, Quantized]:
    """`quantize_1x128_both(silu(gate) * up, group_sizes)` in one pass over `gate_up`.

    Args:
      gate_up: bfloat16 or float32 `[M, 2F]`, gate first.
      group_sizes: int32 `[G]` or None, as in `quantize_1x128_both`.
      scale_dtype: "float32", or "ue8m0" for float32 scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      rows: values `[M, F]`, scales `[M, ceil(F/128)]`; unspecified past the last group.
      columns: values `[F, P]`, scales `[F, P/128]`, `P = padded_tokens(M, G)`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules, for sizes known
        while tracing that are negative or exceed M, or where differentiated.
    """
    _check_gate_up(gate_up, scale_dtype)
    if group_sizes is not None:
        check_group_sizes(group_sizes, None, gate_up.shape[0])

    def portable(gate_up: Array, group_sizes: Array | None) -> tuple[Quantized, Quantized]:
        return xla.quantize_1x128_both(xla.swiglu(gate_up), group_sizes, scale_dtype)

    cuda = functools.partial(ffi.quantize_lines, scale_dtype=scale_dtype, swiglu=True)
    return _run(
        "swiglu_quantize_1x128_both", implementation, (gate_up, group_sizes), portable, cuda
    )


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """`values * scale of the value's block`, in float32.

    Args:
      q: Quantized with 1x128 or 128x128 blocks.

    Returns:
      float32 of the shape of `q`.

    Raises:
      ValueError, TypeError: for scales that fit neither block size, or where differentiated.
    """
    check_quantized("q", q)
    return without_gradient("dequantize", _INSTEAD, xla.dequantize, q)


def _run(
    op: str,
    implementation: Implementation,
    operands: tuple[Any, ...],
    portable: Callable[..., Any],
    cuda: Callable[..., Any],
) -> Any:
    """Every quantizer ends here."""

    def chosen(*operands: Any) -> Any:
        return choose(op, implementation, operands, xla=portable, cuda=cuda)

    return without_gradient(op, _INSTEAD, chosen, *operands)


def _check_input(argument: str, x: Array, min_rank: int, scale_dtype: str) -> None:
    check_dtype(argument, x, jnp.bfloat16, jnp.float32)
    dims = "dimension" if min_rank == 1 else "dimensions"
    rule = f"must have at least {min_rank} {dims}"
    check(x.ndim >= min_rank, argument, rule, f"shape {format_shape(x.shape)}")
    check_choice("scale_dtype", scale_dtype, ("float32", "ue8m0"))


def _check_gate_up(gate_up: Array, scale_dtype: str) -> None:
    _check_input("gate_up", gate_up, 1, scale_dtype)
    check_rank("gate_up", gate_up, 2)
    rule = "last dimension must be even (gate, then up)"
    check(gate_up.shape[-1] % 2 == 0, "gate_up", rule, gate_up.shape[-1])


def _check_num_rows(argument: str, x: Array, num_rows: Array | None) -> None:
    if num_rows is None:
        return
    check_rank(argument, x, 2)
    check_dtype("num_rows", num_rows, jnp.int32)
    check(
        num_rows.shape == (),
        "num_rows",
        "must be a scalar",
        f"shape {format_shape(num_rows.shape)}",
    )
