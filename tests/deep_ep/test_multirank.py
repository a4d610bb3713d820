"""The communication kernels against the portable implementation, one process for each rank.

With several nodes each has an expert-parallel group of its own; `test_multinode.py` has those over
both axes.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_ep
from tests.deep_ep.ranks import (
    ROUTINGS,
    Program,
    Sizes,
    check,
    compare,
    compiles,
    different,
    expert_ids,
    far,
    group_size,
    mine,
    nodes,
)

pytestmark = pytest.mark.multigpu

Array = jax.Array


SIZES = {
    "default": Sizes(),
    "few_columns": Sizes(tokens=33, hidden=7168, top_k=8, experts=1, num_sms=3),
    "drops": Sizes(tokens=200, hidden=512, top_k=8, experts=32, capacity=384, alignment=128),
    "float32": Sizes(tokens=7, hidden=640, top_k=16, experts=3, dtype="float32", num_sms=1),
    "widest": Sizes(tokens=24, hidden=8192, top_k=16, experts=64),
    "rounds": Sizes(tokens=150, hidden=7168, top_k=8, experts=4),  # five, the last one shorter
    "many_tokens": Sizes(tokens=8192, hidden=512, top_k=2, experts=1),
    "least": Sizes(tokens=1, hidden=512, top_k=1, experts=1),
    "no_tokens": Sizes(tokens=0, hidden=512, experts=64),
}


def _compare(name: str) -> Program:
    if nodes() > 1 and name != "default":
        pytest.skip("groups of one node run all sizes without NODES")
    return compare(SIZES[name])


@compiles(_compare)
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_portable_implementation(name: str, ranks: int) -> None:
    _compare(name)
    for seed, routing in enumerate(ROUTINGS):
        check(SIZES[name], seed, routing)


TURNS = ("default", "few_columns", "drops")


def _take_turns() -> list[Program]:
    if nodes() > 1:
        pytest.skip("groups of one node take turns without NODES")
    return [compare(SIZES[name]) for name in TURNS]


@compiles(_take_turns)
def test_programs_take_turns(ranks: int) -> None:
    """Their windows are shared or not, by size; every round has its own layout."""
    _take_turns()
    for seed in range(12):
        check(SIZES[TURNS[seed % len(TURNS)]], 100 + seed, ROUTINGS[seed % len(ROUTINGS)])


@functools.cache
def _gradient() -> Program:
    sizes = Sizes(tokens=40, hidden=512, experts=4)
    layers = 5

    def loss(x: Array, scale: Array, key: Array, implementation: str) -> Array:
        @jax.checkpoint
        def layer(x: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
            key, scale = step
            key = mine(key)
            ids = expert_ids(sizes, key, jnp.asarray(0))
            weights = jax.random.uniform(key, ids.shape)
            plan = sizes.plan(ids)
            rows = deep_ep.dispatch(x, plan, implementation=implementation)
            rows = jnp.tanh(rows * scale[None]).astype(x.dtype)
            y = deep_ep.combine(rows, plan, weights, implementation=implementation)
            return x + y, None

        x, _ = jax.lax.scan(layer, x, (jax.random.split(key, layers), scale))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def run(key: Array) -> dict[str, Array]:
        own_key = mine(key)
        x = jax.random.normal(own_key, (sizes.tokens, sizes.hidden)).astype(jnp.bfloat16)
        scale = jax.random.normal(own_key, (layers, sizes.hidden)).astype(jnp.bfloat16)
        got = jax.value_and_grad(loss, (0, 1))(x, scale, key, "cuda")
        want = jax.value_and_grad(loss, (0, 1))(x, scale, key, "xla")
        behind = jax.lax.optimization_barrier(key)  # or XLA would make one call of two
        again = jax.value_and_grad(loss, (0, 1))(x, scale, behind, "cuda")
        close = jax.tree.map(
            lambda a, b: (
                jnp.linalg.norm((a - b).astype(jnp.float32).reshape(-1))
                / (jnp.linalg.norm(b.astype(jnp.float32).reshape(-1)) + 1e-6)
            ),
            got,
            want,
        )
        same = jax.tree.map(
            lambda a, b: different(jnp.atleast_1d(a), jnp.atleast_1d(b)), got, again
        )
        return {"close": close, "same": same}

    return Program(run)


@compiles(_gradient)
def test_gradient_of_a_scan_over_layers(ranks: int) -> None:
    result = _gradient()(jax.random.key(7))
    assert all(error < 0.02 * ranks for error in jax.tree.leaves(result["close"])), result
    assert not any(jax.tree.leaves(result["same"])), result


@functools.cache
def _many_calls() -> Program:
    sizes = Sizes(tokens=8, hidden=256, top_k=3)
    steps = 7_000

    def step(wrong: Array, key: Array) -> tuple[Array, None]:
        me, experts = jax.lax.axis_index("ep"), sizes.experts
        shape = (sizes.tokens, sizes.top_k)

        def of_rank(rank: Array) -> tuple[Array, Array, Array]:
            mine = jax.random.fold_in(key, rank)
            ids = jax.random.randint(mine, shape, -sizes.num_experts // 4, sizes.num_experts)
            x = jax.random.randint(mine, (sizes.tokens, sizes.hidden), -8, 9)
            return ids, x.astype(jnp.bfloat16), jax.random.randint(mine, shape, 0, 3)

        ids, x, weights = jax.vmap(of_rank)(jnp.arange(group_size()))
        plan = sizes.plan(ids[me])
        rows = deep_ep.dispatch(x[me], plan, implementation="cuda")
        held = (plan.row_source >= 0)[:, None]
        source = x.reshape(-1, sizes.hidden)[jnp.maximum(plan.row_source, 0) // plan.sizes.columns]
        wrong += different(rows, jnp.where(held, source, 0))

        # Expert e multiplies by 1 + e % 3.
        bounds = jnp.cumsum(plan.group_sizes)
        expert = jnp.sum(jnp.arange(rows.shape[0])[:, None] >= bounds[None], axis=1)
        out = rows * (1 + (me * experts + expert) % 3)[:, None].astype(rows.dtype)
        factor = jnp.where(ids[me] >= 0, 1 + ids[me] % 3, 0)
        again = ids[me][:, :, None] == ids[me][:, None, :]
        first = jnp.argmax(again, axis=2) == jnp.arange(sizes.top_k)[None]
        for given, gain in (
            (weights[me].astype(jnp.float32), jnp.sum(factor * weights[me], axis=1)),
            (None, jnp.sum(factor * first, axis=1)),
        ):
            y = deep_ep.combine(out, plan, given, implementation="cuda")
            want = x[me].astype(jnp.float32) * gain[:, None].astype(jnp.float32)
            wrong += jnp.sum(y.astype(jnp.float32) != want)
        return wrong, None

    def run(key: Array) -> dict[str, Array]:
        keys = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index("node")), steps)
        start = jax.lax.pcast(jnp.zeros((), jnp.int32), ("node", "ep"), to="varying")
        return {"wrong": jax.lax.scan(step, start, keys)[0]}

    return Program(run)


@compiles(_many_calls)
def test_many_calls(ranks: int) -> None:
    """21,000 calls of small integers with random routing; every rank works out what it must get."""
    assert _many_calls()(jax.random.key(13))["wrong"] == 0


@functools.cache
def _many_rounds() -> Program:
    sizes = Sizes(tokens=64, hidden=512, top_k=3, experts=2)
    rounds = 400

    def run(key: Array) -> dict[str, Array]:
        def step(wrong: Array, key: Array) -> tuple[Array, None]:
            key = mine(key)
            ids = expert_ids(sizes, key, jax.random.randint(key, (), 0, len(ROUTINGS)))
            x = jax.random.normal(key, (sizes.tokens, sizes.hidden)).astype(jnp.bfloat16)
            # A loop of random length: this rank comes late to the exchange.
            turns = jax.random.randint(key, (), 0, 40)
            late = jax.lax.fori_loop(0, turns, lambda _, a: a * 1.0001, jnp.ones(()))
            x = x * jnp.where(late > 0, 1, 0).astype(x.dtype)
            plan = sizes.plan(ids)
            rows = [deep_ep.dispatch(x, plan, implementation=i) for i in ("cuda", "xla")]
            y = [deep_ep.combine(rows[1], plan, None, implementation=i) for i in ("cuda", "xla")]
            bad = different(*rows) + far(*y, 2e-2)
            return wrong + bad, None

        start = jax.lax.pcast(jnp.zeros((), jnp.int32), ("node", "ep"), to="varying")
        wrong, _ = jax.lax.scan(step, start, jax.random.split(key, rounds))
        return {"wrong": wrong}

    return Program(run)


@compiles(_many_rounds)
def test_many_rounds_with_delays(ranks: int) -> None:
    """Random routings, ranks slowed down at random against each other; every bit is checked."""
    assert _many_rounds()(jax.random.key(11))["wrong"] == 0


def test_nothing_was_reported(ranks: int) -> None:
    deep_ep.check()
