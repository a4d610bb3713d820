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
from jaxtyping import Array, Float, Float32, Int32

from jax_ds._core.checks import (
    check,
    check_choice,
    check_dtype,
    check_integer,
    check_rank,
    check_shape,
)
from jax_ds._runtime.choose import Implementation, choose
from jax_ds.deep_ep import ffi, low_latency_ffi
from jax_ds.deep_ep import low_latency_xla as portable
from jax_ds.deep_ep.api import MAX_INDEX, check_exchange, check_plan, together
from jax_ds.deep_ep.in_flight import CombineInFlight, DispatchInFlight, UnderWay
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes, valid_ids
from jax_ds.deep_ep.route import FlatRoute
from jax_ds.deep_ep.vjp import inference_only


def low_latency_dispatch(
    x: Float[Array, "T H"],
    expert_ids: Int32[Array, "T K"],
    *,
    num_experts: int,
    max_tokens: int,
    axis_name: str | tuple[str, ...],
    quantize: bool = True,
    channel: int = 0,
    after: Any = (),
    implementation: Implementation = None,
) -> tuple[Any, Int32[Array, " E_local"], DispatchPlan]:
    """Sends every token to its experts: `rows[e, i] = x[i-th token of local expert e]`.

    An expert's rows are in the order of source rank, then token; those from `group_sizes[e]` on
    hold no token: the portable implementation makes them zero (a Quantized's scales 1), the kernel
    does not write them. Nothing is ever dropped.

    Args:
      x: bfloat16 or float32 `[T, H]`, T <= max_tokens, the same on every rank.
      expert_ids: int32 `[T, K]`, any values.
      num_experts: E, a multiple of R.
      max_tokens: the most tokens a rank ever sends; sets the size of the buffers.
      axis_name: mesh axes; several count as one.
      quantize: send FP8 values with a scale per 1x128 block, as `quantize_1x128` makes them.
      channel: calls that may run at the same time need different channels.
      after: arrays to compute before; their values are not used. Orders this call behind others
        where data does not.
      implementation: None, "xla" or "cuda".

    Returns:
      rows: Quantized (or, unquantized, x's dtype) `[E_local, R * max_tokens, H]`.
      group_sizes: int32 `[E_local]`; both feed `deep_gemm.fp8_masked_gemm`.
      handle: for `low_latency_combine`, a pytree.

    Raises:
      ValueError, TypeError: for a shape, dtype, size or axis against these rules, or where
        differentiated.
    """
    sizes = _check_dispatch(x, expert_ids, num_experts, max_tokens, axis_name, quantize, channel)
    x, expert_ids = inference_only(
        "low_latency_dispatch", *together(sizes.axis_name, x, expert_ids)
    )

    def xla(x: Array, expert_ids: Array, after: Any) -> Any:
        return portable.receive(
            portable.send(_behind(x, after), expert_ids, sizes, quantize, implementation)
        )

    def kernel(x: Array, expert_ids: Array, after: Any) -> Any:
        ids = valid_ids(expert_ids, sizes)
        rows, plan = low_latency_ffi.dispatch(x, ids, sizes, quantize, after)
        return portable.in_regions(rows, sizes), plan.group_sizes, plan

    result: tuple[Any, Array, DispatchPlan] = choose(
        "low_latency_dispatch",
        implementation,
        (x, expert_ids, _unused(after)),
        xla=xla,
        cuda=kernel,
        unsupported=_unsupported(implementation, sizes, x),
    )
    return result


def low_latency_dispatch_start(
    x: Float[Array, "T H"],
    expert_ids: Int32[Array, "T K"],
    *,
    num_experts: int,
    max_tokens: int,
    axis_name: str | tuple[str, ...],
    quantize: bool = True,
    channel: int = 0,
    after: Any = (),
    implementation: Implementation = None,
) -> DispatchInFlight:
    """The first half of `low_latency_dispatch`: quantizes and sends, and returns at once.

    Args:
      x, expert_ids, num_experts, max_tokens, axis_name, quantize, channel, implementation: as in
        `low_latency_dispatch`.
      after: arrays to compute before sending; their values are not used. Two calls of one channel
        can be under way: where data does not order a start behind the finish that makes room for
        it, say so here.

    Returns:
      What `low_latency_dispatch_finish` takes.

    Raises:
      ValueError, TypeError: as `low_latency_dispatch`, and where two calls are under way already.
    """
    sizes = _check_dispatch(x, expert_ids, num_experts, max_tokens, axis_name, quantize, channel)
    x, expert_ids = inference_only(
        "low_latency_dispatch", *together(sizes.axis_name, x, expert_ids)
    )
    under_way = UnderWay("low_latency_dispatch", sizes)
    under_way.check()

    def xla(x: Array, expert_ids: Array, after: Any) -> DispatchInFlight:
        return portable.send(_behind(x, after), expert_ids, sizes, quantize, implementation)

    def kernel(x: Array, expert_ids: Array, after: Any) -> DispatchInFlight:
        ids = valid_ids(expert_ids, sizes)
        parts = portable.parts_of(sizes.top_k, x.shape[1], x.dtype, quantize)
        width = sum(count * jnp.dtype(dtype).itemsize for count, dtype in parts)
        like = jax.ShapeDtypeStruct((sizes.num_ranks * ids.shape[0], width), jnp.uint8)
        messages, route = low_latency_ffi.dispatch_start(x, ids, sizes, quantize, after, like)
        return DispatchInFlight(messages, route, sizes, parts, implementation)

    in_flight: DispatchInFlight = choose(
        "low_latency_dispatch",
        implementation,
        (x, expert_ids, _unused(after)),
        xla=xla,
        cuda=kernel,
        unsupported=_unsupported(implementation, sizes, x),
    )
    under_way.add(in_flight)
    return in_flight


def low_latency_dispatch_finish(
    in_flight: DispatchInFlight, *, after: Any = ()
) -> tuple[Any, Int32[Array, " E_local"], DispatchPlan]:
    """The second half of `low_latency_dispatch`: receives, and returns what it returns.

    Args:
      in_flight: from `low_latency_dispatch_start`; each is finished once.
      after: arrays to compute before receiving; their values are not used.

    Returns:
      rows, group_sizes, handle: as `low_latency_dispatch`.

    Raises:
      TypeError: if `in_flight` is something else.
      ValueError: if it has been finished.
    """
    _check_in_flight(in_flight, DispatchInFlight)
    UnderWay("low_latency_dispatch", in_flight.sizes).remove(in_flight)
    (_, (hidden, dtype), *scales), sizes = in_flight.parts, in_flight.sizes

    def xla(in_flight: DispatchInFlight, after: Any) -> Any:
        messages = _behind(in_flight.messages, after)
        return portable.receive(dataclasses.replace(in_flight, messages=messages))

    def kernel(in_flight: DispatchInFlight, after: Any) -> Any:
        rows, plan = low_latency_ffi.dispatch_finish(
            in_flight.messages, in_flight.route, hidden, dtype, sizes, bool(scales), after
        )
        return portable.in_regions(rows, sizes), plan.group_sizes, plan

    result: tuple[Any, Array, DispatchPlan] = choose(
        "low_latency_dispatch",
        in_flight.implementation,
        (in_flight, _unused(after)),
        xla=xla,
        cuda=kernel,
        unsupported=_unsupported(
            in_flight.implementation, sizes, jax.ShapeDtypeStruct((1, hidden), dtype)
        ),
    )
    return result


def low_latency_combine(
    rows: Float[Array, "E_local RM H"],
    handle: DispatchPlan,
    weights: Float32[Array, "T K"],
    *,
    after: Any = (),
    implementation: Implementation = None,
) -> Float[Array, "T H"]:
    """Brings rows back to their tokens: `y_t = sum_k weights_tk * row of (t, k)`.

    Rounds as `combine`: a rank's partial sum once to the dtype of the rows, and the result.

    Args:
      rows: bfloat16 or float32 `[E_local, R * max_tokens, H]`, ordered as
        `low_latency_dispatch` orders them; rows without a token are not read.
      handle: from `low_latency_dispatch`.
      weights: float32 `[T, K]`.
      after: as in `low_latency_dispatch`.
      implementation: None, "xla" or "cuda".

    Returns:
      `[T, H]` with the dtype of the rows; zero for a token without rows.

    Raises:
      ValueError, TypeError: for a shape or dtype against these rules, or where differentiated.
    """
    sizes = _check_combine(rows, handle, weights)
    rows, handle, weights = inference_only(
        "low_latency_combine", *together(sizes.axis_name, rows, handle, weights)
    )

    def xla(rows: Array, handle: DispatchPlan, weights: Array, after: Any) -> Array:
        return portable.add_up(portable.send_back(rows, handle, _behind(weights, after)), sizes)

    def kernel(rows: Array, handle: DispatchPlan, weights: Array, after: Any) -> Array:
        y = low_latency_ffi.combine(portable.in_one(rows), handle, weights, after)
        return y[: sizes.num_tokens]

    y: Array = choose(
        "low_latency_combine",
        implementation,
        (rows, handle, weights, _unused(after)),
        xla=xla,
        cuda=kernel,
        unsupported=_unsupported(implementation, sizes, portable.in_one(rows)),
    )
    return y


def low_latency_combine_start(
    rows: Float[Array, "E_local RM H"],
    handle: DispatchPlan,
    weights: Float32[Array, "T K"],
    *,
    after: Any = (),
    implementation: Implementation = None,
) -> CombineInFlight:
    """The first half of `low_latency_combine`: reduces and sends, and returns at once.

    Args:
      rows, handle, weights, implementation: as in `low_latency_combine`.
      after: as in `low_latency_dispatch_start`.

    Returns:
      What `low_latency_combine_finish` takes.

    Raises:
      ValueError, TypeError: as `low_latency_combine`, and where two calls are under way already.
    """
    sizes = _check_combine(rows, handle, weights)
    rows, handle, weights = inference_only(
        "low_latency_combine", *together(sizes.axis_name, rows, handle, weights)
    )
    under_way = UnderWay("low_latency_combine", sizes)
    under_way.check()

    def in_flight_of(parts: Array, handle: DispatchPlan) -> CombineInFlight:
        assert isinstance(handle.route, FlatRoute)
        return CombineInFlight(parts, handle.route.needed, sizes, implementation)

    def xla(rows: Array, handle: DispatchPlan, weights: Array, after: Any) -> CombineInFlight:
        return in_flight_of(portable.send_back(rows, handle, _behind(weights, after)), handle)

    def kernel(rows: Array, handle: DispatchPlan, weights: Array, after: Any) -> CombineInFlight:
        assert isinstance(handle.route, FlatRoute)
        shape = (*handle.route.needed.shape, rows.shape[2])
        like = jax.ShapeDtypeStruct(shape, rows.dtype)
        parts = low_latency_ffi.combine_start(portable.in_one(rows), handle, weights, after, like)
        return in_flight_of(parts, handle)

    in_flight: CombineInFlight = choose(
        "low_latency_combine",
        implementation,
        (rows, handle, weights, _unused(after)),
        xla=xla,
        cuda=kernel,
        unsupported=_unsupported(implementation, sizes, portable.in_one(rows)),
    )
    under_way.add(in_flight)
    return in_flight


def low_latency_combine_finish(
    in_flight: CombineInFlight, *, after: Any = ()
) -> Float[Array, "T H"]:
    """The second half of `low_latency_combine`: receives, and returns what it returns.

    Args:
      in_flight: from `low_latency_combine_start`; each is finished once.
      after: arrays to compute before receiving; their values are not used.

    Returns:
      `[T, H]`, as `low_latency_combine`.

    Raises:
      TypeError: if `in_flight` is something else.
      ValueError: if it has been finished.
    """
    _check_in_flight(in_flight, CombineInFlight)
    UnderWay("low_latency_combine", in_flight.sizes).remove(in_flight)
    sizes = in_flight.sizes

    def xla(parts: Array, needed: Array, after: Any) -> Array:
        return portable.add_up(_behind(parts, after), sizes)

    def kernel(parts: Array, needed: Array, after: Any) -> Array:
        y = low_latency_ffi.combine_finish(parts, needed, sizes, after)
        return y[: sizes.num_tokens]

    y: Array = choose(
        "low_latency_combine",
        in_flight.implementation,
        (in_flight.parts, in_flight.needed, _unused(after)),
        xla=xla,
        cuda=kernel,
        unsupported=_unsupported(in_flight.implementation, sizes, in_flight.parts[0]),
    )
    return y


def _check_dispatch(
    x: Array,
    expert_ids: Array,
    num_experts: int,
    max_tokens: int,
    axis_name: str | tuple[str, ...],
    quantize: bool,
    channel: int,
) -> PlanSizes:
    check_dtype("x", x, jnp.bfloat16, jnp.float32)
    check_rank("x", x, 2)
    check_integer("max_tokens", max_tokens, 1)
    check_choice("quantize", quantize, (True, False))
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
    return dataclasses.replace(
        sizes, capacity=int(capacity), region=int(sizes.num_ranks * max_tokens)
    )


def _check_combine(rows: Array, handle: DispatchPlan, weights: Array) -> PlanSizes:
    sizes = check_plan(handle, "handle")
    came_from = "a plan of plan_dispatch"
    check(sizes.region is not None, "handle", "must come from low_latency_dispatch", came_from)
    check_dtype("rows", rows, jnp.bfloat16, jnp.float32)
    shape = (sizes.experts_per_rank, sizes.region, None)
    check_shape("rows", rows, shape, "E_local R*max_tokens H")
    check_dtype("weights", weights, jnp.float32)
    check_shape("weights", weights, (sizes.num_tokens, sizes.top_k), "T K")
    return sizes


def _unused(after: Any) -> tuple[Array, ...]:
    """Arrays that order a call: no gradient goes through them."""
    for leaf in jax.tree.leaves(after):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"after: must hold arrays, got {type(leaf).__name__}")
    return tuple(jax.lax.stop_gradient(jnp.asarray(leaf)) for leaf in jax.tree.leaves(after))


def _behind(x: Array, after: tuple[Array, ...]) -> Array:
    """x, once everything in `after` is there."""
    if not after:
        return x
    barred: Array = jax.lax.optimization_barrier((x, after))[0]
    return barred


def _unsupported(implementation: Implementation, sizes: PlanSizes, x: Any) -> str | None:
    """Why the kernels are not taken, for tokens like those of x `[_, H]`."""
    if implementation == "xla":
        return None  # do not look for GPUs and NCCL
    reason = low_latency_ffi.unsupported(sizes, x) or ffi.unsupported(sizes, x, None)
    if reason is None and implementation is None:
        return ffi.not_by_default(sizes)
    return reason


def _check_in_flight(in_flight: Any, wanted: type) -> None:
    if not isinstance(in_flight, wanted):
        raise TypeError(f"in_flight: must be a {wanted.__name__}, got {type(in_flight).__name__}")
