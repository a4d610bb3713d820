"""dispatch and combine under JAX's transformations, and where shapes or meshes are unusual."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds.deep_ep import reference
from tests.deep_ep import cases
from tests.deep_ep.cases import HIDDEN, RANKS, TOKENS, TOP_K, Setup
from tests.deep_ep.harness import on_mesh

Array = jax.Array

EXPERTS = 16
FLAT = Setup("flat")
NODES = Setup("nodes", mesh=(2, 4), axes=("node", "gpu"), expert_axes=("node", "gpu"))


def _gains(setup: Setup) -> Array:
    """What this rank's experts multiply tokens by, `[E_local]`."""
    rank = jax.lax.axis_index(setup.expert_axes)
    local = jnp.arange(EXPERTS // RANKS, dtype=jnp.float32)
    return jnp.sin(1.0 + rank * (EXPERTS // RANKS) + local)


def _layer(setup: Setup, x: Array, ids: Array, weights: Array) -> Array:
    """A mixture of experts `f_e(x) = gain_e * x**2`, so that second derivatives exist."""
    plan = deep_ep.plan_dispatch(ids, num_experts=EXPERTS, axis_name=setup.axis_name)
    rows = deep_ep.dispatch(x, plan)
    gain = jnp.repeat(_gains(setup), plan.group_sizes, total_repeat_length=rows.shape[0])
    return deep_ep.combine(gain[:, None] * rows**2, plan, weights)


def _plain_layer(x: Array, ids: Array, weights: Array) -> Array:
    """The same from a single device's view, x `[..., H]`."""
    named = (ids >= 0) & (ids < EXPERTS)
    gain = jnp.where(named, jnp.sin(1.0 + jnp.clip(ids, 0, EXPERTS - 1)), 0)
    return jnp.sum(weights * gain, axis=-1, keepdims=True) * x**2


def _operands(seed: int = 0, *lead: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((RANKS, *lead, TOKENS, HIDDEN)).astype(np.float32)
    weights = rng.standard_normal((RANKS, *lead, TOKENS, TOP_K)).astype(np.float32)
    return x, weights


def _assert_close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("setup", [FLAT, NODES], ids=str)
def test_scan_over_layers_with_remat(setup: Setup) -> None:
    x, weights = _operands()
    layers = np.stack([cases.expert_ids(n, EXPERTS) for n in ("uniform", "one_rank", "skewed")], 1)

    def loss(layer: Any, x: Array, weights: Array, layers: Array) -> Array:
        def step(x: Array, ids: Array) -> tuple[Array, Array]:
            y = layer(x, ids, weights)
            return x + 0.1 * jnp.tanh(y), jnp.sum(y)

        x, sums = jax.lax.scan(jax.checkpoint(step), x, layers)
        return jnp.sum(x**2) + jnp.sum(sums)

    sharded = functools.partial(loss, functools.partial(_layer, setup))
    got = on_mesh(setup, jax.grad(sharded, argnums=(0, 1)))(x, weights, layers)
    plain = functools.partial(loss, _plain_layer)
    want = jax.jit(jax.grad(plain, argnums=(0, 1)))(x, weights, layers.swapaxes(0, 1))
    _assert_close(got, want)


@pytest.mark.parametrize("setup", [FLAT, NODES], ids=str)
def test_gradient_of_a_gradient(setup: Setup) -> None:
    x, weights = _operands(1)
    ids = cases.expert_ids("duplicates", EXPERTS)

    def second(layer: Any, x: Array, weights: Array, ids: Array) -> Any:
        def first(x: Array, weights: Array) -> Array:
            d_x, d_weights = jax.grad(
                lambda x, w: jnp.sum(jnp.sin(layer(x, ids, w))), argnums=(0, 1)
            )(x, weights)
            return jnp.sum(d_x**2) + jnp.sum(d_weights**3)

        return jax.grad(first, argnums=(0, 1))(x, weights)

    got = on_mesh(setup, functools.partial(second, functools.partial(_layer, setup)))
    want = jax.jit(functools.partial(second, _plain_layer))(x, weights, ids)
    _assert_close(got(x, weights, ids), want, 5e-4)


@pytest.mark.parametrize("setup", [FLAT, NODES], ids=str)
def test_vmap(setup: Setup) -> None:
    x, weights = _operands(2, 2)
    ids = np.stack([cases.expert_ids(n, EXPERTS) for n in ("uniform", "ragged")], axis=1)

    def run(layer: Any, *operands: Array) -> Any:
        def loss(x: Array, ids: Array, weights: Array) -> Array:
            return jnp.sum(layer(x, ids, weights) ** 2)

        return jax.vmap(jax.value_and_grad(loss, argnums=(0, 2)))(*operands)

    mapped = on_mesh(setup, functools.partial(run, functools.partial(_layer, setup)))
    _, got = mapped(x, ids, weights)
    flat = [a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights)]
    _, want = jax.jit(functools.partial(run, _plain_layer))(*flat)
    _assert_close([g.reshape(w.shape) for g, w in zip(got, want, strict=True)], want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_replicated_operands_receive_the_sum_of_cotangents(check_vma: bool) -> None:
    """x and weights are the same on every rank of a group, and enter unsharded."""
    mesh = jax.make_mesh((2, 4), ("data", "ep"), axis_types=(AxisType.Auto,) * 2)
    x, weights = (a[:2] for a in _operands(3))
    ids = cases.expert_ids("uniform", EXPERTS)

    def per_device(x: Array, weights: Array, ids: Array) -> Array:
        plan = deep_ep.plan_dispatch(ids[0], num_experts=EXPERTS, axis_name="ep")
        y = deep_ep.combine(deep_ep.dispatch(x[0], plan), plan, weights[0])
        return jnp.sin(y)[None]

    mapped = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P(("data", "ep"))),
        out_specs=P(("data", "ep")),
        check_vma=check_vma,
    )
    got = jax.jit(jax.grad(lambda x, w: jnp.sum(mapped(x, w, ids)), argnums=(0, 1)))(x, weights)

    def plain(x: Array, weights: Array) -> Array:
        x, weights = (jnp.repeat(a, 4, axis=0) for a in (x, weights))
        return jnp.sum(jnp.sin(jnp.sum(weights, axis=-1, keepdims=True) * x))

    _assert_close(got, jax.jit(jax.grad(plain, argnums=(0, 1)))(x, weights))


def test_ranks_are_numbered_along_the_mesh_axis() -> None:
    """A mesh whose devices are out of order, and whose rank order is that of the swapped tuple."""
    devices = np.array(jax.devices())[[3, 0, 7, 1, 6, 2, 5, 4]].reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("gpu", "node"), axis_types=(AxisType.Auto,) * 2)
    x, _ = _operands(4)
    ids = cases.expert_ids("skewed", EXPERTS)
    capacity = RANKS * TOKENS * (EXPERTS // RANKS)

    def per_device(x: Array, ids: Array) -> Array:
        plan = deep_ep.plan_dispatch(ids[0], num_experts=EXPERTS, axis_name=("node", "gpu"))
        return deep_ep.dispatch(x[0], plan)[None]

    spec = P(("node", "gpu"))
    run = jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec))
    want = reference.dispatch(x, reference.route(ids, num_experts=EXPERTS, capacity=capacity))
    np.testing.assert_array_equal(run(x, ids), want)


@pytest.mark.parametrize("setup", [FLAT, NODES], ids=str)
def test_no_tokens_and_one_column(setup: Setup) -> None:
    def run(x: Array, ids: Array, weights: Array) -> Any:
        plan = deep_ep.plan_dispatch(ids, num_experts=EXPERTS, axis_name=setup.axis_name)
        y, pull = jax.vjp(
            lambda x, w: deep_ep.combine(deep_ep.dispatch(x, plan), plan, w), x, weights
        )
        low = deep_ep.low_latency_dispatch(
            x, ids, num_experts=EXPERTS, max_tokens=2, axis_name=setup.axis_name
        )
        return plan.group_sizes, y, pull(y), low[0].values, low[1]

    sizes, y, (d_x, d_w), rows, low_sizes = on_mesh(setup, run)(
        np.zeros((RANKS, 0, HIDDEN), np.float32),
        np.zeros((RANKS, 0, 1), np.int32),
        np.zeros((RANKS, 0, 1), np.float32),
    )
    assert y.shape == d_x.shape == (RANKS, 0, HIDDEN)
    assert d_w.shape == (RANKS, 0, 1)
    assert rows.shape == (RANKS, EXPERTS // RANKS, RANKS * 2, HIDDEN)
    assert not sizes.any() and not low_sizes.any() and not rows.astype(np.float32).any()


def _lowered(setup: Setup, platform: str) -> str:
    """The layer's forward and backward program, lowered for a platform that need not be here."""
    mesh = jax.make_mesh(setup.mesh, setup.axes, axis_types=(AxisType.Auto,) * len(setup.axes))

    def per_device(x: Array, ids: Array, weights: Array) -> Any:
        y, pull = jax.vjp(lambda x, w: _layer(setup, x, ids, w), x, weights)
        return y, pull(y)

    spec = P(setup.axes)
    x, weights = (a.reshape(-1, a.shape[-1]) for a in _operands())
    ids = cases.expert_ids("uniform", EXPERTS).reshape(-1, TOP_K)
    mapped = jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec))
    return mapped.trace(x, ids, weights).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("setup", "messages"), [(FLAT, (2, 2, 2)), (NODES, (9, 2, 2))], ids=["flat", "nodes"]
)
def test_messages_of_a_layer(setup: Setup, messages: tuple[int, int, int]) -> None:
    """Ids; tokens; weights and results; back: the cotangent, products for weights, of tokens.

    Over one axis kernels carry tokens, and results with their weights; over two, between the GPUs
    of a node.
    """
    text = _lowered(setup, "cuda")
    targets = (
        "stablehlo.all_to_all",
        "custom_call @jax_ds_deep_ep_dispatch",
        "custom_call @jax_ds_deep_ep_combine",
    )
    assert tuple(text.count(target) for target in targets) == messages
    assert "all_gather" not in text
