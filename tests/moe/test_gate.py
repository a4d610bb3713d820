"""Gating and load balancing against plain numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds.moe import group_limited_topk, reference, update_bias

CASES = {
    "deepseek-v3": {"experts": 256, "k": 8, "num_groups": 8, "top_groups": 4},
    "one group": {"experts": 16, "k": 4, "num_groups": 1, "top_groups": 1},
    "groups of one": {"experts": 8, "k": 2, "num_groups": 8, "top_groups": 3},
    "k fills the groups": {"experts": 12, "k": 6, "num_groups": 4, "top_groups": 2},
    "top 1": {"experts": 6, "k": 1, "num_groups": 3, "top_groups": 1},
}


def _inputs(experts: int, tokens: int = 33, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((tokens, experts)).astype(np.float32)
    return logits, rng.uniform(-0.3, 0.3, experts).astype(np.float32)


def _numpy_gate(
    logits: Any, bias: Any, k: int, num_groups: int, top_groups: int
) -> tuple[list[list[int]], Any]:
    """Token by token, as the report words it."""
    experts = logits.shape[1]
    size = experts // num_groups
    ids, weights = [], []
    for row in logits.astype(np.float64):
        s = 1 / (1 + np.exp(-row))
        score = {e: s[e] + bias[e] for e in range(experts)}
        groups = {
            g: sum(sorted((score[e] for e in range(g * size, (g + 1) * size)), reverse=True)[:2])
            for g in range(num_groups)
        }
        best = sorted(groups, key=lambda g: -groups[g])[:top_groups]
        allowed = [e for e in range(experts) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -score[e])[:k]
        ids.append(chosen)
        weights.append(s[chosen] / s[chosen].sum())
    return ids, np.array(weights)


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name: str) -> None:
    case = dict(CASES[name])
    logits, bias = _inputs(case.pop("experts"))
    ids, weights = jax.jit(lambda a, b: group_limited_topk(a, b, routed_scaling=2.5, **case))(
        logits, bias
    )
    expected_ids, expected = _numpy_gate(logits, bias, **case)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, 2.5 * expected, rtol=1e-5)
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    other_ids, other = reference.group_limited_topk(
        jnp.asarray(logits), jnp.asarray(bias), routed_scaling=2.5, **case
    )
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_allclose(weights, other, rtol=1e-5)


def test_gradient_flows_through_the_weights_only() -> None:
    logits, bias = _inputs(16)
    case = {"k": 4, "num_groups": 4, "top_groups": 2}
    cotangent = np.random.default_rng(1).standard_normal((33, 4)).astype(np.float32)

    def loss(gate: Any) -> Any:
        return lambda a, b: (gate(a, b, **case)[1] * cotangent).sum()

    d_logits, d_bias = jax.grad(loss(group_limited_topk), (0, 1))(logits, bias)
    expected = jax.grad(loss(reference.group_limited_topk))(jnp.asarray(logits), bias)
    np.testing.assert_allclose(d_logits, expected, atol=1e-6)
    assert np.abs(d_logits).max() > 0.01
    np.testing.assert_array_equal(d_bias, 0)


def test_the_bias_steers_the_choice_and_not_the_weights() -> None:
    logits = jnp.zeros((5, 8))
    bias = jnp.zeros(8).at[jnp.array([2, 5])].set(0.1)
    ids, weights = group_limited_topk(logits, bias, k=2, num_groups=1, top_groups=1)
    np.testing.assert_array_equal(ids, [[2, 5]] * 5)
    np.testing.assert_array_equal(weights, 0.5)


def test_ties_and_extremes() -> None:
    logits = jnp.stack([jnp.zeros(8), jnp.full(8, -1e4), jnp.full(8, 1e4)])
    ids, weights = group_limited_topk(logits, jnp.zeros(8), k=3, num_groups=2, top_groups=1)
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 3)
    np.testing.assert_allclose(weights, [[1 / 3] * 3, [0] * 3, [1 / 3] * 3], rtol=1e-6)


def test_vmap() -> None:
    logits, bias = _inputs(16, tokens=12)
    case = {"k": 4, "num_groups": 4, "top_groups": 2}
    whole = group_limited_topk(logits, bias, **case)
    parts = jax.vmap(lambda a: group_limited_topk(a, bias, **case))(logits.reshape(3, 4, 16))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b.reshape(12, 4))


def test_update_bias() -> None:
    bias = jnp.array([[0.0, 1.0, 2.0, 3.0], [0.5] * 4])
    load = jnp.array([[10, 0, 4, 2], [7, 7, 7, 7]], jnp.int32)
    moved = update_bias(bias, load, rate=0.25)
    np.testing.assert_allclose(moved, [[-0.25, 1.25, 2.0, 3.25], [0.5] * 4])
    np.testing.assert_allclose(update_bias(bias[0], load[0], rate=0.25), moved[0])


def test_balancing_evens_out_the_load() -> None:
    """Logits with favourite experts: the bias alone brings every expert near its share."""
    rng = np.random.default_rng(0)
    favour = np.linspace(-1.5, 1.5, 16).astype(np.float32)

    @jax.jit
    def step(bias: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, _ = group_limited_topk(logits, bias, k=4, num_groups=4, top_groups=2)
        load = jnp.bincount(ids.reshape(-1), length=16).astype(jnp.int32)
        return update_bias(bias, load, rate=0.01), load

    bias, busiest = jnp.zeros(16), []
    for _ in range(120):
        logits = rng.standard_normal((256, 16)).astype(np.float32) + favour[None, :]
        bias, load = step(bias, logits)
        busiest.append(load.max() / load.mean())
    assert busiest[0] > 2.0
    assert np.mean(busiest[-20:]) < 1.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "num_groups: must divide the 16 experts, got 3"),
        ({"top_groups": 5}, "top_groups: must lie between 1 and num_groups = 4, got 5"),
        ({"top_groups": 0}, "top_groups: must lie between 1 and num_groups = 4, got 0"),
        ({"k": 9}, "k: must lie between 1 and the 8 reachable experts, got 9"),
        ({"logits": jnp.zeros(16)}, "logits: must have 2 dimensions, got shape [16]"),
        ({"bias": jnp.zeros(4)}, "bias: must have shape [E] = [16], got [4]"),
        ({"routed_scaling": 0.0}, "routed_scaling: must be positive and finite, got 0.0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"logits": jnp.zeros((3, 16)), "bias": jnp.zeros(16), "k": 4}
    arguments |= {"num_groups": 4, "top_groups": 2} | change
    with pytest.raises(ValueError) as error:
        group_limited_topk(**arguments)
    assert str(error.value) == message


def test_errors_of_update_bias_and_the_missing_kernel() -> None:
    with pytest.raises(ValueError) as error:
        update_bias(jnp.zeros((2, 4)), jnp.zeros(4, jnp.int32), rate=0.1)
    assert str(error.value) == "load: must have shape [*B E] = [2, 4], got [4]"
    with pytest.raises(TypeError, match="load: dtype must be int32, got float32"):
        update_bias(jnp.zeros(4), jnp.zeros(4), rate=0.1)
    with pytest.raises(TypeError, match="bias: must be an array, got list"):
        update_bias([0.0], jnp.zeros(1, jnp.int32), rate=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rate: must be a static number"):
        update_bias(jnp.zeros(4), jnp.zeros(4, jnp.int32), rate="0.1")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="group_limited_topk has no CUDA kernel"):
        group_limited_topk(
            jnp.zeros((1, 4)), jnp.zeros(4), k=1, num_groups=1, top_groups=1, implementation="cuda"
        )
