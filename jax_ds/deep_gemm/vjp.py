"""The products with gradients: what forward saves for backward, and the three products."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_ds._core.groups import group_bounds
from jax_ds._runtime.choose import Implementation, by_platform
from jax_ds._runtime.varying import match_primal, varying_axes
from jax_ds.deep_gemm import api, xla
from jax_ds.quantization import (
    Quantized,
    ScaleDtype,
    quantize_1x128,
    quantize_1x128_both,
    quantize_128x128,
    quantize_128x128_both,
)


class LinearResiduals(NamedTuple):
    """What the backward pass of `fp8_linear` and `fp8_grouped_linear` keeps.

    Bytes per token: K * (1 + 4/128), about half of a bfloat16 x. Bytes per weight: 1 (+ 4/128**2).

    Attributes:
      x_columns: x quantized along tokens, `[K, P]`, for the weight gradient.
      w_transposed: the forward weights transposed, `[..., K, N]`, for the input gradient.
      group_sizes: int32 `[G]`; None for `fp8_linear`.
      x_type, w_type: empty arrays that carry the primals' dtype and varying mesh axes.
    """

    x_columns: Quantized
    w_transposed: Quantized
    group_sizes: Int[Array, "G"] | None
    x_type: Float[Array, "0"]
    w_type: Float[Array, "0"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: Float[Array, "M K"],
    w: Float[Array, "... N K"],
    group_sizes: Int[Array, "G"] | None,
    scale_dtype: ScaleDtype,
    implementation: Implementation,
) -> Float[Array, "M N"]:
    """`x @ w.T`, or per group `x_g @ w[g].T`, in FP8."""
    keywords: Any = dict(scale_dtype=scale_dtype, implementation=implementation)
    num_rows = None if group_sizes is None else _num_rows(x, group_sizes)
    rows = quantize_1x128(x, num_rows, **keywords)
    w_quantized = quantize_128x128(w, **keywords)
    return _forward(rows, w_quantized, group_sizes, x.dtype, implementation)


def _linear_fwd(
    x: Float[Array, "M K"],
    w: Float[Array, "... N K"],
    group_sizes: Int[Array, "G"] | None,
    scale_dtype: ScaleDtype,
    implementation: Implementation,
) -> tuple[Float[Array, "M N"], LinearResiduals]:
    keywords: Any = dict(scale_dtype=scale_dtype, implementation=implementation)
    rows, columns = quantize_1x128_both(x, group_sizes, **keywords)
    w_quantized, w_transposed = quantize_128x128_both(w, **keywords)
    y = _forward(rows, w_quantized, group_sizes, x.dtype, implementation)
    return y, LinearResiduals(columns, w_transposed, group_sizes, _empty(x), _empty(w))


def _linear_bwd(
    scale_dtype: ScaleDtype,
    implementation: Implementation,
    res: LinearResiduals,
    dy: Float[Array, "M N"],
) -> tuple[Float[Array, "M K"], Float[Array, "... N K"], None]:
    keywords: Any = dict(scale_dtype=scale_dtype, implementation=implementation)
    rows, columns = quantize_1x128_both(dy, res.group_sizes, **keywords)
    dx = _forward(rows, res.w_transposed, res.group_sizes, res.x_type.dtype, implementation)
    # Rounded to the weights' dtype by the kernel, or after a sum over devices in float32.
    summed = set(varying_axes(columns, res.x_columns)) - set(varying_axes(res.w_type))
    dw_dtype = jnp.float32 if summed else res.w_type.dtype
    to_dw: Any = dict(out_dtype=dw_dtype, implementation=implementation)
    if res.group_sizes is None:
        dw = api.fp8_wgrad(columns, res.x_columns, **to_dw)
    else:
        dw = api.fp8_grouped_wgrad(columns, res.x_columns, res.group_sizes, **to_dw)
    dw = match_primal(dw, res.w_type).astype(res.w_type.dtype)
    return match_primal(dx, res.x_type), dw, None


linear.defvjp(_linear_fwd, _linear_bwd)


def _forward(
    rows: Quantized,
    w: Quantized,
    group_sizes: Int[Array, "G"] | None,
    out_dtype: Any,
    implementation: Implementation,
) -> Float[Array, "M N"]:
    if group_sizes is None:
        return api.fp8_gemm(rows, w, out_dtype=out_dtype, implementation=implementation)
    return api.fp8_grouped_gemm(
        rows, w, group_sizes, out_dtype=out_dtype, implementation=implementation
    )


class GroupedResiduals(NamedTuple):
    """What the backward pass of `bf16_grouped_gemm` keeps: its operands in bfloat16."""

    lhs: Float[Array, "M K"]
    rhs: Float[Array, "G N K"]
    group_sizes: Int[Array, "G"]
    lhs_type: Float[Array, "0"]
    rhs_type: Float[Array, "0"]


@jax.custom_vjp
def bf16_grouped(
    lhs: Float[Array, "M K"], rhs: Float[Array, "G N K"], group_sizes: Int[Array, "G"]
) -> Float[Array, "M N"]:
    """Per group `lhs_g @ rhs[g].T` in bfloat16."""
    return _bf16_forward(lhs, rhs, group_sizes).astype(lhs.dtype)


def _bf16_fwd(
    lhs: Float[Array, "M K"], rhs: Float[Array, "G N K"], group_sizes: Int[Array, "G"]
) -> tuple[Float[Array, "M N"], GroupedResiduals]:
    res = GroupedResiduals(
        lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), group_sizes, _empty(lhs), _empty(rhs)
    )
    return _bf16_forward(res.lhs, res.rhs, group_sizes).astype(lhs.dtype), res


def _bf16_bwd(
    res: GroupedResiduals, dy: Float[Array, "M N"]
) -> tuple[Float[Array, "M K"], Float[Array, "G N K"], None]:
    dy = dy.astype(jnp.bfloat16)
    d_lhs = _bf16_forward(dy, jnp.swapaxes(res.rhs, 1, 2), res.group_sizes)
    d_rhs = by_platform(
        (dy, res.lhs, res.group_sizes), cuda=xla.ragged_wgrad, default=xla.bf16_grouped_wgrad
    )
    d_lhs = match_primal(d_lhs.astype(res.lhs_type.dtype), res.lhs_type)
    return d_lhs, match_primal(d_rhs, res.rhs_type).astype(res.rhs_type.dtype), None


bf16_grouped.defvjp(_bf16_fwd, _bf16_bwd)


def _bf16_forward(
    lhs: Float[Array, "M K"], rhs: Float[Array, "G N K"], group_sizes: Int[Array, "G"]
) -> Float[Array, "M N"]:
    lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    # XLA's own ragged product on GPUs: a loop over tiles leaves most of a GPU idle.
    return by_platform((lhs, rhs, group_sizes), cuda=xla.ragged_dot, default=xla.bf16_grouped_gemm)


def _num_rows(x: Float[Array, "M K"], group_sizes: Int[Array, "G"]) -> Int[Array, ""]:
    return group_bounds(group_sizes, x.shape[0])[1][-1]


def _empty(x: Array) -> Array:
    return x.reshape(-1)[:0]
