"""The kernels at sizes that fill a GPU, and at those that only kernels treat specially.

Bit for bit against the portable implementation run on the CPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds.quantization import padded_tokens
from tests.quantization import cases
from tests.quantization.cases import OPERATIONS, Operation

pytestmark = pytest.mark.gpu

# Multiples of 16 that are none of 128 take wide loads with ragged blocks; the large ones give
# every CTA several tiles.
SHAPES = [(257, 144), (130, 2112), (1000, 576), (4096, 7168)]


def _sizes(m: int) -> jax.Array:
    cuts = [0, 0, m // 7, m // 7 + 1, m // 2, m - m // 9]
    return jnp.asarray(np.diff([*cuts, m - m // 50]), jnp.int32)


def _on_cpu(operation: Operation, x: jax.Array, sizes: jax.Array) -> Any:
    run = jax.jit(functools.partial(operation.run, implementation="xla"))
    cpu = jax.local_devices(backend="cpu")[0]
    return run(*jax.device_put((x, sizes), cpu))


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_like_the_portable_one(operation: Operation, shape: tuple[int, int], dtype: Any) -> None:
    m, _ = shape
    x = jax.random.normal(jax.random.key(m), shape, dtype)
    # Scales of many sizes, and rows of zeros.
    x = x * jnp.exp2(jax.random.randint(jax.random.key(1), (m, 1), -40, 40).astype(dtype))
    x = x.at[:: m // 3].set(0)
    sizes = _sizes(m)
    actual = jax.jit(functools.partial(operation.run, implementation="cuda"))(x, sizes)
    used = m if "both" not in operation.name or "128x128" in operation.name else int(sizes.sum())
    expected = [(q.values, np.asarray(q.scales)) for q in _on_cpu(operation, x, sizes)]
    cases.assert_same_bits(actual, expected, used)


def test_every_split_into_groups() -> None:
    m, k = 300, 256
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    operation = next(op for op in OPERATIONS if op.name == "quantize_1x128_both")
    run = jax.jit(functools.partial(operation.run, implementation="cuda"))
    rng = np.random.default_rng(0)
    for groups in (1, 2, 31, 32, 33, 256, 257, 600):
        cuts = np.sort(rng.integers(0, m + 1, groups))
        sizes = jnp.asarray(np.diff([0, *cuts]), jnp.int32)
        actual = run(x, sizes)
        assert actual[1].shape == (k, padded_tokens(m, groups))
        expected = [(q.values, np.asarray(q.scales)) for q in _on_cpu(operation, x, sizes)]
        cases.assert_same_bits(actual, expected, int(sizes.sum()))


def test_absurd_group_sizes_reach_nothing_outside() -> None:
    x = jax.random.normal(jax.random.key(0), (200, 128), jnp.bfloat16)
    operation = next(op for op in OPERATIONS if op.name == "quantize_1x128_both")
    run = jax.jit(functools.partial(operation.run, implementation="cuda"))
    for sizes in ([2**31 - 1, 2**31 - 1, 5], [-7, 50, -(2**31), 60], [0, 0, 0]):
        group_sizes = jnp.asarray(sizes, jnp.int32)
        expected = [(q.values, np.asarray(q.scales)) for q in _on_cpu(operation, x, group_sizes)]
        used = min(200, sum(max(size, 0) for size in sizes))
        cases.assert_same_bits(run(x, group_sizes), expected, used)
