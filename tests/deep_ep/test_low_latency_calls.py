"""What the low-latency custom calls are made of and what may be under way, without a GPU."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds.deep_ep import low_latency_ffi
from jax_ds.deep_ep.plan import PlanSizes
from jax_ds.quantization import dequantize

Array = jax.Array

RANKS, T, K, H, E, MAX_TOKENS = 4, 5, 2, 256, 16, 6
DISPATCH: dict[str, Any] = {"num_experts": E, "max_tokens": MAX_TOKENS, "axis_name": "ep"}


def _traced(
    function: Callable[..., Any], hidden: int = H, tokens: int = T, dtype: Any = None
) -> Any:
    """`function(x, ids)` of per-device arrays on a mesh with a data axis."""
    mesh = jax.make_mesh((2, RANKS), ("data", "ep"), axis_types=(AxisType.Auto,) * 2)
    spec = P(("data", "ep"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((8 * tokens, hidden), dtype or jnp.bfloat16)
    return jax.jit(mapped).trace(x, jax.ShapeDtypeStruct((8 * tokens, K), jnp.int32))


def _calls(traced: Any) -> list[tuple[str, str]]:
    """Name and text of every communication kernel, in order."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"custom_call @jax_ds_deep_ep_(\w+)(.*)", text)
    assert text.count('_xla_stream_annotation = "collective"') >= len(found)
    return found


def _whole(x: Array, ids: Array, **options: Any) -> Array:
    rows, _, handle = deep_ep.low_latency_dispatch(x, ids, **DISPATCH, **options)
    plain = dequantize(rows) if options.get("quantize", True) else rows
    weights = jnp.ones(ids.shape, jnp.float32)
    return deep_ep.low_latency_combine(plain.astype(x.dtype), handle, weights)


def _halves(x: Array, ids: Array) -> Array:
    sent = deep_ep.low_latency_dispatch_start(x, ids, channel=3, **DISPATCH)
    rows, _, handle = deep_ep.low_latency_dispatch_finish(sent, after=jnp.sin(x))
    flat = dequantize(rows).astype(x.dtype)
    weights = jnp.ones(ids.shape, jnp.float32)
    return deep_ep.low_latency_combine_finish(
        deep_ep.low_latency_combine_start(flat, handle, weights)
    )


def test_whole_calls() -> None:
    """One kernel each way and no collective: nothing is exchanged beforehand."""
    traced = _traced(_whole)
    calls = _calls(traced)
    assert [name for name, _ in calls] == ["low_latency_dispatch", "low_latency_combine"]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo\.(all_to_all|all_gather|all_reduce|collective)", text)
    for name, call in calls:
        for attribute in (
            "channel = 0 : i64",
            f"experts = {E // RANKS} : i64",
            f"hidden = {H} : i64",
            f"num_ranks = {RANKS} : i64",
            f"num_tokens = {T} : i64",
            f"region = {RANKS * MAX_TOKENS} : i64",
            f"top_k = {K} : i64",
            "groups = dense<[0, 1, 2, 3, 4, 5, 6, 7]>",
            'dtype = "bfloat16"',
            'half = "whole"',
        ):
            assert attribute in call, name
    assert "quantize = true" in calls[0][1]
    rows = E // RANKS * RANKS * MAX_TOKENS
    assert f"tensor<{rows}x{H}xf8E4M3FN>" in calls[0][1]
    assert f"tensor<{rows}x{H // 128}xf32>" in calls[0][1]


def test_halves() -> None:
    calls = _calls(_traced(_halves))
    assert [(name, re.findall(r'half = "(\w+)"', call)) for name, call in calls] == [
        ("low_latency_dispatch_start", ["start"]),
        ("low_latency_dispatch_finish", ["finish"]),
        ("low_latency_combine_start", ["start"]),
        ("low_latency_combine_finish", ["finish"]),
    ]
    assert all("channel = 3 : i64" in call for _, call in calls)
    # XLA awaits a call of several results at once; only what is received has several.
    several = [name for name, call in calls if "-> (" in call]
    assert several == ["low_latency_dispatch_finish"]


def test_unquantized() -> None:
    ((_, dispatch), _) = _calls(_traced(lambda x, ids: _whole(x, ids, quantize=False)))
    assert "quantize = false" in dispatch
    assert "f8E4M3FN" not in dispatch


def test_no_tokens_still_take_part() -> None:
    calls = _calls(_traced(_whole, tokens=0))
    assert all("num_tokens = 1 : i64" in call for _, call in calls)


def test_odd_sizes_stay_portable() -> None:
    assert not _calls(_traced(_whole, hidden=264))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"num_experts": 8 * 64}, None),
        ({"num_tokens": 1 << 14}, "131072 tokens of all ranks"),
        ({"num_tokens": 2048, "num_experts": 8 * 64}, "do not serve 64 experts of a rank"),
        ({"num_tokens": 2560, "num_experts": 8 * 32}, None),
    ],
)
def test_what_fits_in_shared_memory(changes: dict[str, Any], reason: str | None) -> None:
    """The same limits as in the plan of the host (tests/native/deep_ep_plan_test.cc)."""
    given: dict[str, Any] = {
        "axis_name": ("ep",),
        "num_ranks": 8,
        "num_experts": 256,
        "num_tokens": 128,
        "top_k": 8,
        "capacity": 1,
        "expert_alignment": 1,
        "channel": 0,
    }
    said = low_latency_ffi.unsupported(PlanSizes(**given | changes), jnp.zeros((1, 7168)))
    assert said is None if reason is None else reason in (said or "")


def _start(x: Array, ids: Array, **options: Any) -> Any:
    return deep_ep.low_latency_dispatch_start(x, ids, **DISPATCH, **options)


def _rows(in_flight: Any, **options: Any) -> Array:
    rows, _, _ = deep_ep.low_latency_dispatch_finish(in_flight, **options)
    return rows.values


def test_two_under_way() -> None:
    def run(x: Array, ids: Array) -> Any:
        first, second = _start(x, ids), _start(x, ids)
        results = [_rows(second), _rows(first)]
        return [*results, _rows(_start(x, ids, after=results))]

    calls = _calls(_traced(run))
    assert len(calls) == 6


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_three_under_way(operation: str) -> None:
    def start(x: Array, ids: Array, channel: int) -> Any:
        if operation == "dispatch":
            return _start(x, ids, channel=channel)
        rows, _, handle = deep_ep.low_latency_dispatch(x, ids, **DISPATCH, channel=channel)
        weights = jnp.ones(ids.shape, jnp.float32)
        return deep_ep.low_latency_combine_start(dequantize(rows), handle, weights)

    def finish(in_flight: Any) -> Array:
        if operation == "dispatch":
            return _rows(in_flight)
        return deep_ep.low_latency_combine_finish(in_flight)

    def run(x: Array, ids: Array, third: int) -> Any:
        return [finish(f) for f in [start(x, ids, c) for c in (1, 1, third)]]

    sentence = f"channel: 2 calls of low_latency_{operation} can be under way, and as many are on "
    with pytest.raises(ValueError, match=f"{sentence}channel 1; finish one"):
        _traced(lambda x, ids: run(x, ids, 1))
    # Another channel has slots of its own, and the failed trace leaves nothing behind.
    _traced(lambda x, ids: run(x, ids, 2))
