"""Every implementation of `flash_mla` against the equations: values, gradients, transformations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import flash_mla
from jax_ds.flash_mla import reference
from jax_ds.flash_mla.config import PrefillOperands
from jax_ds.flash_mla.ffi import prefill_unsupported
from tests.flash_mla import cases
from tests.flash_mla.cases import DecodeCase, PrefillCase

Array = jax.Array

IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name
    for name in cases.IMPLEMENTATIONS
]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
prefill_implementations = pytest.mark.parametrize(
    "implementation", ("xla", pytest.param("cuda", marks=pytest.mark.gpu))
)
decode_cases = pytest.mark.parametrize("case", cases.DECODE_CASES, ids=str)
prefill_cases = pytest.mark.parametrize("case", cases.PREFILL_CASES, ids=str)

APPEND_LENGTHS = (0, 1, 2, 64, 65, 130)


def _mesh() -> jax.sharding.Mesh:
    """Two devices, or the one GPU that there is."""
    return jax.make_mesh((min(2, jax.device_count()),), ("data",), axis_types=(AxisType.Auto,))


def _check(
    function: Callable[..., Any],
    ground: Callable[..., Any],
    operands: tuple[Array, ...],
    *,
    gradients: bool,
) -> None:
    """Compares `(out, lse)` and the gradients of the operands with those of the equation."""
    rng = np.random.default_rng(7)
    out, lse = jax.eval_shape(function, *operands)
    dtype = operands[0].dtype
    assert out.dtype == dtype and lse.dtype == jnp.float32
    dout = jnp.asarray(rng.standard_normal(out.shape), dtype)
    dlse = jnp.asarray(rng.standard_normal(lse.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(function: Callable[..., Any], empty_rows: float, *operands: Array) -> Any:
        (out, lse), pullback = jax.vjp(function, *operands)
        empty = lse == -jnp.inf
        cotangents = (
            jnp.where(empty[..., None], empty_rows, dout.astype(out.dtype)).astype(out.dtype),
            jnp.where(empty, empty_rows, dlse),
        )
        return out, lse, pullback(cotangents)

    # A NaN that comes back to a row without any key must not spread.
    out, lse, actual = run(function, float("nan"), *operands)
    exact = (x.astype(jnp.float32) for x in operands)
    expected_out, expected_lse, expected = run(ground, 0.0, *exact)
    cases.assert_close("out", out, expected_out, cases.value_tolerance(dtype))
    cases.assert_lse_close(lse, expected_lse)
    if gradients:
        tolerance = cases.gradient_tolerance(dtype)
        for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert a.dtype == dtype
            cases.assert_close(f"gradient {position}", a, e, tolerance)


@implementations
@decode_cases
def test_decode(case: DecodeCase, implementation: str) -> None:
    q, kv_pages, page_table, seq_lens = cases.decode_inputs(case)

    def function(q: Array, pages: Array) -> Any:
        static = {**case.static, "return_lse": True, "implementation": implementation}
        return flash_mla.decode(q, pages, page_table, seq_lens, **static)

    def ground(q: Array, pages: Array) -> Any:
        return reference.decode(q, pages, page_table, seq_lens, **case.static)

    # The gradient of a saturated softmax is rounding noise.
    _check(function, ground, (q, kv_pages), gradients=case.spread == 1)


@implementations
def test_a_live_nan_shows(implementation: str) -> None:
    case = cases.DECODE_CASES[0]
    q, kv_pages, page_table, seq_lens = cases.decode_inputs(case)
    kv_pages = kv_pages.at[page_table[5, 1], 3].set(jnp.nan)
    out, lse = flash_mla.decode(
        q, kv_pages, page_table, seq_lens, return_lse=True, implementation=implementation
    )
    assert jnp.isnan(out[5]).all() and jnp.isnan(lse[5]).all()
    assert not jnp.isnan(out[:5]).any() and not jnp.isnan(lse[:5]).any()


@implementations
@pytest.mark.parametrize("case", (cases.DECODE_CASES[1], cases.DECODE_CASES[2]), ids=str)
def test_decode_vmap(case: DecodeCase, implementation: str) -> None:
    q, kv_pages, page_table, seq_lens = cases.decode_inputs(case)

    def loss(q: Array, pages: Array, table: Array, lengths: Array) -> Any:
        static = {**case.static, "return_lse": True, "implementation": implementation}
        out, lse = flash_mla.decode(q, pages, table, lengths, **static)
        weights = jnp.cos(jnp.arange(out.shape[-1], dtype=jnp.float32))
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return (out.astype(jnp.float32) @ weights).sum() + finite.sum()

    both = jax.value_and_grad(loss, (0, 1))
    halves = [x.reshape(2, x.shape[0] // 2, *x.shape[1:]) for x in (q, page_table, seq_lens)]
    value, (dq, dpages) = jax.jit(jax.vmap(both, (0, None, 0, 0)))(
        halves[0], kv_pages, halves[1], halves[2]
    )
    whole, (whole_dq, whole_dpages) = jax.jit(both)(q, kv_pages, page_table, seq_lens)
    np.testing.assert_allclose(value.sum(), whole, rtol=1e-4)
    cases.assert_close("dq", dq.reshape(q.shape), whole_dq, 1e-3)
    total = dpages.astype(jnp.float32).sum(axis=0)
    cases.assert_close("dkv_pages", total, whole_dpages, cases.gradient_tolerance(q.dtype))


@implementations
@pytest.mark.parametrize("check_vma", (True, False))
def test_decode_in_shard_map(check_vma: bool, implementation: str) -> None:
    case = cases.DECODE_CASES[5]
    q, kv_pages, page_table, seq_lens = cases.decode_inputs(case)

    def function(q: Array, pages: Array, table: Array, lengths: Array) -> Any:
        return flash_mla.decode(
            q, pages, table, lengths, **case.static, implementation=implementation
        )

    sharded = jax.shard_map(
        function,
        mesh=_mesh(),
        in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    # Both devices read the shared pages: their gradients must be summed over the mesh.
    results = []
    for f in (sharded, function):

        @jax.jit
        def both(q: Array, pages: Array, f: Callable[..., Array] = f) -> Any:
            out, pullback = jax.vjp(lambda q, pages: f(q, pages, page_table, seq_lens), q, pages)
            cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype)
            return out, *pullback(cotangent)

        results.append(both(q, kv_pages))
    for name, a, e in zip(("out", "dq", "dkv_pages"), *results, strict=True):
        cases.assert_close(name, a, e, 3e-3)


def _append_inputs(dtype: Any) -> tuple[Array, Array, Array, Array]:
    case = DecodeCase("append", APPEND_LENGTHS, tokens=3, width=576, dtype=dtype)
    x = cases.decode_inputs(case)
    kv = np.random.default_rng(3).standard_normal((len(APPEND_LENGTHS), 3, 576))
    return x.kv_pages, jnp.asarray(kv, dtype), x.page_table, x.seq_lens


@implementations
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_append(dtype: Any, implementation: str) -> None:
    kv_pages, kv, page_table, seq_lens = _append_inputs(dtype)
    actual = flash_mla.append(kv_pages, kv, page_table, seq_lens, implementation=implementation)
    expected = reference.append(kv_pages, kv, page_table, seq_lens)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))


@implementations
def test_append_drops_what_has_no_slot(implementation: str) -> None:
    kv_pages = jnp.zeros((4, 64, 576), jnp.bfloat16)
    row = jnp.arange(1, 16, dtype=jnp.bfloat16).reshape(5, 3, 1)
    kv = jnp.broadcast_to(row, (5, 3, 576))
    # No spare column: a position before the first must not wrap to the last page, nor page -1.
    page_table = jnp.array([[1], [2], [-1], [4], [3]], jnp.int32)
    seq_lens = jnp.array([1, 0, 5, 5, 66], jnp.int32)
    out = flash_mla.append(kv_pages, kv, page_table, seq_lens, implementation=implementation)
    # Of the last sequence's positions 63 to 65, the table reaches only the first.
    expected = kv_pages.at[1, 0].set(kv[0, 2]).at[3, 63].set(kv[4, 0])
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected, np.float32))


@implementations
def test_append_gradient(implementation: str) -> None:
    kv_pages, kv, page_table, seq_lens = _append_inputs(jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(4).standard_normal(kv_pages.shape), jnp.float32)

    def gradients(append: Callable[..., Array]) -> Any:
        def pull(pages: Array, kv: Array) -> Any:
            return jax.vjp(lambda p, k: append(p, k, page_table, seq_lens), pages, kv)[1](cotangent)

        return jax.jit(pull)(kv_pages, kv)

    actual = gradients(lambda *x: flash_mla.append(*x, implementation=implementation))
    for a, e in zip(actual, gradients(reference.append), strict=True):
        np.testing.assert_array_equal(a, e)


@implementations
def test_append_vmap(implementation: str) -> None:
    kv_pages, kv, page_table, seq_lens = _append_inputs(jnp.float32)

    def append(pages: Array, kv: Array) -> Array:
        return flash_mla.append(pages, kv, page_table, seq_lens, implementation=implementation)

    stacked = jax.vmap(append)(jnp.stack([kv_pages, 2 * kv_pages]), jnp.stack([kv, 3 * kv]))
    np.testing.assert_array_equal(stacked[0], append(kv_pages, kv))
    np.testing.assert_array_equal(stacked[1], append(2 * kv_pages, 3 * kv))


@implementations
@pytest.mark.parametrize("check_vma", (True, False))
def test_append_in_shard_map(check_vma: bool, implementation: str) -> None:
    kv_pages, kv, page_table, seq_lens = _append_inputs(jnp.float32)
    doubled = [jnp.concatenate([x, x]) for x in (kv_pages, kv, page_table, seq_lens)]

    def append(*operands: Array) -> Array:
        return flash_mla.append(*operands, implementation=implementation)

    sharded = jax.shard_map(
        append, mesh=_mesh(), in_specs=(P("data"),) * 4, out_specs=P("data"), check_vma=check_vma
    )
    expected = append(kv_pages, kv, page_table, seq_lens)
    np.testing.assert_array_equal(jax.jit(sharded)(*doubled), jnp.concatenate([expected] * 2))


@prefill_implementations
@prefill_cases
def test_prefill(case: PrefillCase, implementation: str) -> None:
    q, k, v, k_rope, *offsets = cases.prefill_inputs(case)
    given = PrefillOperands(q, k, v, k_rope, *offsets)
    if implementation == "cuda" and (reason := prefill_unsupported(given)):
        pytest.skip(reason)

    def function(*heads: Array) -> Any:
        static = {"causal": case.causal, "return_lse": True, "implementation": implementation}
        return flash_mla.prefill(*(*heads, None)[:4], *offsets, **static)

    def ground(*heads: Array) -> Any:
        return reference.prefill(*(*heads, None)[:4], *offsets, causal=case.causal)

    operands = (q, k, v) if k_rope is None else (q, k, v, k_rope)
    _check(function, ground, operands, gradients=case.spread == 1)


def _prefill_loss(implementation: str) -> Callable[..., Any]:
    def loss(q: Array, k: Array, v: Array, k_rope: Array) -> Any:
        out, lse = flash_mla.prefill(
            q, k, v, k_rope, return_lse=True, implementation=implementation
        )
        weights = jnp.cos(jnp.arange(out.shape[-1], dtype=jnp.float32))
        return (out.astype(jnp.float32) @ weights).sum() + lse.sum()

    return loss


@functools.cache
def _prefill_whole(implementation: str) -> tuple[tuple[Array, ...], Array, tuple[Array, ...]]:
    """Operands, and what `_prefill_loss` and its gradient are without any transformation."""
    operands = cases.prefill_inputs(cases.PREFILL_CASES[1])[:4]
    function = jax.jit(jax.value_and_grad(_prefill_loss(implementation), (0, 1, 2, 3)))
    return operands, *function(*operands)


@prefill_implementations
def test_prefill_vmap(implementation: str) -> None:
    operands, whole, expected = _prefill_whole(implementation)
    function = jax.vmap(jax.value_and_grad(_prefill_loss(implementation), (0, 1, 2, 3)))
    value, gradients = jax.jit(function)(*(x[:, None] for x in operands))
    np.testing.assert_allclose(value.sum(), whole, rtol=1e-5)
    for a, e in zip(gradients, expected, strict=True):
        cases.assert_close("gradient", a[:, 0], e, 1e-3)


@prefill_implementations
@pytest.mark.parametrize(
    ("over", "check_vma"), (("batch", True), ("batch", False), ("heads", True))
)
def test_prefill_in_shard_map(over: str, check_vma: bool, implementation: str) -> None:
    operands, whole, expected = _prefill_whole(implementation)
    loss = _prefill_loss(implementation)
    axis = P("data") if over == "batch" else P(None, None, "data")
    # Over heads, k_rope is the same on both devices: its gradient is their sum.
    specs = (axis, axis, axis, axis if over == "batch" else P())
    sharded = jax.shard_map(
        lambda *x: loss(*x)[None],
        mesh=_mesh(),
        in_specs=specs,
        out_specs=P("data"),
        check_vma=check_vma,
    )
    function = jax.value_and_grad(lambda *x: sharded(*x).sum(), (0, 1, 2, 3))
    value, gradients = jax.jit(function)(*operands)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    for a, e in zip(gradients, expected, strict=True):
        cases.assert_close("gradient", a, e, 3e-3)
