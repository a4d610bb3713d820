"""The equations of `flash_mla` in float32, dense and slow. Tests compare with them.

Nothing here is shared with the implementations.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


def attention(
    q: Float[Array, "Q H D"],
    k: Float[Array, "K H D"],
    v: Float[Array, "K H V"],
    visible: Array,
    scale: float,
) -> tuple[Float32[Array, "Q H V"], Float32[Array, "Q H"]]:
    """Softmax attention of one sequence under a mask [Q, K].

    out = softmax(scale * q k^T) v over the visible keys; lse is the logarithm of its denominator.
    A query without any key gives 0 and -inf. Values that no visible pair touches are never used.
    """
    used = visible.any(axis=1)
    q = jnp.where(used[:, None, None], q.astype(jnp.float32), 0.0)
    touched = visible.any(axis=0)[:, None, None]
    k = jnp.where(touched, k.astype(jnp.float32), 0.0)
    v = jnp.where(touched, v.astype(jnp.float32), 0.0)
    scores = scale * jnp.einsum("qhd,khd->hqk", q, k, precision="highest")
    scores = jnp.where(visible[None], scores, -jnp.inf)
    peak = jnp.where(used[None], scores.max(axis=-1, initial=-jnp.inf), 0.0)
    weights = jnp.where(visible[None], jnp.exp(scores - peak[..., None]), 0.0)
    total = jnp.where(used[None], weights.sum(axis=-1), 1.0)
    out = jnp.einsum("hqk,khv->qhv", weights / total[..., None], v, precision="highest")
    lse = jnp.where(used[None], peak + jnp.log(total), -jnp.inf)
    return out, lse.T


def decode(
    q: Float[Array, "B S H D"],
    kv_pages: Float[Array, "P L D"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
    *,
    scale: float | None = None,
    causal: bool = True,
    value_dim: int = 512,
) -> tuple[Float32[Array, "B S H V"], Float32[Array, "B S H"]]:
    """`flash_mla.decode` on the gathered cache with every score at once; returns out and lse."""
    _, tokens, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    num_keys = page_table.shape[1] * kv_pages.shape[1]

    def one(q: Array, table: Array, seq_len: Array) -> tuple[Array, Array]:
        cache = kv_pages[jnp.clip(table, 0, kv_pages.shape[0] - 1)]
        keys = jnp.broadcast_to(cache.reshape(num_keys, 1, width), (num_keys, heads, width))
        query, key = jnp.arange(tokens)[:, None], jnp.arange(num_keys)[None, :]
        last = seq_len - tokens + query if causal else seq_len - 1
        return attention(q, keys, keys[..., :value_dim], (key <= last) & (query >= 0), scale)

    return jax.vmap(one)(q, page_table, seq_lens)


def append(
    kv_pages: Float[Array, "P L D"],
    kv: Float[Array, "B S D"],
    page_table: Int32[Array, "B N"],
    seq_lens: Int32[Array, " B"],
) -> Float[Array, "P L D"]:
    """`flash_mla.append`, one token after the other; table and lengths must be concrete."""
    table, lengths = np.asarray(page_table), np.asarray(seq_lens)
    page_size = kv_pages.shape[1]
    batch, tokens, _ = kv.shape
    for b in range(batch):
        for s in range(tokens):
            position = int(lengths[b]) - tokens + s
            if position >= 0:
                page = int(table[b, position // page_size])
                kv_pages = kv_pages.at[page, position % page_size].set(kv[b, s])
    return kv_pages


def prefill(
    q: Float[Array, "B Sq H Dk"],
    k: Float[Array, "B Sk Hk Dk"],
    v: Float[Array, "B Sk Hk V"],
    k_rope: Float[Array, "B Sk 1 Dr"] | None = None,
    cu_seqlens_q: Int32[Array, " N+1"] | None = None,
    cu_seqlens_k: Int32[Array, " N+1"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Float32[Array, "B Sq H V"], Float32[Array, "B Sq H"]]:
    """`flash_mla.prefill` with every score at once; returns out and lse."""
    batch, num_q, heads, width = q.shape
    num_k = k.shape[1]
    scale = width**-0.5 if scale is None else scale
    repeats = heads // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    if k_rope is not None:
        rope = jnp.broadcast_to(k_rope, (batch, num_k, heads, k_rope.shape[3]))
        k = jnp.concatenate([k, rope], axis=3)
    if cu_seqlens_q is None:
        cu_seqlens_q, cu_seqlens_k = jnp.array([0, num_q]), jnp.array([0, num_k])
    elif cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    assert cu_seqlens_k is not None
    i, j = jnp.arange(num_q)[:, None], jnp.arange(num_k)[None, :]
    visible = jnp.zeros((num_q, num_k), bool)
    for n in range(cu_seqlens_q.shape[0] - 1):
        own = (i >= cu_seqlens_q[n]) & (i < cu_seqlens_q[n + 1])
        own &= (j >= cu_seqlens_k[n]) & (j < cu_seqlens_k[n + 1])
        if causal:
            # The last query of a sequence sees its last key.
            own &= j - cu_seqlens_k[n + 1] <= i - cu_seqlens_q[n + 1]
        visible |= own
    return jax.vmap(lambda q, k, v: attention(q, k, v, visible, scale))(q, k, v)
