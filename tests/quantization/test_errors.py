"""Every public error of `quantization`, word for word."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import quantization
from jax_ds.quantization import Quantized


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _quantized(values: Any, scales: Any) -> Any:
    return Quantized(values, scales)


FP8 = jnp.float8_e4m3fn
SIZES = _array(2, dtype=jnp.int32)

ERRORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type, str]] = {
    "dtype": (
        quantization.quantize_1x128,
        (_array(5, 200, dtype=jnp.float16),),
        {},
        TypeError,
        "x: dtype must be bfloat16 or float32, got float16",
    ),
    "scalar": (
        quantization.quantize_1x128,
        (_array(),),
        {},
        ValueError,
        "x: must have at least 1 dimension, got shape []",
    ),
    "scale_dtype": (
        quantization.quantize_1x128,
        (_array(5, 200),),
        {"scale_dtype": jnp.float32},
        ValueError,
        "scale_dtype: must be one of 'float32', 'ue8m0', got <class 'jax.numpy.float32'>",
    ),
    "implementation": (
        quantization.quantize_1x128,
        (_array(5, 200),),
        {"implementation": "gpu"},
        ValueError,
        "implementation: must be one of None, 'xla', 'cuda', got 'gpu'",
    ),
    "num_rows of a stack": (
        quantization.quantize_1x128,
        (_array(2, 5, 200), _array(dtype=jnp.int32)),
        {},
        ValueError,
        "x: must have 2 dimensions, got shape [2, 5, 200]",
    ),
    "dtype of num_rows": (
        quantization.quantize_1x128,
        (_array(5, 200), _array(dtype=jnp.float32)),
        {},
        TypeError,
        "num_rows: dtype must be int32, got float32",
    ),
    "shape of num_rows": (
        quantization.quantize_1x128,
        (_array(5, 200), _array(1, dtype=jnp.int32)),
        {},
        ValueError,
        "num_rows: must be a scalar, got shape [1]",
    ),
    "vector weights": (
        quantization.quantize_128x128,
        (_array(200),),
        {},
        ValueError,
        "w: must have at least 2 dimensions, got shape [200]",
    ),
    "vector weights, both": (
        quantization.quantize_128x128_both,
        (_array(200),),
        {},
        ValueError,
        "w: must have at least 2 dimensions, got shape [200]",
    ),
    "rank for columns": (
        quantization.quantize_1x128_both,
        (_array(2, 5, 200),),
        {},
        ValueError,
        "x: must have 2 dimensions, got shape [2, 5, 200]",
    ),
    "dtype of sizes": (
        quantization.quantize_1x128_both,
        (_array(5, 200), _array(2, dtype=jnp.uint32)),
        {},
        TypeError,
        "group_sizes: dtype must be int32, got uint32",
    ),
    "rank of sizes": (
        quantization.quantize_1x128_both,
        (_array(5, 200), _array(2, 2, dtype=jnp.int32)),
        {},
        ValueError,
        "group_sizes: must have shape [G] = [*], got [2, 2]",
    ),
    "no groups": (
        quantization.quantize_1x128_both,
        (_array(5, 200), _array(0, dtype=jnp.int32)),
        {},
        ValueError,
        "group_sizes: must have at least one group, got none",
    ),
    "odd gate and up": (
        quantization.swiglu_quantize_1x128,
        (_array(5, 201),),
        {},
        ValueError,
        "gate_up: last dimension must be even (gate, then up), got 201",
    ),
    "rank of gate and up": (
        quantization.swiglu_quantize_1x128_both,
        (_array(2, 5, 200), SIZES),
        {},
        ValueError,
        "gate_up: must have 2 dimensions, got shape [2, 5, 200]",
    ),
    "no Quantized": (
        quantization.dequantize,
        ((_array(5, 200),),),
        {},
        TypeError,
        "q: must be a Quantized, got tuple",
    ),
    "dtype of scales": (
        quantization.dequantize,
        (_quantized(_array(5, 200, dtype=FP8), _array(5, 2)),),
        {},
        TypeError,
        "q.scales: dtype must be float32, got bfloat16",
    ),
    "scales of neither block": (
        quantization.dequantize,
        (_quantized(_array(300, 200, dtype=FP8), _array(2, 3, dtype=jnp.float32)),),
        {},
        ValueError,
        "q.scales: must have shape [300, 2] (1x128) or [3, 2] (128x128), got [2, 3]",
    ),
    "scalar Quantized": (
        quantization.dequantize,
        (_quantized(_array(dtype=FP8), _array(dtype=jnp.float32)),),
        {},
        ValueError,
        "q.values: must have at least 1 dimension, got shape []",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    function, operands, keywords, kind, message = ERRORS[name]
    with pytest.raises(kind) as caught:
        jax.eval_shape(lambda *args: function(*args, **keywords), *operands)
    assert str(caught.value) == message


def test_float64() -> None:
    with pytest.raises(TypeError) as caught:
        quantization.quantize_1x128(np.ones((2, 128)))
    assert str(caught.value) == "x: dtype must be bfloat16 or float32, got float64"


@pytest.mark.parametrize("name", ["quantize_1x128_both", "swiglu_quantize_1x128_both"])
def test_sizes_known_while_tracing(name: str) -> None:
    function, x = getattr(quantization, name), jnp.ones((5, 16))
    with pytest.raises(ValueError) as caught:
        function(x, jnp.asarray([3, 3], jnp.int32))
    assert str(caught.value) == "group_sizes: sum must be at most M = 5, got 6"
    with pytest.raises(ValueError) as caught:
        function(x, np.asarray([3, -3], np.int32))
    assert str(caught.value) == "group_sizes: must not be negative, got -3"


def test_sharded_outside_shard_map() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jnp.ones((4, 128)), sharding)
    with jax.set_mesh(mesh), pytest.raises(ValueError) as caught:
        quantization.quantize_1x128(x)
    assert str(caught.value) == (
        "quantize_1x128: operands must not be sharded outside jax.shard_map, "
        "got float32[4@data,128] sharded over data"
    )


def test_gradient() -> None:
    with pytest.raises(TypeError) as caught:
        jax.grad(lambda x: quantization.quantize_1x128(x).scales.sum())(jnp.ones((2, 128)))
    assert str(caught.value) == (
        "quantize_1x128: not differentiable, a cotangent cannot cross FP8 values; "
        "use deep_gemm.fp8_linear, or apply jax.lax.stop_gradient to the operand"
    )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-1,), "num_rows: must be at least 0, got -1"),
        ((8.0,), "num_rows: must be a static integer, got 8.0"),
        ((8, 0), "num_groups: must be at least 1, got 0"),
    ],
)
def test_padded_tokens(numbers: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        quantization.padded_tokens(*numbers)
    assert str(caught.value) == message
