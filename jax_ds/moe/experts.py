"""The routed experts' products outside the custom_vjp: bfloat16, and the low-latency form."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from jax_ds import deep_ep, deep_gemm, quantization
from jax_ds._runtime.choose import Implementation
from jax_ds.moe.vjp import ExpertConfig
from jax_ds.quantization import Quantized


def swiglu(gate_up: Float[Array, "*M 2F"]) -> BFloat16[Array, "*M F"]:
    """silu(gate) * up in float32, rounded once; the gate comes first."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(jnp.bfloat16)


def linear(
    x: BFloat16[Array, "M K"],
    w: Float[Array, "N K"] | Quantized,
    precision: str,
    implementation: Implementation,
) -> BFloat16[Array, "M N"]:
    """x w^T; `w` may be quantized beforehand (inference)."""
    if isinstance(w, Quantized):
        rows = quantization.quantize_1x128(x, implementation=implementation)
        return deep_gemm.fp8_gemm(rows, w, implementation=implementation)
    if precision == "fp8":
        return deep_gemm.fp8_linear(x, w, implementation=implementation)
    return jnp.einsum("mk,nk->mn", x, w.astype(x.dtype))


def down_of_swiglu(
    gate_up: BFloat16[Array, "M 2F"],
    w: Float[Array, "H F"] | Quantized,
    implementation: Implementation,
) -> BFloat16[Array, "M H"]:
    """swiglu(gate_up) w^T in FP8, quantized where the swiglu is computed; no gradient."""
    act = quantization.swiglu_quantize_1x128(gate_up, implementation=implementation)
    return deep_gemm.fp8_gemm(act, _quantized(w, implementation), implementation=implementation)


def bf16_experts(
    config: ExpertConfig,
    x: BFloat16[Array, "T H"],
    weights: Float32[Array, "T k"],
    gate_up: Float[Array, "E_local 2F H"],
    down: Float[Array, "E_local H F"],
    plan: deep_ep.DispatchPlan,
) -> BFloat16[Array, "T H"]:
    """The routed experts without quantization; differentiable through its parts."""
    rows = deep_ep.dispatch(x, plan, **config.exchange)
    impl = config.implementation
    hidden = deep_gemm.bf16_grouped_gemm(
        rows, gate_up.astype(jnp.bfloat16), plan.group_sizes, implementation=impl
    )
    out = deep_gemm.bf16_grouped_gemm(
        swiglu(hidden), down.astype(jnp.bfloat16), plan.group_sizes, implementation=impl
    )
    return deep_ep.combine(out, plan, weights, **config.exchange)


def low_latency(
    config: ExpertConfig,
    x: BFloat16[Array, "T H"],
    ids: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    gate_up: Float[Array, "E_local 2F H"] | Quantized,
    down: Float[Array, "E_local H F"] | Quantized,
    precision: str,
    after: Array | None,
) -> BFloat16[Array, "T H"]:
    """The routed experts for decoding: fixed slots per expert, no counts exchanged beforehand.

    `after` is computed while the tokens travel.
    """
    impl = config.implementation
    experts = gate_up.shape[0] * jax.lax.axis_size(config.axis_name)
    in_flight = deep_ep.low_latency_dispatch_start(
        x,
        ids,
        num_experts=experts,
        max_tokens=x.shape[0],
        axis_name=config.axis_name,
        quantize=precision == "fp8",
        channel=config.channel,
        implementation=impl,
    )
    rows, sizes, handle = deep_ep.low_latency_dispatch_finish(in_flight, after=after)
    if precision == "fp8":
        # An expert's share of all ranks' choices, if even: R T k of them for R E_local experts.
        expected = -(-ids.size // gate_up.shape[0])
        product = functools.partial(
            deep_gemm.fp8_masked_gemm,
            group_sizes=sizes,
            expected_rows=expected,
            implementation=impl,
        )
        hidden = product(rows, _quantized(gate_up, impl))
        # Of each expert's region only the rows that have a token are read and written.
        act = jax.vmap(functools.partial(quantization.swiglu_quantize_1x128, implementation=impl))(
            hidden, sizes
        )
        out = product(act, _quantized(down, impl))
    else:
        assert not isinstance(gate_up, Quantized)
        assert not isinstance(down, Quantized)
        hidden = deep_gemm.bf16_masked_gemm(rows, gate_up, sizes, implementation=impl)
        out = deep_gemm.bf16_masked_gemm(swiglu(hidden), down, sizes, implementation=impl)
    return deep_ep.low_latency_combine(out, handle, weights, implementation=impl)


def _quantized(w: Float[Array, "... N K"] | Quantized, implementation: Implementation) -> Quantized:
    if isinstance(w, Quantized):
        return w
    return quantization.quantize_128x128(w, implementation=implementation)
