"""Feeding prompts and decoding on a paged latent cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int32

from jax_ds import flash_mla, quantization
from jax_ds._core.checks import check_integer
from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.models.checks import check_cache
from jax_ds.models.config import (
    CACHE_WIDTH,
    LATENT,
    NOPE,
    PAGE_SIZE,
    SOFTMAX_SCALE,
    VALUE,
    ModelConfig,
)
from jax_ds.models.layers import latents, project, queries, rms_norm
from jax_ds.models.model import embed, feed_forward, logits
from jax_ds.models.params import LayerParams, MLPParams, ModelParams
from jax_ds.quantization import Quantized

# (config, kv_up, q_nope, q_rope, pages, page_table, seq_lens) -> [B, S, heads, VALUE]
_Attend = Callable[..., Array]


def empty_pages(config: ModelConfig, pages: int) -> BFloat16[Array, "L*P 64 576"]:
    """The cache of one device: `pages` pages for every layer, in one array.

    One pool that the scan over layers carries is updated in place; a pool per layer would be
    copied once per step. Layer l's pages start at l * pages.

    Args:
      config: the model.
      pages: P, of 64 tokens each, for every layer.

    Returns:
      bfloat16 [L * P, 64, 576], zeros.

    Raises:
      ValueError, TypeError: unless `pages` is an integer of 1 or more.
    """
    check_integer("pages", pages, 1)
    return jnp.zeros((config.num_layers * pages, PAGE_SIZE, CACHE_WIDTH), jnp.bfloat16)


def prepare_for_decoding(config: ModelConfig, params: ModelParams) -> ModelParams:
    """Weights as `decode_step` wants them, converted once instead of at every step.

    bfloat16, or FP8 (`Quantized`) for what `config.precision="fp8"` multiplies in FP8. Router,
    norms and bias stay float32. `kv_up` stays bfloat16: it is absorbed, never multiplied whole.

    Args:
      config: the model.
      params: float32 masters; whole or, inside `jax.shard_map`, one device's.

    Returns:
      `ModelParams` for `decode_step` and `prefill_step`, without a gradient.
    """

    def narrow(w: Any) -> Any:
        return None if w is None else w.astype(jnp.bfloat16)

    def weight(w: Any) -> Any:
        if w is None or config.precision == "bf16":
            return narrow(w)
        return quantization.quantize_128x128(
            w.astype(jnp.bfloat16), implementation=config.implementation
        )

    def layer(params: LayerParams) -> LayerParams:
        a, m = params.attention, params.mlp
        attention = a._replace(
            q_down=weight(a.q_down),
            q_up=weight(a.q_up),
            kv_down=weight(a.kv_down),
            kv_up=narrow(a.kv_up),
            out=weight(a.out),
        )
        mlp = m._replace(gate_up=weight(m.gate_up), down=weight(m.down))
        if not isinstance(mlp, MLPParams):
            mlp = mlp._replace(
                shared_gate_up=weight(mlp.shared_gate_up), shared_down=weight(mlp.shared_down)
            )
        return params._replace(attention=attention, mlp=mlp)

    return params._replace(
        embedding=narrow(params.embedding),
        dense_layers=None if params.dense_layers is None else layer(params.dense_layers),
        moe_layers=layer(params.moe_layers),
        head=narrow(params.head),
    )


def decode_step(
    config: ModelConfig,
    params: ModelParams,
    pages: BFloat16[Array, "L*P 64 576"],
    tokens: Int32[Array, "B S"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
) -> tuple[Float32[Array, "B vocab"], BFloat16[Array, "L*P 64 576"]]:
    """Feeds S new tokens per sequence and returns the logits after the last one.

    Equals the last row of `forward` on the whole sequence, up to rounding, with work proportional
    to the new tokens. Call it inside `jax.shard_map`; the experts see the tokens of all devices
    (low-latency exchange). Keys and values stay latent (absorbed form), which suits few new
    tokens; `prefill_step` feeds many. Sequences may differ in length: tokens are aligned at the
    right, those at a negative position are ignored, and a sequence of length 0 is an empty slot.

    Args:
      config: the model.
      params: this device's parameters, best from `prepare_for_decoding`.
      pages: the pool of `empty_pages`; donate it, and carry it from step to step.
      tokens: [B, S] int32.
      page_table: [B, N] int32, as in `flash_mla.decode`, the same for all layers: entries in
        [0, P), layer l uses page + l * P.
      seq_lens: [B] int32 lengths including the S new tokens.

    Returns:
      logits float32 [B, vocab], and the pool with the new tokens appended.

    Raises:
      ValueError, TypeError: for a shape or dtype against these rules, and as `moe_layer`.
    """
    return _step(config, params, pages, tokens, page_table, seq_lens, _absorbed)


def prefill_step(
    config: ModelConfig,
    params: ModelParams,
    pages: BFloat16[Array, "L*P 64 576"],
    tokens: Int32[Array, "B S"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
) -> tuple[Float32[Array, "B vocab"], BFloat16[Array, "L*P 64 576"]]:
    """`decode_step`, the same up to rounding, for a chunk of S tokens of each prompt.

    Keys and values of the past and of the chunk are expanded from the cache, one layer at a time,
    which takes memory for B * N * 64 of them but needs 3.4 times less arithmetic for each pair of
    tokens. `decode_step` goes on from the cache that it leaves.

    Args:
      config, params, pages, tokens, page_table, seq_lens: as in `decode_step`.

    Returns:
      logits float32 [B, vocab] after the last token, and the pool, as `decode_step`.

    Raises:
      ValueError, TypeError: as `decode_step`.
    """
    return _step(config, params, pages, tokens, page_table, seq_lens, _expanded)


def _step(
    config: ModelConfig,
    params: ModelParams,
    pages: Array,
    tokens: Array,
    page_table: Array,
    seq_lens: Array,
    attend: _Attend,
) -> tuple[Array, Array]:
    check_cache(config, pages, tokens, page_table, seq_lens)
    per_layer = pages.shape[0] // config.num_layers
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = seq_lens[:, None] - tokens.shape[1] + steps[None, :]
    valid = positions >= 0
    positions = jnp.maximum(positions, 0)

    def layer(carry: Any, params: LayerParams) -> tuple[Any, None]:
        x, pages, index = carry
        table = page_table + index * per_layer
        attention = params.attention
        normed = rms_norm(x, attention.norm, config.norm_eps)
        q_nope, q_rope = queries(config, attention, normed, positions)
        latent, k_rope = latents(config, attention, normed, positions)
        row = jnp.concatenate([latent, k_rope[:, :, 0]], axis=-1)
        impl = config.implementation
        pages = flash_mla.append(pages, row, table, seq_lens, implementation=impl)
        assert not isinstance(attention.kv_up, Quantized)
        kv_up = attention.kv_up.astype(x.dtype).reshape(config.num_heads, NOPE + VALUE, LATENT)
        value = attend(config, kv_up, q_nope, q_rope, pages, table, seq_lens)
        x = x + project(config, value.reshape(*value.shape[:2], -1), attention.out)
        change, _ = feed_forward(config, params, x, valid, low_latency=True)
        return (x + change, pages, index + 1), None

    axes = varying_axes(params, pages, tokens, page_table, seq_lens)
    carry = (embed(params, tokens), pages, jnp.zeros((), jnp.int32))
    carry = (*to_varying(carry[:2], axes), carry[2])
    if params.dense_layers is not None:
        carry, _ = jax.lax.scan(layer, carry, params.dense_layers)
    (x, pages, _), _ = jax.lax.scan(layer, carry, params.moe_layers)
    return logits(config, params, x[:, -1:])[:, 0], pages


def _absorbed(
    config: ModelConfig,
    kv_up: BFloat16[Array, "heads NOPE+VALUE LATENT"],
    q_nope: BFloat16[Array, "B S heads NOPE"],
    q_rope: BFloat16[Array, "B S heads ROPE"],
    pages: BFloat16[Array, "L*P 64 576"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
) -> BFloat16[Array, "B S heads VALUE"]:
    """With k = W_k c and v = W_v c for a cached latent c, q . k = (W_k^T q) . c, and the attention
    over v is W_v times the attention over c."""
    q_latent = jnp.einsum("bshn,hnc->bshc", q_nope, kv_up[:, :NOPE])
    out = flash_mla.decode(
        jnp.concatenate([q_latent, q_rope], axis=-1),
        pages,
        page_table,
        seq_lens,
        scale=SOFTMAX_SCALE,
        value_dim=LATENT,
        implementation=config.implementation,
    )
    return jnp.einsum("bshc,hvc->bshv", out, kv_up[:, NOPE:])


def _expanded(
    config: ModelConfig,
    kv_up: BFloat16[Array, "heads NOPE+VALUE LATENT"],
    q_nope: BFloat16[Array, "B S heads NOPE"],
    q_rope: BFloat16[Array, "B S heads ROPE"],
    pages: BFloat16[Array, "L*P 64 576"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
) -> BFloat16[Array, "B S heads VALUE"]:
    """Attention over expanded keys and values, all sequences packed into one row of tokens."""
    batch, new = q_nope.shape[:2]
    slots = page_table.shape[1] * PAGE_SIZE
    rows = pages[jnp.clip(page_table, 0, pages.shape[0] - 1)].reshape(batch, slots, CACHE_WIDTH)
    # Slots without a token may hold anything.
    filled = jnp.arange(slots, dtype=jnp.int32)[None, :] < seq_lens[:, None]
    rows = jnp.where(filled[..., None], rows, 0).reshape(1, batch * slots, CACHE_WIDTH)
    kv = jnp.einsum("btc,hnc->bthn", rows[..., :LATENT], kv_up)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    # After each sequence comes one of the slots that it leaves empty, which has no queries.
    ends = jnp.arange(1, batch + 1, dtype=jnp.int32)
    ends_q = jnp.repeat(ends * new, 2)
    ends_k = jnp.stack([(ends - 1) * slots + jnp.minimum(seq_lens, slots), ends * slots], axis=1)
    zero = jnp.zeros((1,), jnp.int32)
    out = flash_mla.prefill(
        q.reshape(1, batch * new, *q.shape[2:]),
        kv[..., :NOPE],
        kv[..., NOPE:],
        rows[:, :, None, LATENT:],
        jnp.concatenate([zero, ends_q]),
        jnp.concatenate([zero, ends_k.reshape(-1)]),
        scale=SOFTMAX_SCALE,
        implementation=config.implementation,
    )
    assert not isinstance(out, tuple)
    return out.reshape(batch, new, *out.shape[2:])
