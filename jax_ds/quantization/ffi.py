"""The quantizers' custom calls: shapes and attributes.

Scales of 1x128 blocks leave the kernels column-major: the products read them by columns. XLA
turns them where something else needs them otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_ds._core.groups import BLOCK, padded_tokens
from jax_ds._runtime.call import ffi_call
from jax_ds.quantization.types import VALUES_DTYPE, Quantized, num_blocks
from jax_ds.quantization.xla import ScaleDtype


def quantize_rows(
    x: Float[Array, "... K"],
    num_rows: Int[Array, ""] | None,
    *,
    scale_dtype: ScaleDtype,
    swiglu: bool = False,
) -> Quantized:
    """1x128 blocks along the last dimension; with `swiglu`, of `silu(gate) * up`."""
    if x.ndim == 1:
        return jax.tree.map(
            lambda leaf: leaf[0],
            quantize_rows(x[None], None, scale_dtype=scale_dtype, swiglu=swiglu),
        )
    *lead, k = x.shape
    k = k // 2 if swiglu else k
    outputs = _quantized((*lead, k), (*lead, num_blocks(k)))
    if x.size == 0:
        return Quantized(*_empty(outputs))
    values, scales = ffi_call(
        "jax_ds_quantize_rows",
        outputs,
        *([x] if num_rows is None else [x, num_rows]),
        attributes={
            "input": x.dtype.name,
            "k": k,
            "swiglu": swiglu,
            "ue8m0": scale_dtype == "ue8m0",
        },
        output_layouts=[None, _column_major(x.ndim)],
    )
    return Quantized(values, scales)


def quantize_lines(
    x: Float[Array, "M K"],
    group_sizes: Int[Array, "G"] | None,
    *,
    scale_dtype: ScaleDtype,
    swiglu: bool = False,
) -> tuple[Quantized, Quantized]:
    """1x128 blocks along rows and, transposed, along tokens, from one read of x."""
    m, k = x.shape
    k = k // 2 if swiglu else k
    p = padded_tokens(m, 1 if group_sizes is None else group_sizes.shape[0])
    outputs = _quantized((m, k), (m, num_blocks(k))) + _quantized((k, p), (k, p // BLOCK))
    if x.size == 0:
        return _pair(_empty(outputs))
    results = ffi_call(
        "jax_ds_quantize_tiles",
        outputs,
        *([x] if group_sizes is None else [x, group_sizes]),
        attributes=_tiles_attributes(x, "lines", k, p, swiglu, scale_dtype),
        output_layouts=[None, _column_major(2), None, _column_major(2)],
    )
    return _pair(results)


def quantize_square(w: Float[Array, "... N K"], *, scale_dtype: ScaleDtype) -> Quantized:
    """128x128 blocks over the last two dimensions."""
    *lead, n, k = w.shape
    outputs = _quantized((*lead, n, k), (*lead, num_blocks(n), num_blocks(k)))
    if w.size == 0:
        return Quantized(*_empty(outputs))
    attributes = _tiles_attributes(w, "square", k, n, False, scale_dtype)
    return Quantized(*ffi_call("jax_ds_quantize_tiles", outputs, w, attributes=attributes))


def quantize_square_transposed(
    w: Float[Array, "... N K"], *, scale_dtype: ScaleDtype
) -> tuple[Quantized, Quantized]:
    """128x128 blocks, as they are and transposed, from one read of w."""
    *lead, n, k = w.shape
    nb, kb = num_blocks(n), num_blocks(k)
    outputs = _quantized((*lead, n, k), (*lead, nb, kb)) + _quantized(
        (*lead, k, n), (*lead, kb, nb)
    )
    if w.size == 0:
        return _pair(_empty(outputs))
    attributes = _tiles_attributes(w, "square_transposed", k, n, False, scale_dtype)
    return _pair(ffi_call("jax_ds_quantize_tiles", outputs, w, attributes=attributes))


def _tiles_attributes(
    x: Array,
    blocks: str,
    k: int,
    p: int,
    swiglu: bool,
    scale_dtype: ScaleDtype,
) -> dict[str, Any]:
    return {
        "input": x.dtype.name,
        "blocks": blocks,
        "k": k,
        "p": p,
        "swiglu": swiglu,
        "ue8m0": scale_dtype == "ue8m0",
    }


def _quantized(values: tuple[int, ...], scales: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(values, VALUES_DTYPE),
        jax.ShapeDtypeStruct(scales, jnp.float32),
    ]


def _column_major(ndim: int) -> tuple[int, ...]:
    return (*range(ndim - 2), ndim - 1, ndim - 2)


def _pair(results: list[Array]) -> tuple[Quantized, Quantized]:
    return Quantized(*results[:2]), Quantized(*results[2:])


def _empty(outputs: list[jax.ShapeDtypeStruct]) -> list[Array]:
    """What an empty x gives: there is nothing to launch, and every result is empty too."""
    return [jnp.zeros(out.shape, out.dtype) for out in outputs]
