"""The low-latency kernels, one process for each rank: `make gpu-test-multirank` starts them."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_ep
from jax_ds.quantization import Quantized, quantize_1x128
from tests.deep_ep.ranks import (
    ROUTINGS,
    Program,
    bits_of,
    compiles,
    different,
    expert_ids,
    far,
    group_size,
    key_and_routing,
    mine,
)
from tests.deep_ep.ranks import Sizes as CommonSizes

pytestmark = pytest.mark.multigpu

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sizes(CommonSizes):
    """Static sizes of one program; experts are per rank."""

    tokens: int = 40
    max_tokens: int = 48
    hidden: int = 512
    quantize: bool = True


SIZES = {
    "default": Sizes(),
    "v3": Sizes(tokens=128, max_tokens=128, hidden=7168, top_k=8, experts=32),
    "wide": Sizes(tokens=17, max_tokens=20, hidden=8192, top_k=16, experts=64),
    "one_expert_each": Sizes(tokens=70, max_tokens=70, hidden=640, top_k=8, experts=1),
    "top_1": Sizes(tokens=33, hidden=528, top_k=1, experts=3, quantize=False),
    "least": Sizes(tokens=1, max_tokens=1, top_k=1, experts=1),
    "no_tokens": Sizes(tokens=0, max_tokens=2, experts=64),
    "float32": Sizes(tokens=5, hidden=1040, top_k=6, experts=5, dtype="float32"),
    "float32_plain": Sizes(
        tokens=9, hidden=2048, top_k=3, experts=40, dtype="float32", quantize=False
    ),
}


def _dispatch(sizes: Sizes, x: Array, ids: Array, implementation: Any, halves: bool) -> Any:
    static: dict[str, Any] = {
        "num_experts": sizes.num_experts,
        "max_tokens": sizes.max_tokens,
        "axis_name": "ep",
        "quantize": sizes.quantize,
        "implementation": implementation,
    }
    if not halves:
        return deep_ep.low_latency_dispatch(x, ids, **static)
    in_flight = deep_ep.low_latency_dispatch_start(x, ids, **static)
    return deep_ep.low_latency_dispatch_finish(in_flight, after=jnp.sin(x))


def _combine(rows: Array, handle: Any, weights: Array, implementation: Any, halves: bool) -> Array:
    if not halves:
        return deep_ep.low_latency_combine(rows, handle, weights, implementation=implementation)
    in_flight = deep_ep.low_latency_combine_start(
        rows, handle, weights, implementation=implementation
    )
    return deep_ep.low_latency_combine_finish(in_flight, after=jnp.cos(weights))


def _operands(sizes: Sizes, key: Array, routing: Array) -> tuple[Array, Array, Array]:
    """Tokens, ids and weights: blocks of very different magnitudes, zeros and a NaN."""
    keys = jax.random.split(key, 3)
    ids = expert_ids(sizes, keys[0], routing)
    x = jax.random.normal(keys[1], (sizes.tokens, sizes.hidden))
    x = x * 10.0 ** (jnp.arange(sizes.hidden)[None] // 128 % 9 - 4)
    x = x.at[:, :128].mul((jnp.arange(sizes.tokens) % 3 > 0)[:, None])
    x = x.at[:1, -1].set(jnp.nan).astype(sizes.dtype)
    # Behind a barrier, or XLA would quantize what was not rounded to bfloat16 yet.
    x, weights = jax.lax.optimization_barrier((x, jax.random.normal(keys[2], ids.shape)))
    return x, ids, weights


def _results(
    sizes: Sizes, key: Array, routing: Array, implementation: str, halves: bool = False
) -> dict[str, Any]:
    """What dispatch and combine return on one rank; rows without a token as zero.

    The portable implementation moves tokens as they are and the quantizer quantizes the rows: on a
    GPU XLA divides with an error of two units in the last place, and now and then a value differs.
    """
    key = mine(key)
    x, ids, weights = _operands(sizes, key, routing)
    afterwards = sizes.quantize and implementation == "xla"
    sent = dataclasses.replace(sizes, quantize=False) if afterwards else sizes
    rows, counts, handle = _dispatch(sent, x, ids, implementation, halves)
    if afterwards:
        rows = quantize_1x128(rows)
    held = jnp.arange(rows.shape[1])[None, :, None] < counts[:, None, None]
    out = jax.random.normal(key, (*rows.shape[:2], sizes.hidden)).astype(sizes.dtype)
    out = jax.lax.optimization_barrier(jnp.where(held, out, jnp.nan))
    return {
        "rows": jax.tree.map(
            lambda a: jnp.where(held, a, jnp.zeros((), a.dtype)),
            (rows.values, rows.scales) if isinstance(rows, Quantized) else rows,
        ),
        "counts": (counts, handle.group_sizes, handle.expert_counts),
        "row_source": handle.row_source,
        "row_of": handle.row_of,
        "column": handle.column,
        "needed": handle.route.needed.astype(jnp.uint8),
        "num_dropped": handle.num_dropped[None],
        "y": _combine(out, handle, weights, implementation, halves),
    }


@functools.cache
def _compare(name: str) -> Program:
    sizes = SIZES[name]
    tolerance = 1e-5 if sizes.dtype == "float32" else 2e-2

    def run(key: Array, routing: Array) -> dict[str, Any]:
        want = _results(sizes, key, routing, "xla")
        whole = _results(sizes, key, routing, "cuda")
        halves = _results(sizes, key, routing, "cuda", halves=True)
        wrong = {name: jax.tree.map(different, whole[name], want[name]) for name in want}
        wrong["y"] = far(whole["y"], want["y"], tolerance)
        wrong["halves"] = jax.tree.map(different, halves, whole)
        return {"wrong": wrong, "live": jnp.sum(want["counts"][0])}

    return Program(run, *key_and_routing())


@compiles(_compare)
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_portable_implementation(name: str, ranks: int) -> None:
    for seed, routing in enumerate(ROUTINGS):
        counts = _compare(name)(*key_and_routing(seed, routing))
        assert not any(jax.tree.leaves(counts["wrong"])), (routing, counts)
        assert (counts["live"] > 0) == (routing != "none" and SIZES[name].tokens > 0)


TURNS = ("default", "v3", "top_1", "float32")


@compiles(lambda: map(_compare, TURNS))
def test_programs_of_different_sizes_take_turns(ranks: int) -> None:
    for seed in range(12):
        given = key_and_routing(100 + seed, ROUTINGS[seed % len(ROUTINGS)])
        counts = _compare(TURNS[seed % len(TURNS)])(*given)
        assert not any(jax.tree.leaves(counts["wrong"])), (seed, counts)


def _round(sizes: Sizes, key: Array, delay: int) -> Array:
    """Wrong elements of a round of small integers, whose results every rank works out by itself."""
    ranks = group_size()
    num_experts = sizes.experts * ranks
    me = jax.lax.axis_index("ep")
    keys = jax.vmap(lambda rank: jax.random.fold_in(key, rank))(jnp.arange(ranks))
    shape = (sizes.tokens, sizes.top_k)

    def of_rank(key: Array) -> tuple[Array, Array, Array]:
        ids = jax.random.randint(key, shape, -num_experts // 4, num_experts)
        x = jax.random.randint(key, (sizes.tokens, sizes.hidden), -8, 9)
        return ids, x.astype(jnp.bfloat16), jax.random.randint(key, shape, 0, 3)

    ids, x, weights = jax.vmap(of_rank)(keys)
    # A loop of random length: this rank comes late to the exchange.
    turns = jax.random.randint(keys[me], (), 0, delay + 1)
    late = jax.lax.fori_loop(0, turns, lambda _, a: a * 1.0001, jnp.ones(()))
    own = x[me] * jnp.where(late > 0, 1, 0).astype(x.dtype)

    rows, counts, handle = _dispatch(sizes, own, ids[me], "cuda", halves=False)
    sent = quantize_1x128(x.reshape(-1, sizes.hidden))
    has_row = handle.row_of >= 0
    at = jnp.maximum(handle.row_of, 0)

    def moved(got: Array, want: Array) -> Array:
        got = got.reshape(-1, got.shape[-1])[at]
        return jnp.sum((bits_of(got) != bits_of(want)[:, None]) & has_row[:, :, None])

    wrong = moved(rows.values, sent.values) + moved(rows.scales, sent.scales)
    named = jnp.any(
        ids.reshape(-1, sizes.top_k, 1)
        == me * sizes.experts + jnp.arange(sizes.experts)[None, None],
        axis=1,
    )
    wrong += jnp.sum(counts != jnp.sum(named, axis=0)) + jnp.sum(
        jnp.sum(has_row, axis=1) != jnp.sum(named, axis=1)
    )

    plain = dataclasses.replace(sizes, quantize=False)
    rows, _, handle = _dispatch(plain, own, ids[me], "cuda", halves=True)
    factor = 1 + (me * sizes.experts + jnp.arange(sizes.experts)) % 3
    out = rows * factor[:, None, None].astype(rows.dtype)
    y = _combine(out, handle, weights[me].astype(jnp.float32), "cuda", halves=False)
    gain = jnp.where(ids[me] >= 0, weights[me] * (1 + ids[me] % 3), 0).sum(1)
    want = x[me].astype(jnp.float32) * gain[:, None].astype(jnp.float32)
    return wrong + jnp.sum(y.astype(jnp.float32) != want)


ROUNDS = 20_000


@functools.cache
def _many_rounds(rounds: int, delay: int) -> Program:
    """Random routing in every round, and ranks at random delays."""
    sizes = Sizes(tokens=8, max_tokens=8, hidden=256, top_k=3)

    def run(key: Array) -> Array:
        start = jax.lax.pcast(jnp.zeros((), jnp.int32), ("node", "ep"), to="varying")
        node = jax.random.fold_in(key, jax.lax.axis_index("node"))

        def step(wrong: Array, i: Array) -> tuple[Array, None]:
            bad = _round(sizes, jax.random.fold_in(node, i), delay)
            return wrong + bad.astype(jnp.int32), None

        return jax.lax.scan(step, start, jnp.arange(rounds))[0]

    return Program(run)


@compiles(_many_rounds)
@pytest.mark.parametrize(("rounds", "delay"), [(ROUNDS, 0), (ROUNDS // 20, 40)])
def test_many_rounds(rounds: int, delay: int, ranks: int) -> None:
    begin = time.monotonic()
    assert _many_rounds(rounds, delay)(jax.random.key(5 + delay)) == 0
    print(f"{rounds} rounds, delay {delay}: {time.monotonic() - begin:.1f} s")


@functools.cache
def _command_buffers() -> Program:
    sizes = Sizes(tokens=16, max_tokens=16, hidden=512, top_k=4)
    rounds = 3

    def run(key: Array) -> Array:
        node = jax.random.fold_in(key, jax.lax.axis_index("node"))
        keys = jax.random.split(node, rounds)
        return sum(_round(sizes, keys[i], 0) for i in range(rounds)).astype(jnp.int32)

    return Program(run, compiler_options={"xla_gpu_graph_min_graph_size": 1})


@compiles(_command_buffers)
def test_command_buffers(ranks: int) -> None:
    """Captured once, replayed with other routings; an odd number of rounds changes the slots."""
    for seed in range(12):
        assert _command_buffers()(jax.random.key(seed)) == 0, seed


def test_nothing_was_reported(ranks: int) -> None:
    deep_ep.check()
