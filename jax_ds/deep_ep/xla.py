"""The portable implementation of dispatch and combine, and what their gradients need.

Tokens travel by `plan.route`; here arrived tokens are expanded into rows, and rows are reduced to
one partial sum per token. Both directions are gathers, which are deterministic on every backend,
where a scatter-add would not be. Rows and slots that hold nothing are masked, never multiplied by
zero: they may hold NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from jax_ds.deep_ep.plan import DispatchPlan
from jax_ds.quantization import Quantized


def dispatch(x: Shaped[Array, "T H"] | Quantized, plan: DispatchPlan) -> Any:
    """`rows[c] = x` of row c's token, zero where row c has none; `[C, H]`."""
    if isinstance(x, Quantized):
        return _dispatch_quantized(x, plan)
    return expand(plan.route.spread(at_least_one(x)), plan)


def combine(
    rows: Float[Array, "C H"], plan: DispatchPlan, by_column: Float[Array, "B J"] | None
) -> Float[Array, "T H"]:
    """`y[t] = sum over t's rows c of w_c * rows[c]`; w_c is 1 without weights.

    The weights are those that `publish` returns.
    """
    parts = reduce_rows(rows, plan, by_column)
    return plan.route.collect(parts)[: plan.sizes.num_tokens].astype(rows.dtype)


def publish(weights: Float[Array, "T K"], plan: DispatchPlan) -> Float[Array, "B J"]:
    """Sends the tokens' weights to where their rows are; ids of one expert add theirs up."""
    received = plan.route.spread(at_least_one(weights))
    j = jnp.arange(plan.sizes.columns, dtype=jnp.int32)
    total = jnp.zeros(plan.row_of.shape, jnp.float32)
    for k in range(plan.sizes.top_k):  # in this order, as the kernel adds them
        mine = plan.column[:, k, None] == j[None]
        total = total + jnp.where(mine, received[:, k, None], 0)
    return total


def weight_of_rows(by_column: Float[Array, "B J"], plan: DispatchPlan) -> Float[Array, " C"]:
    """The weight of every row, 0 for one without a token."""
    source = plan.row_source
    return jnp.where(source >= 0, by_column.reshape(-1)[jnp.maximum(source, 0)], 0)


def in_rows(scalars: Float[Array, " C"], plan: DispatchPlan) -> Float[Array, "B J"]:
    """The scalar of every pair's row, 0 for a pair without one: the transpose of the above."""
    return jnp.where(plan.row_of >= 0, scalars[jnp.maximum(plan.row_of, 0)], 0)


def expand(buffer: Shaped[Array, "B W"], plan: DispatchPlan) -> Shaped[Array, "C W"]:
    """Copies every arrived token into its rows."""
    source = plan.row_source
    slot = jnp.maximum(source, 0) // plan.sizes.columns
    return jnp.where(source[:, None] >= 0, buffer[slot], jnp.zeros((), buffer.dtype))


def reduce_rows(
    rows: Float[Array, "C H"], plan: DispatchPlan, by_column: Float[Array, "B J"] | None
) -> Float[Array, "B H"]:
    """The sum of each token's rows here, in float32, rounded once to the dtype of the rows."""
    total = jnp.zeros((plan.row_of.shape[0], rows.shape[1]), jnp.float32)
    for j in range(plan.sizes.columns):
        row = plan.row_of[:, j]
        value = rows[jnp.maximum(row, 0)].astype(jnp.float32)
        if by_column is not None:
            value = value * by_column[:, j, None]
        total = total + jnp.where(row[:, None] >= 0, value, 0)
    return total.astype(rows.dtype)


def stage(plan: DispatchPlan, *arrays: Shaped[Array, "T _"]) -> list[Array]:
    """What a rank's direct peers are sent: over (node, gpu), tokens of other nodes too.

    Several arrays cross the network as one message.
    """
    if plan.route.num_nodes == 1 or len(arrays) == 1:
        return [plan.route.stage(array) for array in arrays]
    return unpack(plan.route.stage(pack(*arrays)), *widths(*arrays))


def pack(*arrays: Shaped[Array, "T _"]) -> UInt8[Array, "T bytes"]:
    """The bytes of each row of the arrays, side by side, so that they travel as one message."""
    as_bytes = [jax.lax.bitcast_convert_type(a, jnp.uint8) for a in arrays]
    return jnp.concatenate([b.reshape(b.shape[0], -1) for b in as_bytes], axis=1)


def widths(*arrays: Shaped[Array, "T _"]) -> tuple[tuple[int, Any], ...]:
    """What `unpack` must know of packed arrays."""
    return tuple((a.shape[1], a.dtype) for a in arrays)


def unpack(message: UInt8[Array, "B bytes"], *parts: tuple[int, Any]) -> list[Array]:
    """The arrays of a message, each given by its width and dtype."""
    arrays, start = [], 0
    for width, dtype in parts:
        size = jnp.dtype(dtype).itemsize
        piece = message[:, start : start + width * size]
        if size > 1:
            piece = piece.reshape(-1, width, size)
        arrays.append(jax.lax.bitcast_convert_type(piece, dtype))
        start += width * size
    return arrays


def _dispatch_quantized(x: Quantized, plan: DispatchPlan) -> Quantized:
    """Values and scales travel as one message; a row without a token has scale 1."""
    x = Quantized(at_least_one(x.values), at_least_one(x.scales))
    message = plan.route.spread(pack(x.values, x.scales))
    values, scales = unpack(expand(message, plan), *widths(x.values, x.scales))
    return Quantized(values, jnp.where(plan.row_source[:, None] >= 0, scales, 1))


def at_least_one(x: Shaped[Array, "T W"]) -> Shaped[Array, "T' W"]:
    """x, or one token of zeros where there is none, as in `valid_ids`."""
    return x if x.shape[0] else jnp.zeros((1, x.shape[1]), x.dtype)
