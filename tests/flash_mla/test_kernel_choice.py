"""Which decode kernel is chosen, what is said about it, and how the custom calls are lowered."""

import re

import jax
import jax.numpy as jnp
import pytest

from jax_ds import flash_mla
from jax_ds.flash_mla import ffi


def _array(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("query_rows", "tile"),
    [
        (1, ("narrow", 8)),
        (12, ("narrow", 16)),
        (20, ("narrow", 24)),
        (32, ("narrow", 32)),
        (33, ("wide", 64)),
        (64, ("wide", 64)),
        (96, ("wide", 64)),
        (192, ("wide", 64)),
        (512, ("wide", 64)),
    ],
)
def test_tile(query_rows: int, tile: tuple[str, int]) -> None:
    assert ffi.decode_tile(query_rows) == tile


@pytest.mark.parametrize(
    ("q", "pages", "value_dim", "words"),
    [
        (_array(8, 2, 10, 576), _array(9, 64, 576), 512, ("narrow", "20 query rows", "tile of 24")),
        (_array(8, 1, 128, 576), _array(9, 128, 576), 512, ("wide", "2 tiles of 64")),
        (_array(8, 1, 8, 576), _array(9, 16, 576), 512, ("narrow", "1 tile of 8")),
        (_array(8, 1, 8, 576), _array(9, 64, 576), 256, ("portable", "value_dim 512", "256")),
        (_array(8, 1, 8, 24), _array(9, 64, 24), 16, ("portable", "rows of 576", "24")),
        (
            _array(8, 1, 8, 576, dtype=jnp.float32),
            _array(9, 64, 576, dtype=jnp.float32),
            512,
            ("portable", "float16", "float32"),
        ),
    ],
)
def test_explain(
    q: jax.ShapeDtypeStruct, pages: jax.ShapeDtypeStruct, value_dim: int, words: tuple[str, ...]
) -> None:
    said = flash_mla.explain(q, pages, value_dim=value_dim)
    assert all(word in said for word in words), said


def test_explain_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="q: "):
        flash_mla.explain(_array(8, 128, 576), _array(9, 64, 576))
    q, pages = _array(8, 1, 128, 576), _array(9, 64, 576)
    with pytest.raises(ValueError, match="value_dim: must be an integer from 1 to D = 576, got 0"):
        flash_mla.explain(q, pages, value_dim=0)
    with pytest.raises(ValueError, match="implementation: must be one of"):
        flash_mla.explain(q, pages, implementation="pallas")  # type: ignore[arg-type]


def _lowered(function, *operands: jax.ShapeDtypeStruct) -> str:  # type: ignore[no-untyped-def]
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def test_append_is_lowered_in_place() -> None:
    ints = jnp.int32
    text = _lowered(
        flash_mla.append,
        _array(9, 64, 576),
        _array(2, 1, 576),
        _array(2, 4, dtype=ints),
        _array(2, dtype=ints),
    )
    call = next(line for line in text.splitlines() if "jax_ds_flash_mla_append" in line)
    assert "output_operand_alias" in call


def test_no_size_of_the_batch_is_an_attribute() -> None:
    """Or every batch size would be a compilation of its own."""

    def attributes(batch: int) -> str:
        ints = jnp.int32
        text = _lowered(
            flash_mla.decode,
            _array(batch, 2, 16, 576),
            _array(9, 64, 576),
            _array(batch, 4, dtype=ints),
            _array(batch, dtype=ints),
        )
        call = next(line for line in text.splitlines() if "jax_ds_flash_mla_decode" in line)
        return call.partition("mhlo.backend_config = ")[2].partition("}")[0]

    assert "heads = 16" in attributes(3)
    assert attributes(3) == attributes(5)


@pytest.mark.parametrize(
    ("heads", "rows"), [(5, 2 * 132 * 8), (32, 2 * 132 * 32), (33, 2 * 132 * 64)]
)
def test_decode_has_room_for_two_parts_of_every_cta(heads: int, rows: int) -> None:
    """tests/native/flash_mla_decode_plan_test.cc holds the plan to it."""
    ints = jnp.int32
    operands = (_array(2, 1, heads, 576), _array(9, 64, 576))
    text = _lowered(flash_mla.decode, *operands, _array(2, 4, dtype=ints), _array(2, dtype=ints))
    call = next(line for line in text.splitlines() if "jax_ds_flash_mla_decode" in line)
    assert f"tensor<{rows}x512xf32>, tensor<{rows}xf32>, tensor<2x2xi32>" in call


@pytest.mark.parametrize(("queries", "words"), [(1, 48), (128, 300), (129, 320), (301, 676)])
def test_packed_lists_have_the_words_of_their_layout(queries: int, words: int) -> None:
    """tests/native/flash_mla_prefill_packing_test.cc: 4 + 5 (3 tiles + 5) + 2 rows, in fours; and
    what the second kernel of the gradient needs to know of each query, in rows of 16 bytes."""
    q, v = (_array(1, queries, 2, width) for width in (192, 128))
    offsets = _array(3, dtype=jnp.int32)

    def out(q: jax.Array, k: jax.Array, v: jax.Array, offsets: jax.Array) -> jax.Array:
        return flash_mla.prefill(q, k, v, None, offsets)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, offsets: jax.Array) -> jax.Array:
        return jax.grad(lambda q: out(q, k, v, offsets).astype(jnp.float32).sum())(q)

    text = _lowered(out, q, q, v, offsets)
    call = next(line for line in text.splitlines() if "jax_ds_flash_mla_prefill" in line)
    assert call.rstrip().endswith(f"tensor<{words}xi32>)"), call[-200:]
    text = _lowered(gradient, q, q, v, offsets)
    call = next(line for line in text.splitlines() if "jax_ds_flash_mla_prefill_backward" in line)
    assert (
        f"tensor<1x2x2x{-(-queries // 4) * 4}xf32>, tensor<1xi32>, tensor<{2 * words}xi32>)" in call
    )


@pytest.mark.parametrize(
    ("qk", "rope", "v", "kernel"),
    [
        (192, 64, 128, True),
        (192, 0, 128, True),
        (128, 0, 128, True),
        (64, 0, 64, True),
        (192, 32, 128, False),
        (192, 0, 192, False),
        (96, 0, 96, False),
    ],
)
def test_prefill_heads(qk: int, rope: int, v: int, kernel: bool) -> None:
    q, k, values = _array(2, 64, 4, qk), _array(2, 64, 2, qk - rope), _array(2, 64, 2, v)
    operands = (q, k, values, *([_array(2, 64, 1, rope)] if rope else []))
    calls = re.findall(r"@jax_ds_flash_mla_prefill\(.*", _lowered(flash_mla.prefill, *operands))
    assert len(calls) == kernel
    for call in calls:
        assert f"qk_dim = {qk} : i64, rope = {rope} : i64" in call
        assert f"v_dim = {v} : i64" in call


def test_nothing_is_launched_for_nothing() -> None:
    ints = jnp.int32
    pages, lens = _array(9, 64, 576), _array(2, dtype=ints)
    for tokens, entries in ((0, 4), (1, 0)):
        table = _array(2, entries, dtype=ints)
        for function, operands in (
            (flash_mla.append, (pages, _array(2, tokens, 576), table, lens)),
            (flash_mla.decode, (_array(2, tokens, 16, 576), pages, table, lens)),
        ):
            assert "jax_ds_flash_mla" not in _lowered(function, *operands)
    q, k, v = _array(2, 64, 4, 192), _array(2, 0, 4, 192), _array(2, 0, 4, 128)
    assert "jax_ds_flash_mla" not in _lowered(flash_mla.prefill, q, k, v)


def test_why_not_the_kernel() -> None:
    q, k, v = _array(2, 64, 4, 192), _array(2, 64, 4, 160), _array(2, 64, 4, 128)
    with pytest.raises(NotImplementedError, match="got 192/128 with a k_rope of 32; use"):
        jax.eval_shape(
            lambda *x: flash_mla.prefill(*x, implementation="cuda"), q, k, v, _array(2, 64, 1, 32)
        )
