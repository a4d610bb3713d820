"""The parts of a layer: norm, rotary embedding, projections, latent attention, dense MLP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jax_ds import flash_mla
from jax_ds.models.config import LATENT, NOPE, ROPE, SOFTMAX_SCALE, VALUE, ModelConfig
from jax_ds.models.params import AttentionParams, MLPParams, Weight
from jax_ds.moe.experts import linear, swiglu


def rms_norm(
    x: BFloat16[Array, "... D"], weight: Float32[Array, " D"], eps: float
) -> BFloat16[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    weight = weight.reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * scale * weight).astype(x.dtype)


def rope(
    x: Float[Array, "B S heads ROPE"], positions: Int32[Array, "B S"], theta: float
) -> Float[Array, "B S heads ROPE"]:
    """Rotary position embedding of neighbouring pairs (x[2i], x[2i + 1]), DeepSeek's layout:

        pair i turns by positions * theta^(-2i / ROPE)

    Other libraries pair i with i + ROPE / 2; weights for them need a permutation.
    """
    frequency = theta ** (-jnp.arange(0, ROPE, 2, dtype=jnp.float32) / ROPE)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def project(
    config: ModelConfig, x: BFloat16[Array, "B S K"], w: Weight
) -> BFloat16[Array, "B S N"]:
    """x w^T in the model's precision."""
    flat = linear(x.reshape(-1, x.shape[-1]), w, config.precision, config.implementation)
    return flat.reshape(*x.shape[:-1], -1)


def mlp(
    config: ModelConfig, params: MLPParams, x: BFloat16[Array, "B S hidden"]
) -> BFloat16[Array, "B S hidden"]:
    """down (silu(g) * v), [g, v] = gate_up x."""
    return project(config, swiglu(project(config, x, params.gate_up)), params.down)


def queries(
    config: ModelConfig,
    params: AttentionParams,
    x: BFloat16[Array, "B S hidden"],
    positions: Int32[Array, "B S"],
) -> tuple[BFloat16[Array, "B S heads NOPE"], BFloat16[Array, "B S heads ROPE"]]:
    """Position-free and rotary parts of the queries; `x` is normalised."""
    if params.q_down is not None:
        assert params.q_norm is not None
        x = rms_norm(project(config, x, params.q_down), params.q_norm, config.norm_eps)
    q = project(config, x, params.q_up)
    q = q.reshape(*q.shape[:2], config.num_heads, NOPE + ROPE)
    return q[..., :NOPE], rope(q[..., NOPE:], positions, config.rope_theta)


def latents(
    config: ModelConfig,
    params: AttentionParams,
    x: BFloat16[Array, "B S hidden"],
    positions: Int32[Array, "B S"],
) -> tuple[BFloat16[Array, "B S LATENT"], BFloat16[Array, "B S 1 ROPE"]]:
    """The compressed keys and values and the shared rotary key: all that a cache holds."""
    kv = project(config, x, params.kv_down)
    latent = rms_norm(kv[..., :LATENT], params.kv_norm, config.norm_eps)
    return latent, rope(kv[:, :, None, LATENT:], positions, config.rope_theta)


def attention(
    config: ModelConfig,
    params: AttentionParams,
    x: BFloat16[Array, "B S hidden"],
    positions: Int32[Array, "B S"],
) -> BFloat16[Array, "B S hidden"]:
    """Causal latent attention over whole sequences, for training: keys and values are expanded
    from the latent (DeepSeek-V2, section 2.1)."""
    x = rms_norm(x, params.norm, config.norm_eps)
    q_nope, q_rope = queries(config, params, x, positions)
    latent, k_rope = latents(config, params, x, positions)
    kv = project(config, latent, params.kv_up)
    kv = kv.reshape(*kv.shape[:2], config.num_heads, NOPE + VALUE)
    out = flash_mla.prefill(
        jnp.concatenate([q_nope, q_rope], axis=-1),
        kv[..., :NOPE],
        kv[..., NOPE:],
        k_rope,
        scale=SOFTMAX_SCALE,
        implementation=config.implementation,
    )
    assert not isinstance(out, tuple)
    return project(config, out.reshape(*out.shape[:2], -1), params.out)
