"""The decode and append kernels on a Hopper GPU, against the equations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import flash_mla
from jax_ds.flash_mla import reference
from jax_ds.flash_mla.ffi import decode_unsupported
from tests.flash_mla import cases
from tests.flash_mla.cases import DecodeCase, DecodeInputs

pytestmark = pytest.mark.gpu

Array = jax.Array

RAGGED = (0, 1, 63, 64, 65, 4097, 3, 700, 128, 129, 2000, 1)
VARIED = tuple(int(n) for n in np.random.default_rng(1).integers(1, 3000, 128))
# Uneven, but evenly dealt out whole to 132 or 66 groups of CTAs.
DEALT = tuple(int(n) for n in np.random.default_rng(2).integers(300, 700, 264))

HARD_CASES = (
    *(DecodeCase(f"{h} heads", RAGGED, heads=h) for h in (1, 8, 12, 16, 20, 32, 33, 64, 96, 128)),
    DecodeCase("two tokens", RAGGED, tokens=2, heads=128),
    DecodeCase("three tokens, odd tiles", RAGGED, tokens=3, heads=64),
    DecodeCase("four tokens", RAGGED, tokens=4, heads=8),
    DecodeCase("four tokens, 96 heads, no mask", RAGGED, tokens=4, heads=96, causal=False),
    DecodeCase("pages of 128", RAGGED, heads=128, page_size=128),
    *(DecodeCase(f"pages of {n}, few rows", RAGGED, heads=16, page_size=n) for n in (16, 32, 128)),
    *(DecodeCase(f"pages of {n}, tile of 64", RAGGED, heads=64, page_size=n) for n in (16, 32)),
    *(DecodeCase(f"pages of {n}, two tiles", RAGGED, heads=128, page_size=n) for n in (16, 32)),
    DecodeCase("float16, many rows", RAGGED, heads=128, dtype=jnp.float16),
    DecodeCase("float16, few rows", RAGGED, heads=16, dtype=jnp.float16),
    DecodeCase("large logits, many rows", RAGGED, heads=128, spread=1e3),
    DecodeCase("one long", (100000,), heads=16),
    DecodeCase("one long, many rows", (100000,), heads=128),
    DecodeCase("one long among short ones", (20000, *(100,) * 63), heads=128),
    DecodeCase("all empty", (0,) * 8, heads=16),
    DecodeCase("all empty, many rows", (0,) * 8, tokens=2, heads=128),
    DecodeCase("512 requests", tuple((i * 37) % 300 for i in range(512)), heads=8),
    DecodeCase("512 requests, many rows", tuple((i * 37) % 300 for i in range(512)), heads=64),
    DecodeCase("dealt whole", DEALT, heads=16),
    DecodeCase("dealt whole, many rows", DEALT[:132], heads=128),
    DecodeCase("each cut alike", (3000, 2990, 2999, 2940, 3000), heads=16),
    DecodeCase("each cut alike, many rows", (3000, 2990, 2999, 2940, 3000), heads=128),
    DecodeCase("varied", VARIED, heads=16),
    DecodeCase("varied, many rows", VARIED, heads=128),
)


def _supported(case: DecodeCase) -> bool:
    pages = jax.ShapeDtypeStruct((1, case.page_size, case.width), case.dtype)
    return decode_unsupported(pages, case.value_dim) is None


CASES = tuple(case for case in (*cases.DECODE_CASES, *HARD_CASES) if _supported(case))


@functools.partial(jax.jit, static_argnums=0)
def _decode(case: DecodeCase, inputs: DecodeInputs) -> tuple[Array, Array]:
    out = flash_mla.decode(*inputs, **case.static, return_lse=True, implementation="cuda")
    assert isinstance(out, tuple)
    return out


@functools.partial(jax.jit, static_argnums=0)
def _expected(case: DecodeCase, inputs: DecodeInputs) -> tuple[Array, Array]:
    """The equation; where it would not fit (it keeps every score), the portable float32 path."""
    q, pages, table, lengths = inputs
    exact = q.astype(jnp.float32), pages.astype(jnp.float32)
    if case in cases.DECODE_CASES:
        return reference.decode(*exact, table, lengths, **case.static)
    with jax.default_matmul_precision("highest"):
        out = flash_mla.decode(
            *exact, table, lengths, **case.static, return_lse=True, implementation="xla"
        )
    assert isinstance(out, tuple)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(case: DecodeCase) -> None:
    inputs = cases.decode_inputs(case)
    out, lse = _decode(case, inputs)
    expected_out, expected_lse = _expected(case, inputs)
    cases.assert_close("out", out, expected_out, cases.value_tolerance(case.dtype))
    cases.assert_lse_close(lse, expected_lse)
    again = _decode(case, inputs)
    np.testing.assert_array_equal(np.asarray(again[0], np.float32), np.asarray(out, np.float32))
    np.testing.assert_array_equal(np.asarray(again[1]), np.asarray(lse))


@pytest.mark.parametrize("heads", (16, 128))
def test_new_lengths_in_a_replayed_graph(heads: int) -> None:
    """The schedule is made anew in every replay: nothing of it is in the graph."""
    case = DecodeCase("graph", (4000, 64, 900, 1), heads=heads)
    inputs = cases.decode_inputs(case)
    layers = 3

    def step(inputs: DecodeInputs) -> Array:
        q = inputs.q
        for _ in range(layers):
            out = flash_mla.decode(q, *inputs[1:], **case.static, implementation="cuda")
            assert isinstance(out, Array)
            q = jnp.concatenate([out, q[..., 512:]], axis=-1)
        return q

    compiled = (
        jax.jit(step).lower(inputs).compile(compiler_options={"xla_gpu_graph_min_graph_size": 1})
    )
    fresh = jax.jit(step)
    for lengths in ((4000, 64, 900, 1), (1, 0, 3, 1), (3999, 63, 1, 0), (4000, 64, 900, 1)):
        now = inputs._replace(seq_lens=jnp.asarray(lengths, jnp.int32))
        for _ in range(3):
            np.testing.assert_array_equal(
                np.asarray(compiled(now), np.float32), np.asarray(fresh(now), np.float32)
            )


def test_gradient() -> None:
    case = DecodeCase("gradient", (5, 0, 200, 64), tokens=2, heads=20)
    inputs = cases.decode_inputs(case)

    # Linear in what comes out: else the rounding of `out` would be in the cotangents.
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((4, 2, 20, 512)), jnp.float32)

    def loss(decode: Any, q: Array, pages: Array) -> Array:
        out, lse = decode(q, pages, *inputs[2:], **case.static)
        return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    ours = functools.partial(flash_mla.decode, return_lse=True, implementation="cuda")
    actual = jax.jit(jax.grad(functools.partial(loss, ours), (0, 1)))(*inputs[:2])
    exact = (x.astype(jnp.float32) for x in inputs[:2])
    expected = jax.grad(functools.partial(loss, reference.decode), (0, 1))(*exact)
    for name, a, e in zip(("q", "kv_pages"), actual, expected, strict=True):
        cases.assert_close(name, a, e, cases.gradient_tolerance(case.dtype))


@pytest.mark.parametrize("page_size", (16, 64, 128))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_append_in_place(page_size: int, dtype: Any) -> None:
    case = DecodeCase("append", (0, 1, 2, 64, 65, 130), page_size=page_size, dtype=dtype)
    _, pages, table, lengths = cases.decode_inputs(case)
    kv = jnp.asarray(np.random.default_rng(3).standard_normal((6, 3, 576)), dtype)
    expected = reference.append(pages, kv, table, lengths)
    append = jax.jit(functools.partial(flash_mla.append, implementation="cuda"), donate_argnums=0)
    memory = append.lower(pages, kv, table, lengths).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pages.nbytes and memory.temp_size_in_bytes == 0
    actual = append(pages, kv, table, lengths)
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))


def test_append_and_decode_in_scan() -> None:
    case = DecodeCase("scan", (3, 64, 200), heads=16)
    q, pages, table, lengths = cases.decode_inputs(case)
    kv = jnp.asarray(np.random.default_rng(4).standard_normal((10, 3, 1, 576)), case.dtype)

    def generate(implementation: str, pages: Array) -> tuple[Array, Array]:
        def step(pages: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            i, kv = inputs
            pages = flash_mla.append(
                pages, kv, table, lengths - 9 + i, implementation=implementation
            )
            out = flash_mla.decode(q, pages, table, lengths - 9 + i, implementation=implementation)
            assert isinstance(out, Array)
            return pages, out

        return jax.lax.scan(step, pages, (jnp.arange(10), kv))

    run = jax.jit(generate, static_argnums=0)
    pages_ours, ours = run("cuda", pages)
    pages_xla, portable = run("xla", pages)
    np.testing.assert_array_equal(
        np.asarray(pages_ours, np.float32), np.asarray(pages_xla, np.float32)
    )
    cases.assert_close("out", ours, portable, cases.value_tolerance(case.dtype))


def test_vmap() -> None:
    case = DecodeCase("vmap", (5, 300, 0, 70), heads=12)
    q, pages, table, lengths = cases.decode_inputs(case)
    halves = [x.reshape(2, 2, *x.shape[1:]) for x in (q, table, lengths)]

    def decode(q: Array, table: Array, lengths: Array) -> Any:
        return flash_mla.decode(q, pages, table, lengths, **case.static, implementation="cuda")

    whole = decode(q, table, lengths)
    parts = jax.jit(jax.vmap(decode))(*halves).reshape(whole.shape)
    cases.assert_close("out", parts, whole, cases.value_tolerance(case.dtype))
