"""Our custom calls on a GPU under everything XLA and users do to them."""

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import quantization
from jax_ds._runtime import native, profile

pytestmark = pytest.mark.gpu

SIZES = jnp.asarray([100, 0, 28, 60], jnp.int32)


def _chain(x: jax.Array, sizes: jax.Array) -> Any:
    """Several of our calls with XLA's own kernels between them."""
    run = functools.partial(quantization.quantize_1x128_both, implementation="cuda")
    rows, columns = run(x * 2, sizes)
    again = quantization.quantize_1x128(
        jnp.float32(3) * quantization.dequantize(rows), implementation="cuda"
    )
    return columns, again, quantization.quantize_128x128(x + 1, implementation="cuda")


def _operand(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (256, 384), jnp.bfloat16)


def _same(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Rows past the last group are unspecified.
        rows = slice(0, 188) if a.shape[0] == 256 else slice(None)
        np.testing.assert_array_equal(
            np.asarray(a)[rows].view(np.uint8), np.asarray(e)[rows].view(np.uint8)
        )


def test_nothing_stands_in_the_way() -> None:
    assert native.why_not_native() is None


def test_the_profiler_tells_what_ran() -> None:
    @functools.partial(jax.jit, compiler_options={"xla_gpu_graph_min_graph_size": 1 << 30})
    def quantized(x: jax.Array) -> Any:
        return quantization.quantize_1x128(x, implementation="cuda")

    x = jax.block_until_ready(_operand(0))
    jax.block_until_ready(quantized(x))
    found = profile.launches(lambda: [jax.block_until_ready(quantized(x)) for _ in range(2)])
    kernels = [launch for launch in found if "quantize_rows" in launch.name]
    assert [launch.program for launch in kernels] == ["quantized"] * 2
    assert all(launch.duration_ns > 0 for launch in kernels)
    assert kernels[0].start_ns + kernels[0].duration_ns <= kernels[1].start_ns


def test_command_buffers_replay_with_changed_data() -> None:
    # Captured into a graph from the first operation on.
    compiled = (
        jax.jit(_chain)
        .lower(_operand(0), SIZES)
        .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1})
    )
    assert "command_buffer" in compiled.as_text()
    plain = jax.jit(_chain)
    for seed in range(4):
        sizes = jnp.roll(SIZES, seed)
        _same(compiled(_operand(seed), sizes), plain(_operand(seed), sizes))


def test_many_threads_and_programs_at_once() -> None:
    def program(seed: int) -> Any:
        # A constant and a function of its own make every thread compile a program of its own.
        run = jax.jit(lambda x: _chain(x + jnp.bfloat16(seed % 4), SIZES))
        return [run(_operand(seed + i)) for i in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(program, range(8)))
    for seed, outputs in enumerate(together):
        _same(outputs, program(seed))


def test_scan_and_donation() -> None:
    def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        q = quantization.quantize_1x128(x, implementation="cuda")
        return (quantization.dequantize(q) * 0.5).astype(x.dtype), q.scales

    def run(x: jax.Array) -> Any:
        return jax.lax.scan(step, x, None, length=5)

    x = _operand(3)
    expected = [step(x, None)]
    for _ in range(4):
        expected.append(step(expected[-1][0], None))
    last, scales = jax.jit(run, donate_argnums=0)(jnp.copy(x))
    np.testing.assert_array_equal(last, expected[-1][0])
    np.testing.assert_array_equal(scales, jnp.stack([s for _, s in expected]))


def test_none_takes_the_kernel() -> None:
    text = jax.jit(quantization.quantize_1x128).lower(_operand(0)).compile().as_text()
    assert "jax_ds_quantize_rows" in text


def test_a_slice_of_a_larger_buffer() -> None:
    # XLA may hand a slice's address straight to the call.
    x = jax.random.normal(jax.random.key(0), (5, 256, 384), jnp.bfloat16)
    sliced = jax.jit(lambda x, i: quantization.quantize_1x128(x[i], implementation="cuda"))
    for i in range(5):
        whole = quantization.quantize_1x128(x[i], implementation="cuda")
        _same(sliced(x, i), whole)
