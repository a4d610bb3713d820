"""Checks of this room's arguments, raised while tracing or before."""

import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ds._core.checks import axis_names, check, check_dtype, check_rank, check_shape
from jax_ds.models.config import CACHE_WIDTH, PAGE_SIZE, ModelConfig


def check_mesh(model: ModelConfig, mesh: Mesh) -> None:
    """Requires a mesh of the experts' axes and no others, of a size that divides the experts."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    axes = axis_names(model.axis_name)
    rule = f"must name the axes of the mesh, {mesh.axis_names}"
    check(set(axes) == set(mesh.axis_names), "axis_name", rule, repr(model.axis_name))
    ranks = math.prod(mesh.shape[axis] for axis in axes)
    rule = f"must be a multiple of the {ranks} ranks of axis_name"
    check(model.num_experts % ranks == 0, "num_experts", rule, model.num_experts)


def check_tokens(tokens: Any, letters: str = "B S", least: int = 1) -> None:
    """Requires int32 sequences of `least` tokens or more."""
    check_rank("tokens", tokens, 2)
    check_dtype("tokens", tokens, jnp.int32)
    rule = f"must have shape [{letters}] with {least} or more in a row"
    check(tokens.shape[1] >= least, "tokens", rule, list(tokens.shape))


def check_cache(
    config: ModelConfig, pages: Any, tokens: Any, page_table: Any, seq_lens: Any
) -> None:
    """Requires operands of a step on a paged cache."""
    check_tokens(tokens)
    batch = tokens.shape[0]
    check_dtype("pages", pages, jnp.bfloat16)
    check_shape("pages", pages, (None, PAGE_SIZE, CACHE_WIDTH), "L*P 64 576")
    rule = f"must have as many pages for each of the {config.num_layers} layers"
    check(pages.shape[0] % config.num_layers == 0, "pages", rule, pages.shape[0])
    check_dtype("page_table", page_table, jnp.int32)
    check_shape("page_table", page_table, (batch, None), "B N")
    check_dtype("seq_lens", seq_lens, jnp.int32)
    check_shape("seq_lens", seq_lens, (batch,), "B")
