"""Training: it learns, on any mesh alike, and goes on after a restart as if nothing had been."""

import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from jax_ds import models
from tests.models import tiny


def _train(
    config: models.ModelConfig, mesh: Any, steps: range, state: Any = None
) -> tuple[models.TrainState, list[models.Metrics]]:
    step_fn = models.make_train_step(config, tiny.TRAIN, mesh)
    state = models.init_state(config, tiny.TRAIN, mesh, seed=0) if state is None else state
    metrics = []
    for step in steps:
        state, measured = step_fn(state, tiny.put(tiny.tokens(step), mesh))
        metrics.append(jax.tree.map(np.asarray, measured))
    return state, metrics


@pytest.fixture(scope="module")
def one_device() -> tuple[models.TrainState, list[models.Metrics]]:
    mesh, axis = tiny.mesh(1)
    return _train(tiny.config(axis_name=axis), mesh, range(8))


@pytest.mark.parametrize("sizes", [(8,), (2, 4)], ids=str)
def test_any_mesh_gives_the_losses_of_one_device(sizes: tuple[int, ...], one_device: Any) -> None:
    mesh, axis = tiny.mesh(*sizes)
    _, metrics = _train(tiny.config(axis_name=axis, remat=len(sizes) == 2), mesh, range(8))
    expected = one_device[1]
    for ours, theirs in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=5e-3)
        assert ours.load.sum() == theirs.load.sum() == 8 * 16 * 2
    np.testing.assert_allclose(metrics[0].loss, expected[0].loss, rtol=1e-4)
    np.testing.assert_allclose(metrics[0].grad_norm, expected[0].grad_norm, rtol=1e-2)
    assert metrics[-1].loss < 0.8 * metrics[0].loss


def test_the_bias_follows_the_load(one_device: Any) -> None:
    """b += rate * sign(mean - load), every step, and nothing else touches it."""
    state, metrics = one_device
    expected = np.zeros((1, 8), np.float32)
    for measured in metrics:
        expected += 0.01 * np.sign(measured.load.mean() - measured.load)
    np.testing.assert_allclose(state.params.moe_layers.mlp.bias, expected, atol=1e-6)
    assert np.abs(expected).max() > 0.02


@pytest.fixture(scope="module")
def fp8() -> dict[str, Any]:
    """The FP8 step on eight devices, compiled once."""
    mesh, axis = tiny.mesh(8)
    config = tiny.config(axis_name=axis, precision="fp8", capacity_factor=3.0)
    state = models.init_state(config, tiny.TRAIN, mesh, seed=0)
    step = models.make_train_step(config, tiny.TRAIN, mesh)
    batch = tiny.put(tiny.tokens(0), mesh)
    compiled = step.lower(state, batch).compile()
    return {"mesh": mesh, "config": config, "state": state, "step": compiled}


def test_fp8_learns_and_resumes_to_the_bit(
    fp8: dict[str, Any], one_device: Any, tmp_path: pathlib.Path
) -> None:
    mesh, config, step = fp8["mesh"], fp8["config"], fp8["step"]
    path = tmp_path / "checkpoint.npz"
    state = jax.tree.map(jax.numpy.copy, fp8["state"])
    losses = []
    for i in range(8):
        if i == 5:
            models.save_tree(path, state)
        state, metrics = step(state, tiny.put(tiny.tokens(i), mesh))
        losses.append(float(metrics.loss))
    reference = [float(m.loss) for m in one_device[1]]
    np.testing.assert_allclose(losses, reference, rtol=0.02)

    specs = models.state_specs(config, tiny.TRAIN)
    resumed = models.load_tree(path, jax.eval_shape(lambda: state), mesh, specs)
    assert int(resumed.step) == 5
    for i in range(5, 8):
        resumed, metrics = step(resumed, tiny.put(tiny.tokens(i), mesh))
        assert float(metrics.loss) == losses[i]
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_the_compiled_step_gathers_no_operand(fp8: dict[str, Any]) -> None:
    """Tokens move by all-to-all, and of gathers there are only counts and the like: an
    all-gather of activations or experts would mean that XLA undid the sharding."""
    text = fp8["step"].as_text()
    moved = re.findall(
        r"^.* = (.*?) (all-to-all|all-gather|collective-permute)[\w-]*\(", text, re.M
    )
    assert sum(operation == "all-to-all" for _, operation in moved) >= 4
    for shapes, operation in moved:
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            if operation != "all-to-all":
                assert dtype in ("s32", "u32", "pred"), f"{operation} of {dtype}[{sizes}]"
                assert np.prod([int(n) for n in sizes.split(",") if n]) <= 8 * 16 * 2
    experts = fp8["config"].num_experts
    whole = rf"(?:f32|bf16|f8e4m3fn)\[(?:1,)?{experts},(?:64,64|64,32)\]"
    assert not re.findall(whole, text), "all experts in one place"


def test_evaluation_equals_the_loss_of_a_step(one_device: Any) -> None:
    mesh, axis = tiny.mesh(1)
    config = tiny.config(axis_name=axis)
    params = models.init_state(config, tiny.TRAIN, mesh, seed=0).params
    loss = models.make_eval_step(config, mesh)(params, tiny.put(tiny.tokens(0), mesh))
    np.testing.assert_allclose(loss, one_device[1][0].loss, rtol=1e-5)


def test_weight_decay_spares_norms_router_and_bias() -> None:
    config = tiny.config(precision="bf16")
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    state = models.state_specs(config, tiny.TRAIN)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    optimizer = models.TrainConfig(steps=3, peak_rate=0.1, warmup=1).optimizer()
    ones = jax.tree.map(lambda p: np.ones(p.shape, np.float32), params)
    zeros = jax.tree.map(np.zeros_like, ones)
    opt_state = optimizer.init(ones)
    _, opt_state = optimizer.update(zeros, opt_state, ones)
    updates, _ = optimizer.update(zeros, opt_state, ones)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        kept = "norm" in name or name.endswith((".router", ".bias"))
        assert (np.abs(update).max() == 0) == kept, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"axis_name": "rank"},
            "axis_name: must name the axes of the mesh, ('ep',), got 'rank'",
        ),
        (
            {"num_experts": 12},
            "num_experts: must be a multiple of the 8 ranks of axis_name, got 12",
        ),
    ],
)
def test_mesh_errors(changes: dict[str, Any], message: str) -> None:
    mesh, _ = tiny.mesh(8)
    config = tiny.config(**changes)
    for make in (
        lambda: models.init_state(config, tiny.TRAIN, mesh, seed=0),
        lambda: models.make_train_step(config, tiny.TRAIN, mesh),
        lambda: models.make_eval_step(config, mesh),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == message


def test_a_mesh_has_no_other_axes() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "ep"), devices=jax.devices()[:8])
    with pytest.raises(ValueError, match=r"axes of the mesh, \('data', 'ep'\), got 'ep'"):
        models.make_train_step(tiny.config(), tiny.TRAIN, mesh)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((16,), np.int32, "tokens: must have 2 dimensions, got shape [16]"),
        ((8, 9), np.float32, "tokens: dtype must be int32, got float32"),
        (
            (8, 1),
            np.int32,
            "tokens: must have shape [B S+1] with 2 or more in a row, got [8, 1]",
        ),
        (
            (12, 9),
            np.int32,
            "tokens: must have shape [B S+1] with B a multiple of the mesh's 8 devices, "
            "got [12, 9]",
        ),
    ],
)
def test_token_errors(shape: tuple[int, ...], dtype: Any, message: str) -> None:
    mesh, _ = tiny.mesh(8)
    config = tiny.config()

    def placed(shape: tuple[int, ...], dtype: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    specs = models.param_specs(config, params)
    params = jax.tree.map(lambda p, spec: placed(p.shape, p.dtype, spec), params, specs)
    with pytest.raises((ValueError, TypeError)) as error:
        models.make_eval_step(config, mesh).trace(params, placed(shape, dtype, jax.P()))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp4"}, "precision: must be one of 'fp8', 'bf16', got 'fp4'"),
        (
            {"num_dense_layers": 2},
            "num_dense_layers: must lie between 0 and num_layers - 1 = 1, got 2",
        ),
        ({"hidden": 0}, "hidden: must be at least 1, got 0"),
        ({"shared_ffn": -1}, "shared_ffn: must be at least 0, got -1"),
        ({"q_lora": 0}, "q_lora: must be at least 1, got 0"),
        ({"rope_theta": 0.0}, "rope_theta: must be positive and finite, got 0.0"),
        ({"capacity_factor": -1.0}, "capacity_factor: must be positive and finite, got -1.0"),
        ({"num_groups": 3}, "num_groups: must divide the 8 experts, got 3"),
        ({"top_k": 5}, "top_k: must lie between 1 and the 4 reachable experts, got 5"),
        (
            {"implementation": "jax"},
            "implementation: must be one of None, 'xla', 'cuda', got 'jax'",
        ),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        tiny.config(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"steps": 0}, ValueError, "steps: must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps: must be a static integer, got 1.5"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm: must be positive and finite, got 0.0"),
        ({"peak_rate": -1}, ValueError, "peak_rate: must be finite and not negative, got -1"),
    ],
)
def test_train_config_errors(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        models.TrainConfig(**({"steps": 8} | changes))
    assert str(error.value) == message
