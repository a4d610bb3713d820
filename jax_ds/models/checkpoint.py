"""Checkpoints: one npz file per tree, written whole and renamed into place."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jax_ds._core.checks import fail


def save_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes all leaves of `tree` (arrays, also sharded over processes) to `path`.

    Every process calls it; process 0 writes. The file appears by an atomic rename, so an
    interrupted save leaves the previous file. Leaves are stored under their tree path, bits
    unchanged; dtypes that numpy lacks (bfloat16, float8) as integers of their width.

    Args:
      path: the file; its folder is made.
      tree: any pytree of arrays.

    Raises:
      OSError: where process 0 cannot write; nothing is left of the attempt.
    """
    path = pathlib.Path(path)
    flat = {
        jax.tree_util.keystr(key): _to_host(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, allow_pickle=False, **flat)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {path.name}")


def load_tree(path: str | os.PathLike[str], like: Any, mesh: Mesh, specs: Any) -> Any:
    """Reads what `save_tree` wrote into the structure of `like`, placed on `mesh` by `specs`.

    Args:
      path: the file; every process reads it.
      like: a tree of arrays or `jax.ShapeDtypeStruct`: the names, shapes and dtypes expected.
      mesh, specs: where the leaves go; any mesh, not only the one that saved.

    Returns:
      A tree of the structure of `like`.

    Raises:
      OSError: where the file cannot be read.
      ValueError: the file holds another tree (a name, a shape or a dtype differs).
    """
    with np.load(path, allow_pickle=False) as stored:
        keys = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(like)]
        missing = sorted(set(keys) ^ set(stored.files))
        if missing:
            fail("path", f"{path} must hold the same leaves as the model", missing[0])
        shardings = [
            NamedSharding(mesh, spec)
            for spec in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, jax.P))
        ]
        leaves = [
            _place(key, stored[key], leaf, sharding)
            for key, leaf, sharding in zip(keys, jax.tree.leaves(like), shardings, strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _to_host(leaf: Any) -> np.ndarray[Any, Any]:
    if jax.process_count() > 1 and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    value = np.asarray(leaf)
    return value if value.dtype.kind in "biuf" else value.view(f"u{value.dtype.itemsize}")


def _place(key: str, value: np.ndarray[Any, Any], like: Any, sharding: NamedSharding) -> jax.Array:
    dtype = np.dtype(jnp.dtype(like.dtype))
    stored = dtype if dtype.kind in "biuf" else np.dtype(f"u{dtype.itemsize}")
    if value.shape != like.shape or value.dtype != stored:
        fail(
            key, f"must be {dtype.name}{list(like.shape)}", f"{value.dtype.name}{list(value.shape)}"
        )
    value = value.view(dtype)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
