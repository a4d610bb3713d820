"""The plan's table, which needs the native module but no GPU, and what products are given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import deep_gemm
from jax_ds.deep_gemm import ffi
from jax_ds.quantization import quantize_1x128, quantize_128x128


def test_tells_the_choice_and_its_rivals() -> None:
    few, many = deep_gemm.explain(64, 2112, 7168), deep_gemm.explain(8192, 8192, 8192)
    for table in (few, many):
        head, *lines = table.splitlines()
        assert head.split()[0] == "configuration" and "total us" in head
        totals = [float(line.split()[-1]) for line in lines]
        assert totals == sorted(totals) and len(totals) > 2
    assert few.splitlines()[1].split()[0].startswith("64x")
    assert not many.splitlines()[1].split()[0].startswith("64x")


def test_modes_have_their_own_candidates() -> None:
    tables = {
        mode: deep_gemm.explain(4096, 512, 7168, mode=mode, groups=groups)
        for mode, groups in (("dense", 1), ("grouped", 8), ("masked", 8), ("wgrad", 8))
    }
    assert len(set(tables.values())) == 4


def test_expected_rows_change_the_choice() -> None:
    few, many = (
        deep_gemm.explain(4096, 4096, 7168, mode="masked", groups=4, expected_rows=rows)
        for rows in (32, 4096)
    )
    assert few.splitlines()[1].split()[0].startswith("64x")
    assert many.splitlines()[1].split()[0].startswith("128x")


@pytest.mark.parametrize(("expected", "told"), [(None, 0), (3, 3), (9, 5)])
def test_calls_tell_the_rows_expected(expected: int | None, told: int) -> None:
    """As many as M = 5 at most; 0 leaves the guess to the model."""

    def call(x: Any, w: Any, sizes: Any) -> Any:
        lhs, rhs = quantize_1x128(x), quantize_128x128(w)
        return deep_gemm.fp8_masked_gemm(lhs, rhs, sizes, expected_rows=expected)

    shapes = (jax.ShapeDtypeStruct((2, n, 128), jnp.bfloat16) for n in (5, 8))
    traced = jax.jit(call).trace(*shapes, jax.ShapeDtypeStruct((2,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"expected_rows = {told} : i64" in text


@pytest.mark.parametrize(
    ("sizes", "keywords", "message"),
    [
        ((0, 8, 16), {}, "m: must be between 1"),
        ((8, 8, 16), {"mode": "sparse"}, "mode: .*sparse"),
        ((8, 8, 16), {"out_dtype": "float16"}, "out_dtype: .*float16"),
        ((8, 8, 16), {"expected_rows": 8}, "expected_rows: must be None but for masked, got 8"),
        ((8, 8, 16), {"mode": "grouped", "groups": 513}, "groups: must be at most 512, got 513"),
        ((8, 8, 16.0), {}, "k: must be a static integer, got 16.0"),
        ((8, 8, 16), {"num_sms": 1.5}, "num_sms: must be a static integer, got 1.5"),
        ((8, 8, 16), {"out_dtype": "bf16"}, "out_dtype: must be one of .* got 'bf16'"),
    ],
)
def test_errors(sizes: tuple[int, int, int], keywords: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        deep_gemm.explain(*sizes, **keywords)


def test_odd_sizes_are_padded_behind() -> None:
    """With zeros, which add nothing; their scales are those of the block or zero."""
    w = jax.random.normal(jax.random.key(0), (3, 131, 137), jnp.bfloat16)
    weights, rows = quantize_128x128(w), quantize_1x128(w)
    for q, per_row, scales in ((weights, False, (3, 2, 2)), (rows, True, (3, 136, 2))):
        padded = ffi._padded(q, 8, per_row=per_row)
        assert padded.shape == (3, 136, 144)
        assert padded.scales.shape == scales
        values = padded.values.astype(jnp.float32)
        np.testing.assert_array_equal(values[:, :131, :137], q.values.astype(jnp.float32))
        assert not values[:, 131:].any() and not values[:, :, 137:].any()
        np.testing.assert_array_equal(padded.scales[:, : q.scales.shape[1]], q.scales)
    assert ffi._padded(quantize_1x128(w[:, :, :128]), 1, per_row=True).shape == (3, 131, 128)
