"""The model's parameters: layout, initialisation, placement."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32

from jax_ds.models.config import LATENT, NOPE, ROPE, VALUE, ModelConfig
from jax_ds.moe import MoEParams
from jax_ds.quantization import Quantized

Weight = Float[Array, "..."] | Quantized


class AttentionParams(NamedTuple):
    """Multi-head latent attention; every projection is [out, in]."""

    norm: Float32[Array, " hidden"]
    q_down: Weight | None  # [q_lora, hidden]
    q_norm: Float32[Array, " q_lora"] | None
    q_up: Weight  # [heads * (NOPE + ROPE), q_lora or hidden]
    kv_down: Weight  # [LATENT + ROPE, hidden]
    kv_norm: Float32[Array, " LATENT"]
    kv_up: Weight  # [heads * (NOPE + VALUE), LATENT]: each head's key rows, then its value rows
    out: Weight  # [hidden, heads * VALUE]


class MLPParams(NamedTuple):
    gate_up: Weight  # [2 ffn, hidden]
    down: Weight  # [hidden, ffn]


class LayerParams(NamedTuple):
    attention: AttentionParams
    mlp_norm: Float32[Array, " hidden"]
    mlp: MLPParams | MoEParams


class ModelParams(NamedTuple):
    """float32 masters. Layers of a kind are stacked along a leading dimension, for a scan."""

    embedding: Float32[Array, "vocab hidden"]
    dense_layers: LayerParams | None
    moe_layers: LayerParams
    final_norm: Float32[Array, " hidden"]
    head: Float32[Array, "vocab hidden"]


def init_params(config: ModelConfig, key: Array) -> ModelParams:
    """All parameters, unsharded: normal weights of variance 1 / fan-in; what writes to the
    residual stream is scaled down by sqrt(2 num_layers).

    Args:
      config: the model.
      key: of `jax.random`.

    Returns:
      float32 `ModelParams`; norms are 1, biases 0, the embedding of variance 1.
    """
    c = config
    k_embed, k_dense, k_moe, k_head = jax.random.split(key, 4)

    def stack(key: Array, layers: int, mlp: str) -> LayerParams:
        keys = iter(jax.random.split(key, 16))

        def weight(*shape: int, residual: bool = False) -> Float32[Array, "..."]:
            std = shape[-1] ** -0.5 * ((2 * c.num_layers) ** -0.5 if residual else 1.0)
            return std * jax.random.normal(next(keys), (layers, *shape), jnp.float32)

        ones = lambda width: jnp.ones((layers, width), jnp.float32)  # noqa: E731
        q_in = c.q_lora or c.hidden
        attention = AttentionParams(
            norm=ones(c.hidden),
            q_down=weight(c.q_lora, c.hidden) if c.q_lora else None,
            q_norm=ones(c.q_lora) if c.q_lora else None,
            q_up=weight(c.num_heads * (NOPE + ROPE), q_in),
            kv_down=weight(LATENT + ROPE, c.hidden),
            kv_norm=ones(LATENT),
            kv_up=weight(c.num_heads * (NOPE + VALUE), LATENT),
            out=weight(c.hidden, c.num_heads * VALUE, residual=True),
        )
        if mlp == "dense":
            block: MLPParams | MoEParams = MLPParams(
                gate_up=weight(2 * c.dense_ffn, c.hidden),
                down=weight(c.hidden, c.dense_ffn, residual=True),
            )
        else:
            shared = c.shared_ffn > 0
            block = MoEParams(
                router=weight(c.num_experts, c.hidden),
                bias=jnp.zeros((layers, c.num_experts), jnp.float32),
                gate_up=weight(c.num_experts, 2 * c.expert_ffn, c.hidden),
                down=weight(c.num_experts, c.hidden, c.expert_ffn, residual=True),
                shared_gate_up=weight(2 * c.shared_ffn, c.hidden) if shared else None,
                shared_down=weight(c.hidden, c.shared_ffn, residual=True) if shared else None,
            )
        return LayerParams(attention, ones(c.hidden), block)

    return ModelParams(
        embedding=jax.random.normal(k_embed, (c.vocab, c.hidden), jnp.float32),
        dense_layers=stack(k_dense, c.num_dense_layers, "dense") if c.num_dense_layers else None,
        moe_layers=stack(k_moe, c.num_moe_layers, "moe"),
        final_norm=jnp.ones(c.hidden, jnp.float32),
        head=c.hidden**-0.5 * jax.random.normal(k_head, (c.vocab, c.hidden), jnp.float32),
    )


def param_specs(config: ModelConfig, params: ModelParams) -> ModelParams:
    """A PartitionSpec for every leaf of `params`: routed experts over `axis_name`, the rest
    replicated. Works for arrays and for their shapes (`jax.eval_shape`).

    Args:
      config: the model, for its `axis_name`.
      params: as in training, or from `prepare_for_decoding`.

    Returns:
      A tree of the structure of `params`.
    """
    everywhere = PartitionSpec()
    experts = PartitionSpec(None, config.axis_name)  # [layer, expert, ...]
    specs = jax.tree.map(lambda _: everywhere, params)
    moe = params.moe_layers.mlp
    assert isinstance(moe, MoEParams)
    sharded = specs.moe_layers.mlp._replace(
        gate_up=jax.tree.map(lambda _: experts, moe.gate_up),
        down=jax.tree.map(lambda _: experts, moe.down),
    )
    return specs._replace(moe_layers=specs.moe_layers._replace(mlp=sharded))
