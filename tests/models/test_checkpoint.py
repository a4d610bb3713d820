"""Checkpoints keep every bit, on any mesh, and never half a file."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds.models import load_tree, save_tree
from tests.models import tiny


class Tree(NamedTuple):
    weights: Any
    others: dict[str, Any]


SPECS = Tree(jax.P("ep"), {"bf16": jax.P(), "fp8": jax.P(None, "ep"), "step": jax.P()})


def _tree(mesh: Any) -> Tree:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((8, 16)).astype(np.float32)
    tree = Tree(
        jnp.asarray(values).at[0, :2].set(jnp.array([jnp.nan, -jnp.inf])),
        {
            "bf16": jnp.asarray(values, jnp.bfloat16),
            "fp8": jnp.asarray(values, jnp.float8_e4m3fn),
            "step": jnp.asarray(7, jnp.int32),
        },
    )
    return jax.tree.map(lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s)), tree, SPECS)


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_round_trip_on_another_mesh(devices: int, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new folder" / "tree.npz"
    tree = _tree(tiny.mesh(8)[0])
    save_tree(path, tree)
    mesh, _ = tiny.mesh(devices)
    loaded = load_tree(path, jax.eval_shape(lambda: tree), mesh, SPECS)
    assert _bits(loaded) == _bits(tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for leaf, spec in zip(jax.tree.leaves(loaded), jax.tree.leaves(SPECS), strict=True):
        assert leaf.sharding == jax.NamedSharding(mesh, spec)
    assert [file.name for file in path.parent.iterdir()] == ["tree.npz"]


def test_a_failed_save_leaves_the_last_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tree.npz"
    save_tree(path, {"a": jnp.zeros(3)})
    before = path.read_bytes()

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_tree(path, {"a": jnp.ones(3)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tree.npz"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.zeros(3)}, "must hold the same leaves as the model, got ['b']"),
        ({"a": jnp.zeros(4), "b": jnp.zeros(2)}, "['a']: must be float32[4], got float32[3]"),
        (
            {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2)},
            "['a']: must be bfloat16[3], got float32[3]",
        ),
    ],
)
def test_errors(like: Any, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tree.npz"
    save_tree(path, {"a": jnp.zeros(3), "b": jnp.ones(2)})
    mesh, _ = tiny.mesh(1)
    with pytest.raises(ValueError) as error:
        load_tree(path, like, mesh, jax.tree.map(lambda _: jax.P(), like))
    assert str(error.value).endswith(message)
