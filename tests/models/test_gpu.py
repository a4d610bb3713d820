"""The model on a GPU: what None runs there against the portable implementation."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import models
from tests.models import tiny

pytestmark = pytest.mark.gpu


def test_a_step_with_kernels_agrees_with_the_portable_one() -> None:
    """One FP8 step on one device: the loss, the gradient's norm and what AdamW made of it."""
    mesh, axis = tiny.mesh(1)
    batch = tiny.put(tiny.tokens(0), mesh)
    results = {}
    for implementation in (None, "xla"):
        config = tiny.config(axis_name=axis, precision="fp8", implementation=implementation)
        step = models.make_train_step(config, tiny.TRAIN, mesh)
        state = models.init_state(config, tiny.TRAIN, mesh, seed=0)
        if implementation is None:
            text = step.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
            called = set(re.findall(r"custom_call @jax_ds_(\w+)", text))
            kernels = {"deep_ep_dispatch", "deep_ep_combine", "flash_mla_prefill", "gemm"}
            assert kernels | {"flash_mla_prefill_backward"} <= called
        # Two steps: the first one's learning rate is that of a warm-up.
        measured = []
        for _ in range(2):
            state, metrics = step(state, batch)
            measured.append(jax.tree.map(np.asarray, metrics))
        results[implementation] = jax.tree.map(np.asarray, state.params), measured
    (params, ours), (expected_params, theirs) = results[None], results["xla"]
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.loss, expected.loss, rtol=5e-3)
        np.testing.assert_allclose(mine.grad_norm, expected.grad_norm, rtol=0.03)
        assert mine.load.sum() == expected.load.sum() == 8 * 16 * 2
        # A token near the boundary between two experts may take the other one.
        assert np.abs(mine.load - expected.load).sum() <= 8
    # The bias follows the sign of a difference of loads, which such a token can turn.
    bias, expected_bias = (p.moe_layers.mlp.bias for p in (params, expected_params))
    assert (np.abs(bias - expected_bias) > 1e-6).sum() <= 2
    params, expected_params = (
        p._replace(moe_layers=p.moe_layers._replace(mlp=p.moe_layers.mlp._replace(bias=None)))
        for p in (params, expected_params)
    )
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(b) + 1e-6


@pytest.mark.gpu
def test_chunks_of_prompts_then_decoding_agree_with_the_portable_steps() -> None:
    """Prefill writes the latent cache, decode goes on from it; one slot stays empty."""
    mesh, axis = tiny.mesh(1)
    tokens = np.random.default_rng(2).integers(0, 64, (4, 140)).astype(np.int32)
    table = np.array([[5, 0, 2], [1, -1, 99], [3, 4, 7], [-9, 0, 0]], np.int32)
    results: dict[Any, list[Any]] = {None: [], "xla": []}
    for implementation, found in results.items():
        config = tiny.config(axis_name=axis, implementation=implementation)
        params = models.init_params(config, jax.random.key(0))
        specs = models.param_specs(config, params)
        params = jax.device_put(params, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs))

        @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
        def run(step: Any, *operands: Any, config: Any = config, specs: Any = specs) -> Any:
            rest = (jax.P("ep"),) * 4
            return jax.shard_map(
                functools.partial(step, config),
                mesh=mesh,
                in_specs=(specs, *rest),
                out_specs=jax.P("ep"),
            )(*operands)

        pages = tiny.put(jnp.full((8 * config.num_layers, 64, 576), jnp.nan, jnp.bfloat16), mesh)
        lens = np.zeros(4, np.int32)
        for width, gain in ((60, (60, 5, 33, 0)), (60, (60, 40, 60, 0)), (1, (1, 1, 1, 0))):
            lens = lens + np.array(gain, np.int32)
            window = np.zeros((4, width), np.int32)
            for row, length in enumerate(lens):
                new = tokens[row, max(0, length - width) : length]
                window[row, width - len(new) :] = new
            step = models.prefill_step if width > 1 else models.decode_step
            given = [tiny.put(x, mesh) for x in (window, table, lens)]
            logits, pages = run(step, params, pages, *given)
            found.append(np.asarray(logits[:3], np.float64))
    for ours, theirs in zip(results[None], results["xla"], strict=True):
        assert np.linalg.norm(ours - theirs) <= 0.03 * np.linalg.norm(theirs)
