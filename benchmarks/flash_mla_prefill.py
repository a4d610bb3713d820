"""Prefill attention, forward and backward, beside cuDNN: `python -m benchmarks.flash_mla_prefill`.

Causal. FLOPs: `2 B H S^2 (D + V) / 2` forward, 2.6 times that backward, S^2 summed over the
sequences of a packed batch. cuDNN takes no 192/128 heads, so it runs on 128/128 and on 192/192 with
padded values, where only 128 columns count. Marks: the best published library, forward, on an H200.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from jax_ds import flash_mla
from jax_ds._runtime import native

SHAPES = ((2, 4096, 128), (1, 16384, 128))
MARKS_US = {"192/128 forward 2x4096x128": 2120.0, "192/128 forward 1x16384x128": 16100.0}
# As many FLOPs as two sequences of 4096.
PACKED = (833, 4855, 31, 1201, 250, 2743, 97, 500)
_BACKWARD = 2.6

Array = jax.Array


def _ours(q: Array, k: Array, v: Array) -> Array:
    out = flash_mla.prefill(q, k, v, implementation="cuda")
    assert isinstance(out, Array)
    return out


def _shared_rope(q: Array, k: Array, v: Array, k_rope: Array) -> Array:
    out = flash_mla.prefill(q, k, v, k_rope, implementation="cuda")
    assert isinstance(out, Array)
    return out


def _packed(q: Array, k: Array, v: Array) -> Array:
    offsets = jnp.asarray(np.append(0, np.cumsum(PACKED)), jnp.int32)
    out = flash_mla.prefill(q, k, v, None, offsets, implementation="cuda")
    assert isinstance(out, Array)
    return out


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_padded(q: Array, k: Array, v: Array) -> Array:
    padding = [(0, 0)] * 3 + [(0, q.shape[3] - v.shape[3])]
    return _cudnn(q, k, jnp.pad(v, padding))[..., : v.shape[3]]


def _operands(shape: tuple[int, int, int], widths: tuple[int, ...], key: Array) -> tuple[Any, ...]:
    """q, k, v, and a shared rotary part of the keys if `widths` has a fourth entry."""
    batch, tokens, heads = shape
    return tuple(
        jax.random.normal(k, (batch, tokens, 1 if i == 3 else heads, width), jnp.bfloat16)
        for i, (k, width) in enumerate(zip(jax.random.split(key, len(widths)), widths, strict=True))
    )


def _rows(
    name: str,
    attention: Callable[..., Array],
    shape: tuple[int, int, int],
    widths: tuple[int, ...],
    lengths: Sequence[int] = (),
) -> list[timing.Row]:
    batch, tokens, heads = shape
    operands = timing.rotate(functools.partial(_operands, shape, widths))
    squares = sum(n**2 for n in lengths) if lengths else batch * tokens**2
    flops = float(heads * squares * (widths[0] + widths[2]))

    @jax.jit
    def differentiate(*operands: Array) -> Any:
        out, pullback = jax.vjp(attention, *operands)
        return pullback, jax.random.normal(jax.random.key(1), out.shape, out.dtype)

    at = "x".join(map(str, shape))
    pulled = [differentiate(*o) for o in operands]
    return [
        timing.Row(f"{name} forward {at}", attention, operands, flops=flops),
        timing.Row(
            f"{name} backward {at}",
            lambda pullback, dout: pullback(dout),
            pulled,
            flops=_BACKWARD * flops,
        ),
    ]


def rows(shape: tuple[int, int, int]) -> list[timing.Row]:
    result = _rows("192/128", _ours, shape, (192, 192, 128))
    if shape == SHAPES[0]:
        # Beside what it is compared with: clocks depend on what has just run.
        packed = (1, sum(PACKED), 128)
        result += _rows("192/128 packed", _packed, packed, (192, 192, 128), PACKED)
    result += _rows("192/128 shared rope", _shared_rope, shape, (192, 128, 128, 64))
    result += _rows("cuDNN 128/128", _cudnn, shape, (128, 128, 128))
    result += _rows("cuDNN padded 192/128", _cudnn_padded, shape, (192, 192, 128))
    return result


def host() -> dict[str, float]:
    """Microseconds that a warm call takes on the host, and seconds to compile a kernel."""

    def gradient(q: Array, k: Array, v: Array) -> Any:
        return jax.vjp(_ours, q, k, v)[1](v)

    kernels = [spec for _, spec in native.module().kernels() if "Config{192, 64" in spec.entry]
    seconds = [native.module().compile(spec, False)["seconds"] for spec in kernels]
    operands = _operands((1, 64, 2), (192, 192, 128), jax.random.key(0))
    forward = timing.host_us(_ours, *operands)
    return {
        "host_us_per_call": forward,
        # Its two kernels, and what XLA adds for the cotangent of lse.
        "host_us_per_gradient": timing.host_us(gradient, *operands) - forward,
        "compile_s_median": statistics.median(seconds),
        "compile_s_max": max(seconds),
    }


def main() -> None:
    timings: dict[str, timing.Timing] = {}
    for shape in SHAPES:
        # A shape at a time: the long one's rows of up to 100 ms leave a hotter, slower chip.
        yardsticks = timing.yardsticks()
        if timings:
            beside = "x".join(map(str, shape))
            yardsticks = [
                dataclasses.replace(y, name=f"{y.name} beside {beside}") for y in yardsticks
            ]
        timings |= timing.measure([*yardsticks, *rows(shape)], rounds=7)
    timing.show(timings)
    measured = host()
    print("host:", {name: round(value, 2) for name, value in measured.items()})
    timing.save("flash_mla_prefill", timings, {"marks_us": MARKS_US, "host": measured})


if __name__ == "__main__":
    main()
