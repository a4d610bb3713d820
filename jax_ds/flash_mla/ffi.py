"""The custom calls of this room: shapes, attributes, and what the kernels cannot take."""

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
        return f"the kernel takes head sizes 192/128, 128/128 and 64/64, got {widths[0]}/{widths[2]}"
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
        attributes={
            "qk_dim": width,
            "rope": 0 if k_rope is None else k_rope.shape[3],
            "v_dim": v.shape[3],
            "causal": config.causal,
            "scale": np.float32(config.scale),
        },
    )
    return results[0], results[1]
