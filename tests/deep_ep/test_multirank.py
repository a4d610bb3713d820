"""The communication kernels against the portable implementation, one process for each rank.

`make gpu-test-multirank` starts the processes. Every rank makes its own operands from a key; what
differs between the implementations is counted on the devices and summed over all ranks. With
several nodes each has an expert-parallel group of its own.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds.quantization import quantize_1x128
from tests.gpu import multirank

pytestmark = pytest.mark.multigpu

Array = jax.Array


@pytest.fixture(scope="module")
def ranks() -> int:
    if not multirank.started_here():
        pytest.skip("run by make gpu-test-multirank")
    return _join()


@functools.cache
def _join() -> int:
    _, ranks = multirank.join()
    return ranks // _nodes()


def _nodes() -> int:
    return int(os.environ.get("JAX_DS_TEST_NODES", "1"))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one program; experts are per rank."""

    tokens: int = 96
    hidden: int = 1024
    top_k: int = 4
    experts: int = 2
    capacity: int | None = None
    alignment: int = 1
    dtype: str = "bfloat16"
    num_sms: int | None = None


SIZES = {
    "default": Sizes(),
    "few_columns": Sizes(tokens=33, hidden=7168, top_k=8, experts=1, num_sms=3),
    "drops": Sizes(tokens=200, hidden=512, top_k=8, experts=32, capacity=384, alignment=128),
    "float32": Sizes(tokens=7, hidden=640, top_k=16, experts=3, dtype="float32", num_sms=1),
}

ROUTINGS = ("uniform", "one_expert", "one_rank", "none", "ragged", "repeated", "not_experts")


def _ids(sizes: Sizes, num_experts: int, key: Array, routing: Array) -> Array:
    """Expert ids `[T, K]` of this rank; `routing` indexes ROUTINGS."""
    shape = (sizes.tokens, sizes.top_k)
    rank = jax.lax.axis_index("ep")
    draws = jax.random.randint(key, shape, 0, num_experts)
    one = jnp.where(jnp.arange(sizes.top_k)[None] == 1, num_experts // 2, -1)
    kinds = [
        draws,
        jnp.broadcast_to(one, shape),
        num_experts - 1 - draws % sizes.experts,
        jnp.full(shape, -1),
        jnp.where(jnp.arange(sizes.tokens)[:, None] % 5 <= rank % 4, draws, -1),
        jnp.broadcast_to(draws[:, :1], shape),
        draws * 2 - num_experts // 2,
    ]
    return jnp.stack(kinds)[routing].astype(jnp.int32)


def _on_ranks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of replicated arguments on every rank, jitted; results are summed over ranks."""
    axes = ("node", "ep")
    shape = (_nodes(), jax.device_count() // _nodes())
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2)

    def per_rank(*args: Any) -> Any:
        args = jax.tree.map(lambda a: jax.lax.pcast(a, axes, to="varying"), args)
        return jax.tree.map(lambda a: jax.lax.psum(a, axes), function(*args))

    mapped = jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=P(), out_specs=P()))
    return lambda *args: jax.tree.map(np.asarray, mapped(*args))


def _mine(key: Array) -> Array:
    """A key that no other rank has."""
    return jax.random.fold_in(key, jax.lax.axis_index(("node", "ep")))


def _everything(sizes: Sizes, key: Array, routing: Array, implementation: str) -> dict[str, Any]:
    """Values and gradients of both functions on one rank."""
    num_experts = sizes.experts * jax.lax.axis_size("ep")
    keys = jax.random.split(_mine(key), 6)
    dtype = jnp.dtype(sizes.dtype)
    ids = _ids(sizes, num_experts, keys[0], routing)
    plan = deep_ep.plan_dispatch(
        ids,
        num_experts=num_experts,
        axis_name="ep",
        capacity=sizes.capacity,
        expert_alignment=sizes.alignment,
    )
    capacity = plan.row_source.shape[0]
    options = {"implementation": implementation, "num_sms": sizes.num_sms}
    x, g = jax.random.normal(keys[1], (2, sizes.tokens, sizes.hidden)).astype(dtype)
    rows, d_rows = jax.random.normal(keys[2], (2, capacity, sizes.hidden)).astype(dtype)
    rows = jnp.where(plan.row_source[:, None] >= 0, rows, jnp.nan)
    weights = jax.random.normal(keys[3], ids.shape)
    dispatched, pull = jax.vjp(lambda x: deep_ep.dispatch(x, plan, **options), x)
    y, pull_combine = jax.vjp(lambda r, w: deep_ep.combine(r, plan, w, **options), rows, weights)
    quantized = deep_ep.dispatch(quantize_1x128(x), plan, **options)
    d_combine = pull_combine(g)
    return {
        "rows": dispatched,
        "values": quantized.values,
        "scales": quantized.scales,
        "y": y,
        "d_x": pull(d_rows)[0],
        "d_combine_rows": d_combine[0],
        "d_combine_weights": d_combine[1],
    }


def _bits(a: Array) -> Array:
    return jax.lax.bitcast_convert_type(
        a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    )


def _different(a: Array, b: Array) -> Array:
    """Elements with other bits."""
    return jnp.sum(_bits(a) != _bits(b), dtype=jnp.int32)


def _far(a: Array, b: Array, tolerance: float) -> Array:
    """Elements further apart than the tolerance, or NaN."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(~(jnp.abs(a - b) <= tolerance * (1 + jnp.abs(b))), dtype=jnp.int32)


@functools.cache
def _compare(sizes: Sizes) -> Callable[..., Any]:
    tolerance = 1e-5 if sizes.dtype == "float32" else 2e-2

    def run(key: Array, routing: Array) -> dict[str, Array]:
        got, want = (_everything(sizes, key, routing, i) for i in ("cuda", "xla"))
        exact = ("rows", "values", "scales", "d_combine_rows")
        counts = {name: _different(got[name], want[name]) for name in exact}
        for name in ("y", "d_x", "d_combine_weights"):
            counts[name] = _far(got[name], want[name], tolerance)
        again = _everything(sizes, key, routing, "cuda")
        for name in got:
            counts[f"{name} again"] = _different(got[name], again[name])
        counts["live"] = jnp.sum(jnp.any(want["values"].astype(jnp.float32) != 0, axis=1))
        return counts

    return _on_ranks(run)


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_portable_implementation(name: str, ranks: int) -> None:
    run = _compare(SIZES[name])
    for seed, routing in enumerate(ROUTINGS):
        counts = run(jax.random.key(seed), jnp.asarray(ROUTINGS.index(routing)))
        live = counts.pop("live")
        assert not any(counts.values()), (routing, counts)
        assert (live > 0) == (routing != "none")


def test_two_programs_take_turns(ranks: int) -> None:
    """Their windows are shared or not, by size; every round has its own layout."""
    programs = [_compare(SIZES[name]) for name in ("default", "few_columns", "drops")]
    for seed in range(12):
        counts = programs[seed % 3](jax.random.key(100 + seed), jnp.asarray(seed % len(ROUTINGS)))
        counts.pop("live")
        assert not any(counts.values()), (seed, counts)


def test_gradient_of_a_scan_over_layers(ranks: int) -> None:
    sizes = Sizes(tokens=40, hidden=512, experts=4)
    layers = 5

    def loss(x: Array, scale: Array, key: Array, implementation: str) -> Array:
        num_experts = sizes.experts * ranks

        @jax.checkpoint
        def layer(x: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
            key, scale = step
            key = _mine(key)
            ids = _ids(sizes, num_experts, key, jnp.asarray(0))
            weights = jax.random.uniform(key, ids.shape)
            plan = deep_ep.plan_dispatch(ids, num_experts=num_experts, axis_name="ep")
            rows = deep_ep.dispatch(x, plan, implementation=implementation)
            rows = jnp.tanh(rows * scale[None]).astype(x.dtype)
            y = deep_ep.combine(rows, plan, weights, implementation=implementation)
            return x + y, None

        x, _ = jax.lax.scan(layer, x, (jax.random.split(key, layers), scale))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def run(key: Array) -> dict[str, Array]:
        mine = _mine(key)
        x = jax.random.normal(mine, (sizes.tokens, sizes.hidden)).astype(jnp.bfloat16)
        scale = jax.random.normal(mine, (layers, sizes.hidden)).astype(jnp.bfloat16)
        got = jax.value_and_grad(loss, (0, 1))(x, scale, key, "cuda")
        want = jax.value_and_grad(loss, (0, 1))(x, scale, key, "xla")
        again = jax.value_and_grad(loss, (0, 1))(x, scale, key, "cuda")
        close = jax.tree.map(
            lambda a, b: (
                jnp.linalg.norm((a - b).astype(jnp.float32).reshape(-1))
                / (jnp.linalg.norm(b.astype(jnp.float32).reshape(-1)) + 1e-6)
            ),
            got,
            want,
        )
        same = jax.tree.map(
            lambda a, b: _different(jnp.atleast_1d(a), jnp.atleast_1d(b)), got, again
        )
        return {"close": close, "same": same}

    result = _on_ranks(run)(jax.random.key(7))
    assert all(error < 0.02 * ranks for error in jax.tree.leaves(result["close"])), result
    assert not any(jax.tree.leaves(result["same"])), result


def test_many_rounds_with_delays(ranks: int) -> None:
    """Random routings, ranks slowed down at random against each other; every bit is checked."""
    sizes = Sizes(tokens=64, hidden=512, top_k=3, experts=2)
    rounds = 400

    def run(key: Array) -> dict[str, Array]:
        num_experts = sizes.experts * ranks

        def step(wrong: Array, key: Array) -> tuple[Array, None]:
            key = _mine(key)
            ids = _ids(sizes, num_experts, key, jax.random.randint(key, (), 0, len(ROUTINGS)))
            x = jax.random.normal(key, (sizes.tokens, sizes.hidden)).astype(jnp.bfloat16)
            # A loop of random length: this rank comes late to the exchange.
            turns = jax.random.randint(key, (), 0, 40)
            late = jax.lax.fori_loop(0, turns, lambda _, a: a * 1.0001, jnp.ones(()))
            x = x * jnp.where(late > 0, 1, 0).astype(x.dtype)
            plan = deep_ep.plan_dispatch(ids, num_experts=num_experts, axis_name="ep")
            rows = [deep_ep.dispatch(x, plan, implementation=i) for i in ("cuda", "xla")]
            y = [deep_ep.combine(rows[1], plan, None, implementation=i) for i in ("cuda", "xla")]
            bad = _different(*rows) + _far(*y, 2e-2)
            return wrong + bad, None

        start = jax.lax.pcast(jnp.zeros((), jnp.int32), ("node", "ep"), to="varying")
        wrong, _ = jax.lax.scan(step, start, jax.random.split(key, rounds))
        return {"wrong": wrong}

    assert _on_ranks(run)(jax.random.key(11))["wrong"] == 0


def test_nothing_was_reported(ranks: int) -> None:
    deep_ep.check()


def test_a_stopped_rank_is_reported(ranks: int) -> None:
    """The last test: the device stays dead. The last rank does not come to the second round."""
    if ranks == 1 or _nodes() > 1:
        pytest.skip("needs one group with a peer")
    sizes = Sizes(tokens=16, hidden=512)
    mesh = jax.make_mesh((ranks,), ("ep",), axis_types=(AxisType.Auto,))
    on_ranks = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("ep"))

    @jax.jit
    @functools.partial(on_ranks, in_specs=P())
    def make(key: Array) -> Any:
        key = jax.random.fold_in(key, jax.lax.axis_index("ep"))
        ids = _ids(sizes, sizes.experts * ranks, key, jnp.asarray(0))
        plan = deep_ep.plan_dispatch(ids, num_experts=sizes.experts * ranks, axis_name="ep")
        x = jnp.ones((sizes.tokens, sizes.hidden), jnp.bfloat16)
        return jax.tree.map(lambda a: a[None], (x, plan))

    # Only a kernel communicates here: XLA's own collectives would wait without end.
    @jax.jit
    @functools.partial(on_ranks, in_specs=P("ep"))
    def send(x: Array, plan: Any) -> Array:
        x, plan = jax.tree.map(lambda a: a[0], (x, plan))
        return deep_ep.dispatch(x, plan, implementation="cuda")[None]

    operands = jax.block_until_ready(make(jax.random.key(3)))
    jax.block_until_ready(send(*operands))
    deep_ep.check()
    last = ranks - 1
    limit = float(os.environ["JAX_DS_TIMEOUT_S"])
    if jax.process_index() == last:
        time.sleep(limit + 4)
        return
    start = time.monotonic()
    poisoned = jax.block_until_ready(send(*operands)).addressable_shards[0].data
    assert limit * 0.9 < time.monotonic() - start < limit + 3
    assert np.isnan(np.asarray(poisoned, np.float32)).all()
    sentence = (
        f"deep_ep.dispatch, rank {jax.process_index()}, round .*: waited in vain for rank {last}"
    )
    with pytest.raises(RuntimeError, match=sentence):
        deep_ep.check()
    with pytest.raises(Exception, match=sentence):
        jax.block_until_ready(send(*operands))
