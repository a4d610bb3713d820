"""The calls that choose between the portable implementation and the kernels."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from jax_ds._runtime.choose import Implementation, choose
from jax_ds.deep_ep import ffi, xla
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes, make_plan


@dataclasses.dataclass(frozen=True)
class Options:
    """What a call and the calls of its gradient share."""

    implementation: Implementation
    num_sms: int | None = None


def plan(
    options: Options, sizes: PlanSizes, node_capacity: int | None, expert_ids: Int[Array, "T K"]
) -> DispatchPlan:
    """The plan of `expert_ids`; XLA's collectives exchange the ids in every implementation."""

    def portable(expert_ids: Array) -> DispatchPlan:
        return make_plan(expert_ids, sizes, node_capacity)

    made: DispatchPlan = choose(
        "plan_dispatch", options.implementation, (expert_ids,), xla=portable, cuda=portable
    )
    return made


def dispatch(options: Options, x: Any, plan: DispatchPlan) -> Any:
    """Tokens, or Quantized tokens, to rows."""
    return choose(
        "dispatch",
        options.implementation,
        (x, plan),
        xla=xla.dispatch,
        cuda=lambda x, plan: ffi.dispatch(x, plan, options.num_sms),
        unsupported=_unsupported(options, plan, x),
    )


def combine(
    options: Options,
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    weights: Float[Array, "T K"] | None,
) -> tuple[Float[Array, "T H"], Float[Array, "B J"] | None]:
    """Rows to tokens, and the weights where the rows are, as `xla.publish` returns them."""

    def portable(rows: Array, plan: DispatchPlan, weights: Array | None) -> Any:
        by_column = None if weights is None else xla.publish(weights, plan)
        return xla.combine(rows, plan, by_column), by_column

    result: tuple[Array, Array | None] = choose(
        "combine",
        options.implementation,
        (rows, plan, weights),
        xla=portable,
        cuda=lambda rows, plan, weights: ffi.combine(rows, plan, weights, options.num_sms),
        unsupported=_unsupported(options, plan, rows),
    )
    return result


def _unsupported(options: Options, plan: DispatchPlan, tokens: Any) -> str | None:
    if options.implementation == "xla":
        return None  # do not look for GPUs and NCCL
    reason = ffi.unsupported(plan.sizes, tokens, options.num_sms)
    if reason is None and options.implementation is None:
        return ffi.not_by_default(plan.sizes)
    return reason
