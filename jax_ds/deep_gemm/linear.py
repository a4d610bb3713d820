"""The products of unquantized operands: those with gradients, and `bf16_masked_gemm`."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_ds._core.checks import check, check_choice, check_dtype, check_rank, format_shape
from jax_ds._core.gradients import without_gradient
from jax_ds._core.groups import check_group_sizes
from jax_ds._runtime.choose import Implementation, choose
from jax_ds.deep_gemm import vjp, xla
from jax_ds.quantization import ScaleDtype


def fp8_linear(
    x: Float[Array, "... K"],
    w: Float[Array, "N K"],
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> Float[Array, "... N"]:
    """`y = x @ w.T` with all three products of training in FP8.

    With q1 quantizing in 1x128 blocks along the contracted dimension and q2 in 128x128 blocks,

        y  = q1(x) @ q2(w).T        contracted over K
        dx = q1(dy) @ q2(w)         contracted over N
        dw = q1(dy.T) @ q1(x.T).T   contracted over tokens

    Each tensor is quantized once per layout, where it is first needed: the forward pass writes x
    along K and along tokens and w as it is and transposed, the backward pass dy both ways. Saved
    for the backward pass: x along tokens and w transposed, in FP8 (K * (1 + 4/128) bytes per
    token), not x itself. Quantizing counts as the identity in the gradient.

    Args:
      x: bfloat16 or float32 `[..., K]`.
      w: bfloat16 or float32 `[N, K]`.
      scale_dtype: "float32", or "ue8m0" for scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      `[..., N]` in x's dtype. Gradients have their primal's dtype; that of w is computed, and
      inside `jax.shard_map` summed over devices, in float32 first.

    Raises:
      ValueError, TypeError: for shapes or dtypes against these rules.
      NotImplementedError: for "cuda" where a kernel cannot run.

    Source: DeepSeek-V3 report, section 3.3.
    """
    check_dtype("x", x, jnp.bfloat16, jnp.float32)
    check_dtype("w", w, jnp.bfloat16, jnp.float32)
    check(x.ndim >= 1, "x", "must have at least 1 dimension", f"shape {format_shape(x.shape)}")
    check_rank("w", w, 2)
    _check_contracted("w", w, "x", x)
    check_choice("scale_dtype", scale_dtype, ("float32", "ue8m0"))
    # Not -1: with K = 0 the number of rows would not be known.
    rows = jnp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    y = vjp.linear(rows, jnp.asarray(w), None, scale_dtype, implementation)
    return y.reshape(*x.shape[:-1], w.shape[0])


def fp8_grouped_linear(
    x: Float[Array, "M K"],
    w: Float[Array, "G N K"],
    group_sizes: Int[Array, "G"],
    *,
    scale_dtype: ScaleDtype = "float32",
    implementation: Implementation = None,
) -> Float[Array, "M N"]:
    """`y_g = x_g @ w[g].T` for every group of rows, all three products of training in FP8.

    The products, what is saved and the gradients are those of `fp8_linear`, per group. Rows past
    `sum(group_sizes)` are not read, their y and dx are zero, and their dy is not read.

    Args:
      x: bfloat16 or float32 `[M, K]`, rows sorted by group.
      w: bfloat16 or float32 `[G, N, K]`.
      group_sizes: int32 `[G]`, rows of each group, zero allowed; as in `jax.lax.ragged_dot`.
      scale_dtype: "float32", or "ue8m0" for scales rounded up to powers of two.
      implementation: None, "xla" or "cuda".

    Returns:
      `[M, N]` in x's dtype.

    Raises:
      ValueError, TypeError: for shapes or dtypes against these rules, or sizes known while
        tracing that are negative or exceed M.
      NotImplementedError: for "cuda" where a kernel cannot run.

    Source: DeepSeek-V3 report, section 3.3.
    """
    _check_grouped("x", x, "w", w, group_sizes)
    check_choice("scale_dtype", scale_dtype, ("float32", "ue8m0"))
    x, w, group_sizes = jnp.asarray(x), jnp.asarray(w), jnp.asarray(group_sizes)
    return vjp.linear(x, w, group_sizes, scale_dtype, implementation)


def bf16_grouped_gemm(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "G N K"],
    group_sizes: Int[Array, "G"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "M N"]:
    """`out_g = lhs_g @ rhs[g].T` for every group of rows, in bfloat16, with gradients.

    The unquantized counterpart of `fp8_grouped_linear`. Operands are rounded to bfloat16 and sums
    run in float32. Rows past `sum(group_sizes)` are not read; their results and gradients are
    zero. GPUs use `jax.lax.ragged_dot_general`, other devices a loop over tiles of rows.

    Args:
      lhs: bfloat16 or float32 `[M, K]`, rows sorted by group.
      rhs: bfloat16 or float32 `[G, N, K]`.
      group_sizes: int32 `[G]`, rows of each group, zero allowed; as in `jax.lax.ragged_dot`.
      implementation: None or "xla"; there is no kernel of ours.

    Returns:
      `[M, N]` in lhs's dtype.

    Raises:
      ValueError, TypeError: for shapes or dtypes against these rules, or sizes known while
        tracing that are negative or exceed M.
      NotImplementedError: for "cuda".
    """
    _check_grouped("lhs", lhs, "rhs", rhs, group_sizes)
    operands = (jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(group_sizes))
    return choose("bf16_grouped_gemm", implementation, operands, xla=vjp.bf16_grouped, cuda=None)


def bf16_masked_gemm(
    lhs: Float[Array, "G M K"],
    rhs: Float[Array, "G N K"],
    group_sizes: Int[Array, "G"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "G M N"]:
    """`out[g, i] = lhs[g, i] @ rhs[g].T` for `i < group_sizes[g]`, in bfloat16.

    The unquantized counterpart of `fp8_masked_gemm`, for decoding. Operands are rounded to
    bfloat16, sums run in float32, and the result is rounded to bfloat16. Rows from
    `group_sizes[g]` on are not read, NaN included; their results are zero. The work is that of
    the valid rows, in tiles of 64.

    Args:
      lhs: bfloat16 or float32 `[G, M, K]`.
      rhs: bfloat16 or float32 `[G, N, K]`.
      group_sizes: int32 `[G]`, valid rows of each group, at most M (more counts as M).
      implementation: None or "xla"; there is no kernel of ours.

    Returns:
      `[G, M, N]` in lhs's dtype.

    Raises:
      ValueError, TypeError: for shapes or dtypes against these rules, for sizes known while
        tracing that are negative or exceed M, or where differentiated.
      NotImplementedError: for "cuda".
    """
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        check_dtype(name, x, jnp.bfloat16, jnp.float32)
        check_rank(name, x, 3)
    _check_contracted("rhs", rhs, "lhs", lhs)
    rule = "must have as many groups as lhs"
    check(rhs.shape[0] == lhs.shape[0], "rhs", rule, f"{rhs.shape[0]} and {lhs.shape[0]}")
    check_group_sizes(group_sizes, rhs.shape[0], lhs.shape[1], masked=True)

    def portable(lhs: Array, rhs: Array, group_sizes: Array) -> Array:
        operands = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
        return xla.bf16_masked_gemm(*operands, group_sizes).astype(lhs.dtype)

    def chosen(*operands: Array) -> Array:
        out: Array = choose("bf16_masked_gemm", implementation, operands, xla=portable, cuda=None)
        return out

    operands = (jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(group_sizes))
    why, instead = "it is made for decoding", "use bf16_grouped_gemm"
    return without_gradient("bf16_masked_gemm", instead, chosen, *operands, why=why)


def _check_grouped(
    lhs_name: str, lhs: Array, rhs_name: str, rhs: Array, group_sizes: Int[Array, "G"]
) -> None:
    check_dtype(lhs_name, lhs, jnp.bfloat16, jnp.float32)
    check_dtype(rhs_name, rhs, jnp.bfloat16, jnp.float32)
    check_rank(lhs_name, lhs, 2)
    check_rank(rhs_name, rhs, 3)
    _check_contracted(rhs_name, rhs, lhs_name, lhs)
    check_group_sizes(group_sizes, rhs.shape[0], lhs.shape[0])


def _check_contracted(rhs_name: str, rhs: Array, lhs_name: str, lhs: Array) -> None:
    rule = f"last dimension must be {lhs_name}'s K"
    check(rhs.shape[-1] == lhs.shape[-1], rhs_name, rule, f"{rhs.shape[-1]} and {lhs.shape[-1]}")
