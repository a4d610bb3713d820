"""What the portable implementation promises beyond its values: memory, aliasing, composition."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_ds import flash_mla
from tests.flash_mla import cases

Array = jax.Array


def _struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _struct(*shape, dtype=jnp.int32)


def _sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every intermediate value, in nested programs too."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield math.prod(value.aval.shape)
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)


def _decode_sum(q: Array, pages: Array, table: Array, lengths: Array) -> Array:
    return flash_mla.decode(q, pages, table, lengths, value_dim=16).sum()


def _prefill_sum(q: Array, k: Array, v: Array) -> Array:
    return flash_mla.prefill(q, k, v).sum()


def test_memory_of_decode_does_not_depend_on_the_length() -> None:
    def largest(columns: int) -> int:
        operands = _struct(2, 1, 4, 24), _struct(8, 64, 24), _ints(2, columns), _ints(2)
        decode = functools.partial(flash_mla.decode, value_dim=16)
        return max(_sizes(jax.make_jaxpr(decode)(*operands).jaxpr))

    # One block of keys of both sequences.
    assert largest(64) == largest(256) == 2 * 256 * 24


def test_memory_of_the_decode_gradient_is_that_of_the_cache() -> None:
    pages, columns = 512, 256
    operands = _struct(2, 1, 4, 24), _struct(pages, 64, 24), _ints(2, columns), _ints(2)
    program = jax.make_jaxpr(jax.grad(_decode_sum, (0, 1)))(*operands)
    assert max(_sizes(program.jaxpr)) == pages * 64 * 24


@pytest.mark.parametrize("differentiate", (False, True))
def test_prefill_stores_nothing_of_quadratic_size(differentiate: bool) -> None:
    function = jax.grad(_prefill_sum, (0, 1, 2)) if differentiate else _prefill_sum

    def largest(tokens: int) -> int:
        operands = [_struct(1, tokens, 2, width) for width in (24, 24, 16)]
        return max(_sizes(jax.make_jaxpr(function)(*operands).jaxpr))

    # A tile of scores for two heads while that is more than an operand.
    assert largest(1024) == 2 * 256 * 256
    assert largest(16384) == 16384 * 2 * 24


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_append_writes_in_place(dtype: Any) -> None:
    pages = _struct(512, 64, 48, dtype=dtype)
    operands = _struct(4, 2, 48, dtype=dtype), _ints(4, 4), _ints(4)
    size = 512 * 64 * 48 * jnp.dtype(dtype).itemsize

    def steps(pages: Array, kv: Array, table: Array, lengths: Array) -> Array:
        def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            pages, lengths = carry
            return (flash_mla.append(pages, kv, table, lengths), lengths + 2), None

        return jax.lax.scan(step, (pages, lengths), length=8)[0][0]

    for function in (flash_mla.append, steps):
        memory = (
            jax.jit(function, donate_argnums=0).lower(pages, *operands).compile().memory_analysis()
        )
        assert memory.alias_size_in_bytes == size
        assert memory.temp_size_in_bytes < size // 100


def test_lowers_for_cuda_without_a_gpu() -> None:
    operands = _struct(2, 1, 4, 24), _struct(8, 64, 24), _ints(2, 9), _ints(2)
    heads = [_struct(1, 300, 2, width) for width in (24, 24, 16)]
    for function, arguments in (
        (jax.grad(_decode_sum, (0, 1)), operands),
        (flash_mla.append, (operands[1], _struct(2, 1, 24), *operands[2:])),
        (jax.grad(_prefill_sum, (0, 1, 2)), heads),
    ):
        assert jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_scan_and_remat_keep_the_gradient() -> None:
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.standard_normal((1, 40, 2, 16)), jnp.float32) for _ in range(3)]

    def layers(x: Array, k: Array, v: Array, *, looped: bool) -> Array:
        @jax.checkpoint
        def layer(x: Array) -> Array:
            return x + flash_mla.prefill(x, k, v)

        if looped:
            x, _ = jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)
        else:
            x = layer(layer(layer(x)))
        return (x * x).sum()

    results = [
        jax.jit(jax.grad(functools.partial(layers, looped=looped), (0, 1, 2)))(*heads)
        for looped in (True, False)
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_finite_differences() -> None:
    x = cases.prefill_inputs(
        cases.PrefillCase("", 1, 5, 7, 4, 2, 6, 3, 2, dtype=jnp.float32), seed=1
    )
    check_grads(
        lambda *heads: flash_mla.prefill(*heads, return_lse=True),
        x[:4], order=1, modes=["rev"], atol=1e-2, rtol=1e-2,
    )  # fmt: skip
    case = cases.DecodeCase("", (3, 20), 2, 2, 16, 6, 4, dtype=jnp.float32)
    q, pages, table, lengths = cases.decode_inputs(case, seed=1)
    check_grads(
        lambda q, pages: flash_mla.decode(q, pages, table, lengths, value_dim=4, return_lse=True),
        (q, jnp.nan_to_num(pages)), order=1, modes=["rev"], atol=1e-2, rtol=1e-2,
    )  # fmt: skip


def test_same_bits_every_time() -> None:
    x = cases.decode_inputs(cases.DECODE_CASES[2])
    decode = functools.partial(flash_mla.decode, **cases.DECODE_CASES[2].static)
    np.testing.assert_array_equal(
        np.asarray(decode(*x), np.float32), np.asarray(decode(*x), np.float32)
    )


@pytest.mark.parametrize("shape", ((0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 1, 2, 0)), ids=str)
def test_decode_of_nothing(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, heads, columns = shape
    q, pages = jnp.ones((batch, tokens, heads, 24)), jnp.ones((4, 16, 24))
    table, lengths = jnp.zeros((batch, columns), jnp.int32), jnp.ones((batch,), jnp.int32)
    decode = functools.partial(flash_mla.decode, value_dim=16, return_lse=True)
    (out, lse), pullback = jax.vjp(lambda q, pages: decode(q, pages, table, lengths), q, pages)
    assert out.shape == (batch, tokens, heads, 16) and not out.any()
    assert lse.shape == out.shape[:3] and (lse == -jnp.inf).all()
    dq, dpages = pullback((out, lse))
    assert dq.shape == q.shape and not dq.any() and not dpages.any()
    appended = flash_mla.append(pages, jnp.ones((batch, tokens, 24)), table, lengths)
    assert appended.shape == pages.shape


@pytest.mark.parametrize("shape", ((0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 3, 0)), ids=str)
def test_prefill_of_nothing(shape: tuple[int, int, int, int]) -> None:
    batch, queries, keys, heads = shape
    operands = (
        jnp.ones((batch, queries, heads, 24)),
        jnp.ones((batch, keys, max(heads, 1), 24)),
        jnp.ones((batch, keys, max(heads, 1), 16)),
    )
    prefill = functools.partial(flash_mla.prefill, return_lse=True)
    (out, lse), pullback = jax.vjp(prefill, *operands)
    assert out.shape == (batch, queries, heads, 16) and not out.any()
    assert lse.shape == out.shape[:3] and (lse == -jnp.inf).all()
    for gradient, operand in zip(pullback((out, lse)), operands, strict=True):
        assert gradient.shape == operand.shape and not gradient.any()
