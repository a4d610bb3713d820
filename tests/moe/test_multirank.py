"""The layer through the kernels of all three systems, one process for each rank.

`make gpu-test-multirank` starts the processes. What None takes on Hopper is compared with the
portable layer: the same blocks in FP8 and the same routing, values and gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds.moe import MoEParams, moe_layer
from tests.deep_ep.ranks import AXES, Program, compiles, mine, nodes

pytestmark = pytest.mark.multigpu

Array = jax.Array

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 48, 512, 256, 4, 4


def _params(key: Array, experts: int, everywhere: Array) -> MoEParams:
    """Routed experts of this rank, and what all ranks have alike."""

    def draw(key: Array, *shape: int) -> Array:
        return jax.random.normal(key, shape) * shape[-1] ** -0.5

    here, alike = jax.random.split(key, 2), jax.random.split(everywhere, 3)
    return MoEParams(
        router=draw(alike[0], experts, HIDDEN),
        bias=jnp.zeros(experts),
        gate_up=draw(here[0], EXPERTS, 2 * FFN, HIDDEN),
        down=draw(here[1], EXPERTS, HIDDEN, FFN),
        shared_gate_up=draw(alike[1], 2 * FFN, HIDDEN),
        shared_down=draw(alike[2], HIDDEN, FFN),
    )


@functools.cache
def _compare(precision: str) -> Program:
    """Values and gradients: squares of the differences and of the portable layer's."""
    axis_name = "ep" if nodes() == 1 else AXES

    def run(key: Array) -> Any:
        experts = EXPERTS * jax.lax.axis_size(axis_name)
        keys = jax.random.split(mine(key), 3)
        params = _params(keys[0], experts, key)
        x, g = jax.random.normal(keys[1], (2, TOKENS, HIDDEN)).astype(jnp.bfloat16)

        def layer(implementation: str | None, x: Array, params: MoEParams) -> Array:
            return moe_layer(
                x,
                params,
                axis_name=axis_name,
                k=TOP_K,
                capacity_factor=1.5,
                precision=precision,
                num_sms=8,
                implementation=implementation,
            )[0]

        def both(implementation: str | None) -> Any:
            y, pull = jax.vjp(functools.partial(layer, implementation), x, params)
            return y, pull(g)

        def squares(a: Array) -> Array:
            return jnp.sum(a.astype(jnp.float32) ** 2)

        ours, portable = both(None), both("xla")
        return jax.tree.map(
            lambda a, b: (squares(a.astype(jnp.float32) - b.astype(jnp.float32)), squares(b)),
            ours,
            portable,
        )

    return Program(run)


@compiles(_compare)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_kernels_agree_with_the_portable_layer(precision: str, ranks: int) -> None:
    """Over one axis, or with several nodes over two."""
    y, (dx, d_params) = _compare(precision)(jax.random.key(nodes()))
    for name, (difference, size) in {"y": y, "x": dx, **d_params._asdict()}.items():
        if name == "bias":
            assert difference == size == 0
        else:
            assert size > 0
            assert (difference / size) ** 0.5 < 0.02, name
