"""Properties of the decode kernels that hold for any lengths, on a Hopper GPU."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jax_ds import flash_mla
from tests.flash_mla import cases

pytestmark = pytest.mark.gpu

Array = jax.Array

few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
BATCH, COLUMNS, SIZE = 6, 40, 32
# Mostly near the ends of blocks and pages, some far from them.
LENGTHS = st.lists(
    st.one_of(st.integers(0, 70), st.sampled_from((127, 128, 129)), st.integers(0, 1280)),
    min_size=BATCH,
    max_size=BATCH,
)


@functools.partial(jax.jit, static_argnames="implementation")
def _decode(
    q: Array, pages: Array, table: Array, lengths: Array, implementation: str
) -> tuple[Array, Array]:
    result = flash_mla.decode(
        q, pages, table, lengths, return_lse=True, implementation=implementation
    )
    assert isinstance(result, tuple)
    return result


@pytest.mark.parametrize(("tokens", "heads"), ((1, 7), (2, 20), (3, 30), (2, 64)))
@few
@given(lengths=LENGTHS, seed=st.integers(0, 2**20))
def test_any_lengths(tokens: int, heads: int, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(BATCH * COLUMNS)
    table = jnp.asarray(order.reshape(BATCH, COLUMNS), jnp.int32)
    pages = jnp.asarray(rng.standard_normal((order.size, SIZE, 576)), jnp.bfloat16)
    q = jnp.asarray(3 * rng.standard_normal((BATCH, tokens, heads, 576)), jnp.bfloat16)
    seq_lens = jnp.asarray(lengths, jnp.int32)
    out, lse = _decode(q, pages, table, seq_lens, "cuda")
    exact = (x.astype(jnp.float32) for x in (q, pages))
    with jax.default_matmul_precision("highest"):
        expected, expected_lse = _decode(*exact, table, seq_lens, "xla")
    cases.assert_close("out", out, expected, 3e-3)
    cases.assert_lse_close(lse, expected_lse)
    # Where pages lie makes no difference, to the bit; nor what is in the others.
    moved = (
        jnp.full((order.size + 5, SIZE, 576), jnp.nan, pages.dtype).at[table + 5].set(pages[table])
    )
    for a, b in zip((out, lse), _decode(q, moved, table + 5, seq_lens, "cuda"), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
