"""What the kernels' plan chooses for given sizes, and why."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ds._core.checks import check, check_choice, check_dtype_choice, check_integer
from jax_ds._runtime import native
from jax_ds.deep_gemm import tuned

_MODES = ("dense", "grouped", "masked", "wgrad")


def explain(
    m: int,
    n: int,
    k: int,
    *,
    mode: str = "dense",
    groups: int = 1,
    out_dtype: DTypeLike | None = None,
    expected_rows: int | None = None,
    num_sms: int = 132,
) -> str:
    """The kernel configurations for a product, best first, with the model's times; needs no GPU.

    The first line of the table is what runs. Its times, in microseconds: multiplying and
    promoting in whole waves of tiles, bringing tiles from L2, moving every operand once through
    device memory, and the total. The longest counts in full, the others in part, plus a fixed
    overhead.

    Args:
      m, n, k: rows and columns of the result, contracted elements; "masked": rows of one group;
        "wgrad": N and K of the weights, and the tokens of all groups.
      mode: "dense", "grouped", "masked" or "wgrad".
      groups: number of groups.
      out_dtype: bfloat16 or float32; by default bfloat16, for "wgrad" float32.
      expected_rows: "masked": rows a group is likely to hold, at most M; a quarter of M by default.
      num_sms: multiprocessors of the GPU; 132 on H100 SXM and H200.

    Returns:
      A table: one line per candidate. Its name tells the tile, the math warpgroups, the CTAs that
      share the lhs tile by multicast (lhs), those that divide K (split), the CTAs per
      multiprocessor and the blocks in flight (depth); what is 1 is left out. Then stages, shared
      memory, threads, clusters with work, and the times.

    Raises:
      ValueError, TypeError: for sizes or names against these rules.
      RuntimeError: where the native module is missing.
    """
    check_size("num_sms", num_sms)
    p = checked_problem(m, n, k, mode, groups, out_dtype, expected_rows)
    table: str = native.module().explain_gemm(
        p.mode, p.output, p.m, p.n, p.k, p.groups, p.expected_rows, num_sms
    )
    return table


def check_size(argument: str, size: int) -> None:
    """Requires what the native module takes for a size."""
    check(
        0 < check_integer(argument, size) < 2**31, argument, "must be between 1 and 2^31 - 1", size
    )


def checked_problem(
    m: int,
    n: int,
    k: int,
    mode: str,
    groups: int,
    out_dtype: DTypeLike | None,
    expected_rows: int | None = None,
    accumulate: bool = False,
) -> tuned.Problem:
    """The problem these arguments of `explain` and `tune` name."""
    check_choice("mode", mode, _MODES)
    check_choice("accumulate", accumulate, (False, True) if mode == "wgrad" else (False,))
    if out_dtype is None:
        out_dtype = jnp.float32 if mode == "wgrad" else jnp.bfloat16
    dtypes = (jnp.float32,) if accumulate else (jnp.bfloat16, jnp.float32)
    dtype = check_dtype_choice("out_dtype", out_dtype, *dtypes)
    for name, size in {"m": m, "n": n, "k": k, "groups": groups}.items():
        check_size(name, size)
    check(groups <= 512, "groups", "must be at most 512", groups)
    check(mode != "dense" or groups == 1, "groups", "must be 1 for dense products", groups)
    if expected_rows is not None:
        check(mode == "masked", "expected_rows", "must be None but for masked", expected_rows)
        check_integer("expected_rows", expected_rows)
        check(1 <= expected_rows <= m, "expected_rows", "must be between 1 and m", expected_rows)
    return tuned.Problem(mode, dtype.name, accumulate, m, n, k, groups, expected_rows or 0)
