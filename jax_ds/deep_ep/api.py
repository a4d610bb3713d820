"""Expert parallelism: tokens to the ranks of their experts, and the experts' results back.

Call these functions inside `jax.shard_map`; shapes are those of one device. R ranks along
`axis_name` hold E experts, E_local = E/R each: rank r has experts `r * E_local` and up. A rank has
T tokens with up to K experts each, and receives up to C rows.

    plan = plan_dispatch(expert_ids, num_experts=E, axis_name="ep")
    rows = dispatch(x, plan)                    # [C, H], grouped by local expert
    y = combine(experts(rows), plan, weights)   # [T, H], y_t = sum_k weights_tk * f_k(x_t)

Every rank must make the same calls in the same order: a `lax.cond` predicate or a loop's trip
count around them must agree on all ranks. The method is that of DeepEP
(github.com/deepseek-ai/DeepEP) and of the DeepSeek-V3 report, section 3.2.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_ds._core.checks import (
    check,
    check_axis,
    check_dtype,
    check_integer,
    check_rank,
    check_shape,
    fail,
    format_shape,
)
from jax_ds._core.gradients import without_gradient
from jax_ds._runtime.choose import Implementation
from jax_ds._runtime.varying import to_varying, varying_axes
from jax_ds.deep_ep import calls, vjp
from jax_ds.deep_ep.calls import Options
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes
from jax_ds.quantization import Quantized
from jax_ds.quantization.types import check_quantized

MAX_INDEX = 2**31 - 1


def plan_dispatch(
    expert_ids: Int32[Array, "T K"],
    *,
    num_experts: int,
    axis_name: str | tuple[str, ...],
    capacity: int | None = None,
    node_capacity: int | None = None,
    expert_alignment: int = 1,
    channel: int = 0,
    implementation: Implementation = None,
) -> DispatchPlan:
    """Works out which row of which rank every token becomes.

    A rank's rows are the (token, local expert) pairs that were routed to it, in the order of
    expert, then source rank, then token. A token that names an expert twice has one row for it,
    and `combine` adds both weights. Ids outside 0 .. E-1, -1 above all, name no expert.

    Expert e of a rank has `group_sizes[e]` rows, right after those of expert e-1.

    Drops: where `capacity` is too small, each expert keeps its first rows up to a common level, so
    that the busiest lose first: `min(count_e, level)` for the largest level at which all fit, and
    one more for each of the first experts cut off as far as room is left (in units of
    `expert_alignment`). Where `node_capacity` is too small, the first tokens bound for a node are
    kept, in token order. A dropped pair adds nothing to y and has zero gradients.

    Args:
      expert_ids: int32 `[T, K]`, any values. T is the same on every rank: fill up with -1.
      num_experts: E, a multiple of R.
      axis_name: one mesh axis, or a (node, gpu) pair: then a token crosses the node axis at most
        once per destination node and fans out along the gpu axis. Ranks are numbered row-major;
        rows are the same either way.
      capacity: C, rows that a rank can receive. None: `R * T * min(K, E_local)` and the worst
        filling by `expert_alignment`, which never drops.
      node_capacity: tokens that a rank can send to one other node. None: T, which never drops.
      expert_alignment: each expert's rows start at a multiple of it. `group_sizes` includes the
        zero rows in between, so that groups stay consecutive.
      channel: calls that may run at the same time need different channels.
      implementation: None, "xla" or "cuda".

    Returns:
      A `DispatchPlan`, a pytree; its `group_sizes` and `num_dropped` are per rank.

    Raises:
      ValueError, TypeError: for a shape, dtype, size or axis against these rules.
    """
    check_rank("expert_ids", expert_ids, 2)
    check_dtype("expert_ids", expert_ids, jnp.int32)
    sizes = check_exchange(expert_ids, num_experts, axis_name, channel)
    check_integer("expert_alignment", expert_alignment, 1)
    if node_capacity is not None:
        check(
            len(sizes.axis_name) == 2,
            "node_capacity",
            "needs axis_name=(node, gpu)",
            repr(axis_name),
        )
        check_integer("node_capacity", node_capacity, 1)
    if capacity is not None and check_integer("capacity", capacity) < expert_alignment:
        fail("capacity", f"must be at least expert_alignment = {expert_alignment}", capacity)

    pairs = sizes.num_ranks * sizes.num_tokens * min(sizes.top_k, sizes.experts_per_rank)
    check(pairs <= MAX_INDEX, "expert_ids", "R*T*min(K, E_local) must be below 2**31", pairs)
    if capacity is None:
        filling = min(sizes.experts_per_rank, pairs) * (expert_alignment - 1)
        capacity = max(pairs + filling, expert_alignment) // expert_alignment * expert_alignment
    check(capacity <= MAX_INDEX, "capacity", "must be below 2**31", capacity)
    sizes = dataclasses.replace(
        sizes, capacity=int(capacity), expert_alignment=int(expert_alignment)
    )
    (expert_ids,) = together(sizes.axis_name, expert_ids)
    plan: DispatchPlan = calls.plan(Options(implementation), sizes, node_capacity, expert_ids)
    return plan


def dispatch(
    x: Float[Array, "T H"] | Quantized,
    plan: DispatchPlan,
    *,
    num_sms: int | None = None,
    implementation: Implementation = None,
) -> Any:
    """Sends every token to the ranks of its experts: `rows[c] = x[token of row c]`.

    A token goes once to each rank that needs it, however many of its experts live there, and is
    copied into its rows on arrival. The result feeds `deep_gemm.fp8_grouped_gemm(rows, w,
    plan.group_sizes)`. Rows without a token are zero (a Quantized's scales are 1 there).

    The gradient is the unweighted combine; its partial sums round as in `combine`. A Quantized x
    has none: differentiating raises a TypeError.

    Args:
      x: bfloat16 or float32 `[T, H]`, or Quantized in 1x128 blocks; values and scales travel
        together as bytes.
      plan: from `plan_dispatch`.
      num_sms: the most multiprocessors the kernel may use; None: a small number of its choice.
      implementation: None, "xla" or "cuda".

    Returns:
      `[C, H]` with x's dtype, or Quantized `[C, H]`.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules.
    """
    sizes = _check_call(plan, num_sms)
    options = Options(implementation, num_sms)
    if isinstance(x, Quantized):
        check_rank("x.values", x.values, 2)
        check_quantized("x", x, (1, 128))
        check_shape("x.values", x.values, (sizes.num_tokens, None), "T H")
        x, plan = together(sizes.axis_name, x, plan)
        return without_gradient(
            "dispatch",
            "dispatch x in bfloat16, or apply jax.lax.stop_gradient to it",
            lambda x, plan: calls.dispatch(options, x, plan),
            x,
            plan,
        )
    check_dtype("x", x, jnp.bfloat16, jnp.float32)
    check_shape("x", x, (sizes.num_tokens, None), "T H")
    x, plan = together(sizes.axis_name, x, plan)
    return vjp.dispatch(options, x, plan)


def combine(
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    weights: Float32[Array, "T K"] | None,
    *,
    num_sms: int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "T H"]:
    """Brings rows back to their tokens: `y_t = sum_k weights_tk * rows[row of (t, k)]`.

    A rank first adds a token's rows there in float32 and rounds that partial sum once to the dtype
    of the rows; the owner adds the partial sums in float32 in rank order and rounds the result.
    Over (node, gpu), a node's partial sums are added in float32, rounded once more, and the owner
    adds the nodes' sums in node order. For float32 rows nothing but float32 addition rounds.

    Gradients: `d_rows[c] = weight_c * dispatch(g)[c]` and
    `d_weights_tk = <rows[row of (t, k)], g_t>`, 0 where the pair was dropped.

    Args:
      rows: bfloat16 or float32 `[C, H]`, as `dispatch` orders them; rows without a token are not
        read.
      plan: from `plan_dispatch`.
      weights: float32 `[T, K]`. None: every row counts once, the transpose of `dispatch`.
      num_sms: the most multiprocessors the kernel may use; None: a small number of its choice.
      implementation: None, "xla" or "cuda".

    Returns:
      `[T, H]` with the dtype of the rows; zero for a token without rows.

    Raises:
      ValueError, TypeError: for a shape, dtype or keyword against these rules.
    """
    sizes = _check_call(plan, num_sms)
    check_dtype("rows", rows, jnp.bfloat16, jnp.float32)
    check_shape("rows", rows, (sizes.capacity, None), "C H")
    options = Options(implementation, num_sms)
    if weights is None:
        rows, plan = together(sizes.axis_name, rows, plan)
        return vjp.combine_unweighted(options, rows, plan)
    check_dtype("weights", weights, jnp.float32)
    check_shape("weights", weights, (sizes.num_tokens, sizes.top_k), "T K")
    rows, plan, weights = together(sizes.axis_name, rows, plan, weights)
    return vjp.combine(options, rows, plan, weights)


def check_axes(axis_name: str | tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The mesh axes as a tuple, and the number of ranks along them."""
    axes = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    distinct = len(axes) in (1, 2) and len(set(axes)) == len(axes)
    check(distinct, "axis_name", "must be one axis or a (node, gpu) pair", repr(axis_name))
    return axes, check_axis("axis_name", axis_name)


def check_exchange(
    expert_ids: Int32[Array, "T K"],
    num_experts: int,
    axis_name: str | tuple[str, ...],
    channel: int,
) -> PlanSizes:
    """Checks what every exchange is given; its sizes, apart from the capacity."""
    num_tokens, top_k = expert_ids.shape
    shape = f"shape {format_shape(expert_ids.shape)}"
    check(top_k >= 1, "expert_ids", "must have at least 1 expert per token", shape)
    axes, num_ranks = check_axes(axis_name)
    check_integer("num_experts", num_experts)
    rule = f"must be a positive multiple of the {num_ranks} ranks of axis {axis_name!r}"
    check(num_experts >= 1 and num_experts % num_ranks == 0, "num_experts", rule, num_experts)
    check_integer("channel", channel, 0)
    return PlanSizes(
        axis_name=axes,
        num_ranks=num_ranks,
        num_experts=int(num_experts),
        num_tokens=num_tokens,
        top_k=top_k,
        capacity=0,
        expert_alignment=1,
        channel=int(channel),
    )


def together(axes: tuple[str, ...], *operands: Any) -> Any:
    """The operands, all varying over the axes of any of them and over `axes`.

    Done outside the custom_vjp: the transpose of the cast then sums a cotangent over the axes on
    which its primal does not vary, as it must.
    """
    return to_varying(operands, tuple(dict.fromkeys((*axes, *varying_axes(operands)))))


def check_plan(plan: DispatchPlan, argument: str = "plan") -> PlanSizes:
    """The sizes of a plan, which must belong to the enclosing shard_map."""
    if not isinstance(plan, DispatchPlan):
        raise TypeError(f"{argument}: must be a DispatchPlan, got {type(plan).__name__}")
    check_axis(f"{argument}.axis_name", plan.sizes.axis_name)
    return plan.sizes


def _check_call(plan: DispatchPlan, num_sms: int | None) -> PlanSizes:
    sizes = check_plan(plan)
    came_from = "a handle of low_latency_dispatch"
    check(sizes.region is None, "plan", "must come from plan_dispatch", came_from)
    if num_sms is not None:
        check_integer("num_sms", num_sms, 1)
    return sizes
