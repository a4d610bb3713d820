"""Checks of this room's operands, raised while tracing."""

import math
import numbers

import jax
import jax.numpy as jnp

from jax_ds._core.checks import check, check_dtype, check_rank, check_shape, known_values

PAGE_SIZES = (16, 32, 64, 128)
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def resolve_scale(scale: float | None, width: int) -> float:
    """The factor of the scores of heads of `width`."""
    check(width > 0, "q", "last dimension must be positive", width)
    if scale is None:
        return float(width**-0.5)
    valid = isinstance(scale, numbers.Real) and math.isfinite(scale) and scale > 0
    check(valid, "scale", "must be a positive finite number", repr(scale))
    return float(scale)


def check_cache(
    kv_pages: jax.Array, page_table: jax.Array, seq_lens: jax.Array, batch: int
) -> None:
    """Checks the paged cache of `batch` sequences."""
    check_rank("kv_pages", kv_pages, 3)
    check_dtype("kv_pages", kv_pages, *FLOATS)
    page_size = kv_pages.shape[1]
    check(page_size in PAGE_SIZES, "kv_pages", "page size must be 16, 32, 64 or 128", page_size)
    check_dtype("page_table", page_table, jnp.int32)
    check_shape("page_table", page_table, (batch, None), "B N")
    tokens = page_table.shape[1] * page_size
    check(tokens <= 2**30, "page_table", "N times the page size must be at most 2^30", tokens)
    check_dtype("seq_lens", seq_lens, jnp.int32)
    check_shape("seq_lens", seq_lens, (batch,), "B")


def check_same_dtype(argument: str, x: jax.Array, other: str, like: jax.Array) -> None:
    """Requires the dtype of `like`; a TypeError otherwise."""
    if x.dtype != like.dtype:
        raise TypeError(
            f"{argument}: dtype must be {other}'s, {like.dtype.name}, got {x.dtype.name}"
        )


def check_heads(q: jax.Array, k: jax.Array, v: jax.Array, k_rope: jax.Array | None) -> None:
    """Checks the operands of `prefill` other than the offsets."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 4)
    check_dtype("q", q, *FLOATS)
    batch, _, heads, width = q.shape
    rope = 0
    if k_rope is not None:
        check_rank("k_rope", k_rope, 4)
        rope = k_rope.shape[3]
        check(0 < rope < width, "k_rope", f"width must be positive and below q's {width}", rope)
        check_shape("k_rope", k_rope, (batch, k.shape[1], 1, None), "B Sk 1 Dr")
        check_same_dtype("k_rope", k_rope, "q", q)
    check_shape(
        "k", k, (batch, None, None, width - rope), "B Sk Hk Dk-Dr" if rope else "B Sk Hk Dk"
    )
    kv_heads = k.shape[2]
    check(
        kv_heads > 0 and heads % kv_heads == 0,
        "k",
        f"number of heads must divide q's {heads}",
        kv_heads,
    )
    check_shape("v", v, (batch, k.shape[1], kv_heads, None), "B Sk Hk V")
    check_same_dtype("k", k, "q", q)
    check_same_dtype("v", v, "q", q)


def check_packing(
    q: jax.Array, k: jax.Array, cu_seqlens_q: jax.Array | None, cu_seqlens_k: jax.Array | None
) -> jax.Array | None:
    """Checks the offsets of a packed batch; returns those of the keys."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: needs cu_seqlens_q too, got None for it")
        return None
    check_rank("cu_seqlens_q", cu_seqlens_q, 1)
    check_dtype("cu_seqlens_q", cu_seqlens_q, jnp.int32)
    entries = cu_seqlens_q.shape[0]
    check(entries >= 2, "cu_seqlens_q", "must have at least 2 entries", entries)
    check(q.shape[0] == 1, "q", "B must be 1 with cu_seqlens_q", q.shape[0])
    _check_offsets("cu_seqlens_q", cu_seqlens_q, "Sq", q.shape[1])
    if cu_seqlens_k is None:
        same = q.shape[1] == k.shape[1]
        check(same, "cu_seqlens_k", "is needed where Sk differs from Sq", None)
        return cu_seqlens_q
    check_dtype("cu_seqlens_k", cu_seqlens_k, jnp.int32)
    check_shape("cu_seqlens_k", cu_seqlens_k, (entries,), "N+1")
    _check_offsets("cu_seqlens_k", cu_seqlens_k, "Sk", k.shape[1])
    return cu_seqlens_k


def _check_offsets(argument: str, offsets: jax.Array, letters: str, size: int) -> None:
    """Checks the values, where they are known while tracing."""
    values = known_values(offsets)
    if values is not None:
        got = values.tolist()
        check(got == sorted(got), argument, "must not decrease", got)
        rule = f"must lie between 0 and {letters} = {size}"
        check(got[0] >= 0 and got[-1] <= size, argument, rule, got)
