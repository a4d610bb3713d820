"""The products with gradients, against their equations on quantized operands and in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ds import deep_gemm
from jax_ds.deep_gemm import reference, vjp, xla
from jax_ds.quantization import reference as quantization
from tests.deep_gemm import cases

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name
    for name in cases.IMPLEMENTATIONS
]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

# e4m3 rounds with an error of about 2.6%, and a product has two operands.
FP8 = 0.06
BF16 = 0.006

M, N, K = 150, 136, 272
SIZES = (0, 5, 100, 0, 30)


def _operands(groups: int | None, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and dy; NaN in the rows of x and dy that belong to no group."""
    x = cases.random(cases.normal, (M, K), 1)
    w_shape = (N, K) if groups is None else (groups, N, K)
    w = cases.random(cases.normal, w_shape, 2, dtype)
    dy = cases.random(cases.normal, (M, N), 3)
    if groups is not None:
        x[sum(SIZES) :] = dy[sum(SIZES) :] = np.nan
    return x, w, dy


def _pull(function: Callable[..., jax.Array], *primals: Any) -> Callable[[Any], Any]:
    """Value and gradients of `function` as one compiled program of the cotangent."""

    @jax.jit
    def run(dy: jax.Array) -> Any:
        y, pullback = jax.vjp(function, *primals)
        return y, *pullback(dy)

    return run


def _slices() -> list[slice]:
    ends = np.cumsum(SIZES)
    return [slice(end - size, end) for size, end in zip(SIZES, ends, strict=True)]


def _by_hand(x: np.ndarray, w: np.ndarray, dy: np.ndarray, scale_dtype: str) -> list[np.ndarray]:
    """y, dx and dw of one group from the reference quantizers and the reference product."""
    rows = functools.partial(quantization.quantize_1x128, scale_dtype=scale_dtype)
    columns = functools.partial(
        quantization.quantize_columns, group_sizes=None, scale_dtype=scale_dtype
    )
    values, scales = quantization.quantize_128x128(w, scale_dtype)
    y = reference.gemm(*rows(x), values, scales)
    dx = reference.gemm(*rows(dy), values.T, scales.T)
    return [y, dx, reference.gemm(*columns(dy), *columns(x))]


@implementations
@pytest.mark.parametrize(
    ("w_dtype", "scale_dtype"), [(jnp.float32, "float32"), (jnp.bfloat16, "ue8m0")], ids=str
)
def test_linear(w_dtype: Any, scale_dtype: str, implementation: str) -> None:
    x, w, dy = _operands(None, w_dtype)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return deep_gemm.fp8_linear(x, w, scale_dtype=scale_dtype, implementation=implementation)

    actual = _pull(function, x, w)(dy)
    assert [a.dtype for a in actual] == [jnp.bfloat16, jnp.bfloat16, w_dtype]
    for a, e in zip(actual, _by_hand(x, w, dy, scale_dtype), strict=True):
        assert cases.error(a, e) <= (2e-4 if a.dtype == jnp.float32 else 2e-3)
    exact = _pull(reference.linear, x.astype(np.float32), w.astype(np.float32))
    for a, e in zip(actual, exact(dy.astype(np.float32)), strict=True):
        assert cases.error(a, e) <= FP8


@implementations
def test_grouped_linear(implementation: str) -> None:
    x, w, dy = _operands(len(SIZES), jnp.float32)
    sizes = jnp.asarray(SIZES, jnp.int32)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return deep_gemm.fp8_grouped_linear(x, w, sizes, implementation=implementation)

    y, dx, dw = _pull(function, x, w)(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = [np.zeros(a.shape, np.float32) for a in (y, dx, dw)]
    for g, rows in enumerate(_slices()):
        if rows.start != rows.stop:
            by_hand = _by_hand(x[rows], w[g], dy[rows], "float32")
            expected[0][rows], expected[1][rows], expected[2][g] = by_hand
    for a, e in zip((y, dx, dw), expected, strict=True):
        assert cases.error(a, e) <= (2e-4 if a.dtype == jnp.float32 else 2e-3)
    assert not np.asarray(y[sum(SIZES) :]).any()
    assert not np.asarray(dx[sum(SIZES) :]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_bf16_grouped_gemm(dtype: Any) -> None:
    x, w, dy = _operands(len(SIZES), dtype)
    x, dy = x.astype(dtype), dy.astype(dtype)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return deep_gemm.bf16_grouped_gemm(x, w, jnp.asarray(SIZES, jnp.int32))

    actual = _pull(function, x, w)(dy)
    assert [a.dtype for a in actual] == [dtype] * 3
    used = slice(0, sum(SIZES))
    clean = [np.zeros(a.shape, np.float32) for a in (x, dy)]
    clean[0][used], clean[1][used] = x[used], dy[used]
    exact = functools.partial(reference.grouped_linear, group_sizes=SIZES)
    expected = _pull(exact, clean[0], w.astype(np.float32))(clean[1])
    for a, e in zip(actual, expected, strict=True):
        assert cases.error(a, e) <= BF16


@pytest.mark.parametrize("name", ["gemm", "wgrad"])
def test_ragged_dot_agrees_with_tiles(name: str) -> None:
    """What GPUs run for `bf16_grouped_gemm`, run here."""
    x, w, dy = (jnp.asarray(a) for a in _operands(len(SIZES), jnp.bfloat16))
    sizes = jnp.asarray(SIZES, jnp.int32)
    if name == "gemm":
        tiles, ragged = xla.bf16_grouped_gemm(x, w, sizes), xla.ragged_dot(x, w, sizes)
    else:
        tiles, ragged = xla.bf16_grouped_wgrad(dy, x, sizes), xla.ragged_wgrad(dy, x, sizes)
    assert cases.error(ragged, tiles) <= 1e-5


@pytest.mark.parametrize("shape", [(0, 8), (2, 3, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x, w = jnp.ones(shape, jnp.bfloat16), jnp.ones((16, shape[-1]), jnp.float32)
    y, pullback = jax.vjp(deep_gemm.fp8_linear, x, w)
    dx, dw = pullback(jnp.ones_like(y))
    assert (y.shape, dx.shape, dw.shape) == ((*shape[:-1], 16), shape, w.shape)
    assert not y.any() and not dw.any()


@pytest.mark.parametrize("leading", [(), (1,), (2, 5), (0,)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    x = jnp.asarray(cases.random(cases.normal, (*leading, 48), 1))
    w = jnp.asarray(cases.random(cases.normal, (24, 48), 2))
    rows = x.reshape(-1, 48)

    def loss(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = deep_gemm.fp8_linear(x, w, implementation="xla")
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (dx, dw), y = grad(x, w)
    (dx_rows, dw_rows), y_rows = grad(rows, w)
    assert (y.shape, dx.shape) == ((*leading, 24), x.shape)
    np.testing.assert_array_equal(y.reshape(y_rows.shape), y_rows)
    np.testing.assert_array_equal(dx.reshape(rows.shape), dx_rows)
    np.testing.assert_array_equal(dw, dw_rows)


def _linear(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: str) -> jax.Array:
    return deep_gemm.fp8_linear(x, w[0], implementation=implementation)


def _grouped(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: str) -> jax.Array:
    return deep_gemm.fp8_grouped_linear(x, w, sizes, implementation=implementation)


def _bf16(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: str) -> jax.Array:
    return deep_gemm.bf16_grouped_gemm(x, w, sizes, implementation="xla")


LAYERS = {"fp8_linear": _linear, "fp8_grouped_linear": _grouped, "bf16_grouped_gemm": _bf16}
layers = pytest.mark.parametrize("name", LAYERS)


def _loss(name: str, implementation: str) -> Callable[..., jax.Array]:
    def loss(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        y = LAYERS[name](x, w, sizes, implementation)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    return loss


def _pair() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two batches of rows and group sizes for one set of weights."""
    x = jnp.asarray(cases.random(cases.normal, (2, 40, 48), 1))
    w = jnp.asarray(cases.random(cases.normal, (2, 40, 48), 2, jnp.float32)) / 8
    return x, w, jnp.asarray([[3, 30], [0, 40]], jnp.int32)


@functools.cache
def _one_by_one(name: str, implementation: str) -> tuple[np.ndarray, np.ndarray]:
    """dx and dw of each batch of `_pair`, by itself."""
    x, w, sizes = _pair()
    grad = jax.jit(jax.grad(_loss(name, implementation), (0, 1)))
    results = [grad(x[i], w, sizes[i]) for i in range(2)]
    return tuple(np.stack([np.asarray(r[j], np.float32) for r in results]) for j in range(2))


@implementations
@layers
@pytest.mark.parametrize("shared", [True, False], ids=["shared-w", "own-w"])
def test_gradient_under_vmap(name: str, shared: bool, implementation: str) -> None:
    x, w, sizes = _pair()
    grad = jax.grad(_loss(name, implementation), (0, 1))
    if shared:
        actual = jax.jit(jax.vmap(grad, in_axes=(0, None, 0)))(x, w, sizes)
    else:
        actual = jax.jit(jax.vmap(grad))(x, jnp.stack([w, w]), sizes)
    for a, e in zip(actual, _one_by_one(name, implementation), strict=True):
        assert cases.error(a, e) <= 2e-3


@implementations
@layers
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no-vma"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradient_under_shard_map(
    name: str, kind: AxisType, check_vma: bool, implementation: str
) -> None:
    """Rows differ between devices and weights do not: their gradient is the sum."""
    devices = min(2, jax.device_count())  # a machine with one GPU takes the first half
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
    x, w, sizes = _pair()
    x, sizes = x[:devices], sizes[:devices]

    def per_device(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.psum(_loss(name, implementation)(x[0], w, sizes[0]), "data")

    loss = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    placed = (
        jax.device_put(x, NamedSharding(mesh, P("data"))),
        jax.device_put(w, NamedSharding(mesh, P())),
        jax.device_put(sizes, NamedSharding(mesh, P("data"))),
    )
    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(*placed)
    expected_dx, expected_dw = _one_by_one(name, implementation)
    assert cases.error(dx, expected_dx[:devices]) <= 2e-3
    assert cases.error(dw, expected_dw[:devices].sum(0)) <= 2e-3


@implementations
@layers
def test_gradient_under_scan_and_remat(name: str, implementation: str) -> None:
    x, w, sizes = _pair()

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        @jax.checkpoint
        def step(total: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + _loss(name, implementation)(batch[0], w, batch[1]), None

        return jax.lax.scan(step, jnp.float32(0), (x, sizes))[0]

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    expected_dx, expected_dw = _one_by_one(name, implementation)
    assert cases.error(dx, expected_dx) <= 2e-3
    assert cases.error(dw, expected_dw.sum(0)) <= 2e-3


def test_residuals_are_quantized() -> None:
    """What the docstring says is saved: x along tokens and w transposed, one byte a value."""
    x, w, _ = _operands(None, jnp.bfloat16)
    _, res = jax.eval_shape(
        lambda x, w: vjp._linear_fwd(x, w, None, "float32", "xla"), jnp.asarray(x), jnp.asarray(w)
    )
    padded = 256
    sizes = {"x": K * padded * (1 + 4 / 128), "w": N * K + 4 * 2 * 3}
    saved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(res))
    assert saved == sum(sizes.values())


@implementations
def test_second_order_is_refused(implementation: str) -> None:
    def loss(x: jax.Array) -> jax.Array:
        y = deep_gemm.fp8_linear(x, jnp.ones((8, 16)), implementation=implementation)
        return jnp.sum(y**2)

    with pytest.raises(TypeError, match="not differentiable, a cotangent cannot cross FP8 values"):
        jax.hessian(loss)(jnp.ones((1, 16)))
