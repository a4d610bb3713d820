"""The custom calls of this room: shapes, attributes, and what the kernels cannot take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ds._runtime.call import ffi_call
from jax_ds.flash_mla.config import PrefillConfig

Array = jax.Array

# Widths of queries, of the part of the keys that all heads share, and of values.
_PREFILL_HEADS = ((192, 64, 128), (192, 0, 128), (128, 0, 128), (64, 0, 64))


def prefill_unsupported(
    q: Array, v: Array, k_rope: Array | None, cu_seqlens_q: Array | None
) -> str | None:
    """Why the prefill kernel cannot take these operands; None if it can."""
    if q.dtype != jnp.bfloat16:
        return f"the kernel takes bfloat16, got {q.dtype.name}"
    if cu_seqlens_q is not None:
        return "the kernel takes no packed batches"
    widths = (q.shape[3], 0 if k_rope is None else k_rope.shape[3], v.shape[3])
    if widths not in _PREFILL_HEADS:
        return (
            f"the kernel takes head sizes 192/128, 128/128 and 64/64, got {widths[0]}/{widths[2]}"
        )
    return None


def prefill(
    config: PrefillConfig,
    q: Array,
    k: Array,
    v: Array,
    k_rope: Array | None,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
) -> tuple[Array, Array]:
    """`api.prefill`: out [B, Sq, H, V] and lse [B, Sq, H]."""
    assert cu_seqlens_q is None and cu_seqlens_k is None
    *rows, width = q.shape
    out = jax.ShapeDtypeStruct((*rows, v.shape[3]), q.dtype)
    lse = jax.ShapeDtypeStruct(tuple(rows), jnp.float32)
    if min(q.size, k.size) == 0:
        return jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)
    results = ffi_call(
        "jax_ds_flash_mla_prefill",
        [out, lse],
        *([q, k, v] if k_rope is None else [q, k, v, k_rope]),
        attributes=_prefill_attributes(config, width, v, k_rope),
    )
    return results[0], results[1]


def prefill_backward(
    config: PrefillConfig,
    q: Array,
    k: Array,
    v: Array,
    k_rope: Array | None,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and k_rope."""
    assert cu_seqlens_q is None and cu_seqlens_k is None
    if min(q.size, k.size) == 0:
        dq, dk, dv, dk_rope = jax.tree.map(jnp.zeros_like, (q, k, v, k_rope))
        return dq, dk, dv, dk_rope
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    # Queries that see no key: probabilities of zero, and no NaN of theirs may meet them.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    blind = q.shape[1] - k.shape[1]
    if config.causal and blind > 0:
        q, dout, delta = (x.at[:, :blind].set(0) for x in (q, dout, delta))
    operands = [q, k, v, dout, jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2)]
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    if k_rope is not None:
        operands.append(k_rope)
        outputs.append(jax.ShapeDtypeStruct((*k.shape[:3], k_rope.shape[3]), k_rope.dtype))
    dq, dk, dv, *parts = ffi_call(
        "jax_ds_flash_mla_prefill_backward",
        outputs,
        *operands,
        attributes=_prefill_attributes(config, q.shape[3], v, k_rope),
    )
    if k_rope is None:
        return dq, dk, dv, None
    dk_rope = jnp.sum(parts[0].astype(jnp.float32), axis=2, keepdims=True)
    return dq, dk, dv, dk_rope.astype(k_rope.dtype)


def _prefill_attributes(
    config: PrefillConfig, width: int, v: Array, k_rope: Array | None
) -> dict[str, Any]:
    return {
        "qk_dim": width,
        "rope": 0 if k_rope is None else k_rope.shape[3],
        "v_dim": v.shape[3],
        "causal": config.causal,
        "scale": np.float32(config.scale),
    }
