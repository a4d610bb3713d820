"""Properties that hold for any sizes: one algorithm of `flash_mla` against another."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings

from jax_ds import flash_mla

Array = jax.Array

few = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
seeds = st.integers(0, 2**20)
WIDTH, VALUE = 24, 16
# Float32 throughout: the two sides differ by the order of sums only.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def _draw(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def _paged(
    rng: np.random.Generator, lengths: list[int], size: int
) -> tuple[Array, Array, Array, Array]:
    """Contiguous caches [B, T, D], and the same tokens in scrambled pages with a table."""
    columns = max(1, -(-max(lengths) // size))
    cache = rng.standard_normal((len(lengths), columns * size, WIDTH)).astype(np.float32)
    table = rng.permutation(len(lengths) * columns).reshape(len(lengths), columns)
    pages = np.empty((table.size, size, WIDTH), np.float32)
    pages[table] = cache.reshape(len(lengths), columns, size, WIDTH)
    table = jnp.asarray(table, jnp.int32)
    return jnp.asarray(cache), jnp.asarray(pages), table, jnp.asarray(lengths, jnp.int32)


@few
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from((16, 32, 64, 128)),
    seeds,
)
def test_decode_is_prefill_of_the_gathered_cache(
    lengths: list[int], tokens: int, heads: int, size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cache, pages, table, seq_lens = _paged(rng, lengths, size)
    q = _draw(rng, len(lengths), tokens, heads, WIDTH)
    out, lse = flash_mla.decode(q, pages, table, seq_lens, value_dim=VALUE, return_lse=True)
    for b, length in enumerate(lengths):
        keys = cache[b : b + 1, :length, None]
        expected, expected_lse = flash_mla.prefill(
            q[b : b + 1], keys, keys[..., :VALUE], return_lse=True
        )
        np.testing.assert_allclose(out[b], expected[0], **CLOSE)
        np.testing.assert_allclose(lse[b], expected_lse[0], **CLOSE)


@few
@given(st.lists(st.integers(0, 90), min_size=2, max_size=4), st.integers(1, 3), seeds)
def test_decode_does_not_see_where_pages_lie(lengths: list[int], tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, pages, table, seq_lens = _paged(rng, lengths, 16)
    q = _draw(rng, len(lengths), tokens, 2, WIDTH)
    order = jnp.asarray(rng.permutation(pages.shape[0]), jnp.int32)
    moved = jnp.zeros_like(pages).at[order].set(pages)
    here = flash_mla.decode(q, pages, table, seq_lens, value_dim=VALUE)
    there = flash_mla.decode(q, moved, order[table], seq_lens, value_dim=VALUE)
    np.testing.assert_array_equal(here, there)


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 5), seeds)
def test_decode_after_append_sees_the_new_tokens(
    lengths: list[int], tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    totals = [length + tokens for length in lengths]
    cache, pages, table, seq_lens = _paged(rng, totals, 16)
    q = _draw(rng, len(lengths), tokens, 2, WIDTH)
    new = jnp.stack([cache[b, n : n + tokens] for b, n in enumerate(lengths)])
    blank = flash_mla.append(pages, jnp.full_like(new, jnp.nan), table, seq_lens)
    written = flash_mla.append(blank, new, table, seq_lens)
    np.testing.assert_array_equal(written, pages)
    np.testing.assert_array_equal(
        flash_mla.decode(q, written, table, seq_lens, value_dim=VALUE),
        flash_mla.decode(q, pages, table, seq_lens, value_dim=VALUE),
    )


@few
@given(st.integers(1, 400), st.integers(1, 400), st.booleans(), seeds)
def test_parts_of_the_keys_merge_by_their_lse(
    left: int, right: int, causal: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q = _draw(rng, 1, 3, 2, WIDTH)
    k, v = _draw(rng, 1, left + right, 2, WIDTH), _draw(rng, 1, left + right, 2, VALUE)
    whole = flash_mla.prefill(q, k, v, causal=causal)
    # Aligned at the last token, the causal mask lies in the right part only if that is long enough.
    cut = left if right >= 3 else 0
    parts = [
        flash_mla.prefill(q, k[:, :cut], v[:, :cut], causal=False, return_lse=True),
        flash_mla.prefill(q, k[:, cut:], v[:, cut:], causal=causal, return_lse=True),
    ]
    lse = jnp.logaddexp(parts[0][1], parts[1][1])
    some = lse > -jnp.inf
    merged = sum(
        out * jnp.where(some, jnp.exp(part - jnp.where(some, lse, 0)), 0)[..., None]
        for out, part in parts
    )
    np.testing.assert_allclose(merged, whole, **CLOSE)


@few
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=5), seeds)
def test_packed_sequences_are_separate_sequences(lengths: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([(0, 0), *lengths], axis=0).astype(np.int32)
    num_q, num_k = offsets[-1] + 2
    q = _draw(rng, 1, num_q, 4, WIDTH)
    k, v = _draw(rng, 1, num_k, 2, WIDTH - 8), _draw(rng, 1, num_k, 2, VALUE)
    rope = _draw(rng, 1, num_k, 1, 8)
    packed = flash_mla.prefill(
        q, k, v, rope, jnp.asarray(offsets[:, 0]), jnp.asarray(offsets[:, 1])
    )
    for (i, j), (end_i, end_j) in itertools.pairwise(offsets):
        alone = flash_mla.prefill(q[:, i:end_i], k[:, j:end_j], v[:, j:end_j], rope[:, j:end_j])
        np.testing.assert_allclose(packed[:, i:end_i], alone, **CLOSE)
    assert not np.asarray(packed[:, offsets[-1][0] :]).any()


@few
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 3), seeds)
def test_chunks_of_the_queries_are_the_whole(
    first: int, second: int, group: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    total = first + second
    q = _draw(rng, 1, total, 2 * group, WIDTH)
    k, v = _draw(rng, 1, total, 2, WIDTH), _draw(rng, 1, total, 2, VALUE)
    whole = flash_mla.prefill(q, k, v)
    chunks = (
        flash_mla.prefill(q[:, :first], k[:, :first], v[:, :first]),
        flash_mla.prefill(q[:, first:], k, v),
    )
    np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), whole, **CLOSE)


@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), seeds)
def test_shared_keys_are_repeated_keys(queries: int, keys: int, rope: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = _draw(rng, 2, queries, 4, WIDTH)
    k, v = _draw(rng, 2, keys, 2, WIDTH - rope), _draw(rng, 2, keys, 2, VALUE)
    k_rope = _draw(rng, 2, keys, 1, rope)
    full = jnp.concatenate([k, jnp.broadcast_to(k_rope, (2, keys, 2, rope))], axis=-1)
    np.testing.assert_allclose(
        flash_mla.prefill(q, k, v, k_rope),
        flash_mla.prefill(q, jnp.repeat(full, 2, axis=2), jnp.repeat(v, 2, axis=2)),
        **CLOSE,
    )
