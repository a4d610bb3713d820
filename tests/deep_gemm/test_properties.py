"""Properties of the portable products on random shapes and sizes, odd ones included."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from jax_ds import deep_gemm
from jax_ds.deep_gemm import reference
from tests.deep_gemm import cases
from tests.deep_gemm.cases import GemmCase, GroupedCase

few = hypothesis.settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
draws = st.sampled_from([cases.normal, cases.heavy, cases.positive])
group_sizes = st.lists(st.integers(0, 150), min_size=1, max_size=5).map(tuple)


@few
@hypothesis.given(m=st.integers(1, 140), n=st.integers(1, 140), k=st.integers(1, 600), draw=draws)
def test_gemm(m: int, n: int, k: int, draw: cases.Draw) -> None:
    case = GemmCase("", m, n, k, draw)
    lhs, rhs = cases.quantized_rows(case, (m, k), 1), cases.quantized_weights(case, (n, k), 2)
    actual = deep_gemm.fp8_gemm(lhs, rhs, out_dtype=jnp.float32, implementation="xla")
    cases.assert_close(actual, reference.gemm(*cases.arrays(lhs, rhs)), draw)


@few
@hypothesis.given(
    sizes=group_sizes, spare=st.integers(0, 50), n=st.integers(1, 20), k=st.integers(1, 300)
)
def test_grouped(sizes: tuple[int, ...], spare: int, n: int, k: int) -> None:
    """The forward product and the weight gradient, with NaN in everything unused."""
    case = GroupedCase("", sizes, sum(sizes) + spare, n, k)
    used = np.arange(case.m) < sum(sizes)
    lhs = cases.poisoned(cases.quantized_rows(case, (case.m, k), 1), used)
    rhs = cases.quantized_weights(case, (len(sizes), n, k), 2)
    actual = deep_gemm.fp8_grouped_gemm(
        lhs, rhs, case.sizes, out_dtype=jnp.float32, implementation="xla"
    )
    cases.assert_close(actual, reference.grouped_gemm(*cases.arrays(lhs, rhs), sizes))

    dy, x = cases.quantized_columns(case, n, 3), cases.quantized_columns(case, k, 4)
    actual = deep_gemm.fp8_grouped_wgrad(dy, x, case.sizes, implementation="xla")
    cases.assert_close(actual, reference.grouped_wgrad(*cases.arrays(dy, x), sizes))


@few
@hypothesis.given(sizes=group_sizes, spare=st.integers(0, 20), n=st.integers(1, 20))
def test_masked(sizes: tuple[int, ...], spare: int, n: int) -> None:
    case = GroupedCase("", sizes, max(sizes) + spare, n, 140)
    hypothesis.assume(case.m > 0)
    used = np.arange(case.m)[None, :] < np.asarray(sizes)[:, None]
    lhs = cases.poisoned(cases.quantized_rows(case, (*used.shape, case.k), 1), used)
    rhs = cases.quantized_weights(case, (len(sizes), n, case.k), 2)
    actual = deep_gemm.fp8_masked_gemm(
        lhs, rhs, case.sizes, out_dtype=jnp.float32, implementation="xla"
    )
    cases.assert_close(actual, reference.masked_gemm(*cases.arrays(lhs, rhs), sizes))
