"""The expert-parallel mixture-of-experts layer, made of deep_ep, deep_gemm and quantization."""

import math
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int32

from jax_ds import deep_ep
from jax_ds._core.checks import (
    check,
    check_axis,
    check_choice,
    check_dtype,
    check_number,
    check_rank,
    check_shape,
)
from jax_ds._runtime.choose import Implementation
from jax_ds.moe import experts
from jax_ds.moe.gate import group_limited_topk
from jax_ds.moe.vjp import ExpertConfig, fp8_experts
from jax_ds.quantization import Quantized

Precision = Literal["fp8", "bf16"]


class MoEParams(NamedTuple):
    """Parameters of one layer on one device. E experts over all devices, E_local of them here.

    `gate_up` and `down` (and the shared ones) may be `Quantized` by `quantize_128x128` for
    inference with `low_latency=True`.
    """

    router: Float32[Array, "E H"]
    bias: Float32[Array, " E"]  # steers the choice; moved by update_bias, never by a gradient
    gate_up: Float[Array, "E_local 2F H"] | Quantized  # gate rows first
    down: Float[Array, "E_local H F"] | Quantized
    shared_gate_up: Float[Array, "2Fs H"] | Quantized | None = None
    shared_down: Float[Array, "H Fs"] | Quantized | None = None


class MoEStats(NamedTuple):
    """What happened to this device's tokens."""

    load: Int32[Array, " E"]  # choices of this device's valid tokens per expert, drops included
    num_dropped: Int32[Array, ""]  # as DispatchPlan.num_dropped; 0 under low_latency


def moe_layer(
    x: Float[Array, "T H"],
    params: MoEParams,
    valid: Bool[Array, " T"] | None = None,
    *,
    axis_name: str | tuple[str, ...],
    k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    routed_scaling: float = 1.0,
    capacity_factor: float | None = None,
    node_capacity: int | None = None,
    precision: Precision = "fp8",
    low_latency: bool = False,
    num_sms: int | None = None,
    channel: int = 0,
    implementation: Implementation = None,
) -> tuple[Float[Array, "T H"], MoEStats]:
    """A DeepSeek-V3 MoE layer over the devices of `axis_name`; call it inside `jax.shard_map`.

        ids, w = group_limited_topk(x router^T, bias)
        E_e(u) = down_e (silu(g) * v),   [g, v] = gate_up_e u
        y = shared expert(x) + sum_j w[:, j] E_{ids[:, j]}(x)

    Tokens travel to their experts (`deep_ep.dispatch`), go through two grouped products
    (`deep_gemm.fp8_grouped_gemm`) and come back weighted and summed (`deep_ep.combine`).

    Differentiable with respect to x and all of `params` but the bias. With `precision="fp8"` one
    custom_vjp spans dispatch, experts and combine; its backward uses FP8 products throughout:
    the cotangent of the rows is quantized along features for the data gradients and along tokens
    for the weight gradients. Saved for it, per received row: the row in FP8 (H + H/32 bytes), the
    first product in bfloat16 (4F bytes) and the second one (2H bytes, for the gradient of w).

    Args:
      x: [T, H] bfloat16 or float32, this device's tokens; T is the same on every device.
      params: `MoEParams`, the expert weights already the local shard.
      valid: [T] bool; tokens that are False go to no routed expert. None: all are valid.
      axis_name: mesh axis of the experts, or ("node", "gpu"); expert e lives on rank
        e // E_local of the flattened axes.
      k, num_groups, top_groups, routed_scaling: as in `group_limited_topk`.
      capacity_factor: a rank has room for ceil(capacity_factor * T * k) rows, 1.0 being the even
        share; what exceeds it is dropped as `plan_dispatch` says. None: nothing is ever dropped.
      node_capacity: as in `plan_dispatch`.
      precision: "fp8", or "bf16" for unquantized products.
      low_latency: use the low-latency exchange and masked products, for decoding; no gradient.
        It never drops: capacity_factor, node_capacity and num_sms do not apply.
      num_sms, channel: as in `deep_ep.dispatch`.
      implementation: None, "xla" or "cuda".

    Returns:
      y [T, H] in x's dtype and the `MoEStats` of this device.

    Raises:
      TypeError: an array has another dtype, or the low-latency form is differentiated.
      ValueError: a shape breaks a rule, E is no multiple of the axis' size, or the call is
        outside `jax.shard_map`.

    Source: DeepSeek-V3 technical report, sections 2.1.2, 3.2 and 3.3 (arXiv:2412.19437).
    """
    check_choice("low_latency", low_latency, (True, False))
    _check_layer(x, params, axis_name, capacity_factor, precision)
    _check_quantized(params, precision, low_latency)
    num_experts = params.router.shape[0]
    # The router stays in float32: a rounded logit changes the choice.
    logits = jnp.einsum(
        "th,eh->te", x.astype(jnp.float32), params.router, precision=jax.lax.Precision.HIGHEST
    )
    ids, weights = group_limited_topk(
        logits,
        params.bias,
        k=k,
        num_groups=num_groups,
        top_groups=top_groups,
        routed_scaling=routed_scaling,
    )
    if valid is not None:
        check_dtype("valid", valid, jnp.bool_)
        check_shape("valid", valid, x.shape[:1], "T")
        ids = jnp.where(valid[:, None], ids, -1)
    config = ExpertConfig(
        axis_name=axis_name, num_sms=num_sms, channel=channel, implementation=implementation
    )
    shared = _shared_expert(x, params, precision, low_latency, implementation)
    if low_latency:
        routed = experts.low_latency(
            config, x, ids, weights, params.gate_up, params.down, precision, after=shared
        )
        dropped = jnp.zeros((), jnp.int32)
    else:
        capacity = _capacity(capacity_factor, x.shape[0], k, num_experts, params)
        plan = deep_ep.plan_dispatch(
            ids,
            num_experts=num_experts,
            axis_name=axis_name,
            capacity=capacity,
            node_capacity=node_capacity,
            channel=channel,
            implementation=implementation,
        )
        run = fp8_experts if precision == "fp8" else experts.bf16_experts
        gate_up, down = cast(tuple[Array, Array], (params.gate_up, params.down))
        routed = run(config, x, weights, gate_up, down, plan)
        dropped = plan.num_dropped
    y = (routed if shared is None else routed + shared).astype(x.dtype)
    return y, MoEStats(load=_load(ids, num_experts), num_dropped=dropped)


def _shared_expert(
    x: BFloat16[Array, "T H"],
    params: MoEParams,
    precision: Precision,
    low_latency: bool,
    implementation: Implementation,
) -> BFloat16[Array, "T H"] | None:
    """The expert that sees every token. It depends on nothing of the exchange, so it can run
    while tokens travel on the collective stream; under low_latency it is done between the halves.
    """
    if params.shared_gate_up is None or params.shared_down is None:
        return None
    hidden = experts.linear(x, params.shared_gate_up, precision, implementation)
    if low_latency and precision == "fp8":
        return experts.down_of_swiglu(hidden, params.shared_down, implementation)
    return experts.linear(experts.swiglu(hidden), params.shared_down, precision, implementation)


def _load(ids: Int32[Array, "T k"], num_experts: int) -> Int32[Array, " E"]:
    hits = ids.reshape(-1)[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    return hits.sum(0, dtype=jnp.int32)


def _capacity(
    factor: float | None, tokens: int, k: int, num_experts: int, params: MoEParams
) -> int | None:
    if factor is None:
        return None
    local = params.gate_up.shape[0]
    everything = (num_experts // local) * tokens * min(k, local)
    return max(1, min(math.ceil(factor * tokens * k), everything))


def _check_layer(
    x: Any,
    params: MoEParams,
    axis_name: str | tuple[str, ...],
    capacity_factor: float | None,
    precision: Precision,
) -> None:
    check_choice("precision", precision, ("fp8", "bf16"))
    check_dtype("x", x, jnp.bfloat16, jnp.float32)
    check_rank("x", x, 2)
    hidden = x.shape[1]
    ranks = check_axis("axis_name", axis_name)
    _check_dtypes(params)
    check_rank("params.router", params.router, 2)
    num_experts = params.router.shape[0]
    check(
        num_experts % ranks == 0,
        "params.router",
        f"the number of experts must be a multiple of the {ranks} ranks of axis_name",
        num_experts,
    )
    local = num_experts // ranks
    check_shape("params.router", params.router, (num_experts, hidden), "E H")
    check_shape("params.bias", params.bias, (num_experts,), "E")
    check_shape("params.gate_up", params.gate_up, (local, None, hidden), "E_local 2F H")
    width = params.gate_up.shape[1]
    check(width % 2 == 0, "params.gate_up", "gate and up must have the same width", width)
    check_shape("params.down", params.down, (local, hidden, width // 2), "E_local H F")
    _check_shared(params, hidden)
    if capacity_factor is not None:
        check_number("capacity_factor", capacity_factor, positive=True)


def _check_dtypes(params: MoEParams) -> None:
    if not isinstance(params, MoEParams):
        raise TypeError(f"params: must be a MoEParams, got {type(params).__name__}")
    for name, value in params._asdict().items():
        if name in ("router", "bias"):
            check_dtype(f"params.{name}", value, jnp.float32)
        elif isinstance(value, Quantized):
            square = value.block == (128, 128) or value.shape[-2] == 1
            check(square, f"params.{name}", "must come from quantize_128x128", "blocks of 1x128")
        elif value is not None or not name.startswith("shared_"):
            check_dtype(f"params.{name}", value, jnp.bfloat16, jnp.float32)


def _check_shared(params: MoEParams, hidden: int) -> None:
    gate_up, down = params.shared_gate_up, params.shared_down
    if gate_up is None or down is None:
        rule = "must be given together with params.shared_gate_up"
        check(gate_up is down, "params.shared_down", rule, "one of them")
        return
    check_shape("params.shared_gate_up", gate_up, (None, hidden), "2Fs H")
    width = gate_up.shape[0]
    check(width % 2 == 0, "params.shared_gate_up", "gate and up must have the same width", width)
    check_shape("params.shared_down", down, (hidden, width // 2), "H Fs")


def _check_quantized(params: MoEParams, precision: Precision, low_latency: bool) -> None:
    for name, value in params._asdict().items():
        if isinstance(value, Quantized):
            rule = "may be Quantized with precision='fp8' and low_latency=True only"
            got = f"precision={precision!r}, low_latency={low_latency}"
            check(precision == "fp8" and low_latency, f"params.{name}", rule, got)
