"""The FP8 products against bf16 ones of the same run: `python -m benchmarks.deep_gemm`.

Cases and marks are those of the best published library, measured on an H200 (kernel time, µs);
a row's ratio is its time over the mark, corrected by nothing: compare the bf16 yardsticks.
"""

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from jax_ds import deep_gemm
from jax_ds._runtime import native
from jax_ds.quantization import Quantized

# (m, n, k): kernel µs of the best published library, of bf16 through cuBLAS (a graph's time)
DENSE = {
    (64, 2112, 7168): (9.43, 14.7),
    (64, 24576, 1536): (13.5, 22.3),
    (64, 7168, 16384): (34.8, 64.0),
    (128, 2112, 7168): (10.4, 14.7),
    (128, 7168, 16384): (42.9, 71.6),
    (128, 4096, 7168): (12.3, 21.2),
    (4096, 2112, 7168): (94.4, 177),
    (4096, 24576, 1536): (237, 432),
    (4096, 32768, 512): (132, 255),
    (4096, 4096, 7168): (177, 337),
    (8192, 8192, 8192): (774, 1494),
}
# (groups, rows of each, n, k)
GROUPED = {
    (4, 8192, 4096, 7168): 1402,
    (8, 4096, 7168, 2048): 741,
    (32, 256, 4096, 7168): 411,
    (32, 256, 7168, 2048): 219,
}
# (rows in use, n, k), of 4096 rows a group: µs, and the rows of a group both are told to expect
MASKED = {
    ((1235,), 4096, 7168): (56.9, 1024),
    ((400, 678), 7168, 2048): (31.7, 512),
    ((180, 230, 275, 330), 4096, 7168): (64.2, 256),
    ((934, 1100, 1300, 800, 1150, 903), 7168, 2048): (153, 1024),
}
# (groups, tokens of each, n, k), added to a float32 sum
WGRAD = {
    (4, 8192, 4096, 7168): 1944,
    (8, 4096, 7168, 2048): 1042,
    (1, 4096, 7168, 4096): 259,
}


def _values(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)


def _scales(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 2.0)


def _operands(
    lhs: tuple[int, ...], rhs: tuple[int, ...], wide: bool, *rest: Any
) -> list[tuple[Any, ...]]:
    """Copies of values and scales; 1x128 scales transposed, as the quantizers leave memory."""

    def make(key: jax.Array) -> tuple[Any, ...]:
        a, b, c, d = jax.random.split(key, 4)
        *lead, m, k = lhs
        blocks = -(-k // 128)
        if wide:
            rhs_scales: tuple[int, ...] = (blocks, rhs[-2])
        else:
            rhs_scales = (*rhs[:-2], -(-rhs[-2] // 128), blocks)
        scales = _scales(b, (*lead, blocks, m)), _scales(d, rhs_scales)
        return _values(a, lhs), scales[0], _values(c, rhs), scales[1], *rest

    return timing.rotate(make)


def _row(
    name: str,
    op: Any,
    operands: list[tuple[Any, ...]],
    flops: float,
    wide: bool = False,
    kernel: str = "",
    **keywords: Any,
) -> timing.Row:
    def run(a: Any, sa: Any, b: Any, sb: Any, *rest: Any) -> Any:
        rhs = Quantized(b, sb.mT if wide else sb)
        return op(Quantized(a, sa.mT), rhs, *rest, implementation="cuda", **keywords)

    return timing.Row(name, run, operands, flops=flops, kernel=kernel)


def dense() -> list[timing.Row]:
    rows = []
    for m, n, k in DENSE:
        at, flops = f"{m}x{n}x{k}", 2.0 * m * n * k
        operands = _operands((m, k), (n, k), False)
        rows.append(_row(f"dense {at}", deep_gemm.fp8_gemm, operands, flops))

        def make(key: jax.Array, m: int = m, n: int = n, k: int = k) -> tuple[jax.Array, ...]:
            x, w = jax.random.split(key)
            return (
                jax.random.normal(x, (m, k), jnp.bfloat16),
                jax.random.normal(w, (n, k), jnp.bfloat16),
            )

        rows.append(
            timing.Row(f"bf16 {at}", lambda x, w: x @ w.T, timing.rotate(make), flops=flops)
        )
    return rows


def grouped(uneven: bool = False) -> list[timing.Row]:
    """`uneven`: as many rows in groups of random sizes."""
    rows = []
    for g, each, n, k in GROUPED:
        m = g * each
        sizes = jnp.full((g,), each, jnp.int32)
        if uneven:
            cuts = jnp.sort(jax.random.randint(jax.random.key(g), (g - 1,), 0, m))
            sizes = jnp.diff(cuts, prepend=0, append=m).astype(jnp.int32)
        operands = _operands((m, k), (g, n, k), False, sizes)
        name = f"grouped {g}x{each} n={n} k={k}" + (" uneven" if uneven else "")
        op = deep_gemm.fp8_grouped_gemm
        rows.append(_row(name, op, operands, 2.0 * m * n * k))
    return rows


def _masked_name(sizes: tuple[int, ...], n: int, k: int) -> str:
    return f"masked {len(sizes)}x{sum(sizes) // len(sizes)} of 4096 n={n} k={k}"


def masked() -> list[timing.Row]:
    rows = []
    for (sizes, n, k), (_, expected) in MASKED.items():
        g = len(sizes)
        operands = _operands((g, 4096, k), (g, n, k), False, jnp.asarray(sizes, jnp.int32))
        name = _masked_name(sizes, n, k)
        op = functools.partial(deep_gemm.fp8_masked_gemm, expected_rows=expected)
        rows.append(_row(name, op, operands, 2.0 * sum(sizes) * n * k, zero_tail=False))
    return rows


def wgrad() -> list[timing.Row]:
    """Added to a sum that is not donated, so that it can be used again: XLA's copy of it is not
    counted."""
    rows = []
    for g, each, n, k in WGRAD:
        sizes = jnp.full((g,), each, jnp.int32)
        total = jax.random.normal(jax.random.key(g), (g, n, k), jnp.float32)
        operands = _operands((n, g * each), (k, g * each), True, sizes, total)
        name, flops = f"wgrad {g}x{each} n={n} k={k}", 2.0 * g * each * n * k
        op = deep_gemm.fp8_grouped_wgrad
        rows.append(_row(name, op, operands, flops, wide=True, kernel="deep_gemm"))
    return rows


# (groups, rows of each, n, k): forward and backward of a layer, quantization included
LINEAR = (8, 4096, 4096, 7168)
# Blocks of Pallas' products that were fastest among those its own search tries.
_PALLAS = {"block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8}
_PALLAS_BLOCKS = ((128, 128), (128, 256), (64, 256))


def linear() -> list[timing.Row]:
    """Products forward and backward in FP8 against bf16 ones: XLA's ragged dot, Pallas' kernels."""
    g, each, n, k = LINEAR
    m = g * each
    sizes = jnp.full((g,), each, jnp.int32)

    def make(key: jax.Array) -> tuple[Any, ...]:
        a, b, c = jax.random.split(key, 3)
        x, dy = (jax.random.normal(key, (m, s), jnp.bfloat16) for key, s in ((a, k), (c, n)))
        return x, jax.random.normal(b, (g, n, k), jnp.bfloat16) * k**-0.5, dy, sizes

    operands, flops = timing.rotate(make), 6.0 * m * n * k
    at = f"{g}x{each} n={n} k={k} forward and backward"

    def trained(product: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
        def run(x: Any, w: Any, dy: Any, sizes: Any) -> Any:
            y, vjp = jax.vjp(lambda x, w: product(x, w, sizes, **keywords), x, w)
            return y, vjp(dy)

        return run

    rows = [
        timing.Row(f"linear fp8 {at}", trained(deep_gemm.fp8_grouped_linear), operands, 0, flops),
        timing.Row(f"linear bf16 {at}", trained(deep_gemm.bf16_grouped_gemm), operands, 0, flops),
    ]
    for name, run in _pallas().items():
        rows.append(timing.Row(f"linear bf16 {name} {at}", run, operands, 0, flops))
    return rows


def _pallas() -> dict[str, Callable[..., Any]]:
    """The Mosaic GPU ragged dots that JAX ships, where they can be imported."""
    try:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
        from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot
    except ImportError as error:
        print(f"without Pallas' ragged dot: {error}")
        return {}

    def products(block_m: int, block_n: int) -> Callable[..., Any]:
        rows: Any = {"block_m": block_m, "block_n": block_n, **_PALLAS}
        tokens: Any = {"block_m": 128, "block_n": 128, **_PALLAS}

        def run(x: Any, w: Any, dy: Any, sizes: Any) -> Any:
            y = ragged_dot(x, w, group_sizes=sizes, transpose_rhs=True, **rows)
            dx = ragged_dot(dy, w, group_sizes=sizes, **rows)
            return y, dx, transposed_ragged_dot(dy, x, group_sizes=sizes, **tokens)

        return run

    return {f"Pallas {m}x{n}": products(m, n) for m, n in _PALLAS_BLOCKS}


def host() -> dict[str, float]:
    """Milliseconds to compile a configuration and to read it back; microseconds a call costs."""
    # Of every fifth configuration: together they take a minute to compile, twice.
    kernels = [spec for room, spec in native.module().kernels() if room == "deep_gemm"][::5]
    compile_ms = [1e3 * native.module().compile(spec, False)["seconds"] for spec in kernels]
    for spec in kernels:
        native.module().compile(spec)
    cached_ms = [1e3 * native.module().compile(spec)["seconds"] for spec in kernels]

    def product(lhs: tuple[jax.Array, jax.Array], rhs: Quantized) -> jax.Array:
        values, columns = lhs
        # The kernel asks for column-major scales: a transpose of these that moves nothing.
        return deep_gemm.fp8_gemm(Quantized(values, columns.T), rhs, implementation="cuda")

    (values, scales), rhs = _small_operands()
    return {
        "compile_ms_median": statistics.median(compile_ms),
        "compile_ms_max": max(compile_ms),
        "cached_ms_max": max(cached_ms),
        "host_us_per_call": timing.host_us(product, (values, scales.T), Quantized(*rhs)),
    }


def _small_operands() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), 4)
    lhs = _values(keys[0], (128, 512)), _scales(keys[1], (128, 4))
    return lhs, (_values(keys[2], (256, 512)), _scales(keys[3], (2, 4)))


def marks() -> dict[str, float]:
    """Row name to the published library's kernel time, µs."""
    found = {f"dense {m}x{n}x{k}": us for (m, n, k), (us, _) in DENSE.items()}
    found |= {f"bf16 {m}x{n}x{k}": us for (m, n, k), (_, us) in DENSE.items()}
    found |= {f"grouped {g}x{r} n={n} k={k}": us for (g, r, n, k), us in GROUPED.items()}
    found |= {f"grouped {g}x{r} n={n} k={k} uneven": us for (g, r, n, k), us in GROUPED.items()}
    found |= {_masked_name(*case): us for case, (us, _) in MASKED.items()}
    found |= {f"wgrad {g}x{r} n={n} k={k}": us for (g, r, n, k), us in WGRAD.items()}
    return found


def main(arguments: Sequence[str]) -> None:
    """Times the parts named (all by default), a part after the other to bound memory."""
    parts: dict[str, Callable[[], list[timing.Row]]] = {
        "dense": dense,
        "grouped": grouped,
        "uneven": functools.partial(grouped, uneven=True),
        "masked": masked,
        "wgrad": wgrad,
        "linear": linear,
    }
    timings: dict[str, timing.Timing] = {}
    for part in arguments or parts:
        timings |= timing.measure(parts[part]())
    timing.show(timings)
    print("\ntime over mark:")
    for name, us in marks().items():
        if name in timings:
            print(f"{timings[name].us / us:6.3f}  {name}")
    print("\nhost:")
    measured = host()
    for name, value in measured.items():
        print(f"{value:9.2f}  {name}")
    if not arguments:
        published = {name: us for name, us in marks().items() if not name.startswith("bf16")}
        timing.save("deep_gemm", timings, {"host": measured, "marks_us": published})


if __name__ == "__main__":
    main(sys.argv[1:])
