"""The custom calls of low-latency dispatch and combine: whole, and in two halves.

A first half returns an array like the portable implementation's messages, so that both have one
type; the kernel writes no more than its beginning, which tells the second half where the messages
are, and after a dispatch which ranks need them.
`after` are operands that no kernel reads: XLA computes them before the call.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.deep_ep import placement
from jax_ds.deep_ep.ffi import PIECE, axis_index, exchange
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes
from jax_ds.deep_ep.route import FlatRoute
from jax_ds.deep_ep.xla import at_least_one
from jax_ds.quantization import Quantized

# The low-latency kernels keep sets of slots in shared memory, and lists of them in 16 bits.
MAX_LISTED_SLOTS = 1 << 16
_MAX_SHARED = 231000
# Bytes of what is in flight before `needed`.
_IN_FLIGHT_HEADER = 16


def dispatch(
    x: Float[Array, "T H"], ids: Int[Array, "T K"], sizes: PlanSizes, quantize: bool, after: Any
) -> tuple[Any, DispatchPlan]:
    """Rows `[C, H]` in the experts' regions, Quantized if asked for, and their plan."""
    x = at_least_one(x)
    needed, rows, group_sizes, row_of, column, *scales = exchange(
        "low_latency_dispatch",
        [_needed(ids, sizes), *_rows(ids, x.shape[1], x.dtype, sizes, quantize)],
        axis_index(sizes),
        x,
        ids,
        *after,
        attributes={
            **_attributes(ids.shape[0], x.shape[1], x.dtype, sizes, "whole"),
            "quantize": quantize,
        },
    )
    plan = _plan(needed, group_sizes, row_of, column, sizes)
    return Quantized(rows, *scales) if scales else rows, plan


def dispatch_start(
    x: Float[Array, "T H"],
    ids: Int[Array, "T K"],
    sizes: PlanSizes,
    quantize: bool,
    after: Any,
    in_flight: jax.ShapeDtypeStruct,
) -> tuple[Array, FlatRoute]:
    """What tells the second half where the tokens are, as an array like `in_flight`; the route."""
    x = at_least_one(x)
    # One result, or XLA would await the call at once.
    (flight,) = exchange(
        "low_latency_dispatch_start",
        [in_flight],
        axis_index(sizes),
        x,
        ids,
        *after,
        attributes={
            **_attributes(ids.shape[0], x.shape[1], x.dtype, sizes, "start"),
            "quantize": quantize,
        },
    )
    return flight, FlatRoute(_needed_in(flight, ids.shape[0], sizes), sizes.axis_name)


def dispatch_finish(
    in_flight: Array,
    route: FlatRoute,
    hidden: int,
    dtype: Any,
    sizes: PlanSizes,
    quantize: bool,
    after: Any,
) -> tuple[Any, DispatchPlan]:
    """As `dispatch`; `dtype` is that of the rows."""
    ids = jax.ShapeDtypeStruct((route.needed.shape[1], sizes.top_k), jnp.int32)
    rows, group_sizes, row_of, column, *scales = exchange(
        "low_latency_dispatch_finish",
        _rows(ids, hidden, dtype, sizes, quantize),
        in_flight,
        *after,
        attributes={
            **_attributes(ids.shape[0], hidden, dtype, sizes, "finish"),
            "quantize": quantize,
        },
    )
    # Read anew, behind this call: read before, XLA would await the first half for it.
    in_flight, group_sizes = jax.lax.optimization_barrier((in_flight, group_sizes))
    needed = _needed_in(in_flight, ids.shape[0], sizes)
    plan = _plan(needed, group_sizes, row_of, column, sizes)
    return Quantized(rows, *scales) if scales else rows, plan


def combine(
    rows: Float[Array, "C H"], plan: DispatchPlan, weights: Float[Array, "T K"], after: Any
) -> Float[Array, "T H"]:
    """`y[t] = sum_k weights_tk * row of (t, k)`; one token of zeros where there is none."""
    needed = plan.route.needed
    output = jax.ShapeDtypeStruct((needed.shape[1], rows.shape[1]), rows.dtype)
    target = "low_latency_combine"
    return _combine_rows(target, output, rows, plan, weights, after, "whole")


def combine_start(
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    weights: Float[Array, "T K"],
    after: Any,
    in_flight: jax.ShapeDtypeStruct,
) -> Array:
    """What tells the second half where the sums are, as an array like `in_flight`."""
    target = "low_latency_combine_start"
    return _combine_rows(target, in_flight, rows, plan, weights, after, "start")


def combine_finish(
    in_flight: Float[Array, "R T H"], needed: Shaped[Array, "R T"], sizes: PlanSizes, after: Any
) -> Float[Array, "T H"]:
    """As `combine`."""
    _, num_tokens, hidden = in_flight.shape
    (y,) = exchange(
        "low_latency_combine_finish",
        [jax.ShapeDtypeStruct((num_tokens, hidden), in_flight.dtype)],
        needed,
        in_flight,
        *after,
        attributes=_attributes(num_tokens, hidden, in_flight.dtype, sizes, "finish"),
    )
    result: Array = y
    return result


def unsupported(sizes: PlanSizes, x: Any) -> str | None:
    """Why the low-latency kernels cannot move tokens like those of x `[..., H]`;
    `ffi.unsupported` has the other reasons.
    """
    slots = sizes.num_ranks * max(sizes.num_tokens, 1)
    shared = (sizes.experts_per_rank + 1) * -(-slots // 32) * 8 + 2 * slots
    if x.shape[-1] % PIECE:
        return f"its low-latency kernels move tokens of a multiple of {PIECE} elements"
    if slots > MAX_LISTED_SLOTS or shared > _MAX_SHARED:
        return (
            f"its low-latency kernels do not serve {sizes.experts_per_rank} experts of a rank "
            f"with {slots} tokens of all ranks"
        )
    return None


def _needed(ids: Any, sizes: PlanSizes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((sizes.num_ranks, ids.shape[0]), jnp.bool_)


def _needed_in(in_flight: Array, num_tokens: int, sizes: PlanSizes) -> Bool[Array, "R T"]:
    """What the first half of a dispatch has left behind its ticket."""
    shape = sizes.num_ranks, num_tokens
    left = in_flight.reshape(-1)[_IN_FLIGHT_HEADER : _IN_FLIGHT_HEADER + math.prod(shape)]
    return left.reshape(shape) != 0


def _rows(
    ids: Any, hidden: int, dtype: Any, sizes: PlanSizes, quantize: bool
) -> list[jax.ShapeDtypeStruct]:
    """Rows, group sizes, row_of, column and, quantized, scales."""
    slots = sizes.num_ranks * ids.shape[0]
    outputs = [
        jax.ShapeDtypeStruct((sizes.capacity, hidden), jnp.float8_e4m3fn if quantize else dtype),
        jax.ShapeDtypeStruct((sizes.experts_per_rank,), jnp.int32),
        jax.ShapeDtypeStruct((slots, sizes.columns), jnp.int32),
        jax.ShapeDtypeStruct((slots, sizes.top_k), jnp.int32),
    ]
    if quantize:
        blocks = -(-hidden // 128)
        outputs.append(jax.ShapeDtypeStruct((sizes.capacity, blocks), jnp.float32))
    return outputs


def _plan(
    needed: Array, group_sizes: Array, row_of: Array, column: Array, sizes: PlanSizes
) -> DispatchPlan:
    """The plan that `plan_rows` makes. XLA drops what nothing reads, as combine does row_source."""
    pairs = jnp.arange(row_of.size, dtype=jnp.int32)
    rows = jnp.where(row_of < 0, sizes.capacity, row_of).reshape(-1)
    empty = to_varying(jnp.full(sizes.capacity, -1, jnp.int32), varying_axes(row_of))
    return DispatchPlan(
        group_sizes=group_sizes,
        expert_counts=group_sizes,
        num_dropped=jnp.zeros_like(group_sizes[0]),
        row_source=empty.at[rows].set(pairs, mode="drop"),
        row_of=row_of,
        column=column,
        route=FlatRoute(needed, sizes.axis_name),
        sizes=sizes,
    )


def _combine_rows(
    target: str,
    output: jax.ShapeDtypeStruct,
    rows: Array,
    plan: DispatchPlan,
    weights: Array,
    after: Any,
    half: str,
) -> Array:
    needed = plan.route.needed
    (result,) = exchange(
        target,
        [output],
        needed,
        axis_index(plan.sizes),
        plan.row_of,
        plan.column,
        rows,
        at_least_one(weights),
        *after,
        attributes=_attributes(needed.shape[1], rows.shape[1], rows.dtype, plan.sizes, half),
    )
    made: Array = result
    return made


def _attributes(
    num_tokens: int, hidden: int, dtype: Any, sizes: PlanSizes, half: str
) -> dict[str, Any]:
    assert sizes.region is not None
    return {
        "groups": placement.current().groups(sizes.direct_axes).reshape(-1),
        "num_ranks": sizes.num_ranks,
        "channel": sizes.channel,
        "num_tokens": num_tokens,
        "num_sms": 0,
        "hidden": hidden,
        "top_k": sizes.top_k,
        "experts": sizes.experts_per_rank,
        "region": sizes.region,
        "dtype": jnp.dtype(dtype).name,
        "half": half,
    }
