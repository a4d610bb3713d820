"""Every implementation of the products of quantized operands against the equations."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ds import deep_gemm
from jax_ds.deep_gemm import reference
from jax_ds.quantization import Quantized
from tests.deep_gemm import cases
from tests.deep_gemm.cases import GemmCase, GroupedCase

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name
    for name in cases.IMPLEMENTATIONS
]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
gemm_cases = pytest.mark.parametrize("case", cases.GEMM_CASES, ids=str)
grouped_cases = pytest.mark.parametrize("case", cases.GROUPED_CASES, ids=str)
masked_cases = pytest.mark.parametrize("case", cases.MASKED_CASES, ids=str)


def _grouped_operands(case: GroupedCase) -> tuple[Quantized, Quantized]:
    lhs = cases.quantized_rows(case, (case.m, case.k), 1)
    rhs = cases.quantized_weights(case, (len(case.group_sizes), case.n, case.k), 2)
    return cases.poisoned(lhs, np.arange(case.m) < sum(case.group_sizes)), rhs


def _masked_operands(case: GroupedCase) -> tuple[Quantized, Quantized]:
    groups = len(case.group_sizes)
    lhs = cases.quantized_rows(case, (groups, case.m, case.k), 1)
    rhs = cases.quantized_weights(case, (groups, case.n, case.k), 2)
    used = np.arange(case.m)[None, :] < np.asarray(case.group_sizes)[:, None]
    return cases.poisoned(lhs, used), rhs


def _bf16_masked_operands(case: GroupedCase) -> tuple[jax.Array, jax.Array]:
    groups = len(case.group_sizes)
    lhs = cases.random(case.draw, (groups, case.m, case.k), 1)
    lhs[np.arange(case.m)[None, :] >= np.asarray(case.group_sizes)[:, None]] = np.nan
    rhs = cases.random(case.draw, (groups, case.n, case.k), 2)
    return jnp.asarray(lhs), jnp.asarray(rhs)


def _columns(case: GroupedCase) -> tuple[Quantized, Quantized]:
    return cases.quantized_columns(case, case.n, 1), cases.quantized_columns(case, case.k, 2)


@implementations
@gemm_cases
def test_gemm(case: GemmCase, implementation: str) -> None:
    lhs = cases.quantized_rows(case, (case.m, case.k), 1)
    rhs = cases.quantized_weights(case, (case.n, case.k), 2)

    @jax.jit
    def run(lhs: Quantized, rhs: Quantized) -> jax.Array:
        return deep_gemm.fp8_gemm(lhs, rhs, out_dtype=case.out_dtype, implementation=implementation)

    actual = run(lhs, rhs)
    assert actual.dtype == case.out_dtype
    cases.assert_close(
        actual, reference.gemm(*cases.arrays(lhs, rhs)), case.draw, kernel=implementation == "cuda"
    )
    np.testing.assert_array_equal(actual, run(lhs, rhs))


@implementations
@grouped_cases
def test_grouped_gemm(case: GroupedCase, implementation: str) -> None:
    lhs, rhs = _grouped_operands(case)

    @jax.jit
    def run(lhs: Quantized, rhs: Quantized, sizes: jax.Array) -> jax.Array:
        return deep_gemm.fp8_grouped_gemm(
            lhs, rhs, sizes, out_dtype=case.out_dtype, implementation=implementation
        )

    actual = run(lhs, rhs, case.sizes)
    expected = reference.grouped_gemm(*cases.arrays(lhs, rhs), case.group_sizes)
    assert actual.dtype == case.out_dtype
    cases.assert_close(actual, expected, case.draw, kernel=implementation == "cuda")
    assert not np.asarray(actual[sum(case.group_sizes) :]).any()
    np.testing.assert_array_equal(actual, run(lhs, rhs, case.sizes))


@implementations
def test_grouped_gemm_without_zeroed_tail(implementation: str) -> None:
    case = cases.GROUPED_CASES[0]
    lhs, rhs = _grouped_operands(case)
    actual = deep_gemm.fp8_grouped_gemm(
        lhs, rhs, case.sizes, out_dtype=jnp.float32, zero_tail=False, implementation=implementation
    )
    used = sum(case.group_sizes)
    expected = reference.grouped_gemm(*cases.arrays(lhs, rhs), case.group_sizes)
    cases.assert_close(actual[:used], expected[:used], kernel=implementation == "cuda")


@implementations
@masked_cases
def test_masked_gemm(case: GroupedCase, implementation: str) -> None:
    lhs, rhs = _masked_operands(case)

    @jax.jit
    def run(lhs: Quantized, rhs: Quantized, sizes: jax.Array) -> jax.Array:
        return deep_gemm.fp8_masked_gemm(
            lhs, rhs, sizes, out_dtype=case.out_dtype, implementation=implementation
        )

    actual = run(lhs, rhs, case.sizes)
    expected = reference.masked_gemm(*cases.arrays(lhs, rhs), case.group_sizes)
    assert actual.dtype == case.out_dtype
    cases.assert_close(actual, expected, case.draw, kernel=implementation == "cuda")
    for g, size in enumerate(case.group_sizes):
        assert not np.asarray(actual[g, size:]).any()


@masked_cases
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_bf16_masked_gemm(case: GroupedCase, dtype: Any) -> None:
    lhs, rhs = _bf16_masked_operands(case)
    actual = jax.jit(deep_gemm.bf16_masked_gemm)(lhs.astype(dtype), rhs, case.sizes)
    assert actual.dtype == dtype
    used = np.arange(case.m)[None, :, None] < np.asarray(case.group_sizes)[:, None, None]
    rows = np.where(used, lhs, 0).astype(np.float32)
    expected = np.einsum("gmk,gnk->gmn", rows, np.asarray(rhs, np.float32))
    assert np.isfinite(np.asarray(actual, np.float32)).all()
    assert cases.error(actual, expected) <= 4e-3
    assert not np.where(used, 0, actual).any()


def test_bf16_masked_gemm_cuts_sizes_off() -> None:
    """Known only on the device, they must not reach into a neighbour's rows."""
    lhs, rhs = jnp.ones((2, 5, 16)), jnp.ones((2, 8, 16))
    run = jax.jit(deep_gemm.bf16_masked_gemm)
    beyond = run(lhs, rhs, jnp.asarray([2**31 - 1, -3], jnp.int32))
    np.testing.assert_array_equal(beyond, run(lhs, rhs, jnp.asarray([5, 0], jnp.int32)))
    assert beyond[0].all() and not beyond[1].any()


def test_bf16_masked_gemm_does_the_work_of_its_rows() -> None:
    """No product over all rows of all experts: the tiles are a loop with a bound on the device."""
    lhs, rhs = jnp.ones((4, 256, 16), jnp.bfloat16), jnp.ones((4, 8, 16), jnp.bfloat16)
    text = jax.jit(deep_gemm.bf16_masked_gemm).lower(lhs, rhs, jnp.ones(4, jnp.int32)).as_text()
    assert re.findall(r"dot_general.*-> tensor<(\S+)>", text) == ["64x8xf32"]


def test_bf16_masked_gradient_is_refused() -> None:
    lhs, rhs = jnp.ones((2, 5, 16)), jnp.ones((2, 8, 16))
    message = "bf16_masked_gemm: not differentiable, it is made for decoding; use bf16_grouped_gemm"
    with pytest.raises(TypeError, match=message):
        jax.grad(lambda x: deep_gemm.bf16_masked_gemm(x, rhs, PAIR[0].sizes * 0).sum())(lhs)


# What a weight gradient's result may be: its dtype, a sum it is added to.
OUTPUTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "accumulate": jnp.float32}
outputs = pytest.mark.parametrize("output", OUTPUTS)


@implementations
@gemm_cases
@outputs
def test_wgrad(case: GemmCase, output: str, implementation: str) -> None:
    dy, x = (
        cases.quantized_rows(case, (width, case.m), seed)
        for seed, width in ((1, case.n), (2, case.k))
    )
    expected = reference.gemm(*cases.arrays(dy, x))
    total = None
    if output == "accumulate":
        total = cases.random(case.draw, (case.n, case.k), 3, jnp.float32)
        expected = expected + total
    actual = deep_gemm.fp8_wgrad(
        dy, x, total, out_dtype=OUTPUTS[output], implementation=implementation
    )
    assert actual.dtype == OUTPUTS[output]
    cases.assert_close(actual, expected, case.draw, kernel=implementation == "cuda")


@implementations
@grouped_cases
@outputs
def test_grouped_wgrad(case: GroupedCase, output: str, implementation: str) -> None:
    dy, x = _columns(case)
    expected = reference.grouped_wgrad(*cases.arrays(dy, x), case.group_sizes)
    total = None
    if output == "accumulate":
        total = cases.random(case.draw, expected.shape, 3, jnp.float32)
        expected = expected + total

    @jax.jit
    def run(dy: Quantized, x: Quantized, sizes: jax.Array, total: jax.Array | None) -> jax.Array:
        return deep_gemm.fp8_grouped_wgrad(
            dy, x, sizes, total, out_dtype=OUTPUTS[output], implementation=implementation
        )

    actual = run(dy, x, case.sizes, total)
    assert actual.dtype == OUTPUTS[output]
    cases.assert_close(actual, expected, case.draw, kernel=implementation == "cuda")
    for g, size in enumerate(case.group_sizes):
        if size == 0:
            np.testing.assert_array_equal(actual[g], expected[g])


@implementations
def test_sizes_beyond_the_rows_are_cut_off(implementation: str) -> None:
    """Known only on the device, they must not reach outside the arrays."""
    case = GroupedCase("cut", (20, 10, 0), 30)
    lhs, rhs = _grouped_operands(case)

    @jax.jit
    def run(sizes: jax.Array) -> jax.Array:
        return deep_gemm.fp8_grouped_gemm(
            lhs, rhs, sizes, out_dtype=jnp.float32, implementation=implementation
        )

    beyond = run(jnp.asarray([20, 2**31 - 1, 2**31 - 1], jnp.int32))
    np.testing.assert_array_equal(beyond, run(case.sizes))
    negative = run(jnp.asarray([20, -5, 10], jnp.int32))
    np.testing.assert_array_equal(negative, run(jnp.asarray([20, 0, 10], jnp.int32)))


def _bf16_masked(*operands: Any, implementation: str) -> jax.Array:
    """There is no kernel: on a GPU too, the portable product."""
    return deep_gemm.bf16_masked_gemm(*operands, implementation="xla")


PRODUCTS: dict[str, tuple[Callable[..., jax.Array], Callable[[GroupedCase], tuple[Any, ...]]]] = {
    "fp8_grouped_gemm": (deep_gemm.fp8_grouped_gemm, _grouped_operands),
    "fp8_masked_gemm": (deep_gemm.fp8_masked_gemm, _masked_operands),
    "fp8_grouped_wgrad": (deep_gemm.fp8_grouped_wgrad, _columns),
    "bf16_masked_gemm": (_bf16_masked, _bf16_masked_operands),
}
products = pytest.mark.parametrize("name", PRODUCTS)
PAIR = (GroupedCase("pair", (3, 30), 40), GroupedCase("pair", (40, 0), 40))


def _pair(name: str, implementation: str) -> tuple[tuple[Any, ...], jax.Array]:
    """The operands of two cases stacked, and their results side by side."""
    product, make = PRODUCTS[name]
    operands = [(*make(case), case.sizes) for case in PAIR]
    expected = jnp.stack([product(*one, implementation=implementation) for one in operands])
    return jax.tree.map(lambda *a: jnp.stack(a), *operands), expected


@implementations
@products
def test_vmap(name: str, implementation: str) -> None:
    stacked, expected = _pair(name, implementation)

    def run(*operands: Any) -> jax.Array:
        return PRODUCTS[name][0](*operands, implementation=implementation)

    actual = jax.jit(jax.vmap(run))(*stacked)
    cases.assert_close(actual, np.asarray(expected, np.float32), kernel=implementation == "cuda")


@implementations
@products
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no-vma"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shard_map(name: str, kind: AxisType, check_vma: bool, implementation: str) -> None:
    devices = min(2, jax.device_count())  # a machine with one GPU runs the first of the pair
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
    stacked, expected = jax.tree.map(lambda a: a[:devices], _pair(name, implementation))

    def run(*operands: Any) -> jax.Array:
        mine = jax.tree.map(lambda a: a[0], operands)
        return PRODUCTS[name][0](*mine, implementation=implementation)[None]

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )
    actual = jax.jit(mapped)(*jax.device_put(stacked, NamedSharding(mesh, P("data"))))
    cases.assert_close(actual, np.asarray(expected, np.float32), kernel=implementation == "cuda")


@implementations
@pytest.mark.parametrize("name", [name for name in PRODUCTS if name.startswith("fp8")])
def test_gradient_is_refused(name: str, implementation: str) -> None:
    product, make = PRODUCTS[name]
    first, second = make(PAIR[0])

    def loss(scales: jax.Array) -> jax.Array:
        lhs = Quantized(first.values, scales)
        return jnp.sum(product(lhs, second, PAIR[0].sizes, implementation=implementation))

    message = f"{name}: not differentiable, .* use fp8_grouped_linear"
    with pytest.raises(TypeError, match=message):
        jax.grad(loss)(first.scales)
