"""Gradients of dispatch and combine, each made of the other.

`combine` without weights is the transpose of `dispatch`, and the other way round. With weights,
for a cotangent g of y,

    d_rows[c]    = w_c * dispatch(g)[c]
    d_weights[k] = <rows[c], dispatch(g)[c]>     for the row c of id k, sent back as a scalar

A plan holds integers only and takes no cotangent.
"""

import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ds.deep_ep import calls, xla
from jax_ds.deep_ep.calls import Options
from jax_ds.deep_ep.plan import DispatchPlan


class _CombineResiduals(NamedTuple):
    rows: Array
    plan: DispatchPlan
    by_column: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dispatch(options: Options, x: Float[Array, "T H"], plan: DispatchPlan) -> Float[Array, "C H"]:
    rows: Array = calls.dispatch(options, x, plan)
    return rows


def _dispatch_fwd(options: Options, x: Array, plan: DispatchPlan) -> tuple[Array, DispatchPlan]:
    return dispatch(options, x, plan), plan


def _dispatch_bwd(options: Options, plan: DispatchPlan, g: Array) -> tuple[Array, None]:
    return combine_unweighted(options, g, plan), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine_unweighted(
    options: Options, rows: Float[Array, "C H"], plan: DispatchPlan
) -> Float[Array, "T H"]:
    return calls.combine(options, rows, plan, None)


def _combine_unweighted_fwd(
    options: Options, rows: Array, plan: DispatchPlan
) -> tuple[Array, DispatchPlan]:
    return combine_unweighted(options, rows, plan), plan


def _combine_unweighted_bwd(options: Options, plan: DispatchPlan, g: Array) -> tuple[Array, None]:
    return dispatch(options, g, plan), None


combine_unweighted.defvjp(_combine_unweighted_fwd, _combine_unweighted_bwd)


def combine(
    options: Options,
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    weights: Float[Array, "T K"],
) -> Float[Array, "T H"]:
    # Sending the weights is linear: its transpose sends one scalar of each row back.
    return _combine_weighted(options, rows, plan, xla.publish(weights, plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_weighted(
    options: Options,
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    by_column: Float[Array, "B J"],
) -> Float[Array, "T H"]:
    return calls.combine(options, rows, plan, by_column)


def _combine_weighted_fwd(
    options: Options, rows: Array, plan: DispatchPlan, by_column: Array
) -> tuple[Array, _CombineResiduals]:
    y = _combine_weighted(options, rows, plan, by_column)
    return y, _CombineResiduals(rows, plan, by_column)


def _combine_weighted_bwd(
    options: Options, residuals: _CombineResiduals, g: Array
) -> tuple[Array, None, Array]:
    rows, plan, by_column = residuals
    back = dispatch(options, g, plan).astype(jnp.float32)
    weight = xla.weight_of_rows(by_column, plan)
    d_rows = (weight[:, None] * back).astype(rows.dtype)
    # A row without a token may hold NaN, which the gradient of this gradient would meet.
    held = jnp.where(plan.row_source[:, None] >= 0, rows.astype(jnp.float32), 0)
    return d_rows, None, xla.in_rows(jnp.sum(held * back, axis=1), plan)


_combine_weighted.defvjp(_combine_weighted_fwd, _combine_weighted_bwd)


def inference_only(op: str, *operands: Any) -> Any:
    """The operands, whose differentiation raises a TypeError."""

    def same(*operands: Any) -> Any:
        return operands

    def refuse(*_: Any) -> NoReturn:
        raise TypeError(
            f"{op}: not differentiable, made for inference; use plan_dispatch, dispatch and combine"
        )

    call = jax.custom_vjp(same)
    call.defvjp(refuse, refuse)
    return call(*operands)
