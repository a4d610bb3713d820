"""Expert parallelism for decoding: fixed buffers, one message each way, no counts beforehand.

Every expert owns a region of rows of fixed size, so a rank needs to know nothing of the others
before it sends: a token's expert ids, FP8 values and scales travel as one record. Each function
also comes in two halves. `_start` sends and returns at once; `_finish` waits and unpacks. Work
whose results are given to `_finish(..., after=...)` is done in between.

    rows, group_sizes, handle = low_latency_dispatch(x, expert_ids, ...)
    out = deep_gemm.fp8_masked_gemm(rows, w, group_sizes)
    y = low_latency_combine(out, handle, weights)

Made for inference: differentiating raises a TypeError. `jax_ds.deep_ep` says what holds for all
communicating functions: ranks, ids that name no expert, ids named twice. The method is that of
DeepEP's low-latency kernels (github.com/deepseek-ai/DeepEP).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from jax_ds._core.checks import check, check_dtype, check_rank, check_shape
from jax_ds._runtime.choose import Implementation, choose
from jax_ds.deep_ep import xla
from jax_ds.deep_ep.api import MAX_INDEX, check_count, check_exchange, check_plan, together
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes, plan_rows, valid_ids
from jax_ds.deep_ep.route import FlatRoute, flat_route, sum_in_order
from jax_ds.deep_ep.vjp import inference_only
from jax_ds.quantization import Quantized, quantize_1x128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchInFlight:
    """What `low_latency_dispatch_start` hands to `_finish`: a pytree with private content."""

    messages: UInt8[Array, "B bytes"]
    route: FlatRoute
    sizes: PlanSizes = dataclasses.field(metadata={"static": True})
    parts: tuple[tuple[int, Any], ...] = dataclasses.field(metadata={"static": True})
    implementation: Implementation = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CombineInFlight:
    """What `low_latency_combine_start` hands to `_finish`: a pytree with private content."""

    parts: Float[Array, "R T H"]
    sizes: PlanSizes = dataclasses.field(metadata={"static": True})
    implementation: Implementation = dataclasses.field(metadata={"static": True})


def low_latency_dispatch(
    x: Float[Array, "T H"],
    expert_ids: Int32[Array, "T K"],
    *,
    num_experts: int,
    max_tokens: int,
    axis_name: str | tuple[str, ...],
    quantize: bool = True,
    channel: int = 0,
    implementation: Implementation = None,
) -> tuple[Any, Int32[Array, " E_local"], DispatchPlan]:
    """Sends every token to its experts: `rows[e, i] = x[i-th token of local expert e]`.

    An expert's rows are in the order of source rank, then token; those from `group_sizes[e]` on
    are zero (a Quantized's scales are 1 there). Nothing is ever dropped.

    Args:
      x: bfloat16 or float32 `[T, H]`, T <= max_tokens, the same on every rank.
      expert_ids: int32 `[T, K]`, any values.
      num_experts: E, a multiple of R.
      max_tokens: the most tokens a rank ever sends; sets the size of the buffers.
      axis_name: mesh axes; several count as one.
      quantize: send FP8 values with a scale per 1x128 block, as `quantize_1x128` makes them.
      channel: calls that may run at the same time need different channels.
      implementation: None, "xla" or "cuda".

    Returns:
      rows: Quantized (or, unquantized, x's dtype) `[E_local, R * max_tokens, H]`.
      group_sizes: int32 `[E_local]`; both feed `deep_gemm.fp8_masked_gemm`.
      handle: for `low_latency_combine`, a pytree.

    Raises:
      ValueError, TypeError: for a shape, dtype, size or axis against these rules, or where
        differentiated.
    """
    in_flight = low_latency_dispatch_start(
        x,
        expert_ids,
        num_experts=num_experts,
        max_tokens=max_tokens,
        axis_name=axis_name,
        quantize=quantize,
        channel=channel,
        implementation=implementation,
    )
    return low_latency_dispatch_finish(in_flight)


def low_latency_dispatch_start(
    x: Float[Array, "T H"],
    expert_ids: Int32[Array, "T K"],
    *,
    num_experts: int,
    max_tokens: int,
    axis_name: str | tuple[str, ...],
    quantize: bool = True,
    channel: int = 0,
    implementation: Implementation = None,
) -> DispatchInFlight:
    """The first half of `low_latency_dispatch`, with the same arguments: sends."""
    check_dtype("x", x, jnp.bfloat16, jnp.float32)
    check_rank("x", x, 2)
    check_count("max_tokens", max_tokens, 1)
    num_tokens = x.shape[0]
    check(
        num_tokens <= max_tokens,
        "x",
        f"must have at most max_tokens = {max_tokens} tokens",
        num_tokens,
    )
    check_dtype("expert_ids", expert_ids, jnp.int32)
    check_shape("expert_ids", expert_ids, (num_tokens, None), "T K")
    sizes = check_exchange(expert_ids, num_experts, axis_name, channel)
    capacity = num_experts * max_tokens
    check(capacity <= MAX_INDEX, "max_tokens", "E * max_tokens must be below 2**31", capacity)
    sizes = dataclasses.replace(
        sizes, capacity=int(capacity), region=int(sizes.num_ranks * max_tokens)
    )
    x, expert_ids = inference_only(
        "low_latency_dispatch", *together(sizes.axis_name, x, expert_ids)
    )

    def portable(x: Array, expert_ids: Array) -> DispatchInFlight:
        return _send(x, expert_ids, sizes, quantize, implementation)

    in_flight: DispatchInFlight = choose(
        "low_latency_dispatch", implementation, (x, expert_ids), xla=portable, cuda=None
    )
    return in_flight


def low_latency_dispatch_finish(
    in_flight: DispatchInFlight, *, after: Any = ()
) -> tuple[Any, Int32[Array, " E_local"], DispatchPlan]:
    """The second half of `low_latency_dispatch`: receives, and returns what it returns.

    Args:
      in_flight: from `low_latency_dispatch_start`; each is finished once.
      after: arrays to compute before receiving; their values are not used.

    Raises:
      TypeError: if `in_flight` is something else.
    """
    _check_in_flight(in_flight, DispatchInFlight)
    messages, *_ = jax.lax.optimization_barrier((in_flight.messages, after))
    in_flight = dataclasses.replace(in_flight, messages=messages)
    result: tuple[Any, Array, DispatchPlan] = choose(
        "low_latency_dispatch", in_flight.implementation, (in_flight,), xla=_receive, cuda=None
    )
    return result


def low_latency_combine(
    rows: Float[Array, "E_local RM H"],
    handle: DispatchPlan,
    weights: Float32[Array, "T K"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "T H"]:
    """Brings rows back to their tokens: `y_t = sum_k weights_tk * row of (t, k)`.

    Rounds as `combine`: a rank's partial sum once to the dtype of the rows, and the result.

    Args:
      rows: bfloat16 or float32 `[E_local, R * max_tokens, H]`, ordered as
        `low_latency_dispatch` orders them; rows without a token are not read.
      handle: from `low_latency_dispatch`.
      weights: float32 `[T, K]`.
      implementation: None, "xla" or "cuda".

    Returns:
      `[T, H]` with the dtype of the rows; zero for a token without rows.

    Raises:
      ValueError, TypeError: for a shape or dtype against these rules, or where differentiated.
    """
    return low_latency_combine_finish(
        low_latency_combine_start(rows, handle, weights, implementation=implementation)
    )


def low_latency_combine_start(
    rows: Float[Array, "E_local RM H"],
    handle: DispatchPlan,
    weights: Float32[Array, "T K"],
    *,
    implementation: Implementation = None,
) -> CombineInFlight:
    """The first half of `low_latency_combine`, with the same arguments: reduces and sends."""
    sizes = check_plan(handle, "handle")
    came_from = "a plan of plan_dispatch"
    check(sizes.region is not None, "handle", "must come from low_latency_dispatch", came_from)
    check_dtype("rows", rows, jnp.bfloat16, jnp.float32)
    shape = (sizes.experts_per_rank, sizes.region, None)
    check_shape("rows", rows, shape, "E_local R*max_tokens H")
    check_dtype("weights", weights, jnp.float32)
    check_shape("weights", weights, (sizes.num_tokens, sizes.top_k), "T K")
    rows, handle, weights = inference_only(
        "low_latency_combine", *together(sizes.axis_name, rows, handle, weights)
    )

    def portable(rows: Array, handle: DispatchPlan, weights: Array) -> CombineInFlight:
        assert isinstance(handle.route, FlatRoute)
        rows = rows.reshape(sizes.capacity, rows.shape[2])
        parts = xla.reduce_rows(rows, handle, xla.publish(weights, handle))
        return CombineInFlight(handle.route.send_back(parts), sizes, implementation)

    in_flight: CombineInFlight = choose(
        "low_latency_combine", implementation, (rows, handle, weights), xla=portable, cuda=None
    )
    return in_flight


def low_latency_combine_finish(
    in_flight: CombineInFlight, *, after: Any = ()
) -> Float[Array, "T H"]:
    """The second half of `low_latency_combine`: receives, and returns what it returns.

    Args:
      in_flight: from `low_latency_combine_start`; each is finished once.
      after: arrays to compute before receiving; their values are not used.

    Raises:
      TypeError: if `in_flight` is something else.
    """
    _check_in_flight(in_flight, CombineInFlight)
    parts, *_ = jax.lax.optimization_barrier((in_flight.parts, after))

    def portable(parts: Array) -> Array:
        return sum_in_order(parts)[: in_flight.sizes.num_tokens].astype(parts.dtype)

    y: Array = choose(
        "low_latency_combine", in_flight.implementation, (parts,), xla=portable, cuda=None
    )
    return y


def _send(
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
    messages = route.spread(xla.pack(*arrays))
    return DispatchInFlight(messages, route, sizes, xla.widths(*arrays), implementation)


def _receive(in_flight: DispatchInFlight) -> tuple[Any, Array, DispatchPlan]:
    sizes = in_flight.sizes
    raised, *_ = xla.unpack(in_flight.messages, *in_flight.parts)
    lost = jnp.zeros((), jnp.int32)
    handle = plan_rows(in_flight.route, raised - 1, lost, sizes)
    _, values, *scales = xla.unpack(xla.expand(in_flight.messages, handle), *in_flight.parts)
    shape = sizes.experts_per_rank, sizes.region
    rows: Any = values.reshape(*shape, -1)
    if scales:
        has_token = handle.row_source[:, None] >= 0
        rows = Quantized(rows, jnp.where(has_token, scales[0], 1).reshape(*shape, -1))
    return rows, handle.group_sizes, handle


def _check_in_flight(in_flight: Any, wanted: type) -> None:
    if not isinstance(in_flight, wanted):
        raise TypeError(f"in_flight: must be a {wanted.__name__}, got {type(in_flight).__name__}")
