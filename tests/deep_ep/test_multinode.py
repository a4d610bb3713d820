"""The kernels over (node, gpu) against the portable implementation, one process for each rank.

`make gpu-test-multirank NODES=2` starts the processes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_ep
from tests.deep_ep.ranks import (
    AXES,
    ROUTINGS,
    Program,
    Sizes,
    check,
    compare,
    compiles,
    different,
    expert_ids,
    far,
    mine,
    nodes,
)

pytestmark = pytest.mark.multigpu

Array = jax.Array

SIZES = {
    "default": Sizes(axes=AXES, num_sms=4),
    "node_drops": Sizes(tokens=33, hidden=7168, top_k=8, axes=AXES, node_capacity=5, num_sms=4),
    "drops": Sizes(
        tokens=200,
        hidden=512,
        top_k=8,
        experts=32,
        capacity=384,
        alignment=128,
        axes=AXES,
        num_sms=4,
    ),
    "float32": Sizes(
        tokens=7, hidden=640, top_k=16, experts=3, dtype="float32", axes=AXES, num_sms=1
    ),
}


@pytest.fixture(autouse=True)
def several_nodes(ranks: int) -> None:
    _need_nodes()


def _need_nodes() -> None:
    if nodes() == 1:
        pytest.skip("needs NODES=2 or more")


def _compare(name: str) -> Program:
    _need_nodes()
    return compare(SIZES[name])


@compiles(_compare)
@pytest.mark.parametrize("name", SIZES)
def test_equals_the_portable_implementation(name: str) -> None:
    for seed, routing in enumerate(ROUTINGS):
        check(SIZES[name], seed, routing)


@functools.cache
def _one_axis_and_two() -> Program:
    _need_nodes()
    two = Sizes(tokens=50, hidden=256, axes=AXES)

    def run(key: Array) -> dict[str, Array]:
        key = mine(key)
        ids = expert_ids(two, key, jnp.asarray(0))
        # Only experts of this node, so that groups of one node see the same tokens.
        per_node = two.experts * jax.lax.axis_size("ep")
        ids = jnp.where(ids >= 0, ids % per_node, -1)
        x = jax.random.normal(key, (two.tokens, two.hidden)).astype(jnp.bfloat16)
        over_one = deep_ep.plan_dispatch(ids, num_experts=per_node, axis_name="ep")
        here = ids + jax.lax.axis_index("node") * per_node
        over_two = deep_ep.plan_dispatch(
            jnp.where(ids >= 0, here, -1),
            num_experts=two.num_experts,
            axis_name=AXES,
            capacity=over_one.row_source.shape[0],
        )
        results = []
        for plan in (over_one, over_two):
            rows = deep_ep.dispatch(x, plan, implementation="cuda")
            results.append((rows, deep_ep.combine(rows, plan, None, implementation="cuda")))
        return {"wrong": sum(different(a, b) for a, b in zip(*results, strict=True))}

    return Program(run)


@compiles(_one_axis_and_two)
def test_one_axis_and_two_give_the_same_rows() -> None:
    """A mesh's shape is no part of the result: one group on a node, alone or as the GPU axis."""
    assert _one_axis_and_two()(jax.random.key(5))["wrong"] == 0


@functools.cache
def _many_rounds() -> Program:
    _need_nodes()
    sizes = Sizes(tokens=64, hidden=512, top_k=3, axes=AXES, node_capacity=40, num_sms=4)

    def run(key: Array) -> dict[str, Array]:
        def step(wrong: Array, key: Array) -> tuple[Array, None]:
            key = mine(key)
            ids = expert_ids(sizes, key, jax.random.randint(key, (), 0, len(ROUTINGS)))
            x = jax.random.normal(key, (sizes.tokens, sizes.hidden)).astype(jnp.bfloat16)
            plan = sizes.plan(ids)
            options: list[dict[str, Any]] = [
                {"implementation": "cuda", "num_sms": sizes.num_sms},
                {"implementation": "xla"},
            ]
            rows = [deep_ep.dispatch(x, plan, **o) for o in options]
            y = [deep_ep.combine(rows[1], plan, None, **o) for o in options]
            return wrong + different(*rows) + far(*y, 2e-2), None

        start = jax.lax.pcast(jnp.zeros((), jnp.int32), AXES, to="varying")
        wrong, _ = jax.lax.scan(step, start, jax.random.split(key, 200))
        return {"wrong": wrong}

    return Program(run)


@compiles(_many_rounds)
def test_many_rounds() -> None:
    """Random routings; the crossing and the kernels take turns on one stream."""
    assert _many_rounds()(jax.random.key(11))["wrong"] == 0


def test_nothing_was_reported() -> None:
    deep_ep.check()
