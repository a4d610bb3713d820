"""Every implementation of `quantization` against its definition, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ds import quantization
from jax_ds.quantization import Quantized, reference
from tests.quantization import cases
from tests.quantization.cases import Case, Operation

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name
    for name in cases.IMPLEMENTATIONS
]
ALL_OPERATIONS = (*cases.OPERATIONS, *cases.SWIGLU_OPERATIONS)
# Weights have no unused rows.
WITH_ROWS = [op for op in ALL_OPERATIONS if not op.name.startswith("quantize_128x128")]
GROUPED = Case("grouped", (70, 260), dtype=jnp.bfloat16, group_sizes=(3, 0, 60))

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_operation = pytest.mark.parametrize("operation", ALL_OPERATIONS, ids=str)


def _used(case: Case) -> int:
    return case.shape[0] if case.group_sizes is None else sum(case.group_sizes)


def _expect(operation: Operation, case: Case, x: Any) -> Any:
    return operation.expect(np.asarray(x, np.float32), case.group_sizes, case.scale_dtype)


def _compare(operation: Operation, actual: Any, expected: Any, used: int) -> None:
    if operation in cases.OPERATIONS:
        cases.assert_same_bits(actual, expected, used)
    else:
        cases.assert_within_one_code(actual, expected, used)


def _check_value(operation: Operation, case: Case, implementation: str) -> None:
    def run(x: jax.Array, sizes: jax.Array | None) -> list[Quantized]:
        return operation.run(x, sizes, scale_dtype=case.scale_dtype, implementation=implementation)

    x = case.operand()
    expected = _expect(operation, case, x)
    _compare(operation, jax.jit(run)(x, case.sizes()), expected, _used(case))


@implementations
@pytest.mark.parametrize("case", cases.CASES, ids=str)
@pytest.mark.parametrize("operation", cases.OPERATIONS, ids=str)
def test_value(operation: Operation, case: Case, implementation: str) -> None:
    _check_value(operation, case, implementation)


@implementations
@pytest.mark.parametrize("case", cases.SWIGLU_CASES, ids=str)
@pytest.mark.parametrize("operation", cases.SWIGLU_OPERATIONS, ids=str)
def test_swiglu_value(operation: Operation, case: Case, implementation: str) -> None:
    _check_value(operation, case, implementation)


@implementations
@every_operation
def test_without_jit(operation: Operation, implementation: str) -> None:
    x = GROUPED.operand()
    actual = operation.run(x, GROUPED.sizes(), implementation=implementation)
    _compare(operation, actual, _expect(operation, GROUPED, x), _used(GROUPED))


@implementations
@pytest.mark.parametrize("operation", WITH_ROWS, ids=str)
def test_rows_past_the_last_group_do_not_leak(operation: Operation, implementation: str) -> None:
    x = GROUPED.operand()
    poisoned = x.at[_used(GROUPED) :].set(jnp.nan)
    actual = operation.run(poisoned, GROUPED.sizes(), implementation=implementation)
    _compare(operation, actual, _expect(operation, GROUPED, x), _used(GROUPED))


@implementations
@pytest.mark.parametrize("name", ["quantize_1x128", "swiglu_quantize_1x128"])
def test_num_rows(name: str, implementation: str) -> None:
    x = GROUPED.operand()
    function = getattr(quantization, name)
    whole = function(x, implementation=implementation)
    part = function(x.at[11:].set(jnp.nan), jnp.int32(11), implementation=implementation)
    np.testing.assert_array_equal(cases.bits(part.values)[:11], cases.bits(whole.values)[:11])
    np.testing.assert_array_equal(part.scales[:11], whole.scales[:11])


@implementations
@every_operation
def test_gradient_is_refused(operation: Operation, implementation: str) -> None:
    def loss(x: jax.Array) -> jax.Array:
        first = operation.run(x, GROUPED.sizes(), implementation=implementation)[0]
        return jnp.sum(first.scales)

    message = f"{operation.name}: not differentiable, a cotangent cannot cross FP8 values; "
    with pytest.raises(TypeError, match=message):
        jax.jit(jax.grad(loss))(GROUPED.operand())


@implementations
def test_stop_gradient_before_quantizing(implementation: str) -> None:
    def loss(x: jax.Array) -> jax.Array:
        q = quantization.quantize_1x128(jax.lax.stop_gradient(x), implementation=implementation)
        return jnp.sum(x * quantization.dequantize(q))

    x = jax.random.normal(jax.random.key(0), (3, 130))
    q = quantization.quantize_1x128(x, implementation=implementation)
    np.testing.assert_array_equal(jax.grad(loss)(x), quantization.dequantize(q))


@implementations
@every_operation
def test_vmap(operation: Operation, implementation: str) -> None:
    sizes = jnp.asarray([[3, 0, 60], [0, 70, 0]], jnp.int32)
    x = GROUPED.operand((2,))

    def run(x: jax.Array, sizes: jax.Array) -> list[Quantized]:
        return operation.run(x, sizes, implementation=implementation)

    actual = jax.jit(jax.vmap(run))(x, sizes)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], actual)
        group_sizes = tuple(sizes[i].tolist())
        expected = operation.expect(np.asarray(x[i], np.float32), group_sizes, "float32")
        _compare(operation, one, expected, sum(group_sizes))


@implementations
@every_operation
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no-vma"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map(
    operation: Operation, kind: AxisType, check_vma: bool, implementation: str
) -> None:
    devices = min(2, jax.device_count())
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
    sizes = jnp.asarray([3, 0, 60, 0, 70, 0][: 3 * devices], jnp.int32)
    x = GROUPED.operand((devices,))
    m, width = GROUPED.shape

    def run(x: jax.Array, sizes: jax.Array) -> Any:
        results = operation.run(x, sizes, implementation=implementation)
        return jax.tree.map(lambda a: a[None], results)

    spec = P("data")
    mapped = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )
    operands = jax.device_put((x.reshape(devices * m, width), sizes), NamedSharding(mesh, spec))
    actual = jax.device_get(mapped(*operands))
    for i in range(devices):
        one = jax.tree.map(lambda a, i=i: a[i], actual)
        group_sizes = tuple(sizes.reshape(devices, 3)[i].tolist())
        expected = operation.expect(np.asarray(x[i], np.float32), group_sizes, "float32")
        _compare(operation, one, expected, sum(group_sizes))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((*leading, 200)).astype(np.float32)
    q = quantization.quantize_1x128(jnp.asarray(x), implementation="xla")
    values, scales = reference.quantize_1x128(x)
    assert (q.shape, q.scales.shape, q.block) == (values.shape, scales.shape, (1, 128))
    np.testing.assert_array_equal(cases.bits(q.values), cases.bits(values))
    np.testing.assert_array_equal(q.scales, scales)


def test_stack_of_weights() -> None:
    w = np.random.default_rng(0).standard_normal((2, 3, 130, 140)).astype(np.float32)
    q, transposed = quantization.quantize_128x128_both(jnp.asarray(w), implementation="xla")
    values, scales = reference.quantize_128x128(w)
    assert (q.block, transposed.block) == ((128, 128), (128, 128))
    np.testing.assert_array_equal(cases.bits(q.values), cases.bits(values))
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(
        cases.bits(transposed.values), cases.bits(values).swapaxes(-1, -2)
    )
    np.testing.assert_array_equal(transposed.scales, scales.swapaxes(-1, -2))


@pytest.mark.parametrize("name", ["quantize_1x128", "quantize_128x128"])
def test_dequantize(name: str) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 130, 140))
    q = getattr(quantization, name)(x, implementation="xla")
    actual = jax.jit(quantization.dequantize)(q)
    expected = reference.dequantize(np.asarray(q.values), np.asarray(q.scales))
    np.testing.assert_array_equal(actual, expected)
    # Half a unit in the last of three mantissa bits, or of the smallest subnormal.
    assert np.all(np.abs(actual - x) <= np.maximum(np.abs(x) / 16, 2.0**-10 * 0.02))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_anomaly_dequantizes_to_nan_in_its_whole_block_only(value: float) -> None:
    x = jnp.ones((2, 256)).at[1, 130].set(value)
    y = quantization.dequantize(quantization.quantize_1x128(x, implementation="xla"))
    expected = np.ones((2, 256), np.float32)
    expected[1, 128:] = np.nan
    np.testing.assert_array_equal(y, expected)
