"""What the layer is for CUDA: kernels of all three systems, few messages, nothing on the host."""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds.moe import MoEParams, moe_layer
from tests.moe import cases
from tests.moe.cases import CASES, MoECase


def _program(case: MoECase, *, backward: bool, **keywords: Any) -> str:
    given = cases.inputs(case)
    tokens = jax.P(case.axis_name)

    def layer(x: Any, params: MoEParams) -> Any:
        return moe_layer(x, params, **case.layer, **keywords)[0]

    mapped = jax.shard_map(
        layer,
        mesh=cases.make_mesh(case),
        in_specs=(tokens, cases.param_specs(case, given.params)),
        out_specs=tokens,
    )

    def both(x: Any, params: MoEParams, cotangent: Any) -> Any:
        y, pull = jax.vjp(mapped, x, params)
        return y, pull(cotangent)

    program = jax.jit(both).trace(*given) if backward else jax.jit(mapped).trace(*given[:2])
    return program.lower(lowering_platforms=("cuda",)).as_text()


def _counts(text: str) -> collections.Counter[str]:
    found = re.findall(r"custom_call @jax_ds_(\w+)", text)
    return collections.Counter([*found, *re.findall(r"stablehlo\.(all_\w+)", text)])


# Ids, and back the products for the weights; over two axes each goes over both, and tokens, weights
# and sums cross the first.
MESSAGES = {(8,): (1, 2), (2, 4): (5, 9)}


@pytest.mark.parametrize("mesh", MESSAGES, ids=str)
def test_one_kernel_each_way(mesh: tuple[int, ...]) -> None:
    """FP8 tokens there, cotangents there; sums back, gradients back. The shared expert's two
    products have weights and rows to quantize of their own."""
    case = dataclasses.replace(CASES[0], mesh=mesh)
    forward, both = MESSAGES[mesh]
    assert _counts(_program(case, backward=False)) == {
        "deep_ep_dispatch": 1,
        "deep_ep_combine": 1,
        "gemm": 4,
        "quantize_rows": 4,  # x twice, the routed SwiGLU, the shared one
        "quantize_tiles": 4,
        "all_to_all": forward,
    }
    counts = _counts(_program(case, backward=True))
    assert (counts["deep_ep_dispatch"], counts["deep_ep_combine"]) == (2, 2)
    assert counts["gemm"] == 3 * 4
    assert counts["all_to_all"] == both
    assert counts["all_gather"] == 0


def test_weight_gradients_are_summed_before_they_are_rounded() -> None:
    """Over an axis on which the experts' weights are the same: in float32, and once."""
    case = dataclasses.replace(CASES[0], mesh=(4,), shared=0)
    x, params, _ = cases.inputs(dataclasses.replace(case, tokens=2 * case.tokens))
    weights = {name: getattr(params, name).astype(jnp.bfloat16) for name in ("gate_up", "down")}
    mesh = jax.make_mesh((2, 4), ("data", "ep"), (jax.sharding.AxisType.Auto,) * 2)
    tokens = jax.P(("data", "ep"))

    def loss(x: Any, params: MoEParams) -> Any:
        y, _ = moe_layer(x, params, **case.layer)
        return jax.lax.psum(jnp.sum(y.astype(jnp.float32)), ("data", "ep"))

    specs = (tokens, cases.param_specs(case, params))
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=jax.P())
    gradient = jax.jit(jax.grad(mapped, argnums=1))
    lowered = gradient.trace(x, params._replace(**weights)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    local = case.experts // 4
    for shape in ((local, 2 * case.ffn, case.hidden), (local, case.hidden, case.ffn)):
        tensor = "x".join(map(str, shape))
        sums = re.findall(rf"\(tensor<{tensor}x(\w+)>\) -> tensor<{tensor}x\w+>\n", text)
        assert set(sums) == {"f32"}, (shape, sums)


def test_swiglu_is_fused_with_its_quantizer() -> None:
    """The routed experts' activation exists in FP8 only: no bfloat16 one of [C, F] is made."""
    case = dataclasses.replace(CASES[0], shared=0, hidden=256, ffn=96)
    rows = 8 * case.tokens * min(case.k, 2)
    text = _program(case, backward=False)
    assert f"tensor<{rows}x192xbf16>" in text
    assert f"tensor<{rows}x96xf8E4M3FN>" in text
    assert f"tensor<{rows}x96xbf16>" not in text


def test_decoding_quantizes_the_rows_that_hold_tokens() -> None:
    """One call for all experts' regions, with the number of rows of each."""
    case = dataclasses.replace(CASES[0], shared=0, hidden=256, ffn=128)
    text = _program(case, backward=False, low_latency=True)
    regions = f"tensor<2x{8 * case.tokens}x256xbf16>"
    calls = [line for line in text.splitlines() if "custom_call @jax_ds_quantize_rows" in line]
    assert [line for line in calls if f": ({regions}, tensor<2xi32>)" in line]
    assert _counts(text)["gemm"] == 2


def test_decoding_fuses_the_shared_experts_swiglu() -> None:
    """Its activation exists in FP8 only."""
    case = dataclasses.replace(CASES[0], shared=96)
    text = _program(case, backward=False, low_latency=True)
    assert f"tensor<{case.tokens}x192xbf16>" in text
    assert f"tensor<{case.tokens}x96xf8E4M3FN>" in text
    assert f"tensor<{case.tokens}x96xbf16>" not in text


def test_decoding_expects_even_shares() -> None:
    """Rows of an expert: tokens of all 8 ranks times k = 4, over all experts, rounded up."""
    for tokens, experts, expected in ((16, 16, 32), (6, 32, 6), (3, 64, 2)):
        case = dataclasses.replace(CASES[0], shared=0, tokens=tokens, experts=experts)
        text = _program(case, backward=False, low_latency=True)
        calls = [line for line in text.splitlines() if "custom_call @jax_ds_gemm" in line]
        assert len(calls) == 2
        assert all(f"expected_rows = {expected} : i64" in call for call in calls)


def test_nothing_waits_for_the_host() -> None:
    text = _program(CASES[0], backward=True)
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in text
