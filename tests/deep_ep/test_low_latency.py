"""Low-latency dispatch and combine, whole and in halves, and dispatch of Quantized tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import deep_ep
from jax_ds.deep_ep import reference
from jax_ds.quantization import Quantized, dequantize, quantize_1x128
from tests.deep_ep import cases
from tests.deep_ep.cases import RANKS, ROUTINGS, TOKENS, TOP_K, Setup
from tests.deep_ep.harness import on_mesh, plan_of, routings_of

Array = jax.Array

WIDE = 160  # a whole block of 128 and a ragged one
EXPERTS = 32
MAX_TOKENS = TOKENS + 2
REGION = RANKS * MAX_TOKENS


def _tokens(seed: int = 3) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((RANKS, TOKENS, WIDE)).astype(np.float32)
    return x * np.float32(10.0) ** np.arange(-3, 3, dtype=np.float32)[None, :, None]


def _weights() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((RANKS, TOKENS, TOP_K)).astype(np.float32)


def _routing(ids: np.ndarray) -> reference.Routing:
    capacity = EXPERTS // RANKS * REGION
    return reference.route(ids, num_experts=EXPERTS, capacity=capacity, region=REGION)


def _round_trip(
    x: Array, ids: Array, weights: Array, *, quantize: bool, halves: bool
) -> tuple[Any, ...]:
    """Dispatch, then combine of the rows as they came, in bfloat16."""
    static = {
        "num_experts": EXPERTS,
        "max_tokens": MAX_TOKENS,
        "axis_name": ("node", "gpu"),
        "quantize": quantize,
        "implementation": "xla",
    }
    if halves:
        in_flight = deep_ep.low_latency_dispatch_start(x, ids, **static)
        between = jnp.sin(x)
        rows, sizes, handle = deep_ep.low_latency_dispatch_finish(in_flight, after=between)
    else:
        rows, sizes, handle = deep_ep.low_latency_dispatch(x, ids, **static)
    plain = dequantize(rows) if quantize else rows
    token = jnp.arange(REGION)[None, :, None] < sizes[:, None, None]
    results = jnp.where(token, plain, jnp.nan).astype(jnp.bfloat16)
    if halves:
        flight = deep_ep.low_latency_combine_start(results, handle, weights, implementation="xla")
        y = deep_ep.low_latency_combine_finish(flight, after=(between, sizes))
    else:
        y = deep_ep.low_latency_combine(results, handle, weights, implementation="xla")
    return rows, sizes, y


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("quantize", [False, True], ids=["plain", "fp8"])
def test_low_latency(quantize: bool, halves: bool) -> None:
    setup = Setup("ll", mesh=(2, 4), axes=("node", "gpu"), check_vma=halves, explicit=quantize)
    run = on_mesh(
        setup,
        lambda *args: _round_trip(*args, quantize=quantize, halves=halves),
    )
    x, weights = _tokens(), _weights()
    sent = quantize_1x128(jnp.asarray(x), implementation="xla")
    for name in ROUTINGS:
        ids = cases.expert_ids(name, EXPERTS)
        routing = _routing(ids)
        rows, sizes, y = run(x, ids, weights)
        np.testing.assert_array_equal(sizes, routing.expert_counts, err_msg=name)
        flat = jax.tree.map(lambda a: a.reshape(RANKS, -1, a.shape[-1]), rows)
        if quantize:
            _assert_moved(flat, sent, routing)
            plain = dequantize(jax.tree.map(jnp.asarray, flat))
        else:
            np.testing.assert_array_equal(flat, reference.dispatch(jnp.asarray(x), routing))
            plain = jnp.asarray(flat)
        results = plain.astype(jnp.bfloat16)
        want = reference.combine(results, routing, jnp.asarray(weights), ids, jnp.bfloat16)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, np.asarray(want.astype(jnp.bfloat16)), err_msg=name)


def _assert_moved(rows: Quantized, sent: Quantized, routing: reference.Routing) -> None:
    """The very bits of values and scales have moved; other rows have values 0 and scales 1."""
    held = (routing.expert >= 0)[:, :, None]
    for got, given, empty in ((rows.values, sent.values, 0), (rows.scales, sent.scales, 1)):
        moved = np.asarray(given)[routing.source, routing.token]
        want = np.where(held, moved, np.asarray(empty, moved.dtype))
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@cases.with_implementations(
    *(s for s in cases.SETUPS if s.name in ("explicit", "nodes_drops", "one_device_drops"))
)
def test_dispatch_of_quantized_moves_its_bits(setup: Setup, implementation: str) -> None:
    def run(values: Array, scales: Array, ids: Array) -> Any:
        plan = plan_of(setup, ids, implementation)
        return deep_ep.dispatch(Quantized(values, scales), plan, implementation=implementation)

    x = _tokens()
    x[0, 0, 0], x[1, 1, 130] = np.nan, np.inf
    sent = quantize_1x128(jnp.asarray(x), implementation="xla")
    program = on_mesh(setup, run)
    for name in ("uniform", "duplicates", "none"):
        ids = cases.expert_ids(name, setup.num_experts)
        rows = program(np.asarray(sent.values), np.asarray(sent.scales), ids)
        for g, routing in enumerate(routings_of(setup, ids)):
            part = slice(g * setup.num_ranks, (g + 1) * setup.num_ranks)
            _assert_moved(*jax.tree.map(lambda a, p=part: a[p], (rows, sent)), routing)


def test_finish_waits_for_the_work_given_to_it() -> None:
    """The arrived messages and the results of the work pass one barrier, before any use."""
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(x: Array, ids: Array) -> Array:
        in_flight = deep_ep.low_latency_dispatch_start(
            x, ids, num_experts=EXPERTS, max_tokens=TOKENS, axis_name="ep"
        )
        work = jnp.sin(x)
        rows, sizes, handle = deep_ep.low_latency_dispatch_finish(in_flight, after=work)
        weights = jnp.ones(ids.shape, jnp.float32)
        flight = deep_ep.low_latency_combine_start(dequantize(rows), handle, weights)
        return deep_ep.low_latency_combine_finish(flight, after={"work": work, "sizes": sizes})

    spec = jax.sharding.PartitionSpec("ep")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    x = np.zeros((RANKS * TOKENS, WIDE), np.float32)
    text = jax.jit(mapped).lower(x, np.zeros((RANKS * TOKENS, TOP_K), np.int32)).as_text()
    barriers = [line for line in text.splitlines() if "stablehlo.optimization_barrier" in line]
    work = f"tensor<{TOKENS}x{WIDE}xf32>"
    assert len(barriers) == 2
    assert all(work in line for line in barriers)
    first_use = text.index("stablehlo.sort")
    assert text.index(barriers[0]) < first_use


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [False, True], ids=["plain", "fp8"])
def test_kernels_on_one_gpu(quantize: bool) -> None:
    """A single rank, without peers; `test_multirank_low_latency.py` has several."""
    mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    region = TOKENS + 2

    def run(x: Array, ids: Array, weights: Array, implementation: Any, halves: bool) -> Any:
        static: Any = {
            "num_experts": EXPERTS,
            "max_tokens": region,
            "axis_name": "ep",
            "quantize": quantize,
            "implementation": implementation,
        }
        if halves:
            sent = deep_ep.low_latency_dispatch_start(x, ids, **static)
            rows, sizes, handle = deep_ep.low_latency_dispatch_finish(sent, after=jnp.sin(x))
        else:
            rows, sizes, handle = deep_ep.low_latency_dispatch(x, ids, **static)
        held = jnp.arange(region)[None, :, None] < sizes[:, None, None]
        rows = jax.tree.map(lambda a: jnp.where(held, a, jnp.zeros((), a.dtype)), rows)
        out = (dequantize(rows) if quantize else rows).astype(jnp.bfloat16)
        out = jnp.where(held, out, jnp.nan)
        if halves:
            flight = deep_ep.low_latency_combine_start(
                out, handle, weights, implementation=implementation
            )
            y = deep_ep.low_latency_combine_finish(flight, after=sizes)
        else:
            y = deep_ep.low_latency_combine(out, handle, weights, implementation=implementation)
        return rows, sizes, handle, y

    def program(implementation: Any, halves: bool) -> Any:
        spec = jax.sharding.PartitionSpec()
        return jax.jit(
            jax.shard_map(
                lambda *args: run(*args, implementation, halves),
                mesh=mesh,
                in_specs=spec,
                out_specs=spec,
                check_vma=False,
            )
        )

    programs = [program(*which) for which in (("xla", False), ("cuda", False), ("cuda", True))]
    # Powers of two: XLA's division on a GPU is exact for them.
    exponents = np.random.default_rng(7).integers(-7, 8, (TOKENS, WIDE))
    x = jnp.asarray(np.exp2(exponents), jnp.bfloat16)
    weights = jnp.asarray(_weights()[0])
    for name in ROUTINGS:
        ids = jnp.asarray(cases.expert_ids(name, EXPERTS)[0])
        want, *others = [run(x, ids, weights) for run in programs]
        for got in others:
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
