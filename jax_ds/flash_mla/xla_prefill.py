"""The portable prefill: tiles of queries and keys, those that the mask hides skipped.

Every mask this operation knows (causal, full, packed) gives each query an interval of keys, so
one loop serves all: over tiles of queries, and for each over the tiles from the first key that
any of its queries sees to the last.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.flash_mla import softmax
from jax_ds.flash_mla.config import PrefillConfig, PrefillOperands, PrefillResiduals
from jax_ds.flash_mla.softmax import Interval, product

Array = jax.Array

# Queries and keys of a tile, at most. Up to this length there is one tile and no loop.
_TILE = 256


class Shape(NamedTuple):
    """Sizes of a call and its tiling; G = H / Hk query heads share one head of keys."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    rope: int
    value_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


class Keys(NamedTuple):
    """Tiles of keys and values, [tiles, B, Hk, L, .]; rope [tiles, B, L, Dr] serves all heads."""

    nope: Array
    rope: Array | None
    values: Array


@functools.partial(jax.jit, static_argnums=0)
def prefill(config: PrefillConfig, operands: PrefillOperands) -> tuple[Array, Array]:
    """`api.prefill`: out [B, Sq, H, V] and lse [B, Sq, H]."""
    axes = varying_axes(operands)
    shape = _shape(operands)
    q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k = to_varying(operands, axes)
    if min(q.size, shape.keys) == 0:
        out = jnp.zeros((*q.shape[:3], shape.value_dim), q.dtype)
        lse = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
        return to_varying(out, axes), to_varying(lse, axes)
    interval = to_varying(_intervals(config, shape, cu_seqlens_q, cu_seqlens_k), axes)
    keys = _tile_keys(shape, k, v, k_rope, cu_seqlens_k)
    rows = _tile_rows(shape, q)

    def attend(tile: tuple[Array, Interval]) -> tuple[Array, Array]:
        row, seen = tile

        def absorb(j: Array, state: softmax.State) -> softmax.State:
            tile_keys, positions = _take(keys, j)
            scores = _scores(config, shape, row, tile_keys)
            return softmax.absorb(state, scores, seen.sees(positions), tile_keys.values)

        state = softmax.initial(row.shape[:3], shape.value_dim)
        state = _over_tiles(keys, seen, absorb, to_varying(state, axes))
        out, lse = softmax.finish(state)
        return out.astype(q.dtype), lse

    out, lse = _map(attend, (rows, interval))
    return _untile_rows(shape, out), _untile_rows(shape, lse)


@functools.partial(jax.jit, static_argnums=0)
def prefill_backward(
    config: PrefillConfig, residuals: PrefillResiduals, dout: Array, dlse: Array
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and k_rope, recomputing the probabilities from lse tile by tile."""
    axes = varying_axes(residuals, dout, dlse)
    shape = _shape(residuals.operands)
    residuals, dout, dlse = to_varying((residuals, dout, dlse), axes)
    (q, k, v, k_rope, cu_seqlens_q, cu_seqlens_k), out, lse = residuals
    if min(q.size, shape.keys) == 0:
        dq, dk, dv, dk_rope = jax.tree.map(jnp.zeros_like, (q, k, v, k_rope))
        return dq, dk, dv, dk_rope
    interval = to_varying(_intervals(config, shape, cu_seqlens_q, cu_seqlens_k), axes)
    keys = _tile_keys(shape, k, v, k_rope, cu_seqlens_k)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - dlse
    rows, drows, lse, delta = (
        _zero_empty(interval, _tile_rows(shape, x)) for x in (q, dout, lse, delta)
    )

    def attend(dkeys: Keys, tile: tuple[Array, Array, Array, Array, Interval]) -> Any:
        row, drow, row_lse, row_delta, seen = tile

        def absorb(j: Array, gradients: tuple[Array, Keys]) -> tuple[Array, Keys]:
            tile_keys, positions = _take(keys, j)
            probabilities, dscores = softmax.score_gradient(
                _scores(config, shape, row, tile_keys),
                seen.sees(positions),
                row_lse,
                product("bgrv,bglv->bgrl", drow, tile_keys.values),
                row_delta,
            )
            dscores = (config.scale * dscores).astype(q.dtype)
            dvalues = product("bgrl,bgrv->bglv", probabilities.astype(q.dtype), drow)
            dnope, drope = _key_gradients(shape, row, dscores)
            dq_tile = gradients[0] + _row_gradients(dscores, tile_keys)
            return dq_tile, _add_at(gradients[1], j, Keys(dnope, drope, dvalues))

        dq_tile = to_varying(jnp.zeros(row.shape, jnp.float32), axes)
        dq_tile, dkeys = _over_tiles(keys, seen, absorb, (dq_tile, dkeys))
        return dkeys, dq_tile.astype(q.dtype)

    dkeys = jax.tree.map(lambda x: to_varying(jnp.zeros(x.shape, jnp.float32), axes), keys)
    dkeys, dq = _scan(attend, dkeys, (rows, drows, lse, delta, interval))
    dk_rope = None
    if dkeys.rope is not None:
        dk_rope = _untile_keys(shape, dkeys.rope[:, :, None]).astype(q.dtype)
    dk, dv = _untile_keys(shape, dkeys.nope), _untile_keys(shape, dkeys.values)
    return _untile_rows(shape, dq), dk.astype(q.dtype), dv.astype(q.dtype), dk_rope


def _shape(operands: PrefillOperands) -> Shape:
    q, k, v, k_rope, *_ = operands
    batch, queries, heads, _ = q.shape
    rope = 0 if k_rope is None else k_rope.shape[3]
    return Shape(batch, queries, k.shape[1], heads, k.shape[2], rope, v.shape[3])


def _tiling(size: int) -> tuple[int, int]:
    """Number of tiles and tokens of a tile: as even as multiples of 16 allow."""
    tiles = -(-size // _TILE)
    if tiles <= 1:
        return 1, size
    length = -(-size // (16 * tiles)) * 16
    return -(-size // length), length


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def _intervals(
    config: PrefillConfig, shape: Shape, cu_seqlens_q: Array | None, cu_seqlens_k: Array | None
) -> Interval:
    """The keys each row sees, tiled like the rows: [tiles, 1, 1, G * rows of a tile]."""
    token = jnp.arange(shape.queries, dtype=jnp.int32)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        first = jnp.zeros_like(token)
        last = jnp.full_like(token, shape.keys)
        own = token + shape.keys - shape.queries
    else:
        sequences = cu_seqlens_q.shape[0] - 1
        # side="right": of several sequences that start here, all but the last are empty.
        sequence = jnp.searchsorted(cu_seqlens_q, token, side="right").astype(jnp.int32) - 1
        packed = (sequence >= 0) & (sequence < sequences)
        sequence = jnp.clip(sequence, 0, sequences - 1)
        first = cu_seqlens_k[sequence]
        last = jnp.where(packed, cu_seqlens_k[sequence + 1], first)
        own = token - cu_seqlens_q[sequence + 1] + cu_seqlens_k[sequence + 1]
    if config.causal:
        last = jnp.minimum(last, own + 1)
    tiles, length = _tiling(shape.queries)

    def tile(x: Array) -> Array:
        x = _pad(x, 0, tiles * length).reshape(tiles, 1, 1, length)
        return jnp.tile(x, (1, 1, 1, shape.group))

    return Interval(tile(first), tile(last))


def _tile_rows(shape: Shape, x: Array) -> Array:
    """[B, Sq, H, ...] as [tiles, B, Hk, G * rows of a tile, ...]."""
    tiles, length = _tiling(shape.queries)
    rest = x.shape[3:]
    x = _pad(x, 1, tiles * length)
    x = x.reshape(shape.batch, tiles, length, shape.kv_heads, shape.group, *rest)
    x = jnp.moveaxis(x, (1, 3, 4), (0, 2, 3))
    return x.reshape(tiles, shape.batch, shape.kv_heads, shape.group * length, *rest)


def _untile_rows(shape: Shape, x: Array) -> Array:
    tiles, length = _tiling(shape.queries)
    rest = x.shape[4:]
    x = x.reshape(tiles, shape.batch, shape.kv_heads, shape.group, length, *rest)
    x = jnp.moveaxis(x, (0, 2, 3), (1, 3, 4))
    x = x.reshape(shape.batch, tiles * length, shape.heads, *rest)
    return x[:, : shape.queries]


def _tile_keys(
    shape: Shape, k: Array, v: Array, k_rope: Array | None, cu_seqlens_k: Array | None
) -> Keys:
    tiles, length = _tiling(shape.keys)

    def tile(x: Array) -> Array:
        if cu_seqlens_k is not None:
            # Masking the scores is not enough: 0 * NaN of a padding token is NaN.
            token = jnp.arange(shape.keys, dtype=jnp.int32)
            packed = (token >= cu_seqlens_k[0]) & (token < cu_seqlens_k[-1])
            x = jnp.where(packed[None, :, None, None], x, jnp.zeros((), x.dtype))
        x = _pad(x, 1, tiles * length)
        x = x.reshape(shape.batch, tiles, length, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    return Keys(tile(k), None if k_rope is None else tile(k_rope)[:, :, 0], tile(v))


def _untile_keys(shape: Shape, x: Array) -> Array:
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    x = x.reshape(shape.batch, -1, *x.shape[3:])
    return x[:, : shape.keys]


def _zero_empty(interval: Interval, x: Array) -> Array:
    """Tiled rows with zeros where a row sees no key: it may hold NaN."""
    mask = interval.nonempty()
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - 4))
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _take(keys: Keys, j: Array) -> tuple[Keys, Array]:
    """Tile j of the keys and their positions."""
    tiles, length = keys.nope.shape[0], keys.nope.shape[3]
    positions = j * length + jnp.arange(length, dtype=jnp.int32)

    def take(x: Array) -> Array:
        if tiles == 1:
            return x[0]
        tile: Array = jax.lax.dynamic_index_in_dim(x, j, keepdims=False)
        return tile

    rope = None if keys.rope is None else take(keys.rope)
    return Keys(take(keys.nope), rope, take(keys.values)), positions


def _add_at(total: Keys, j: Array, part: Keys) -> Keys:
    """Adds `part` to tile j, in place."""

    def add(x: Array, y: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(x, j, keepdims=False)
        new: Array = jax.lax.dynamic_update_index_in_dim(x, old + y, j, 0)
        return new

    result: Keys = jax.tree.map(add, total, part)
    return result


def _scores(config: PrefillConfig, shape: Shape, rows: Array, keys: Keys) -> Array:
    """Scaled scores [B, Hk, R, L]; the rotary part of the keys is read once for all heads."""
    if keys.rope is None:
        return config.scale * product("bgrd,bgld->bgrl", rows, keys.nope)
    nope, rope = jnp.split(rows, [rows.shape[-1] - shape.rope], axis=-1)
    scores = product("bgrd,bgld->bgrl", nope, keys.nope)
    return config.scale * (scores + product("bgrd,bld->bgrl", rope, keys.rope))


def _row_gradients(dscores: Array, keys: Keys) -> Array:
    dnope = product("bgrl,bgld->bgrd", dscores, keys.nope)
    if keys.rope is None:
        return dnope
    return jnp.concatenate([dnope, product("bgrl,bld->bgrd", dscores, keys.rope)], axis=-1)


def _key_gradients(shape: Shape, rows: Array, dscores: Array) -> tuple[Array, Array | None]:
    if shape.rope == 0:
        return product("bgrl,bgrd->bgld", dscores, rows), None
    nope, rope = jnp.split(rows, [rows.shape[-1] - shape.rope], axis=-1)
    drope = product("bgrl,bgrd->bld", dscores, rope)
    return product("bgrl,bgrd->bgld", dscores, nope), drope


def _over_tiles[T](keys: Keys, seen: Interval, body: Callable[[Array, T], T], init: T) -> T:
    """Runs `body` over the tiles of keys that any of the rows sees."""
    tiles, length = keys.nope.shape[0], keys.nope.shape[3]
    if tiles == 1:
        return body(jnp.int32(0), init)
    first, last = seen.hull()
    result: T = jax.lax.fori_loop(first // length, -(-last // length), body, init)
    return result


def _scan(body: Callable[..., Any], carry: Any, tiles: Any) -> Any:
    """`jax.lax.scan`, without a loop around a single tile."""
    if jax.tree.leaves(tiles)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, tiles)
    carry, result = body(carry, jax.tree.map(lambda x: x[0], tiles))
    return carry, jax.tree.map(lambda x: x[None], result)


def _map(body: Callable[..., Any], tiles: Any) -> Any:
    return _scan(lambda carry, tile: (carry, body(tile)), None, tiles)[1]
