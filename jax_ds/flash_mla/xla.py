"""The portable decode and append: blocks of pages, up to the end of the longest sequence."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_ds._runtime.choose import Implementation
from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.flash_mla import softmax
from jax_ds.flash_mla.config import DecodeConfig
from jax_ds.flash_mla.softmax import Interval, product
from jax_ds.flash_mla.xla_prefill import prefill, prefill_backward

__all__ = [
    "append",
    "append_backward",
    "decode",
    "decode_backward",
    "prefill",
    "prefill_backward",
]

Array = jax.Array

# Tokens that one turn of the loop reads per sequence. Larger costs memory, smaller costs turns.
_BLOCK = 256


@functools.partial(jax.jit, static_argnums=0)
def decode(
    config: DecodeConfig, q: Array, kv_pages: Array, page_table: Array, seq_lens: Array
) -> tuple[Array, Array]:
    """`api.decode`: out [B, S, H, V] and lse [B, S, H]."""
    batch, tokens, heads, _ = q.shape
    if min(q.size, kv_pages.size, page_table.size) == 0:
        axes = varying_axes(q, kv_pages, page_table, seq_lens)
        out = jnp.zeros((batch, tokens, heads, config.value_dim), q.dtype)
        lse = jnp.full((batch, tokens, heads), -jnp.inf, jnp.float32)
        return to_varying(out, axes), to_varying(lse, axes)
    q, kv_pages, page_table, seq_lens = _same_axes(q, kv_pages, page_table, seq_lens)
    page_size = kv_pages.shape[1]
    table = _block_table(page_table, page_size)
    rows = q.reshape(batch, 1, tokens * heads, -1)
    ends = jnp.minimum(seq_lens, page_table.shape[1] * page_size)
    interval = _intervals(config, seq_lens, ends, tokens, heads)

    def absorb(block: Array, state: softmax.State) -> softmax.State:
        _, positions, keys = _read_block(kv_pages, table, ends, block)
        scores = config.scale * product("bgrd,bgld->bgrl", rows, keys)
        values = keys[..., : config.value_dim]
        return softmax.absorb(state, scores, interval.sees(positions), values)

    state = softmax.initial((batch, 1, tokens * heads), config.value_dim)
    state = to_varying(state, varying_axes(q))
    out, lse = softmax.finish(_over_blocks(table, page_size, interval, absorb, state))
    out = out.astype(q.dtype).reshape(batch, tokens, heads, config.value_dim)
    return out, lse.reshape(batch, tokens, heads)


@functools.partial(jax.jit, static_argnums=0)
def decode_backward(
    config: DecodeConfig,
    q: Array,
    kv_pages: Array,
    page_table: Array,
    seq_lens: Array,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array,
) -> tuple[Array, Array]:
    """Gradients of q and kv_pages, recomputing the probabilities from lse block by block."""
    if min(q.size, kv_pages.size, page_table.size) == 0:
        axes = varying_axes(q, kv_pages, page_table, seq_lens, dout, dlse)
        return to_varying(jnp.zeros_like(q), axes), to_varying(jnp.zeros_like(kv_pages), axes)
    operands = _same_axes(q, kv_pages, page_table, seq_lens, out, lse, dout, dlse)
    q, kv_pages, page_table, seq_lens, out, lse, dout, dlse = operands
    batch, tokens, heads, _ = q.shape
    num_pages, page_size, width = kv_pages.shape
    table = _block_table(page_table, page_size)
    ends = jnp.minimum(seq_lens, page_table.shape[1] * page_size)
    interval = _intervals(config, seq_lens, ends, tokens, heads)
    as_rows = functools.partial(_as_rows, interval.nonempty())
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - dlse
    rows, drows, lse, delta = as_rows(q), as_rows(dout), as_rows(lse), as_rows(delta)

    def absorb(block: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        drow_sum, dpages = gradients
        pages, positions, keys = _read_block(kv_pages, table, ends, block)
        values = keys[..., : config.value_dim]
        probabilities, dscores = softmax.score_gradient(
            config.scale * product("bgrd,bgld->bgrl", rows, keys),
            interval.sees(positions),
            lse,
            product("bgrv,bglv->bgrl", drows, values),
            delta,
        )
        dscores = (config.scale * dscores).astype(q.dtype)
        drow_sum += product("bgrl,bgld->bgrd", dscores, keys)
        dkeys = product("bgrl,bgrd->bgld", dscores, rows)
        dvalues = product("bgrl,bgrv->bglv", probabilities.astype(q.dtype), drows)
        dkeys = dkeys.at[..., : config.value_dim].add(dvalues)
        dpages = dpages.at[pages].add(dkeys.reshape(*pages.shape, page_size, width), mode="drop")
        return drow_sum, dpages

    zeros = (
        jnp.zeros((batch, 1, tokens * heads, width), jnp.float32),
        jnp.zeros((num_pages, page_size, width), jnp.float32),
    )
    zeros = to_varying(zeros, varying_axes(q))
    dq, dpages = _over_blocks(table, page_size, interval, absorb, zeros)
    return dq.reshape(q.shape).astype(q.dtype), dpages.astype(kv_pages.dtype)


@functools.partial(jax.jit, inline=True)
def append(kv_pages: Array, kv: Array, page_table: Array, seq_lens: Array) -> Array:
    """`api.append`: one scatter, in place where XLA may reuse the operand."""
    kv_pages, kv, page_table, seq_lens = _same_axes(kv_pages, kv, page_table, seq_lens)
    where = _slots(page_table, seq_lens, kv.shape[1], *kv_pages.shape[:2])
    return kv_pages.at[where].set(kv, mode="drop")


def append_backward(
    implementation: Implementation,
    cotangent: Array,
    page_table: Array,
    seq_lens: Array,
    tokens: int,
) -> tuple[Array, Array]:
    """Gradients of kv_pages (zero where overwritten) and of kv (read from where it was written)."""
    del implementation
    cotangent, page_table, seq_lens = _same_axes(cotangent, page_table, seq_lens)
    where = _slots(page_table, seq_lens, tokens, *cotangent.shape[:2])
    dkv = cotangent.at[where].get(mode="fill", fill_value=0)
    return cotangent.at[where].set(0, mode="drop"), dkv


def _same_axes(*operands: Array) -> Any:
    """Operands that all vary over the same mesh axes, as loop carries must (see `_runtime`)."""
    return to_varying(operands, varying_axes(operands))


def _slots(
    page_table: Array, seq_lens: Array, tokens: int, num_pages: int, page_size: int
) -> tuple[Array, Array]:
    """Page and slot of each new token, int32 [B, S]; page `num_pages` where there is none."""
    steps = jnp.arange(tokens, dtype=jnp.int32)
    positions = seq_lens[:, None] - tokens + steps[None, :]
    column = positions // page_size
    exists = (positions >= 0) & (column < page_table.shape[1])
    if page_table.shape[1] == 0:
        return jnp.full_like(positions, num_pages), positions
    page = jnp.take_along_axis(page_table, jnp.where(exists, column, 0), axis=1)
    # A negative index would count from the end.
    exists &= (page >= 0) & (page < num_pages)
    return jnp.where(exists, page, num_pages), positions % page_size


def _block_table(page_table: Array, page_size: int) -> Array:
    """The page table in blocks of pages, [number of blocks, B, pages of a block]."""
    batch, columns = page_table.shape
    width = min(columns, max(1, _BLOCK // page_size))
    blocks = -(-columns // width)
    padded = jnp.pad(page_table, ((0, 0), (0, blocks * width - columns)))
    return padded.reshape(batch, blocks, width).transpose(1, 0, 2)


def _intervals(
    config: DecodeConfig, seq_lens: Array, ends: Array, tokens: int, heads: int
) -> Interval:
    """Row s * H + h sees the keys from 0 to its own position, or all of them up to `ends`."""
    last = jnp.broadcast_to(ends[:, None], (ends.shape[0], tokens))
    if config.causal:
        steps = jnp.arange(1 - tokens, 1, dtype=jnp.int32)
        last = jnp.minimum(last, seq_lens[:, None] + steps[None, :])
    last = jnp.repeat(last, heads, axis=1)[:, None, :]
    return Interval(jnp.zeros_like(last), last)


def _read_block(
    kv_pages: Array, table: Array, ends: Array, block: Array
) -> tuple[Array, Array, Array]:
    """Pages [B, pages] of a block (P where none), positions [L], keys [B, 1, L, D]."""
    num_pages, page_size, width = kv_pages.shape
    pages = jnp.clip(jax.lax.dynamic_index_in_dim(table, block, keepdims=False), 0, num_pages - 1)
    batch, columns = pages.shape
    first = block * (columns * page_size)
    starts = first + page_size * jnp.arange(columns, dtype=jnp.int32)
    # Page 0 stands in for pages that do not exist, whatever the table says there.
    exists = starts[None, :] < ends[:, None]
    keys = kv_pages.at[jnp.where(exists, pages, 0)].get(mode="promise_in_bounds")
    keys = keys.reshape(batch, 1, columns * page_size, width)
    positions = first + jnp.arange(columns * page_size, dtype=jnp.int32)
    written = positions[None, :] < ends[:, None]
    # Masking the scores is not enough: 0 * NaN of an unused slot is NaN.
    keys = jnp.where(written[:, None, :, None], keys, jnp.zeros((), keys.dtype))
    return jnp.where(exists, pages, num_pages), positions, keys


def _over_blocks[T](
    table: Array, page_size: int, interval: Interval, body: Callable[[Array, T], T], init: T
) -> T:
    """Runs `body` over the blocks that hold keys of the longest sequence."""
    if table.shape[0] == 1:
        return body(jnp.int32(0), init)
    _, last = interval.hull()
    blocks = -(-last // (table.shape[2] * page_size))
    result: T = jax.lax.fori_loop(0, blocks, body, init)
    return result


def _as_rows(nonempty: Array, x: Array) -> Array:
    """[B, S, H, ...] as [B, 1, S * H, ...], zero in rows without any key (they may hold NaN)."""
    rows = x.reshape(x.shape[0], 1, x.shape[1] * x.shape[2], *x.shape[3:])
    mask = nonempty.reshape(nonempty.shape + (1,) * (rows.ndim - 3))
    return jnp.where(mask, rows, jnp.zeros((), rows.dtype))
