"""Properties of routing on random ids and counts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jax_ds import deep_ep
from jax_ds.deep_ep import plan, reference
from tests.deep_ep.cases import RANKS, TOKENS, TOP_K, Setup
from tests.deep_ep.harness import on_mesh, plan_of, routings_of

Array = jax.Array

few = settings(max_examples=25, deadline=None)

FLAT = Setup("flat", num_experts=16, capacity=11, expert_alignment=2)
NODES = Setup(
    "nodes",
    mesh=(2, 4),
    axes=("node", "gpu"),
    expert_axes=("node", "gpu"),
    num_experts=16,
    capacity=11,
    expert_alignment=2,
    node_capacity=3,
)


def _ids(num_experts: int) -> Any:
    """Ids of every rank: spread evenly, or piled up on a few experts."""
    anywhere = st.integers(-2, num_experts + 1)
    few_experts = st.sampled_from([-1, 0, 1, num_experts // 2, num_experts - 1])
    return st.one_of(
        npst.arrays(np.int32, (RANKS, TOKENS, TOP_K), elements=elements, fill=elements)
        for elements in (anywhere, few_experts)
    )


@functools.cache
def _identity_program(setup: Setup) -> Any:
    """Tokens there and back through experts that change nothing; ids are what travels."""

    def run(ids: Array) -> Any:
        plan = plan_of(setup, ids)
        x = jnp.arange(TOKENS, dtype=jnp.float32)[:, None] + 1
        x = x + TOKENS * jax.lax.axis_index(setup.expert_axes)
        rows = deep_ep.dispatch(x, plan)
        y = deep_ep.combine(rows, plan, None)
        return plan.group_sizes, plan.expert_counts, plan.num_dropped, rows[:, 0], x, y

    return on_mesh(setup, run)


def _check_routing(setup: Setup, ids: np.ndarray) -> None:
    group_sizes, counts, dropped, rows, x, y = _identity_program(setup)(ids)
    (routing,) = routings_of(setup, ids)
    held = routing.expert >= 0
    token = routing.source * TOKENS + routing.token + 1
    np.testing.assert_array_equal(rows, np.where(held, token, 0))
    np.testing.assert_array_equal(dropped, routing.num_dropped)
    np.testing.assert_array_equal(counts, routing.expert_counts)

    # What holds whatever the reference says.
    pairs = sum(
        len({e for e in token if 0 <= e < setup.num_experts})
        for token in ids.reshape(-1, TOP_K).tolist()
    )
    assert counts.sum() + dropped.sum() == pairs
    assert (group_sizes.sum(axis=1) <= setup.rows).all()
    assert not (group_sizes % setup.expert_alignment).any()
    assert ((group_sizes - counts >= 0) & (group_sizes - counts < setup.expert_alignment)).all()
    # Every kept pair brings its token back once.
    assert (y / x).sum() == counts.sum()


@few
@given(_ids(16))
def test_flat_routing(ids: np.ndarray) -> None:
    _check_routing(FLAT, ids)


@few
@given(_ids(16))
def test_routing_over_nodes(ids: np.ndarray) -> None:
    _check_routing(NODES, ids)


@few
@given(
    st.lists(st.integers(0, 40), min_size=8, max_size=8),
    st.integers(1, 200),
    st.sampled_from([1, 4]),
)
def test_experts_share_capacity_fairly(counts: list[int], capacity: int, alignment: int) -> None:
    share = jax.jit(plan.share_capacity, static_argnums=2)
    kept = np.asarray(share(jnp.array(counts, jnp.int32), capacity, alignment))
    np.testing.assert_array_equal(kept, reference.hand_out(counts, capacity, alignment))
    units = -(-kept // alignment)
    assert units.sum() * alignment <= capacity
    cut = kept < counts
    if cut.any():
        assert units.sum() == capacity // alignment
        assert units.max() - units[cut].min() <= 1
