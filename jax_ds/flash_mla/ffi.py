"""The custom calls of this room: shapes, attributes, and what the kernels cannot take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ds._runtime.call import ffi_call
from jax_ds.flash_mla.config import (
    DecodeConfig,
    PrefillConfig,
    PrefillOperands,
    PrefillResiduals,
)

Array = jax.Array

# Of the decode kernels: width of a row, of its value; CTAs with a workspace.
_ROW, _VALUE, _MAX_CTAS = 576, 512, 132
_NARROW_ROWS, _WIDE_ROWS = 32, 64

# Widths of queries, of the part of the keys that all heads share, and of values.
_PREFILL_HEADS = ((192, 64, 128), (192, 0, 128), (128, 0, 128), (64, 0, 64))


def decode_unsupported(q: Array, kv_pages: Array, value_dim: int) -> str | None:
    """Why the decode kernels cannot take these operands; None if they can."""
    return append_unsupported(kv_pages) or (
        f"the kernels take value_dim {_VALUE}, got {value_dim}" if value_dim != _VALUE else None
    )


def append_unsupported(kv_pages: Array) -> str | None:
    """Why the append kernel cannot take these pages; None if it can."""
    if kv_pages.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernels take bfloat16 and float16, got {kv_pages.dtype.name}"
    if kv_pages.shape[2] != _ROW:
        return f"the kernels take rows of {_ROW}, got {kv_pages.shape[2]}"
    return None


def decode_tile(query_rows: int) -> tuple[str, int, int]:
    """The kernel for S * H query rows: its name, rows a CTA works on, CTAs of a cluster."""
    if query_rows <= _NARROW_ROWS:
        return "narrow", -(-query_rows // 8) * 8, 1
    return "wide", _WIDE_ROWS, 1 if -(-query_rows // _WIDE_ROWS) % 2 else 2


def decode(
    config: DecodeConfig, q: Array, kv_pages: Array, page_table: Array, seq_lens: Array
) -> tuple[Array, Array]:
    """`api.decode`: out [B, S, H, 512] and lse [B, S, H]."""
    batch, tokens, heads, _ = q.shape
    out = jax.ShapeDtypeStruct((batch, tokens, heads, _VALUE), q.dtype)
    lse = jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32)
    if min(q.size, kv_pages.size, page_table.size) == 0:
        return jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)
    # Where requests are split, each CTA leaves at most two parts. The scratch space is a result:
    # memory that a handler allocates would keep the call out of command buffers.
    rows = 2 * _MAX_CTAS * decode_tile(tokens * heads)[1]
    workspace = [
        jax.ShapeDtypeStruct((rows, _VALUE), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((batch, 2), jnp.int32),
    ]
    results = ffi_call(
        "jax_ds_flash_mla_decode",
        [out, lse, *workspace],
        q,
        kv_pages,
        page_table,
        seq_lens,
        attributes={
            "tokens": tokens,
            "heads": heads,
            "half": q.dtype == jnp.float16,
            "causal": config.causal,
            "scale": np.float32(config.scale),
        },
        # Batched calls would need a copy of the pages for every element that shares them.
        vmap_method="sequential",
    )
    return results[0], results[1]


def append(kv_pages: Array, kv: Array, page_table: Array, seq_lens: Array) -> Array:
    """`api.append`: the pages, updated in place."""
    if min(kv.size, kv_pages.size, page_table.size) == 0:
        return kv_pages
    pages: Array = ffi_call(
        "jax_ds_flash_mla_append",
        [jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype)],
        kv_pages,
        kv,
        page_table,
        seq_lens,
        attributes={},
        aliases={0: 0},
        vmap_method="sequential",
    )[0]
    return pages


def prefill_unsupported(operands: PrefillOperands) -> str | None:
    """Why the prefill kernel cannot take these operands; None if it can."""
    q, _, v, k_rope, cu_seqlens_q, _ = operands
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


def prefill(config: PrefillConfig, operands: PrefillOperands) -> tuple[Array, Array]:
    """`api.prefill`: out [B, Sq, H, V] and lse [B, Sq, H]."""
    q, k, v, k_rope, *packing = operands
    assert packing == [None, None]
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
    config: PrefillConfig, residuals: PrefillResiduals, dout: Array, dlse: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and k_rope."""
    (q, k, v, k_rope, *packing), out, lse = residuals
    assert packing == [None, None]
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
