"""The forward pass over whole sequences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32

from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.models.checks import check_tokens
from jax_ds.models.config import ModelConfig
from jax_ds.models.layers import attention, mlp, rms_norm
from jax_ds.models.params import LayerParams, MLPParams, ModelParams
from jax_ds.moe import MoEStats, moe_layer


def forward(
    config: ModelConfig, params: ModelParams, tokens: Int32[Array, "B S"]
) -> tuple[Float32[Array, "B S vocab"], MoEStats]:
    """Logits of the next token at every position; call it inside `jax.shard_map`.

    Args:
      config: the model.
      params: this device's parameters: dense ones whole, experts its own shard.
      tokens: [B, S] int32, this device's sequences, each from position 0.

    Returns:
      logits float32 [B, S, vocab], and `MoEStats` stacked over the MoE layers ([L, E] and [L]).

    Raises:
      ValueError, TypeError: for tokens of another shape or dtype, and as `moe_layer`.
    """
    check_tokens(tokens)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))

    def layer(x: BFloat16[Array, "B S hidden"], params: LayerParams) -> tuple[Any, MoEStats | None]:
        x = x + attention(config, params.attention, x, positions)
        change, stats = feed_forward(config, params, x)
        return x + change, stats

    step: Callable[..., Any] = jax.checkpoint(layer) if config.remat else layer
    x = embed(params, tokens)
    if params.dense_layers is not None:
        x, _ = jax.lax.scan(step, x, params.dense_layers, unroll=config.unroll)
    x, stats = jax.lax.scan(step, x, params.moe_layers, unroll=config.unroll)
    return logits(config, params, x), stats


def feed_forward(
    config: ModelConfig,
    params: LayerParams,
    x: BFloat16[Array, "B S hidden"],
    valid: Array | None = None,
    *,
    low_latency: bool = False,
) -> tuple[BFloat16[Array, "B S hidden"], MoEStats | None]:
    """The second half of a layer: normalise, then the dense MLP or the experts."""
    x = rms_norm(x, params.mlp_norm, config.norm_eps)
    if isinstance(params.mlp, MLPParams):
        return mlp(config, params.mlp, x), None
    flat, stats = moe_layer(
        x.reshape(-1, x.shape[-1]),
        params.mlp,
        None if valid is None else valid.reshape(-1),
        axis_name=config.axis_name,
        k=config.top_k,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        routed_scaling=config.routed_scaling,
        capacity_factor=config.capacity_factor,
        precision=config.precision,
        low_latency=low_latency,
        implementation=config.implementation,
    )
    return flat.reshape(x.shape), stats


def embed(params: ModelParams, tokens: Int32[Array, "B S"]) -> BFloat16[Array, "B S hidden"]:
    x = params.embedding.astype(jnp.bfloat16)[tokens]
    # A scan carry varies over the same axes on the way in and out; the experts' outputs vary over
    # every axis that the parameters or the tokens vary over.
    return to_varying(x, varying_axes(params, tokens))


def logits(
    config: ModelConfig, params: ModelParams, x: BFloat16[Array, "B S hidden"]
) -> Float32[Array, "B S vocab"]:
    x = rms_norm(x, params.final_norm, config.norm_eps)
    return jnp.einsum(
        "bsh,vh->bsv", x, params.head.astype(x.dtype), preferred_element_type=jnp.float32
    )
