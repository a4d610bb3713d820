"""deep_ep in twenty lines: tokens to the ranks of their experts and back, over eight devices."""

import launch  # isort: skip; eight virtual devices on a CPU, before jax is imported

import functools

import jax
import jax.numpy as jnp

from jax_ds import deep_ep


def main(_: list[str]) -> None:
    mesh, axis = launch.start()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P(axis), out_specs=jax.P(axis))
    def layer(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        plan = deep_ep.plan_dispatch(ids, num_experts=16, axis_name=axis)
        rows = deep_ep.dispatch(x, plan)  # [C, H], grouped by local expert: plan.group_sizes
        return deep_ep.combine(2 * rows, plan, weights)  # every expert doubles its tokens

    tokens, top_k = 32 * mesh.size, 4
    x = jax.random.normal(jax.random.key(0), (tokens, 256), jnp.bfloat16)
    ids = jax.lax.top_k(jax.random.uniform(jax.random.key(1), (tokens, 16)), top_k)[1]
    weights = jnp.full((tokens, top_k), 1 / top_k)
    operands = jax.device_put((x, ids, weights), jax.NamedSharding(mesh, jax.P(axis)))
    y = jax.jit(layer)(*operands)
    print("largest difference from 2 x:", jnp.abs(y - 2 * x).max())


if __name__ == "__main__":
    launch.run(main)
