"""The portable implementation of low-latency dispatch and combine, in halves.

The first half of dispatch sends one message per token: ids, then values, then scales; the second
numbers rows from the ids and fills them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ds._runtime.choose import Implementation
from jax_ds.deep_ep import xla
from jax_ds.deep_ep.in_flight import DispatchInFlight
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes, plan_rows, valid_ids
from jax_ds.deep_ep.route import FlatRoute, flat_route, sum_in_order
from jax_ds.quantization import Quantized, quantize_1x128


def send(
    x: Array,
    expert_ids: Array,
    sizes: PlanSizes,
    quantize: bool,
    implementation: Implementation,
) -> DispatchInFlight:
    """One message per token: ids, then the values, then the scales."""
    ids = valid_ids(expert_ids, sizes)
    route = flat_route(ids, num_experts=sizes.num_experts, axis_name=sizes.axis_name)
    x = xla.at_least_one(x)
    # Ids travel raised by one: an empty slot is zero, and then reads as -1.
    arrays = [ids + 1, x]
    if quantize:
        q = quantize_1x128(x, implementation="xla")
        arrays[1:] = q.values, q.scales
    parts = parts_of(sizes.top_k, x.shape[1], x.dtype, quantize)
    return DispatchInFlight(route.spread(xla.pack(*arrays)), route, sizes, parts, implementation)


def parts_of(top_k: int, hidden: int, dtype: Any, quantize: bool) -> tuple[tuple[int, Any], ...]:
    """Widths and dtypes of a message: ids, then values, then scales."""
    ids = (top_k, jnp.dtype(jnp.int32))
    if not quantize:
        return ids, (hidden, jnp.dtype(dtype))
    blocks = -(-hidden // 128)
    return ids, (hidden, jnp.dtype(jnp.float8_e4m3fn)), (blocks, jnp.dtype(jnp.float32))


def receive(in_flight: DispatchInFlight) -> tuple[Any, Array, DispatchPlan]:
    """What `low_latency_dispatch` returns; rows without a token are zero, with scales 1."""
    sizes = in_flight.sizes
    raised, *_ = xla.unpack(in_flight.messages, *in_flight.parts)
    lost = jnp.zeros((), jnp.int32)
    handle = plan_rows(in_flight.route, raised - 1, lost, sizes)
    _, values, *scales = xla.unpack(xla.expand(in_flight.messages, handle), *in_flight.parts)
    rows: Any = values
    if scales:
        has_token = handle.row_source[:, None] >= 0
        rows = Quantized(values, jnp.where(has_token, scales[0], 1))
    return in_regions(rows, sizes), handle.group_sizes, handle


def send_back(rows: Array, handle: DispatchPlan, weights: Array) -> Float[Array, "R T H"]:
    """Each rank's partial sum of every token, at the token's owner."""
    assert isinstance(handle.route, FlatRoute)
    parts = xla.reduce_rows(in_one(rows), handle, xla.publish(weights, handle))
    return handle.route.send_back(parts)


def add_up(parts: Float[Array, "R T H"], sizes: PlanSizes) -> Float[Array, "T H"]:
    """The sum of a token's partial sums, in rank order."""
    return sum_in_order(parts)[: sizes.num_tokens].astype(parts.dtype)


def in_regions(rows: Any, sizes: PlanSizes) -> Any:
    """`[C, _]` as `[E_local, R * max_tokens, _]`."""
    shape = sizes.experts_per_rank, sizes.region
    return jax.tree.map(lambda a: a.reshape(*shape, a.shape[1]), rows)


def in_one(rows: Array) -> Array:
    """The inverse of `in_regions`."""
    return rows.reshape(-1, rows.shape[2])
