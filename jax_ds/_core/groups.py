"""Rows in consecutive groups, as in `jax.lax.ragged_dot`, and their layout along tokens.

Group g owns the rows `[starts[g], ends[g])`. Sizes live on the device; a negative size counts as
zero and rows are handed out in order until they run out, so that no sizes can reach outside.
Where tokens are the contracted dimension, group g starts at a multiple of 128 tokens, so that a
block of 128 tokens belongs to one group.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_ds._core.checks import check, check_dtype, check_integer, check_shape, known_values

# Elements of a line, and rows and columns of a square, that share a scale.
BLOCK = 128


def padded_tokens(num_rows: int, num_groups: int = 1) -> int:
    """Length P of the token dimension of the columns that `quantize_1x128_both` writes.

    `P = floor128(M + 127 * min(G, M))`: room for every way of splitting M rows into G groups that
    each start at a multiple of 128.

    Args:
      num_rows: M, zero allowed.
      num_groups: G, at least 1.

    Returns:
      P, tokens.

    Raises:
      ValueError, TypeError: for numbers against these rules.
    """
    check_integer("num_rows", num_rows, 0)
    check_integer("num_groups", num_groups, 1)
    return (num_rows + (BLOCK - 1) * min(num_groups, num_rows)) // BLOCK * BLOCK


def group_bounds(
    group_sizes: Int[Array, "G"], num_rows: int
) -> tuple[Int[Array, "G"], Int[Array, "G"]]:
    """First row and one past the last row of every group, both int32 `[G]`."""
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, num_rows)
    # A running sum that saturates at num_rows, written so that it cannot overflow.
    ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a, num_rows - b) + b, sizes)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return starts, ends


def padded_starts(
    starts: Int[Array, "G"], ends: Int[Array, "G"]
) -> tuple[Int[Array, "G"], Int[Array, ""]]:
    """First token of every group in the padded layout, and where the last group's padding ends."""
    padded = (ends - starts + BLOCK - 1) // BLOCK * BLOCK
    padded_ends = jnp.cumsum(padded, dtype=jnp.int32)
    return padded_ends - padded, jnp.sum(padded, dtype=jnp.int32)


def check_group_sizes(
    group_sizes: Int[Array, "G"], num_groups: int | None, num_rows: int, *, masked: bool = False
) -> None:
    """Checks dtype and shape, and the values where they are known while tracing.

    With `masked`, every group has `num_rows` rows of its own; otherwise they share them.
    """
    check_dtype("group_sizes", group_sizes, jnp.int32)
    check_shape("group_sizes", group_sizes, (num_groups,), "G")
    check(group_sizes.shape[0] > 0, "group_sizes", "must have at least one group", "none")
    sizes = known_values(group_sizes)
    if sizes is None:
        return
    sizes = sizes.astype(np.int64)
    check(bool(sizes.min() >= 0), "group_sizes", "must not be negative", int(sizes.min()))
    if masked:
        rule = f"every size must be at most M = {num_rows}"
        check(bool(sizes.max() <= num_rows), "group_sizes", rule, int(sizes.max()))
    else:
        rule = f"sum must be at most M = {num_rows}"
        check(bool(sizes.sum() <= num_rows), "group_sizes", rule, int(sizes.sum()))
