"""Properties of the quantizers on random shapes, sizes and data."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jax_ds import quantization
from jax_ds._core.groups import group_bounds
from jax_ds.quantization import padded_tokens, reference
from tests.quantization import cases

few = hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


def _operand(shape: tuple[int, ...], decades: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-decades, decades, shape)
    return np.clip(x, -3e38, 3e38).astype(np.float32)


@few
@hypothesis.given(
    m=st.integers(0, 140),
    k=st.integers(1, 300),
    decades=st.sampled_from([0.0, 3.0, 36.0]),
    scale_dtype=st.sampled_from(["float32", "ue8m0"]),
    seed=st.integers(0, 2**16),
)
def test_bits_on_random_shapes(m: int, k: int, decades: float, scale_dtype: str, seed: int) -> None:
    x = _operand((m, k), decades, seed)
    for operation in cases.OPERATIONS:
        run = functools.partial(operation.run, scale_dtype=scale_dtype, implementation="xla")
        actual = jax.jit(run)(x, None)
        cases.assert_same_bits(actual, operation.expect(x, None, scale_dtype), m)


@few
@hypothesis.given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    spare=st.integers(0, 100),
    k=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_columns_on_random_groups(sizes: list[int], spare: int, k: int, seed: int) -> None:
    x = _operand((sum(sizes) + spare, k), 1.0, seed)
    x[sum(sizes) :] = np.nan
    run = jax.jit(functools.partial(quantization.quantize_1x128_both, implementation="xla"))
    _, columns = run(x, jnp.asarray(sizes, jnp.int32))
    values, scales = reference.quantize_columns(x, sizes)
    np.testing.assert_array_equal(cases.bits(columns.values), cases.bits(values))
    np.testing.assert_array_equal(columns.scales, scales)


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_padded_tokens_hold_every_split(sizes: list[int]) -> None:
    padded = padded_tokens(sum(sizes), len(sizes))
    assert padded % 128 == 0
    assert sum(-(-size // 128) * 128 for size in sizes) <= padded


@few
@hypothesis.given(
    sizes=st.lists(st.integers(-5, 300), min_size=1, max_size=8), m=st.integers(0, 200)
)
def test_group_bounds_stay_inside(sizes: list[int], m: int) -> None:
    starts, ends = group_bounds(jnp.asarray(sizes, jnp.int32), m)
    position = 0
    for size, start, end in zip(sizes, starts.tolist(), ends.tolist(), strict=True):
        assert start == position
        position = min(m, position + max(0, size))
        assert end == position


def test_group_bounds_do_not_overflow() -> None:
    sizes = jnp.full((5,), 2**31 - 1, jnp.int32)
    starts, ends = group_bounds(sizes, 2**31 - 1)
    assert starts.tolist() == [0] + [2**31 - 1] * 4
    assert ends.tolist() == [2**31 - 1] * 5
