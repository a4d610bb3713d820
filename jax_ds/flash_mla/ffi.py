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


def decode_unsupported(kv_pages: Array, value_dim: int) -> str | None:
    """Why the decode kernels cannot take these pages; None if they can."""
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


def decode_tile(query_rows: int) -> tuple[str, int]:
    """The kernel for S * H query rows: its name and the rows a CTA works on."""
    if query_rows <= _NARROW_ROWS:
        return "narrow", -(-query_rows // 8) * 8
    return "wide", _WIDE_ROWS


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
    """Why the prefill kernels cannot take these operands; None if they can."""
    q, _, v, k_rope, *_ = operands
    if q.dtype != jnp.bfloat16:
        return f"the kernels take bfloat16, got {q.dtype.name}"
    qk, rope, value = q.shape[3], 0 if k_rope is None else k_rope.shape[3], v.shape[3]
    if (qk, rope, value) not in _PREFILL_HEADS:
        shared = f" with a k_rope of {rope}" if rope else ""
        return (
            "the kernels take head sizes 192/128 (with a k_rope of 64 or without), 128/128 and "
            f"64/64, got {qk}/{value}{shared}"
        )
    return None


def prefill(config: PrefillConfig, operands: PrefillOperands) -> tuple[Array, Array]:
    """`api.prefill`: out [B, Sq, H, V] and lse [B, Sq, H]."""
    q, k, v, *_, cu_seqlens_q, _ = operands
    *rows, _ = q.shape
    out = jax.ShapeDtypeStruct((*rows, v.shape[3]), q.dtype)
    lse = jax.ShapeDtypeStruct(tuple(rows), jnp.float32)
    if min(q.size, k.size) == 0:
        return jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)
    packed = cu_seqlens_q is not None
    results = ffi_call(
        "jax_ds_flash_mla_prefill",
        [out, lse, *([_packed_lists(q.shape[1])] if packed else [])],
        q,
        k,
        v,
        *_optional(operands),
        attributes=_prefill_attributes(config, operands),
        vmap_method=_prefill_vmap(operands),
    )
    return results[0], results[1]


def prefill_backward(
    config: PrefillConfig, residuals: PrefillResiduals, dout: Array, dlse: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and k_rope."""
    operands, out, lse = residuals
    q, k, v, k_rope, cu_seqlens_q, _ = operands
    if min(q.size, k.size) == 0:
        dq, dk, dv, dk_rope = jax.tree.map(jnp.zeros_like, (q, k, v, k_rope))
        return dq, dk, dv, dk_rope
    batch, queries, heads, _ = q.shape
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    # Workspace, as results: what the second kernel needs of each query, in rows of 16 bytes or a
    # multiple, and the counter from which it draws its tiles.
    statistics = (batch, heads, 2, -(-queries // 4) * 4)
    outputs.append(jax.ShapeDtypeStruct(statistics, jnp.float32))
    outputs.append(jax.ShapeDtypeStruct((1,), jnp.int32))
    if k_rope is not None:
        outputs.append(jax.ShapeDtypeStruct((*k.shape[:3], k_rope.shape[3]), k_rope.dtype))
    if cu_seqlens_q is not None:
        outputs.append(_packed_lists(queries, k.shape[1]))
    results = ffi_call(
        "jax_ds_flash_mla_prefill_backward",
        outputs,
        q,
        k,
        v,
        out,
        dout,
        lse,
        dlse,
        *_optional(operands),
        attributes=_prefill_attributes(config, operands),
        vmap_method=_prefill_vmap(operands),
    )
    dq, dk, dv = results[:3]
    if k_rope is None:
        return dq, dk, dv, None
    dk_rope = jnp.sum(results[5].astype(jnp.float32), axis=2, keepdims=True)
    return dq, dk, dv, dk_rope.astype(k_rope.dtype)


def _optional(operands: PrefillOperands) -> list[Array]:
    return [x for x in operands[3:] if x is not None]


def _packed_lists(*rows: int) -> jax.ShapeDtypeStruct:
    """Memory for the lists of a packed batch: as many words as PackedLayout counts for each side,
    a header, four words a tile and one to cut it, and two a row."""

    def words(rows: int) -> int:
        tiles = 3 * -(-rows // 128) + 5
        return -(-(4 + 5 * tiles + 2 * rows) // 4) * 4

    return jax.ShapeDtypeStruct((sum(map(words, rows)),), jnp.int32)


def _prefill_attributes(config: PrefillConfig, operands: PrefillOperands) -> dict[str, Any]:
    q, _, v, k_rope, cu_seqlens_q, _ = operands
    return {
        "qk_dim": q.shape[3],
        "rope": 0 if k_rope is None else k_rope.shape[3],
        "v_dim": v.shape[3],
        "causal": config.causal,
        "packed": cu_seqlens_q is not None,
        "scale": np.float32(config.scale),
    }


def _prefill_vmap(operands: PrefillOperands) -> str:
    """A packed batch has one set of offsets: elements of a vmapped one are called in turn."""
    return "broadcast_all" if operands.cu_seqlens_q is None else "sequential"
