"""Every message of `deep_ep`, word for word."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds.quantization import Quantized

Array = jax.Array

T, K, H, E, R = 4, 2, 8, 16, 8


def _trace(function: Callable[[Array, Array], Any]) -> None:
    """Traces `function` of x and expert_ids on a mesh with axes ep, of 8 devices, and one."""
    mesh = jax.make_mesh((R, 1), ("ep", "one"), axis_types=(AxisType.Auto,) * 2)

    def per_device(x: Array, ids: Array) -> Array:
        function(x, ids)
        return x

    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    jax.eval_shape(
        mapped,
        jax.ShapeDtypeStruct((R * T, H), jnp.float32),
        jax.ShapeDtypeStruct((R * T, K), jnp.int32),
    )


def _plan(ids: Array, **changes: Any) -> deep_ep.DispatchPlan:
    return deep_ep.plan_dispatch(ids, **{"num_experts": E, "axis_name": "ep", **changes})


def _low(x: Array, ids: Array, **changes: Any) -> Any:
    static = {"num_experts": E, "axis_name": "ep", "max_tokens": T, **changes}
    return deep_ep.low_latency_dispatch(x, ids, **static)


def _start(x: Array, ids: Array) -> deep_ep.DispatchInFlight:
    return deep_ep.low_latency_dispatch_start(x, ids, num_experts=E, axis_name="ep", max_tokens=T)


def _finish_twice(x: Array, ids: Array) -> None:
    in_flight = _start(x, ids)
    for _ in range(2):
        deep_ep.low_latency_dispatch_finish(in_flight)


def _quantized(x: Array, columns: int = 1) -> Quantized:
    return Quantized(x.astype(jnp.float8_e4m3fn), jnp.ones((x.shape[0], columns)))


CASES: dict[str, tuple[Callable[[Array, Array], Any], str]] = {
    "rank of expert_ids": (
        lambda x, ids: _plan(ids[0]),
        "expert_ids: must have 2 dimensions, got shape [2]",
    ),
    "dtype of expert_ids": (
        lambda x, ids: _plan(ids.astype(jnp.float32)),
        "expert_ids: dtype must be int32, got float32",
    ),
    "no column": (
        lambda x, ids: _plan(ids[:, :0]),
        "expert_ids: must have at least 1 expert per token, got shape [4, 0]",
    ),
    "num_experts": (
        lambda x, ids: _plan(ids, num_experts=12),
        "num_experts: must be a positive multiple of the 8 ranks of axis 'ep', got 12",
    ),
    "no expert": (
        lambda x, ids: _plan(ids, num_experts=0),
        "num_experts: must be a positive multiple of the 8 ranks of axis 'ep', got 0",
    ),
    "unknown axis": (
        lambda x, ids: _plan(ids, axis_name="expert"),
        "axis_name: must name axes of the enclosing jax.shard_map, got 'expert'",
    ),
    "three axes": (
        lambda x, ids: _plan(ids, axis_name=("a", "b", "c")),
        "axis_name: must be one axis or a (node, gpu) pair, got ('a', 'b', 'c')",
    ),
    "an axis twice": (
        lambda x, ids: _plan(ids, axis_name=("ep", "ep")),
        "axis_name: must be one axis or a (node, gpu) pair, got ('ep', 'ep')",
    ),
    "capacity": (
        lambda x, ids: _plan(ids, capacity=0),
        "capacity: must be at least expert_alignment = 1, got 0",
    ),
    "capacity below a unit": (
        lambda x, ids: _plan(ids, capacity=100, expert_alignment=128),
        "capacity: must be at least expert_alignment = 128, got 100",
    ),
    "node_capacity": (
        lambda x, ids: _plan(ids, axis_name=("ep", "one"), node_capacity=0),
        "node_capacity: must be at least 1, got 0",
    ),
    "node_capacity on one axis": (
        lambda x, ids: _plan(ids, node_capacity=2),
        "node_capacity: needs axis_name=(node, gpu), got 'ep'",
    ),
    "expert_alignment": (
        lambda x, ids: _plan(ids, expert_alignment=0),
        "expert_alignment: must be at least 1, got 0",
    ),
    "channel": (
        lambda x, ids: _plan(ids, channel=-1),
        "channel: must be at least 0, got -1",
    ),
    "too many pairs": (
        lambda x, ids: _plan(jnp.zeros((2**28, 2), jnp.int32)),
        "expert_ids: R*T*min(K, E_local) must be below 2**31, got 4294967296",
    ),
    "too many rows": (
        lambda x, ids: _plan(ids, capacity=2**31),
        "capacity: must be below 2**31, got 2147483648",
    ),
    "tokens of x": (
        lambda x, ids: deep_ep.dispatch(x[1:], _plan(ids)),
        "x: must have shape [T H] = [4, *], got [3, 8]",
    ),
    "dtype of x": (
        lambda x, ids: deep_ep.dispatch(x.astype(jnp.float16), _plan(ids)),
        "x: dtype must be bfloat16 or float32, got float16",
    ),
    "not a plan": (
        lambda x, ids: deep_ep.dispatch(x, "plan"),
        "plan: must be a DispatchPlan, got str",
    ),
    "num_sms": (
        lambda x, ids: deep_ep.dispatch(x, _plan(ids), num_sms=0),
        "num_sms: must be at least 1, got 0",
    ),
    "rank of a Quantized": (
        lambda x, ids: deep_ep.dispatch(
            Quantized(x[None].astype(jnp.float8_e4m3fn), jnp.ones((1, 4, 1))), _plan(ids)
        ),
        "x.values: must have 2 dimensions, got shape [1, 4, 8]",
    ),
    "tokens of a Quantized": (
        lambda x, ids: deep_ep.dispatch(_quantized(x[1:]), _plan(ids)),
        "x.values: must have shape [T H] = [4, *], got [3, 8]",
    ),
    "scales of a Quantized": (
        lambda x, ids: deep_ep.dispatch(_quantized(x, 2), _plan(ids)),
        "x.scales: must have shape [... R ceil(C/128)] = [4, 1], got [4, 2]",
    ),
    "gradient of a Quantized": (
        lambda x, ids: jax.grad(
            lambda s: jnp.sum(
                deep_ep.dispatch(Quantized(_quantized(x).values, s), _plan(ids)).scales
            )
        )(jnp.ones((T, 1))),
        "dispatch: not differentiable, a cotangent cannot cross FP8 values; dispatch x in "
        "bfloat16, or apply jax.lax.stop_gradient to it",
    ),
    "rows": (
        lambda x, ids: deep_ep.combine(x, _plan(ids), jnp.ones((T, K))),
        "rows: must have shape [C H] = [64, *], got [4, 8]",
    ),
    "dtype of rows": (
        lambda x, ids: deep_ep.combine(jnp.ones((64, H), jnp.int32), _plan(ids), None),
        "rows: dtype must be bfloat16 or float32, got int32",
    ),
    "weights": (
        lambda x, ids: deep_ep.combine(jnp.ones((64, H)), _plan(ids), jnp.ones((T,))),
        "weights: must have shape [T K] = [4, 2], got [4]",
    ),
    "dtype of weights": (
        lambda x, ids: deep_ep.combine(
            jnp.ones((64, H)), _plan(ids), jnp.ones((T, K), jnp.bfloat16)
        ),
        "weights: dtype must be float32, got bfloat16",
    ),
    "odd low-latency tokens": (
        lambda x, ids: _low(x, ids, implementation="cuda"),
        "low_latency_dispatch: implementation='cuda' cannot run here, its low-latency kernels move "
        "tokens of a multiple of 16 elements; use implementation=None or 'xla'",
    ),
    "odd tokens": (
        lambda x, ids: deep_ep.dispatch(x[:, :7], _plan(ids), implementation="cuda"),
        "dispatch: implementation='cuda' cannot run here, its kernels move tokens of a multiple of "
        "16 bytes, these have 28; use implementation=None or 'xla'",
    ),
    "too many SMs": (
        lambda x, ids: deep_ep.dispatch(x, _plan(ids), num_sms=133, implementation="cuda"),
        "dispatch: implementation='cuda' cannot run here, num_sms is at most 132; use "
        "implementation=None or 'xla'",
    ),
    "implementation": (
        lambda x, ids: _plan(ids, implementation="triton"),
        "implementation: must be one of None, 'xla', 'cuda', got 'triton'",
    ),
    "more than max_tokens": (
        lambda x, ids: _low(x, ids, max_tokens=3),
        "x: must have at most max_tokens = 3 tokens, got 4",
    ),
    "max_tokens": (
        lambda x, ids: _low(x, ids, max_tokens=0),
        "max_tokens: must be at least 1, got 0",
    ),
    "too many low-latency rows": (
        lambda x, ids: _low(x, ids, max_tokens=2**27),
        "max_tokens: E * max_tokens must be below 2**31, got 2147483648",
    ),
    "tokens of expert_ids": (
        lambda x, ids: _low(x, ids[1:]),
        "expert_ids: must have shape [T K] = [4, *], got [3, 2]",
    ),
    "rank of x": (
        lambda x, ids: _low(x[0], ids),
        "x: must have 2 dimensions, got shape [8]",
    ),
    "low-latency rows": (
        lambda x, ids: deep_ep.low_latency_combine(
            jnp.ones((2, 31, H)), _low(x, ids)[2], jnp.ones((T, K))
        ),
        "rows: must have shape [E_local R*max_tokens H] = [2, 32, *], got [2, 31, 8]",
    ),
    "not a handle": (
        lambda x, ids: deep_ep.low_latency_combine(x, "handle", jnp.ones((T, K))),
        "handle: must be a DispatchPlan, got str",
    ),
    "a plan for a handle": (
        lambda x, ids: deep_ep.low_latency_combine(
            jnp.ones((2, 32, H)), _plan(ids), jnp.ones((T, K))
        ),
        "handle: must come from low_latency_dispatch, got a plan of plan_dispatch",
    ),
    "a handle for a plan": (
        lambda x, ids: deep_ep.combine(jnp.ones((64, H)), _low(x, ids)[2], jnp.ones((T, K))),
        "plan: must come from plan_dispatch, got a handle of low_latency_dispatch",
    ),
    "not in flight": (
        lambda x, ids: deep_ep.low_latency_dispatch_finish(7),
        "in_flight: must be a DispatchInFlight, got int",
    ),
    "the other in flight": (
        lambda x, ids: deep_ep.low_latency_combine_finish(_start(x, ids)),  # type: ignore[arg-type]
        "in_flight: must be a CombineInFlight, got DispatchInFlight",
    ),
    "finished twice": (
        _finish_twice,
        "in_flight: can be finished once, got one that has been",
    ),
    "text to wait for": (
        lambda x, ids: _low(x, ids, after="x"),
        "after: must hold arrays, got str",
    ),
    "quantize": (
        lambda x, ids: _low(x, ids, quantize="no"),
        "quantize: must be one of True, False, got 'no'",
    ),
    "low-latency gradient": (
        lambda x, ids: jax.grad(lambda x: jnp.sum(_low(x, ids, quantize=False)[0]))(x),
        "low_latency_dispatch: not differentiable, made for inference; use plan_dispatch, "
        "dispatch and combine",
    ),
    "buffer_bytes": (
        lambda x, ids: deep_ep.buffer_bytes(num_tokens=8, hidden=0, num_ranks=8),
        "hidden: must be at least 1, got 0",
    ),
    "buffer_bytes of a dtype that does not travel": (
        lambda x, ids: deep_ep.buffer_bytes(num_tokens=8, hidden=8, num_ranks=8, dtype="fp8"),
        "dtype: must be one of 'bfloat16', 'float32', 'float8_e4m3fn', got 'fp8'",
    ),
    "buffer_bytes of a fraction": (
        lambda x, ids: deep_ep.buffer_bytes(num_tokens=1.5, hidden=8, num_ranks=8),
        "num_tokens: must be a static integer, got 1.5",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    function, message = CASES[name]
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
        _trace(function)
    assert str(error.value) == message


def test_outside_shard_map() -> None:
    with pytest.raises(ValueError) as error:
        _plan(jnp.zeros((T, K), jnp.int32))
    rule = "axis_name: must name axes of the enclosing jax.shard_map, got 'ep'"
    assert str(error.value) == rule
    plans = []
    _trace(lambda x, ids: plans.append(_plan(ids)))
    with pytest.raises(ValueError) as error:
        deep_ep.dispatch(jnp.zeros((T, H)), plans[0])
    rule = "plan.axis_name: must name axes of the enclosing jax.shard_map, got ('ep',)"
    assert str(error.value) == rule


def test_each_branch_of_a_conditional_may_finish_a_call() -> None:
    def finish(in_flight: deep_ep.DispatchInFlight) -> Array:
        return deep_ep.low_latency_dispatch_finish(in_flight)[1]

    def both(x: Array, ids: Array) -> None:
        in_flight = _start(x, ids)
        jax.lax.cond(jnp.sum(ids) > 0, lambda: finish(in_flight), lambda: finish(in_flight) + 1)

    _trace(both)
