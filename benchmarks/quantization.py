"""Quantizers against the copy bandwidth of the same run: `python -m benchmarks.quantization`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from jax_ds import quantization
from jax_ds.quantization import Quantized

SHAPES = ((4096, 7168), (8192, 7168), (32768, 2048))
GROUPS = 32


def _normal(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> tuple[jax.Array, ...]:
    return (jax.random.normal(key, shape, dtype),)


def _grouped(shape: tuple[int, int], key: jax.Array) -> tuple[jax.Array, ...]:
    """Rows in groups of uneven sizes that use all rows."""
    cuts = jnp.sort(jax.random.randint(key, (GROUPS - 1,), 0, shape[0]))
    ends = jnp.concatenate([jnp.zeros(1, cuts.dtype), cuts, jnp.array([shape[0]])])
    return (*_normal(shape, jnp.bfloat16, key), jnp.diff(ends).astype(jnp.int32))


def _row(
    name: str, function: Callable[..., Any], make: Callable[[jax.Array], tuple[Any, ...]]
) -> timing.Row:
    operands = timing.rotate(make)

    def run(*operands: Any) -> Any:
        results = function(*operands, implementation="cuda")
        # Scales as the kernels write them, column-major: handing them out row-major would turn
        # them, which the products that consume them do not ask for.
        return [
            (q.values, q.scales.mT if q.block == (1, 128) else q.scales)
            for q in jax.tree.leaves(results, is_leaf=lambda q: isinstance(q, Quantized))
        ]

    outputs = jax.eval_shape(run, *operands[0])
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands[0], outputs)))
    return timing.Row(name, run, operands, bytes=float(size))


def rows() -> list[timing.Row]:
    """Every quantizer on every shape; bytes count each input and output once."""
    result = []
    for m, k in SHAPES:
        at = f"{m}x{k}"
        plain = functools.partial(_normal, (m, k), jnp.bfloat16)
        single = functools.partial(_normal, (m, k), jnp.float32)
        gate_up = functools.partial(_normal, (m, 2 * k), jnp.bfloat16)
        grouped = functools.partial(_grouped, (m, k))
        result += [
            _row(f"1x128 {at}", quantization.quantize_1x128, plain),
            _row(f"1x128 {at} float32", quantization.quantize_1x128, single),
            _row(f"128x128 {at}", quantization.quantize_128x128, plain),
            _row(f"1x128 both {at}", quantization.quantize_1x128_both, plain),
            _row(f"1x128 both {at} float32", quantization.quantize_1x128_both, single),
            _row(f"1x128 both {at} {GROUPS} groups", quantization.quantize_1x128_both, grouped),
            _row(f"128x128 both {at}", quantization.quantize_128x128_both, plain),
            _row(f"swiglu 1x128 {at}", quantization.swiglu_quantize_1x128, gate_up),
            _row(f"swiglu 1x128 both {at}", quantization.swiglu_quantize_1x128_both, gate_up),
        ]
    return result


def main() -> None:
    timings = timing.measure([*timing.yardsticks(), *rows()])
    timing.show(timings)
    timing.save("quantization", timings)
    copy = timings["yardstick copy"].gb_s
    print("bandwidth relative to the copy")
    for name, t in timings.items():
        if t.bytes:
            print(f"  {name:40} {t.gb_s / copy:.2f}")


if __name__ == "__main__":
    main()
