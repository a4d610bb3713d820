"""The layer, values and gradients, against the dense float32 sum over all experts."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from jax_ds import deep_ep, quantization
from jax_ds.moe import MoEParams, MoEStats, group_limited_topk, moe_layer, reference
from tests.moe import cases
from tests.moe.cases import CASES, Inputs, MoECase

# Relative Frobenius errors; FP8 keeps 3 bits of every factor.
TOLERANCE = {"fp8": 0.08, "bf16": 0.01}


def _place(case: MoECase, mesh: Any, inputs: Inputs) -> Inputs:
    """Inputs on the mesh: tokens and experts split, the rest everywhere."""
    tokens = jax.P(case.axis_name)
    specs = Inputs(tokens, cases.param_specs(case, inputs.params), tokens)
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), inputs, specs)


def _sharded(
    case: MoECase, mesh: Any, function: Any, params: MoEParams, out: Any, **vma: Any
) -> Any:
    """`function(x, params)` per device, over the whole arrays."""
    tokens = jax.P(case.axis_name)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(tokens, cases.param_specs(case, params)),
        out_specs=out,
        **vma,
    )


def _layer(case: MoECase, x: Any, params: MoEParams, **keywords: Any) -> tuple[Any, MoEStats]:
    y, stats = moe_layer(x, params, **case.layer, **keywords)
    return y, jax.lax.psum(stats, case.axis_name)


def _reference(case: MoECase, x: Any, params: MoEParams, ids: Any = None) -> Any:
    x = x.astype(jnp.float32)
    logits = x @ params.router.T
    chosen, weights = reference.group_limited_topk(logits, params.bias, **case.gating)
    experts = params.gate_up, params.down, params.shared_gate_up, params.shared_down
    return reference.moe_layer(x, weights, chosen if ids is None else ids, *experts)


def _reference_vjp(case: MoECase, host: Inputs) -> Any:
    @jax.jit
    def run(x: Any, params: MoEParams, cotangent: Any) -> Any:
        y, vjp = jax.vjp(functools.partial(_reference, case), x, params)
        return y, vjp(cotangent)

    return run(*_float32(host))


def _error(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.isfinite(ours).all()
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("case", "implementation"),
    [pytest.param(case, "xla", id=f"{case}, xla") for case in CASES]
    # Where there is one GPU: the exchange between several has tests of its own.
    + [
        pytest.param(case, "cuda", id=f"{case}, cuda", marks=pytest.mark.gpu)
        for case in CASES
        if case.mesh == (1,)
    ],
)
def test_values_and_gradients(case: MoECase, implementation: str) -> None:
    """The loss is outside shard_map: gradients of replicated parameters are summed by JAX."""
    host = cases.inputs(case)
    mesh = cases.make_mesh(case)
    x, params, cotangent = _place(case, mesh, host)
    layer = _sharded(
        case,
        mesh,
        functools.partial(_layer, case, implementation=implementation),
        params,
        (jax.P(case.axis_name), jax.P()),
    )

    @jax.jit
    def run(x: Any, params: MoEParams, cotangent: Any) -> Any:
        (y, stats), vjp = jax.vjp(layer, x, params)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, jax.dtypes.float0), stats)
        return y, stats, vjp((cotangent, zeros))

    y, stats, (dx, d_params) = run(x, params, cotangent)
    expected, (expected_dx, expected_d) = _reference_vjp(case, host)
    tolerance = TOLERANCE[case.precision]
    assert _error(y, expected) < tolerance
    ids, _ = reference.group_limited_topk(
        host.x.astype(jnp.float32) @ host.params.router.T,
        jnp.asarray(host.params.bias),
        **case.gating,
    )
    np.testing.assert_array_equal(stats.load, np.bincount(ids.ravel(), minlength=case.experts))
    assert stats.num_dropped == 0

    assert _error(dx, expected_dx) < 1.5 * tolerance
    for name, theirs in expected_d._asdict().items():
        ours = getattr(d_params, name)
        if name == "bias":
            np.testing.assert_array_equal(ours, 0)
        elif theirs is not None:
            assert ours.dtype == jnp.float32
            assert _error(ours, theirs) < 1.5 * tolerance, name


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@pytest.mark.parametrize(
    ("axis_type", "check_vma"), [(AxisType.Auto, True), (AxisType.Explicit, False)]
)
def test_scan_remat_and_both_kinds_of_mesh(axis_type: Any, check_vma: bool) -> None:
    """Two layers of the same weights under scan and remat, gradients taken inside shard_map."""
    case = dataclasses.replace(CASES[0], mesh=(2,), experts=8, tokens=12)
    host = cases.inputs(case)
    mesh = cases.make_mesh(case, axis_type)

    def loss(x: Any, params: MoEParams) -> Any:
        @jax.checkpoint
        def body(x: Any, _: None) -> tuple[Any, None]:
            return x + moe_layer(x, params, **case.layer)[0], None

        y, _ = jax.lax.scan(body, x, None, length=2)
        return jnp.square(y.astype(jnp.float32)).sum()

    def unrolled(x: Any, params: MoEParams) -> Any:
        x = x.astype(jnp.float32)
        for _ in range(2):
            x = x + _reference(case, x, params)
        return jnp.square(x).sum()

    with jax.set_mesh(mesh):
        x, params, _ = _place(case, mesh, host)
        specs = cases.param_specs(case, params)
        if check_vma:
            out = (jax.P(case.axis_name), specs)
        else:  # untracked: sums of replicated parameters' gradients are the caller's
            out = (jax.P(case.axis_name), jax.tree.map(lambda _: jax.P(case.axis_name), params))
        grad = jax.grad(loss, (0, 1))
        run = jax.jit(_sharded(case, mesh, grad, params, out, check_vma=check_vma))
        dx, d_params = jax.tree.map(np.asarray, run(x, params))
    expected_dx, expected = jax.jit(jax.grad(unrolled, (0, 1)))(*_float32(host[:2]))
    assert _error(dx, expected_dx) < 0.1
    assert _error(d_params.down, expected.down) < 0.1
    router = d_params.router if check_vma else d_params.router.reshape(2, 8, -1).sum(0)
    assert _error(router, expected.router) < 0.15


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_low_latency(precision: str) -> None:
    """The decoding form equals the other one; so does it with weights quantized beforehand."""
    case = dataclasses.replace(CASES[0], precision=precision, mesh=(2, 4), tokens=5)
    mesh = cases.make_mesh(case)
    x, params, _ = _place(case, mesh, cases.inputs(case))

    def run(x: Any, params: MoEParams) -> Any:
        layer = functools.partial(moe_layer, x, **case.layer)
        valid = jnp.arange(case.tokens) != 2
        plain, _ = layer(params, valid)
        fast, stats = layer(params, valid, low_latency=True)
        ready = params
        if precision == "fp8":
            quantized = {
                name: quantization.quantize_128x128(getattr(params, name))
                for name in ("gate_up", "down", "shared_gate_up", "shared_down")
            }
            ready = params._replace(**quantized)
        prepared, _ = layer(ready, valid, low_latency=True)
        return plain, fast, prepared, jax.lax.psum(stats, case.axis_name)

    tokens = jax.P(case.axis_name)
    plain, fast, prepared, stats = jax.jit(
        _sharded(case, mesh, run, params, (tokens, tokens, tokens, jax.P()))
    )(x, params)
    # The exchange for training scales by powers of two, the one for decoding does not.
    assert _error(fast, plain) < (0.06 if precision == "fp8" else 0.01)
    np.testing.assert_array_equal(fast, prepared)
    assert stats.load.sum() == 8 * 4 * case.k


def test_invalid_tokens_reach_no_expert() -> None:
    case = dataclasses.replace(CASES[0], shared=0, precision="bf16", mesh=(2,), tokens=6)
    mesh = cases.make_mesh(case)
    x, params, _ = _place(case, mesh, cases.inputs(case))

    def run(x: Any, params: MoEParams) -> Any:
        valid = jnp.arange(case.tokens) < 4
        x = jnp.where(valid[:, None], x, jnp.nan)
        y, stats = moe_layer(x, params, valid, **case.layer)
        return y, jax.lax.psum(stats.load, case.axis_name)

    y, load = jax.jit(_sharded(case, mesh, run, params, (jax.P("ep"), jax.P())))(x, params)
    y = np.asarray(y, np.float32).reshape(2, 6, -1)
    np.testing.assert_array_equal(y[:, 4:], 0)
    assert np.abs(y[:, :4]).min(axis=-1).max() > 0
    assert load.sum() == 2 * 4 * case.k


def test_capacity_factor_drops_as_planned() -> None:
    """Too small a capacity: the plan's drops, and the sum over what was kept."""
    case = dataclasses.replace(CASES[0], precision="bf16", favourite=3, shared=0)
    host = cases.inputs(case)
    mesh = cases.make_mesh(case)
    x, params, _ = _place(case, mesh, host)

    def run(x: Any, params: MoEParams) -> Any:
        y, stats = _layer(case, x, params, capacity_factor=1.25)
        logits = x.astype(jnp.float32) @ params.router.T
        ids, _ = group_limited_topk(logits, params.bias, **case.gating)
        plan = deep_ep.plan_dispatch(
            ids, num_experts=16, axis_name="ep", capacity=int(1.25 * case.tokens * case.k)
        )
        # 1 where the pair was kept: ones travel there and back.
        ones = jnp.ones((plan.row_source.shape[0], 8), jnp.float32)
        kept = [
            deep_ep.combine(ones, plan, jax.nn.one_hot(jnp.full(ids.shape[0], j), case.k))[:, 0]
            for j in range(case.k)
        ]
        return y, stats, jnp.where(jnp.stack(kept, 1) > 0, ids, -1)

    out = (jax.P("ep"), jax.P(), jax.P("ep"))
    y, stats, kept = jax.jit(_sharded(case, mesh, run, params, out))(x, params)
    assert stats.num_dropped == (np.asarray(kept) < 0).sum() > 0
    assert stats.load.sum() == 8 * case.tokens * case.k
    assert _error(y, _reference(case, *_float32(host[:2]), np.asarray(kept))) < 0.01


@pytest.mark.gpu
def test_kernels_agree_with_the_portable_layer() -> None:
    """On one device, what None runs on Hopper and "xla": the same blocks in FP8 and the same
    routing, so far closer to each other than either is to the float32 reference."""
    case = CASES[-1]
    x, params, cotangent = _place(case, cases.make_mesh(case), cases.inputs(case))

    def program(implementation: str | None) -> Any:
        def layer(x: Any, params: MoEParams) -> Any:
            return _layer(case, x, params, implementation=implementation)[0]

        sharded = _sharded(case, cases.make_mesh(case), layer, params, jax.P(case.axis_name))

        @jax.jit
        def run(x: Any, params: MoEParams, cotangent: Any) -> Any:
            y, vjp = jax.vjp(sharded, x, params)
            return y, vjp(cotangent)

        return run

    ours, portable = program(None), program("xla")
    text = ours.trace(x, params, cotangent).lower(lowering_platforms=("cuda",)).as_text()
    called = set(re.findall(r"custom_call @jax_ds_(\w+)", text))
    assert {"deep_ep_dispatch", "deep_ep_combine", "gemm", "quantize_tiles"} <= called
    (y, (dx, d_params)), (expected, (expected_dx, expected_d)) = (
        program(x, params, cotangent) for program in (ours, portable)
    )
    assert _error(y, expected) < 0.02
    assert _error(dx, expected_dx) < 0.02
    for name, theirs in expected_d._asdict().items():
        if name != "bias":
            assert _error(getattr(d_params, name), theirs) < 0.02, name


@pytest.mark.gpu
def test_decoding_kernels_agree_with_the_portable_layer() -> None:
    """The low-latency form on one device; most rows of the experts' regions hold no token."""
    case = CASES[-1]
    mesh = cases.make_mesh(case)
    x, params, _ = _place(case, mesh, cases.inputs(case))

    def program(implementation: str | None) -> Any:
        def layer(x: Any, params: MoEParams) -> Any:
            return _layer(case, x, params, low_latency=True, implementation=implementation)[0]

        return jax.jit(_sharded(case, mesh, layer, params, jax.P(case.axis_name)))

    ours, portable = program(None), program("xla")
    text = ours.trace(x, params).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @jax_ds_gemm" in text
    assert _error(ours(x, params), portable(x, params)) < 0.02
