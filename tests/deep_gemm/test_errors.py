"""Every public error of `deep_gemm`, word for word."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_gemm
from jax_ds.quantization import Quantized


def _quantized(
    shape: tuple[int, ...], scales: tuple[int, ...], dtype: Any = jnp.float8_e4m3fn
) -> Any:
    return Quantized(jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(scales, jnp.float32))


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


LHS = _quantized((5, 200), (5, 2))
RHS = _quantized((300, 200), (3, 2))
STACK = _quantized((2, 300, 200), (2, 3, 2))
MASKED = _quantized((2, 5, 200), (2, 5, 2))
DY = _quantized((300, 256), (300, 2))
X = _quantized((200, 256), (200, 2))
SIZES = _array(2, dtype=jnp.int32)

ERRORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type, str]] = {
    "a pair for a Quantized": (
        deep_gemm.fp8_gemm,
        ((_array(5, 200), _array(5, 2)), RHS),
        {},
        TypeError,
        "lhs: must be a Quantized, got tuple",
    ),
    "values not in FP8": (
        deep_gemm.fp8_gemm,
        (_quantized((5, 200), (5, 2), jnp.bfloat16), RHS),
        {},
        TypeError,
        "lhs.values: dtype must be float8_e4m3fn, got bfloat16",
    ),
    "rank": (
        deep_gemm.fp8_gemm,
        (MASKED, RHS),
        {},
        ValueError,
        "lhs.values: must have 2 dimensions, got shape [2, 5, 200]",
    ),
    "scales of lhs in the layout of weights": (
        deep_gemm.fp8_gemm,
        (_quantized((5, 200), (1, 2)), RHS),
        {},
        ValueError,
        "lhs.scales: must have shape [... R ceil(C/128)] = [5, 2], got [1, 2]",
    ),
    "scales of rhs in the layout of activations": (
        deep_gemm.fp8_gemm,
        (LHS, _quantized((300, 200), (300, 2))),
        {},
        ValueError,
        "rhs.scales: must have shape [... ceil(R/128) ceil(C/128)] = [3, 2], got [300, 2]",
    ),
    "contracted dimension": (
        deep_gemm.fp8_gemm,
        (LHS, _quantized((300, 264), (3, 3))),
        {},
        ValueError,
        "rhs: last dimension must be lhs's K, got 264 and 200",
    ),
    "out_dtype": (
        deep_gemm.fp8_gemm,
        (LHS, RHS),
        {"out_dtype": jnp.float16},
        ValueError,
        "out_dtype: must be one of 'bfloat16', 'float32', got 'float16'",
    ),
    "implementation": (
        deep_gemm.fp8_gemm,
        (LHS, RHS),
        {"implementation": "triton"},
        ValueError,
        "implementation: must be one of None, 'xla', 'cuda', got 'triton'",
    ),
    "weights without groups": (
        deep_gemm.fp8_grouped_gemm,
        (LHS, RHS, SIZES),
        {},
        ValueError,
        "rhs.values: must have 3 dimensions, got shape [300, 200]",
    ),
    "as many sizes as groups": (
        deep_gemm.fp8_grouped_gemm,
        (LHS, STACK, _array(3, dtype=jnp.int32)),
        {},
        ValueError,
        "group_sizes: must have shape [G] = [2], got [3]",
    ),
    "dtype of sizes": (
        deep_gemm.fp8_grouped_gemm,
        (LHS, STACK, _array(2, dtype=jnp.uint32)),
        {},
        TypeError,
        "group_sizes: dtype must be int32, got uint32",
    ),
    "zero_tail": (
        deep_gemm.fp8_grouped_gemm,
        (LHS, STACK, SIZES),
        {"zero_tail": "yes"},
        ValueError,
        "zero_tail: must be one of True, False, got 'yes'",
    ),
    "masked groups": (
        deep_gemm.fp8_masked_gemm,
        (_quantized((3, 5, 200), (3, 5, 2)), STACK, SIZES),
        {},
        ValueError,
        "rhs: must have as many groups as lhs, got 2 and 3",
    ),
    "rows expected": (
        deep_gemm.fp8_masked_gemm,
        (_quantized((2, 5, 16), (2, 5, 1)), _quantized((2, 8, 16), (2, 1, 1)), SIZES),
        {"expected_rows": 0},
        ValueError,
        "expected_rows: must be at least 1, got 0",
    ),
    "rows expected, no integer": (
        deep_gemm.fp8_masked_gemm,
        (_quantized((2, 5, 16), (2, 5, 1)), _quantized((2, 8, 16), (2, 1, 1)), SIZES),
        {"expected_rows": 2.5},
        TypeError,
        "expected_rows: must be a static integer, got 2.5",
    ),
    "tokens": (
        deep_gemm.fp8_wgrad,
        (DY, _quantized((200, 128), (200, 1))),
        {},
        ValueError,
        "x_columns: must have as many tokens as dy_columns, got 128 and 256",
    ),
    "padded tokens": (
        deep_gemm.fp8_grouped_wgrad,
        (LHS, LHS, SIZES),
        {},
        ValueError,
        "dy_columns: number of tokens must be a multiple of 128, got 200",
    ),
    "dtype of accumulate": (
        deep_gemm.fp8_wgrad,
        (DY, X, _array(300, 200)),
        {},
        TypeError,
        "accumulate: dtype must be float32, got bfloat16",
    ),
    "dtype of a sum": (
        deep_gemm.fp8_wgrad,
        (DY, X, _array(300, 200, dtype=jnp.float32)),
        {"out_dtype": jnp.bfloat16},
        ValueError,
        "out_dtype: must be float32 with accumulate, got bfloat16",
    ),
    "shape of accumulate": (
        deep_gemm.fp8_grouped_wgrad,
        (DY, X, SIZES, _array(300, 200, dtype=jnp.float32)),
        {},
        ValueError,
        "accumulate: must have shape [G N K] = [2, 300, 200], got [300, 200]",
    ),
    "no groups": (
        deep_gemm.fp8_grouped_wgrad,
        (DY, X, _array(0, dtype=jnp.int32)),
        {},
        ValueError,
        "group_sizes: must have at least one group, got none",
    ),
    "dtype of x": (
        deep_gemm.fp8_linear,
        (_array(5, 200, dtype=jnp.float16), _array(300, 200)),
        {},
        TypeError,
        "x: dtype must be bfloat16 or float32, got float16",
    ),
    "scalar x": (
        deep_gemm.fp8_linear,
        (_array(), _array(300, 200)),
        {},
        ValueError,
        "x: must have at least 1 dimension, got shape []",
    ),
    "transposed w": (
        deep_gemm.fp8_linear,
        (_array(5, 200), _array(200, 300)),
        {},
        ValueError,
        "w: last dimension must be x's K, got 300 and 200",
    ),
    "scale_dtype": (
        deep_gemm.fp8_linear,
        (_array(5, 200), _array(300, 200)),
        {"scale_dtype": "e8m0"},
        ValueError,
        "scale_dtype: must be one of 'float32', 'ue8m0', got 'e8m0'",
    ),
    "rank of grouped x": (
        deep_gemm.fp8_grouped_linear,
        (_array(2, 5, 200), _array(2, 300, 200), SIZES),
        {},
        ValueError,
        "x: must have 2 dimensions, got shape [2, 5, 200]",
    ),
    "rank of grouped rhs": (
        deep_gemm.bf16_grouped_gemm,
        (_array(5, 200), _array(300, 200), SIZES),
        {},
        ValueError,
        "rhs: must have 3 dimensions, got shape [300, 200]",
    ),
    "rank of masked lhs": (
        deep_gemm.bf16_masked_gemm,
        (_array(5, 200), _array(2, 300, 200), SIZES),
        {},
        ValueError,
        "lhs: must have 3 dimensions, got shape [5, 200]",
    ),
    "dtype of masked rhs": (
        deep_gemm.bf16_masked_gemm,
        (_array(2, 5, 200), _array(2, 300, 200, dtype=jnp.float16), SIZES),
        {},
        TypeError,
        "rhs: dtype must be bfloat16 or float32, got float16",
    ),
    "contracted dimension of masked rhs": (
        deep_gemm.bf16_masked_gemm,
        (_array(2, 5, 200), _array(2, 200, 300), SIZES),
        {},
        ValueError,
        "rhs: last dimension must be lhs's K, got 300 and 200",
    ),
    "groups of masked rhs": (
        deep_gemm.bf16_masked_gemm,
        (_array(3, 5, 200), _array(2, 300, 200), SIZES),
        {},
        ValueError,
        "rhs: must have as many groups as lhs, got 2 and 3",
    ),
    "a masked kernel for bfloat16": (
        deep_gemm.bf16_masked_gemm,
        (_array(2, 5, 200), _array(2, 300, 200), SIZES),
        {"implementation": "cuda"},
        NotImplementedError,
        "bf16_masked_gemm: implementation='cuda' cannot run here, bf16_masked_gemm has no CUDA "
        "kernel; use implementation=None or 'xla'",
    ),
    "a kernel for bfloat16": (
        deep_gemm.bf16_grouped_gemm,
        (_array(5, 200), _array(2, 300, 200), SIZES),
        {"implementation": "cuda"},
        NotImplementedError,
        "bf16_grouped_gemm: implementation='cuda' cannot run here, bf16_grouped_gemm has no CUDA "
        "kernel; use implementation=None or 'xla'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    function, operands, keywords, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        jax.eval_shape(lambda *args: function(*args, **keywords), *operands)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, 3], "group_sizes: sum must be at most M = 5, got 6"),
        ([-1, 3], "group_sizes: must not be negative, got -1"),
        ([2**31 - 1, 2**31 - 1], "group_sizes: sum must be at most M = 5, got 4294967294"),
    ],
)
def test_sizes_known_while_tracing(sizes: list[int], message: str) -> None:
    x, w = jnp.ones((5, 16)), jnp.ones((2, 8, 16))
    with pytest.raises(ValueError) as caught:
        deep_gemm.fp8_grouped_linear(x, w, jnp.asarray(sizes, jnp.int32))
    assert str(caught.value) == message


def test_masked_sizes_known_while_tracing() -> None:
    lhs = Quantized(jnp.ones((2, 5, 16), jnp.float8_e4m3fn), jnp.ones((2, 5, 1)))
    rhs = Quantized(jnp.ones((2, 8, 16), jnp.float8_e4m3fn), jnp.ones((2, 1, 1)))
    with pytest.raises(ValueError) as caught:
        deep_gemm.fp8_masked_gemm(lhs, rhs, jnp.asarray([5, 6], jnp.int32))
    assert str(caught.value) == "group_sizes: every size must be at most M = 5, got 6"
    with pytest.raises(ValueError) as caught:
        deep_gemm.bf16_masked_gemm(
            jnp.ones((2, 5, 16)), jnp.ones((2, 8, 16)), jnp.asarray([5, 6], jnp.int32)
        )
    assert str(caught.value) == "group_sizes: every size must be at most M = 5, got 6"
