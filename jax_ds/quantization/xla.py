"""The portable quantizers.

One definition for every implementation, to the bit:

    amax  = max |x| over the block, in float32; NaN if any is NaN
    scale = 1 if amax < 2**-107, else amax * float32(1/448)      (ue8m0: rounded up to 2**n)
    value = float8_e4m3fn(x / scale), IEEE division, round to nearest even

`2**-107` is where it stops to matter whether a processor flushes subnormals: above it the scale
is normal, and a subnormal x is less than 2**-10 scales, which rounds to zero either way.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_ds._core.groups import BLOCK, group_bounds, padded_starts, padded_tokens
from jax_ds.quantization.types import VALUES_DTYPE, Quantized, num_blocks

ScaleDtype = Literal["float32", "ue8m0"]

_SMALLEST_AMAX = 2.0**-107


def quantize_1x128(x: Float[Array, "... K"], scale_dtype: ScaleDtype) -> Quantized:
    """1x128 blocks along the last dimension."""
    k = x.shape[-1]
    padded = _pad_to_blocks(x, x.ndim - 1).astype(jnp.float32)
    blocks = padded.reshape(*x.shape[:-1], num_blocks(k), BLOCK)
    scales = _scales(_amax(blocks, -1), scale_dtype)
    values = _values(blocks, scales[..., None])
    return Quantized(values.reshape(padded.shape)[..., :k], scales)


def quantize_128x128(w: Float[Array, "... N K"], scale_dtype: ScaleDtype) -> Quantized:
    """128x128 blocks over the last two dimensions."""
    *batch, n, k = w.shape
    padded = _pad_to_blocks(_pad_to_blocks(w, w.ndim - 1), w.ndim - 2).astype(jnp.float32)
    blocks = padded.reshape(*batch, num_blocks(n), BLOCK, num_blocks(k), BLOCK)
    scales = _scales(_amax(blocks, (-3, -1)), scale_dtype)
    values = _values(blocks, scales[..., :, None, :, None])
    return Quantized(values.reshape(padded.shape)[..., :n, :k], scales)


def quantize_128x128_both(
    w: Float[Array, "... N K"], scale_dtype: ScaleDtype
) -> tuple[Quantized, Quantized]:
    """As it is and transposed; a square block has one scale either way."""
    q = quantize_128x128(w, scale_dtype)
    return q, Quantized(jnp.swapaxes(q.values, -1, -2), jnp.swapaxes(q.scales, -1, -2))


def quantize_1x128_both(
    x: Float[Array, "M K"], group_sizes: Int[Array, "G"] | None, scale_dtype: ScaleDtype
) -> tuple[Quantized, Quantized]:
    """Rows along K, columns along tokens."""
    return quantize_1x128(x, scale_dtype), _columns(x, group_sizes, scale_dtype)


def swiglu(gate_up: Float[Array, "... 2F"]) -> Float[Array, "... F"]:
    """`silu(gate) * up` in float32, gate first."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """Values times their block's scale."""
    rows, cols = q.block
    scales = jnp.repeat(q.scales, cols, axis=-1)[..., : q.shape[-1]]
    if rows != 1:
        scales = jnp.repeat(scales, rows, axis=-2)[..., : q.shape[-2], :]
    return q.values.astype(jnp.float32) * scales


def _columns(
    x: Float[Array, "M K"], group_sizes: Int[Array, "G"] | None, scale_dtype: ScaleDtype
) -> Quantized:
    """Quantized along tokens and transposed, every group from a multiple of 128 tokens on."""
    tokens = _pad_to_blocks(x, 0) if group_sizes is None else _spread(x, group_sizes)
    p, k = tokens.shape
    blocks = tokens.astype(jnp.float32).reshape(p // BLOCK, BLOCK, k)
    scales = _scales(_amax(blocks, 1), scale_dtype)
    values = _values(blocks, scales[:, None, :])
    return Quantized(values.reshape(p, k).T, scales.T)


def _spread(x: Float[Array, "M K"], group_sizes: Int[Array, "G"]) -> Float[Array, "P K"]:
    """Moves each group to its place in the padded layout; zeros between."""
    m, num_groups = x.shape[0], group_sizes.shape[0]
    starts, ends = group_bounds(group_sizes, m)
    offsets, _ = padded_starts(starts, ends)
    p = padded_tokens(m, num_groups)
    if p == 0:
        return x
    block_starts = jnp.arange(p // BLOCK, dtype=jnp.int32) * BLOCK
    # The last group that starts at or before the block; an empty one there starts where the
    # next begins, so the last is the one that owns the block.
    group = jnp.searchsorted(offsets, block_starts, side="right") - 1
    first = starts[group] + block_starts - offsets[group]
    rows = first[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
    owned = (rows < ends[group][:, None]).reshape(p)
    rows = jnp.minimum(rows.reshape(p), m - 1)
    return jnp.where(owned[:, None], x[rows], jnp.zeros((), x.dtype))


def _pad_to_blocks(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    missing = -x.shape[axis] % BLOCK
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def _amax(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """max |x|, NaN if any x is NaN.

    Through the bits, whose order is that of the magnitudes with NaN on top: XLA's floating-point
    maximum over an axis may drop a NaN on the CPU.
    """
    magnitudes = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return jax.lax.bitcast_convert_type(jnp.max(magnitudes, axis=axis), jnp.float32)


def _scales(amax: Float[Array, "..."], scale_dtype: ScaleDtype) -> Float[Array, "..."]:
    scales = amax * jnp.float32(1 / 448)
    if scale_dtype == "ue8m0":
        bits = jax.lax.bitcast_convert_type(scales, jnp.int32)
        up = jnp.bitwise_and(bits + 0x7FFFFF, 0x7F800000)
        # The sum would carry a NaN's mantissa into its sign.
        scales = jnp.where(jnp.isnan(amax), amax, jax.lax.bitcast_convert_type(up, jnp.float32))
    scales = jnp.where(amax < _SMALLEST_AMAX, jnp.float32(1), scales)
    return _canonical(scales)


def _values(x: Float[Array, "..."], scales: Float[Array, "..."]) -> Float[Array, "..."]:
    # XLA turns a division by a broadcast into a product with the reciprocal, which rounds twice.
    # A divisor that depends on x, if only where x is NaN anyway, stays a division.
    divisor = jnp.where(jnp.isnan(x), x, jnp.broadcast_to(scales, x.shape))
    return _canonical(x / divisor).astype(VALUES_DTYPE)


def _canonical(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """One NaN for all: which sign an invalid operation gives differs between processors."""
    return jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), x)
