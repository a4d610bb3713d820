"""The smallest model that has every part, and how tests run it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_ds import models

CONFIG = models.ModelConfig(
    vocab=64,
    hidden=64,
    num_layers=2,
    num_dense_layers=1,
    num_heads=2,
    dense_ffn=64,
    num_experts=8,
    top_k=2,
    num_groups=4,
    top_groups=2,
    expert_ffn=32,
    shared_ffn=32,
    routed_scaling=1.5,
    precision="bf16",
)
TRAIN = models.TrainConfig(steps=8, peak_rate=3e-3, warmup=2, bias_rate=0.01)


def config(**changes: Any) -> models.ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


def mesh(*sizes: int) -> tuple[jax.sharding.Mesh, str | tuple[str, ...]]:
    """A mesh over the first devices, and the name of its expert axis."""
    names = ("ep",) if len(sizes) == 1 else ("node", "gpu")
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, devices=devices), names[0] if len(names) == 1 else names


def tokens(step: int, size: int = 8, length: int = 16) -> np.ndarray[Any, Any]:
    """Something to learn: every token follows from the one before."""
    first = np.random.default_rng(step).integers(0, CONFIG.vocab, (size, 1))
    return ((first + 5 * np.arange(length + 1)[None, :]) % CONFIG.vocab).astype(np.int32)


def put(batch: np.ndarray[Any, Any], mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.device_put(batch, jax.NamedSharding(mesh, jax.P(mesh.axis_names)))
