"""Runs `deep_ep` over a case's mesh, with every rank's arrays side by side: `[8, ...]`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds.deep_ep import reference
from tests.deep_ep.cases import HIDDEN, RANKS, TOKENS, TOP_K, Setup

Array = jax.Array


def on_mesh(setup: Setup, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of per-device arrays as a jitted function of arrays with a leading axis of 8."""
    kind = AxisType.Explicit if setup.explicit else AxisType.Auto
    count = int(np.prod(setup.mesh))
    mesh = jax.make_mesh(
        setup.mesh, setup.axes, (kind,) * len(setup.axes), devices=jax.devices()[:count]
    )
    spec = P(setup.axes)

    def per_device(*args: Any) -> Any:
        if count < RANKS:
            return jax.lax.map(lambda args: function(*args), args)
        return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

    mapped = jax.jit(
        jax.shard_map(
            per_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=setup.check_vma
        )
    )

    def run(*args: Any) -> Any:
        placed = jax.device_put(args, NamedSharding(mesh, spec))
        return jax.tree.map(np.asarray, mapped(*placed))

    return run


def plan_of(setup: Setup, expert_ids: Array, implementation: str | None = "xla") -> Any:
    return deep_ep.plan_dispatch(
        expert_ids,
        num_experts=setup.num_experts,
        axis_name=setup.axis_name,
        capacity=setup.capacity,
        node_capacity=setup.node_capacity,
        expert_alignment=setup.expert_alignment,
        implementation=implementation,
    )


@functools.cache
def contract_program(setup: Setup, implementation: str) -> Callable[..., Any]:
    """Values and gradients of both functions, on given operands and cotangents."""

    def run(ids: Array, x: Array, d_rows: Array, rows: Array, weights: Array, d_y: Array) -> Any:
        plan = plan_of(setup, ids, implementation)
        dispatched, pull = jax.vjp(
            lambda x: deep_ep.dispatch(x, plan, implementation=implementation), x
        )
        y, pull_combine = jax.vjp(
            lambda r, w: deep_ep.combine(r, plan, w, implementation=implementation), rows, weights
        )
        return {
            "group_sizes": plan.group_sizes,
            "expert_counts": plan.expert_counts,
            "num_dropped": plan.num_dropped,
            "rows": dispatched,
            "d_x": pull(d_rows)[0],
            "y": y,
            "d_combine": pull_combine(d_y),
        }

    return on_mesh(setup, run)


def routings_of(setup: Setup, ids: np.ndarray) -> list[reference.Routing]:
    """The reference's routing of each expert-parallel group."""
    return [
        reference.route(
            group,
            num_experts=setup.num_experts,
            capacity=setup.rows,
            expert_alignment=setup.expert_alignment,
            num_nodes=setup.num_nodes,
            node_capacity=setup.node_capacity,
        )
        for group in np.split(ids, setup.num_groups)
    ]


def operands(setup: Setup, routings: list[reference.Routing], seed: int = 0) -> dict[str, Any]:
    """Random operands and cotangents; NaN in the rows of combine that hold no token."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal((8, *shape)).astype(np.float32)

    rows = draw(setup.rows, HIDDEN)
    for g, routing in enumerate(routings):
        group = rows[g * setup.num_ranks : (g + 1) * setup.num_ranks]
        group[routing.expert < 0] = np.nan
    dtype = jnp.dtype(setup.dtype)
    return {
        "x": draw(TOKENS, HIDDEN).astype(dtype),
        "d_rows": draw(setup.rows, HIDDEN).astype(dtype),
        "rows": rows.astype(dtype),
        "weights": draw(TOKENS, TOP_K),
        "d_y": draw(TOKENS, HIDDEN).astype(dtype),
    }
