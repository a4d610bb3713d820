"""Prefill's kernels on the GPU: sizes that end inside a tile, packed batches, the same bits every
time, captured graphs, gradients against finite differences."""

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jax_ds import flash_mla
from jax_ds.flash_mla import reference
from tests.flash_mla import cases
from tests.flash_mla.cases import PrefillCase, PrefillInputs

pytestmark = pytest.mark.gpu

Array = jax.Array

HEADS = {"192/128": (192, 128, 0), "shared rope": (192, 128, 64), "64/64": (64, 64, 0)}
HEADS["128/128"] = (128, 128, 0)


def _case(name: str, batch: int, queries: int, keys: int, **rest: Any) -> PrefillCase:
    width, value_dim, rope = HEADS[rest.pop("sizes", "shared rope")]
    return PrefillCase(
        name, batch, queries, keys, width=width, value_dim=value_dim, rope=rope, **rest
    )


LENGTHS = (1, 2, 63, 65, 127, 128, 129, 300, 1000, 4097, 16384)
EDGES = tuple(
    _case(f"{sizes} {length}", 1, length, length, sizes=sizes)
    for i, length in enumerate(LENGTHS)
    for sizes in (HEADS if 63 <= length <= 1000 else [list(HEADS)[i % 4]])
)
SHAPES = (
    _case("one query, long past", 3, 1, 4097),
    _case("chunk on a past", 2, 129, 1000, sizes="192/128"),
    _case("full, more queries", 2, 300, 65, causal=False),
    _case("full, more keys", 1, 65, 1000, causal=False, sizes="128/128"),
    _case("blind rows", 2, 500, 77, heads=3),
    _case("all heads share", 2, 200, 200, heads=12, kv_heads=1, sizes="64/64"),
    _case("groups of three", 1, 333, 333, heads=6, kv_heads=2, sizes="128/128"),
    _case("many tiles", 2, 600, 600, heads=128),
    _case("many tiles, full", 3, 400, 400, heads=96, causal=False, sizes="192/128"),
    _case("large logits", 1, 200, 200, spread=1e3),
)

_RNG = np.random.default_rng(11)
_RAGGED = tuple((int(n), int(n)) for n in _RNG.integers(1, 700, 9))
_BOTH = tuple((int(a), int(b)) for a, b in _RNG.integers(0, 400, (12, 2)))
PACKED = (
    _case("ragged", 1, 5000, 5000, packed=_RAGGED),
    _case(
        "ragged, 64/64, groups", 1, 5000, 5000, packed=_RAGGED, heads=4, kv_heads=2, sizes="64/64"
    ),
    _case("queries and keys differ", 1, 4000, 4500, packed=_BOTH, sizes="192/128"),
    _case("queries and keys differ, full", 1, 4000, 4500, packed=_BOTH, causal=False),
    _case("one token each", 1, 2000, 2000, packed=((1, 1),) * 1999, sizes="128/128"),
    _case("no sequence has keys", 1, 300, 300, packed=((100, 0),) * 2),
    _case("no sequence has queries", 1, 300, 300, packed=((0, 150),) * 2, sizes="192/128"),
    _case("exact tiles", 1, 1024, 1024, packed=((128, 128), (256, 256), (640, 640))),
    _case("one among short ones", 1, 3000, 3000, packed=(*((9, 9),) * 60, (2000, 2000), (3, 3))),
    _case("more sequences than threads", 1, 4096, 4096, packed=((0, 0), (2, 2), (0, 3)) * 800),
    _case("many heads", 1, 2000, 2000, packed=((700, 700), (1, 1), (900, 1200)), heads=64),
)
CASES = (*EDGES, *SHAPES, *PACKED)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    implementation: str, case: PrefillCase, inputs: PrefillInputs, dout: Any, dlse: Any
) -> Any:
    """out, lse and gradients; the cotangents of rows without any key are NaN, which must not
    spread."""
    q, k, v, k_rope, *offsets = inputs
    operands = (q, k, v) if k_rope is None else (q, k, v, k_rope)

    def function(*heads: Array) -> Any:
        static = {"causal": case.causal, "return_lse": True, "implementation": implementation}
        return flash_mla.prefill(*(*heads, None)[:4], *offsets, **static)

    (out, lse), pullback = jax.vjp(function, *operands)
    empty = jnp.nan if implementation == "cuda" else 0.0
    dout = jnp.where(jnp.isneginf(lse)[..., None], empty, dout.astype(out.dtype)).astype(out.dtype)
    return out, lse, pullback((dout, jnp.where(jnp.isneginf(lse), empty, dlse)))


def _cotangents(case: PrefillCase) -> tuple[Array, Array]:
    rng = np.random.default_rng(5)
    rows = (case.batch, case.queries, case.heads)
    dout = jnp.asarray(rng.standard_normal((*rows, case.value_dim)), case.dtype)
    return dout, jnp.asarray(rng.standard_normal(rows), jnp.float32)


def _compare(case: PrefillCase, inputs: PrefillInputs) -> None:
    cotangents = _cotangents(case)
    out, lse, gradients = _run("cuda", case, inputs, *cotangents)
    # The equation keeps every score; the portable path in float32 is compared with it elsewhere.
    exact = PrefillInputs(
        *(x.astype(jnp.float32) if x is not None and x.dtype == jnp.bfloat16 else x for x in inputs)
    )
    with jax.default_matmul_precision("highest"):
        expected_out, expected_lse, expected = _run("xla", case, exact, *cotangents)
    cases.assert_close("out", out, expected_out, cases.value_tolerance(case.dtype))
    cases.assert_lse_close(lse, expected_lse)
    if case.spread > 1:
        return  # the gradient of a saturated softmax is rounding noise
    # With so few tokens a head's gradient is one product of rounded numbers; errors do not average.
    tolerance = cases.gradient_tolerance(case.dtype) * (2 if case.queries < 4 else 1)
    for name, a, e in zip(("q", "k", "v", "k_rope"), gradients, expected, strict=False):
        if np.any(np.asarray(e)):
            cases.assert_close(f"d{name}", a, e, tolerance)
        else:
            assert not np.any(np.asarray(a, np.float32)), f"d{name} must be zero"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float32(case: PrefillCase) -> None:
    _compare(case, cases.prefill_inputs(case))


@pytest.mark.parametrize("first, last", ((60.0, -60.0), (-60.0, 60.0), (-200.0, -200.0)))
def test_logits_that_drift(first: float, last: float) -> None:
    """Keys are walked from the last to the first: maxima move at every block, at none, from far
    below zero."""
    case = _case("drift", 1, 900, 900, sizes="192/128")
    q, k, v, *_ = cases.prefill_inputs(case)
    drift = jnp.linspace(first, last, case.keys, dtype=k.dtype)
    q = q.at[..., 0].set(case.width**0.5)
    k = k.at[..., 0].set(drift[:, None])
    inputs = PrefillInputs(q, k, v, None, None, None)
    out, lse, _ = _run("cuda", case, inputs, *_cotangents(case))
    exact = PrefillInputs(*(None if x is None else x.astype(jnp.float32) for x in inputs))
    with jax.default_matmul_precision("highest"):
        expected_out, expected_lse, _ = _run("xla", case, exact, *_cotangents(case))
    cases.assert_close("out", out, expected_out, cases.value_tolerance(case.dtype))
    cases.assert_lse_close(lse, expected_lse)


# One program for all: only the offsets differ.
_lengths = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(0, 150), _lengths)
def test_any_offsets(first_q: int, first_k: int, lengths: list[tuple[int, int]]) -> None:
    """Padding on both sides holds NaN."""
    case = _case("any offsets", 1, 700, 800)
    offsets = np.minimum(np.cumsum([(first_q, first_k), *lengths], axis=0), (700, 800))
    q, k, v, k_rope, *_ = (None if x is None else np.array(x) for x in cases.prefill_inputs(case))
    for x, ends in ((q, offsets[:, 0]), *((x, offsets[:, 1]) for x in (k, v, k_rope))):
        assert x is not None
        x[:, : ends[0]] = x[:, ends[-1] :] = np.nan
    cu = [jnp.asarray(offsets[:, i], jnp.int32) for i in range(2)]
    _compare(case, PrefillInputs(*map(jnp.asarray, (q, k, v, k_rope)), *cu))


def test_offsets_that_break_the_rules_do_no_harm() -> None:
    """They give nonsense, but touch no memory of others and end."""
    case = _case("rules", 1, 700, 800)
    inputs, cotangents = cases.prefill_inputs(case), _cotangents(case)
    good = jnp.asarray([0, 100, 300, 700], jnp.int32)
    for bad in ([600, 5, 650, 2], [-(2**31), 2**31 - 1, -7, 10**6], [700, 700, 0, 0]):
        for ways in ((bad, good), (good, bad), (bad, bad)):
            cu = [jnp.asarray(x, jnp.int32) for x in ways]
            jax.block_until_ready(_run("cuda", case, PrefillInputs(*inputs[:4], *cu), *cotangents))
    _compare(case, PrefillInputs(*inputs[:4], good, good))


@pytest.mark.parametrize(
    "case", (SHAPES[7], PACKED[0], _case("one head", 1, 2500, 2500, heads=1)), ids=str
)
def test_the_same_bits_every_time(case: PrefillCase) -> None:
    """Tiles are drawn by whoever comes first; no sum depends on it."""
    inputs, cotangents = cases.prefill_inputs(case), _cotangents(case)
    first = jax.tree.map(np.asarray, _run("cuda", case, inputs, *cotangents))
    for _ in range(5):
        again = _run("cuda", case, inputs, *cotangents)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            assert a.tobytes() == np.asarray(b).tobytes()


def _offsets(*lengths: int) -> Array:
    return jnp.asarray(np.append(5, 5 + np.cumsum(lengths)), jnp.int32)


@pytest.mark.parametrize("packed", (False, True))
def test_new_data_in_a_replayed_graph(packed: bool) -> None:
    """Counters and lists are made anew in every replay: nothing of them is in the graph."""
    case = _case("graph", 1, 700, 700)

    def step(inputs: PrefillInputs, dout: Array, dlse: Array) -> Any:
        return _run("cuda", case, inputs, dout, dlse)

    ways = (_offsets(300, 1, 390), _offsets(0, 690, 0), _offsets(1, 2, 3), _offsets(128, 128, 400))
    given = [
        cases.prefill_inputs(case, seed)._replace(
            cu_seqlens_q=way if packed else None, cu_seqlens_k=way if packed else None
        )
        for seed, way in enumerate(ways)
    ]
    cotangents = _cotangents(case)
    graph = {"xla_gpu_graph_min_graph_size": 1}
    compiled = jax.jit(step).lower(given[0], *cotangents).compile(compiler_options=graph)
    for inputs in (*given, *reversed(given)):
        expected = _run("cuda", case, inputs, *cotangents)
        for a, b in zip(
            jax.tree.leaves(compiled(inputs, *cotangents)), jax.tree.leaves(expected), strict=True
        ):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("case", (_case("", 1, 7, 9), _case("", 1, 70, 70, sizes="128/128")))
def test_gradient_against_finite_differences(case: PrefillCase) -> None:
    """Along random directions, of the equation in float64: no derivative formula is shared."""
    q, k, v, k_rope, *_ = cases.prefill_inputs(case)
    operands = [x for x in (q, k, v, k_rope) if x is not None]
    dout, dlse = _cotangents(case)
    _, _, gradients = _run("cuda", case, PrefillInputs(q, k, v, k_rope, None, None), dout, dlse)
    rng = np.random.default_rng(9)

    def loss(*heads: np.ndarray) -> Any:
        with jax.enable_x64(True):
            out, lse = reference.prefill(*(jnp.asarray(x) for x in heads))
            return float(
                (out * np.asarray(dout, float)).sum() + (lse * np.asarray(dlse, float)).sum()
            )

    exact = [np.asarray(x, np.float64) for x in operands]
    for position, gradient in enumerate(gradients):
        direction = rng.standard_normal(exact[position].shape)
        step = 1e-4
        moved = [
            loss(
                *(x + sign * step * direction if i == position else x for i, x in enumerate(exact))
            )
            for sign in (1, -1)
        ]
        difference = (moved[0] - moved[1]) / (2 * step)
        along = (np.asarray(gradient, np.float64) * direction).sum()
        size = np.linalg.norm(np.asarray(gradient, np.float64))
        # Errors of the gradient are independent of the direction, whose elements have size one.
        assert abs(along - difference) <= 5 * cases.gradient_tolerance(case.dtype) * size


def test_remat_in_scan() -> None:
    case = _case("scan", 2, 150, 150)
    q, k, v, k_rope, *_ = cases.prefill_inputs(case)
    assert k_rope is not None

    def loss(implementation: str, q: Array, k: Array, v: Array, k_rope: Array) -> Array:
        @jax.checkpoint
        def layer(x: Array, _: None) -> tuple[Array, None]:
            out = flash_mla.prefill(x, k, v, k_rope, implementation=implementation)
            return x.at[..., :128].add(0.5 * out), None

        x, _ = jax.lax.scan(layer, q, None, length=3)
        return jnp.square(x.astype(jnp.float32)).mean()

    run = jax.jit(jax.value_and_grad(loss, (1, 2, 3, 4)), static_argnums=0)
    value, gradients = run("cuda", q, k, v, k_rope)
    expected_value, expected = run("xla", q, k, v, k_rope)
    np.testing.assert_allclose(value, expected_value, rtol=1e-3)
    for a, e in zip(gradients, expected, strict=True):
        cases.assert_close("gradient", a, e, 2e-2)


def test_vmap_of_packed_batches() -> None:
    case = _case("vmap", 1, 300, 300)
    q, k, v, k_rope, *_ = cases.prefill_inputs(case)
    ways = jnp.stack([_offsets(100, 150), _offsets(0, 295)])

    def one(q: Array, offsets: Array) -> Any:
        return flash_mla.prefill(q, k, v, k_rope, offsets, offsets, implementation="cuda")

    both = jax.jit(jax.vmap(one))(jnp.stack([q, 2 * q]), ways)
    for i, factor in enumerate((1, 2)):
        alone = one(factor * q, ways[i])
        np.testing.assert_array_equal(
            np.asarray(both[i], np.float32), np.asarray(alone, np.float32)
        )
