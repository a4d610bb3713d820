"""What may run while tokens travel: nothing of the shared expert waits for the exchange."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds.moe import MoEParams, moe_layer
from tests.moe import cases
from tests.moe.cases import CASES, MoECase

COMMUNICATES = ("all_to_all", "all_gather", "ppermute", "ragged_all_to_all")
PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general")


def _inside(eqn: Any) -> Iterator[Any]:
    """The equation and those of the programs it calls."""
    yield eqn
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
        program = getattr(value, "jaxpr", value)
        for inner in getattr(program, "eqns", ()):
            yield from _inside(inner)


def _target(eqn: Any) -> str:
    return str(eqn.params.get("target_name", ""))


def _communicates(eqn: Any) -> bool:
    return any(
        e.primitive.name in COMMUNICATES or _target(e).startswith("jax_ds_deep_ep")
        for e in _inside(eqn)
    )


def _multiplies(eqn: Any) -> bool:
    return any(
        e.primitive.name in PRODUCTS or _target(e).startswith("jax_ds_gemm") for e in _inside(eqn)
    )


def _body(case: MoECase, function: Any) -> tuple[Any, list[Any]]:
    """The per-device program of `function(x, params, cotangent)`, and its variables by operand."""
    given = cases.inputs(case)
    mesh = cases.make_mesh(case)
    tokens = jax.P(case.axis_name)
    specs = cases.Inputs(tokens, cases.param_specs(case, given.params), tokens)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(specs), out_specs=jax.P(case.axis_name), check_vma=False
    )
    program = jax.make_jaxpr(mapped)(*given).jaxpr
    (eqn,) = [e for e in program.eqns if e.primitive.name == "shard_map"]
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    return body, jax.tree.unflatten(jax.tree.structure(tuple(given)), body.invars)


def _depending(body: Any, start: set[Any], also: Any = lambda eqn: False) -> set[Any]:
    """All variables computed from those of `start`, or by an equation for which `also` holds."""
    found = set(start)
    for eqn in body.eqns:
        inputs = {v for v in eqn.invars if not hasattr(v, "val")}
        if inputs & found or also(eqn):
            found |= set(eqn.outvars)
    return found


def _products_of_the_shared_expert(body: Any, params: MoEParams) -> list[set[Any]]:
    """The inputs of each product that reads the shared expert's weights, or what came of them."""
    shared = _depending(body, {params.shared_gate_up, params.shared_down})
    inputs = []
    for eqn in body.eqns:
        read = {v for v in eqn.invars if not hasattr(v, "val")}
        if read & shared and _multiplies(eqn):
            inputs.append(read)
    return inputs


def _forward(case: MoECase, **keywords: Any) -> Any:
    def run(x: Any, params: MoEParams, cotangent: Any) -> Any:
        return moe_layer(x, params, **case.layer, **keywords)[0]

    return run


def _backward(case: MoECase) -> Any:
    def run(x: Any, params: MoEParams, cotangent: Any) -> Any:
        y, pull = jax.vjp(lambda x, p: moe_layer(x, p, **case.layer)[0], x, params)
        _, d_params = pull(cotangent)
        return y, d_params.shared_gate_up[None], d_params.shared_down[None]

    return run


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("mesh", [(8,), (2, 4)], ids=str)
def test_no_product_of_the_shared_expert_waits(precision: str, mesh: tuple[int, ...]) -> None:
    """Forward two products, backward two more for each: none depends on a communicating call."""
    case = dataclasses.replace(CASES[0], mesh=mesh, precision=precision)
    for function, count in ((_forward(case), 2), (_backward(case), 6)):
        body, (_, params, _) = _body(case, function)
        travelled = _depending(body, set(), _communicates)
        products = _products_of_the_shared_expert(body, params)
        assert len(products) == count
        assert not any(inputs & travelled for inputs in products)
        # The routed experts do wait, or this test would see nothing.
        assert any(travelled & set(e.outvars) and _multiplies(e) for e in body.eqns)


def test_what_is_quantized_while_tokens_travel() -> None:
    """Forward the weights, backward the activations: a barrier joins them with what travels."""
    case = CASES[0]
    given = cases.inputs(case)

    def gradient(x: Any, params: MoEParams, cotangent: Any) -> Any:
        return jax.vjp(lambda p: moe_layer(x, p, **case.layer)[0], params)[1](cotangent)[0].down

    tokens, experts = jax.P("ep"), cases.param_specs(case, given.params)
    mapped = jax.shard_map(
        gradient,
        mesh=cases.make_mesh(case),
        in_specs=(tokens, experts, tokens),
        out_specs=experts.down,
    )
    lowered = jax.jit(mapped).trace(*given).lower(lowering_platforms=("cuda",))
    rows, local = 8 * case.tokens * min(case.k, case.experts // 8), case.experts // 8
    travels = f"tensor<{rows}x{case.hidden}x"
    weights = f"tensor<{local}x{2 * case.ffn}x{case.hidden}xf8E4M3FN>"
    activations = f"tensor<{case.ffn}x"
    barriers = [line for line in lowered.as_text().splitlines() if "optimization_barrier" in line]
    assert any(f"{travels}f8E4M3FN>" in line and weights in line for line in barriers)
    assert any(f"{travels}bf16>" in line and activations in line for line in barriers)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_low_latency_halves_hold_the_shared_expert(precision: str) -> None:
    """What receives the tokens waits for its products; what sends them does not."""
    case = dataclasses.replace(CASES[0], precision=precision)
    body, (_, params, _) = _body(case, _forward(case, low_latency=True))
    products = _products_of_the_shared_expert(body, params)
    travelled = _depending(body, set(), _communicates)
    # The other two are the routed experts', which see tokens that were received afterwards.
    assert [bool(inputs & travelled) for inputs in products] == [False, False, True, True]
    shared = _depending(body, {params.shared_gate_up, params.shared_down})
    sends, receives, *_ = [e for e in body.eqns if _communicates(e)]
    assert not shared & {v for v in sends.invars if not hasattr(v, "val")}
    waits_for = {v for v in receives.invars if not hasattr(v, "val")}
    assert shared & waits_for
    assert travelled & waits_for


def test_the_shared_expert_is_added() -> None:
    """The form with halves gives what the whole functions give: the sum of both experts."""
    case = dataclasses.replace(CASES[0], precision="bf16", mesh=(2,), tokens=6)
    given = cases.inputs(case)
    without = given.params._replace(shared_gate_up=None, shared_down=None)

    def run(x: Any, params: MoEParams) -> Any:
        return moe_layer(x, params, **case.layer, low_latency=True)[0]

    def on_mesh(params: MoEParams) -> Any:
        tokens = jax.P("ep")
        mapped = jax.shard_map(
            run,
            mesh=cases.make_mesh(case),
            in_specs=(tokens, cases.param_specs(case, params)),
            out_specs=tokens,
        )
        return np.asarray(jax.jit(mapped)(given.x, params), np.float32)

    x = given.x.astype(jnp.float32)
    gate, up = jnp.split(x @ given.params.shared_gate_up.T, 2, axis=-1)
    shared = (jax.nn.silu(gate) * up) @ given.params.shared_down.T
    np.testing.assert_allclose(
        on_mesh(given.params), on_mesh(without) + shared, rtol=0.05, atol=0.05
    )
