"""Every implementation of dispatch and combine against the global equation: values, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds.deep_ep import reference
from jax_ds.deep_ep.reference import Routing
from tests.deep_ep import cases
from tests.deep_ep.cases import ROUTINGS, SETUPS, Setup
from tests.deep_ep.harness import contract_program, operands, routings_of

Array = jax.Array

OPERANDS = ("x", "d_rows", "rows", "weights", "d_y")


@jax.jit
def _reference(
    routing: Routing, ids: Array, x: Array, d_rows: Array, rows: Array, weights: Array, d_y: Array
) -> dict[str, Any]:
    """One group's values and gradients, in float32."""
    dispatched, pull = jax.vjp(lambda x: reference.dispatch(x, routing), x)
    y, pull_combine = jax.vjp(lambda r, w: reference.combine(r, routing, w, ids), rows, weights)
    return {
        "group_sizes": routing.group_sizes,
        "expert_counts": routing.expert_counts,
        "num_dropped": routing.num_dropped,
        "rows": dispatched,
        "d_x": pull(d_rows)[0],
        "y": y,
        "d_combine": pull_combine(d_y),
    }


def _expected(setup: Setup, ids: np.ndarray, given: dict[str, Any]) -> dict[str, Any]:
    results = []
    for group, routing in enumerate(routings_of(setup, ids)):
        part = slice(group * setup.num_ranks, (group + 1) * setup.num_ranks)
        arrays = (given[name][part].astype(np.float32) for name in OPERANDS)
        results.append(_reference(routing, ids[part], *arrays))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


@cases.with_implementations(*SETUPS)
def test_values_and_gradients(setup: Setup, implementation: str) -> None:
    run = contract_program(setup, implementation)
    # Partial sums and results are rounded to the dtype of the rows.
    tolerance = 2e-5 if setup.dtype == "float32" else 3e-2
    for name in ROUTINGS:
        ids = cases.expert_ids(name, setup.num_experts)
        given = operands(setup, routings_of(setup, ids))
        got = run(ids, *(given[k] for k in OPERANDS))
        want = _expected(setup, ids, given)
        assert got["rows"].dtype == got["y"].dtype == jnp.dtype(setup.dtype)
        for key in ("group_sizes", "expert_counts", "num_dropped", "rows"):
            np.testing.assert_array_equal(
                got[key].astype(np.float32), want[key], err_msg=f"{name}: {key}"
            )
        for key in ("d_x", "y", "d_combine"):
            for a, b in zip(jax.tree.leaves(got[key]), jax.tree.leaves(want[key]), strict=True):
                np.testing.assert_allclose(
                    a.astype(np.float32),
                    b,
                    rtol=tolerance,
                    atol=tolerance,
                    err_msg=f"{name}: {key}",
                )


@pytest.mark.parametrize("mesh", [(8,), (2, 4), (4, 2)], ids=str)
def test_combine_rounds_each_sum_once(mesh: tuple[int, ...]) -> None:
    """A rank's sum, and over two axes a node's, own or other."""
    axes = ("ep",) if len(mesh) == 1 else ("node", "gpu")
    setup = Setup("rounding", mesh=mesh, axes=axes, expert_axes=axes, dtype="bfloat16")
    ids = cases.expert_ids("uniform", setup.num_experts)
    (routing,) = routings_of(setup, ids)
    given = operands(setup, [routing])
    got = contract_program(setup, "xla")(ids, *(given[k] for k in OPERANDS))["y"]

    def rounded(num_nodes: int, partial_dtype: Any) -> np.ndarray:
        rows, weights = given["rows"], given["weights"]
        y = reference.combine(rows, routing, weights, ids, partial_dtype, num_nodes)
        return np.asarray(y.astype(jnp.bfloat16))

    np.testing.assert_array_equal(got, rounded(setup.num_nodes, jnp.bfloat16))
    assert np.any(got != rounded(1, jnp.float32))
    assert len(mesh) == 1 or np.any(got != rounded(1, jnp.bfloat16))


def test_setups_drop_where_they_mean_to() -> None:
    for setup in SETUPS:
        dropped = {
            name: sum(
                int(r.num_dropped.sum())
                for r in routings_of(setup, cases.expert_ids(name, setup.num_experts))
            )
            for name in ROUTINGS
        }
        limited = setup.capacity is not None or setup.node_capacity is not None
        assert (dropped["one_expert"] > 0) == limited, setup
        assert dropped["none"] == 0
