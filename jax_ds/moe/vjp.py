"""The FP8 part of the layer as one custom_vjp: no cotangent ever crosses a Quantized value."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32

from jax_ds import deep_ep, deep_gemm, quantization
from jax_ds._runtime.choose import Implementation
from jax_ds._runtime.varying import match_primal, varying_axes
from jax_ds.quantization import Quantized


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Static choices of the exchange and of the products."""

    axis_name: str | tuple[str, ...]
    num_sms: int | None = None
    channel: int = 0
    implementation: Implementation = None

    @property
    def exchange(self) -> dict[str, Any]:
        """Keywords of `deep_ep.dispatch` and `deep_ep.combine`."""
        return {"num_sms": self.num_sms, "implementation": self.implementation}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Types:
    """Types of x, weights, gate_up and down: dtypes and varying axes of their cotangents."""

    primals: tuple[Any, ...]


class _Residuals(NamedTuple):
    rows: Quantized  # [C, H] the tokens as they arrived
    hidden: BFloat16[Array, "C 2F"]
    combine: Any  # the transpose of combine in the second product and the weights
    gate_up_t: Quantized  # [E_local, H, 2F]
    down_t: Quantized  # [E_local, F, H]
    plan: deep_ep.DispatchPlan
    types: _Types


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fp8_experts(
    config: ExpertConfig,
    x: BFloat16[Array, "T H"],
    weights: Float32[Array, "T k"],
    gate_up: Float[Array, "E_local 2F H"],
    down: Float[Array, "E_local H F"],
    plan: deep_ep.DispatchPlan,
) -> BFloat16[Array, "T H"]:
    """y[t] = sum_j weights[t, j] E_{ids[t, j]}(x[t]) in FP8, for the routing of `plan`."""
    return _fwd(config, x, weights, gate_up, down, plan)[0]


def _fwd(
    config: ExpertConfig,
    x: BFloat16[Array, "T H"],
    weights: Float32[Array, "T k"],
    gate_up: Float[Array, "E_local 2F H"],
    down: Float[Array, "E_local H F"],
    plan: deep_ep.DispatchPlan,
) -> tuple[BFloat16[Array, "T H"], _Residuals]:
    impl = config.implementation
    sizes = plan.group_sizes
    # Quantizing before the exchange halves the bytes on the wire. Scales are powers of two: the
    # backward pass quantizes the received rows once more, along tokens, and between such scales
    # that is exact but for the smallest values (DeepSeek-V3, section 3.3.1).
    x_rows = quantization.quantize_1x128(x, scale_dtype="ue8m0", implementation=impl)
    rows = deep_ep.dispatch(x_rows, plan, **config.exchange)
    gate_up_q, gate_up_t = quantization.quantize_128x128_both(gate_up, implementation=impl)
    down_q, down_t = quantization.quantize_128x128_both(down, implementation=impl)
    # Weights are quantized while tokens travel: what comes out of a barrier waits for all of it.
    rows, gate_up_q, down_q = jax.lax.optimization_barrier((rows, gate_up_q, down_q))
    hidden = deep_gemm.fp8_grouped_gemm(rows, gate_up_q, sizes, implementation=impl)
    num_rows = jnp.sum(sizes, dtype=jnp.int32)
    act = quantization.swiglu_quantize_1x128(hidden, num_rows, implementation=impl)
    out = deep_gemm.fp8_grouped_gemm(act, down_q, sizes, implementation=impl)
    # Taken here, the transpose keeps the weights of the received rows: they need not travel again.
    y, combine_vjp = jax.vjp(
        lambda out, weights: deep_ep.combine(out, plan, weights, **config.exchange), out, weights
    )
    types = _Types(tuple(jax.typeof(primal) for primal in (x, weights, gate_up, down)))
    return y, _Residuals(rows, hidden, combine_vjp, gate_up_t, down_t, plan, types)


def _bwd(
    config: ExpertConfig, saved: _Residuals, g: BFloat16[Array, "T H"]
) -> tuple[BFloat16[Array, "T H"], Float32[Array, "T k"], Any, Any, None]:
    impl = config.implementation
    plan, sizes = saved.plan, saved.plan.group_sizes
    both = functools.partial(
        quantization.quantize_1x128_both, group_sizes=sizes, implementation=impl
    )
    grouped = functools.partial(deep_gemm.fp8_grouped_gemm, group_sizes=sizes, implementation=impl)
    gate_up, down = saved.types.primals[2:]

    def wgrad(dy: Quantized, x: Quantized, w: Any) -> Array:
        """Rounded to the dtype of w by the kernel, or after a sum over devices in float32, of which
        `check_vma=True` tells."""
        summed = set(varying_axes(dy, x)) - set(w.manual_axis_type.varying)
        dtype = jnp.float32 if summed else w.dtype
        return deep_gemm.fp8_grouped_wgrad(dy, x, sizes, out_dtype=dtype, implementation=impl)

    # Each row's share of g travels in bfloat16, as in DeepSeek-V3.
    d_out, d_weights = saved.combine(g)

    _, act_columns = quantization.swiglu_quantize_1x128_both(
        saved.hidden, sizes, implementation=impl
    )
    # While cotangents travel. XLA schedules from the end on: out of a barrier of their own, the
    # columns come up after the exchange does, and so begin before its end.
    act_columns = jax.lax.optimization_barrier(act_columns)
    d_out, act_columns = jax.lax.optimization_barrier((d_out, act_columns))
    d_out_rows, d_out_columns = both(d_out)
    d_down = wgrad(d_out_columns, act_columns, down)
    d_hidden = _swiglu_grad(saved.hidden, grouped(d_out_rows, saved.down_t))
    d_hidden_rows, d_hidden_columns = both(d_hidden)
    x = quantization.dequantize(saved.rows).astype(jnp.bfloat16)
    _, x_columns = both(x, scale_dtype="ue8m0")
    d_gate_up = wgrad(d_hidden_columns, x_columns, gate_up)
    d_rows = grouped(d_hidden_rows, saved.gate_up_t)
    dx = deep_ep.combine(d_rows, plan, None, **config.exchange)

    cotangents = tuple(
        match_primal(ct, primal).astype(primal.dtype)
        for ct, primal in zip((dx, d_weights, d_gate_up, d_down), saved.types.primals, strict=True)
    )
    return *cotangents, None


def _swiglu_grad(
    gate_up: BFloat16[Array, "C 2F"], d_act: BFloat16[Array, "C F"]
) -> BFloat16[Array, "C 2F"]:
    """Cotangent of `gate_up` for silu(gate) * up, computed in float32."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    d = d_act.astype(jnp.float32)
    sig = jax.nn.sigmoid(gate)
    d_gate = d * up * sig * (1.0 + gate * (1.0 - sig))
    return jnp.concatenate([d_gate, d * gate * sig], axis=-1).astype(jnp.bfloat16)


fp8_experts.defvjp(_fwd, _bwd)
