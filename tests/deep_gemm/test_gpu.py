"""The kernels at sizes the contract tests do not reach, on a Hopper GPU.

A product is checked on a sample of its rows, against float32 sums over 128-blocks: what a row
becomes does not depend on the other rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import deep_gemm
from jax_ds.deep_gemm import ffi, reference, tuned
from jax_ds.quantization import Quantized, quantize_1x128, quantize_1x128_both, quantize_128x128
from tests.deep_gemm import cases

pytestmark = pytest.mark.gpu

# Every rule of the plan is met: few rows with K divided by one, two and four, many rows, edges.
DENSE = [
    (1, 2112, 7168),
    (1, 32768, 128),
    (63, 8, 16384),
    (64, 2112, 7168),
    (64, 7168, 16384),
    (64, 24576, 1536),
    (65, 136, 4112),
    (127, 4096, 7168),
    (128, 7168, 16384),
    (129, 2112, 1040),
    (300, 264, 16),
    (4097, 2112, 1552),
    (4097, 4104, 528),
    (2048, 32768, 512),
]
GROUPS = [
    (0, 1, 127, 128, 129, 5000),
    (0, 0, 2049, 0),
    (0,) * 8,
    (3, 0, 11, 1) * 64,
    (256,) * 8,
    (42, 580, 606, 369, 122, 703, 202, 149, 304, 199, 222, 395, 433, 128, 100, 206),
]


def _normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _sample(m: int, count: int = 48) -> np.ndarray:
    """Rows to check: the first and last of everything a tile may end at, and random ones."""
    edges = [0, 63, 64, 127, 128, m - 129, m - 65, m - 64, m - 2, m - 1]
    drawn = np.random.default_rng(m).integers(0, max(m, 1), count)
    return np.unique([i for i in (*edges, *drawn) if 0 <= i < m])


def _check(actual: jax.Array, expected: np.ndarray) -> None:
    limit = 2e-4 if actual.dtype == jnp.float32 else 2e-3
    if expected.size < 4096:
        limit = 2.5 * limit  # so few entries are not rounded evenly
    assert np.isfinite(np.asarray(actual, np.float32)).all()
    assert cases.error(actual, expected) <= limit


def _rows(q: Quantized, rows: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(q.values[rows]), np.asarray(q.scales[rows])]


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("m, n, k", DENSE)
def test_gemm(m: int, n: int, k: int, out_dtype: Any) -> None:
    lhs, rhs = quantize_1x128(_normal((m, k), 1)), quantize_128x128(_normal((n, k), 2))
    run = jax.jit(functools.partial(deep_gemm.fp8_gemm, out_dtype=out_dtype, implementation="cuda"))
    actual = run(lhs, rhs)
    rows = _sample(m)
    expected = reference.gemm(*_rows(lhs, rows), np.asarray(rhs.values), np.asarray(rhs.scales))
    _check(actual[rows], expected)
    assert np.isfinite(np.asarray(actual, np.float32)).all()
    np.testing.assert_array_equal(actual, run(lhs, rhs))


@pytest.mark.parametrize("sizes", GROUPS, ids=lambda s: f"{len(s)} groups of {max(s)}")
@pytest.mark.parametrize("n, k", [(2112, 528), (512, 2048)])
def test_grouped_gemm(sizes: tuple[int, ...], n: int, k: int) -> None:
    total = sum(sizes)
    m, groups = total + 333, len(sizes)
    x = _normal((m, k), 1).at[total:].set(jnp.nan)
    lhs, rhs = quantize_1x128(x), quantize_128x128(_normal((groups, n, k), 2))
    counts = jnp.asarray(sizes, jnp.int32)
    run = jax.jit(functools.partial(deep_gemm.fp8_grouped_gemm, implementation="cuda"))
    actual = run(lhs, rhs, counts)
    assert not np.asarray(actual[total:], np.float32).any()
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for g in np.flatnonzero(sizes)[:: max(1, np.count_nonzero(sizes) // 8)]:
        rows = starts[g] + _sample(sizes[g], 16)
        weights = [np.asarray(rhs.values[g]), np.asarray(rhs.scales[g])]
        _check(actual[rows], reference.gemm(*_rows(lhs, rows), *weights))
    np.testing.assert_array_equal(actual, run(lhs, rhs, counts))


@pytest.mark.parametrize("sizes", GROUPS, ids=lambda s: f"{len(s)} of {max(s)}")
def test_grouped_configurations_agree(sizes: tuple[int, ...]) -> None:
    """However tiles are cut and dealt, every row in use is computed once, and to the same bits."""
    n, k, groups, total = 1096, 528, len(sizes), sum(sizes)
    m = total + 77
    lhs = quantize_1x128(_normal((m, k), 1))
    rhs = quantize_128x128(_normal((groups, n, k), 2))
    counts = jnp.asarray(sizes, jnp.int32)
    problem = tuned.Problem("grouped", "bfloat16", False, m, n, k, groups)
    results = {
        config: ffi.launch(problem, config, lhs, rhs, counts, None, (m, n))
        for config, _ in tuned.candidates(problem)
    }
    expected = results.pop("64x64,per_sm=2,depth=2")
    assert not np.asarray(expected[total:], np.float32).any()
    for config, actual in results.items():
        np.testing.assert_array_equal(actual, expected, err_msg=config)


def test_grouped_gemm_leaves_the_tail() -> None:
    """With zero_tail=False rows in use equal those with zeros behind them."""
    lhs, rhs = quantize_1x128(_normal((500, 256), 1)), quantize_128x128(_normal((3, 128, 256), 2))
    sizes = jnp.array([100, 0, 77], jnp.int32)
    run = functools.partial(deep_gemm.fp8_grouped_gemm, lhs, rhs, sizes, implementation="cuda")
    np.testing.assert_array_equal(run()[:177], run(zero_tail=False)[:177])


@pytest.mark.parametrize("m, n, k", [(4096, 2112, 512), (300, 520, 2064), (64, 256, 128)])
def test_masked_gemm(m: int, n: int, k: int) -> None:
    sizes = (0, m, 1, m // 3, m + 7)
    x = _normal((len(sizes), m, k), 1)
    used = jnp.arange(m)[None] < jnp.asarray(sizes)[:, None]
    lhs = quantize_1x128(jnp.where(used[..., None], x, jnp.nan))
    rhs = quantize_128x128(_normal((len(sizes), n, k), 2))
    run = jax.jit(functools.partial(deep_gemm.fp8_masked_gemm, implementation="cuda"))
    actual = run(lhs, rhs, jnp.asarray(sizes, jnp.int32))
    assert not np.asarray(jnp.where(used[..., None], 0, actual), np.float32).any()
    for g, size in enumerate(sizes):
        rows = _sample(min(size, m), 16)
        if rows.size:
            weights = [np.asarray(rhs.values[g]), np.asarray(rhs.scales[g])]
            one = Quantized(lhs.values[g], lhs.scales[g])
            _check(actual[g, rows], reference.gemm(*_rows(one, rows), *weights))


@pytest.mark.parametrize("sizes", [(0, 1, 127, 128, 129, 3000), (0, 0), (2048, 512)])
@pytest.mark.parametrize("n, k", [(300, 264), (4096, 512)])
def test_grouped_wgrad(sizes: tuple[int, ...], n: int, k: int) -> None:
    m, counts = sum(sizes) + 99, jnp.asarray(sizes, jnp.int32)
    _, dy = quantize_1x128_both(_normal((m, n), 1), counts)
    _, x = quantize_1x128_both(_normal((m, k), 2), counts)
    total = jax.random.normal(jax.random.key(3), (len(sizes), n, k))
    run = jax.jit(functools.partial(deep_gemm.fp8_grouped_wgrad, implementation="cuda"))
    actual, added = run(dy, x, counts), run(dy, x, counts, total)
    start, rows = 0, _sample(n)
    for g, size in enumerate(sizes):
        end = start + -(-size // 128) * 128
        cut, blocks = slice(start, end), slice(start // 128, end // 128)
        operands = [np.asarray(a) for a in (dy.values[rows, cut], dy.scales[rows, blocks])]
        operands += [np.asarray(a) for a in (x.values[:, cut], x.scales[:, blocks])]
        if size:
            _check(actual[g, rows], reference.gemm(*operands))
        else:
            assert not np.asarray(actual[g]).any()
        start = end
    np.testing.assert_allclose(added, total + actual, rtol=1e-6, atol=1e-4)


def test_replay_with_other_data() -> None:
    """A captured graph computes with what its buffers hold now, group sizes included."""
    rhs = quantize_128x128(_normal((4, 256, 512), 2))

    @jax.jit
    def twice(x: jax.Array, sizes: jax.Array) -> jax.Array:
        y = deep_gemm.fp8_grouped_gemm(quantize_1x128(x), rhs, sizes, implementation="cuda")
        z = quantize_1x128(jnp.concatenate([y, y], axis=1))
        return deep_gemm.fp8_grouped_gemm(z, rhs, sizes[::-1], implementation="cuda")

    for seed, sizes in enumerate([(1, 2, 3, 4), (200, 0, 0, 100), (0, 0, 0, 0), (75, 75, 75, 75)]):
        x, counts = _normal((300, 512), seed), jnp.asarray(sizes, jnp.int32)
        with jax.disable_jit():
            expected = twice(x, counts)
        np.testing.assert_array_equal(twice(x, counts), expected)
