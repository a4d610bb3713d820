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
    weights: Array
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
    y, _ = calls.combine(options, rows, plan, None)
    return y


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
    y, _ = _combine_and_publish(options, rows, plan, weights)
    return y


# The weights at the ranks of the rows are a result too, so that the backward pass need not send
# them again, and the gradient of the gradient sees where they come from.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_and_publish(
    options: Options, rows: Array, plan: DispatchPlan, weights: Array
) -> tuple[Float[Array, "T H"], Float[Array, "B J"]]:
    y, by_column = calls.combine(options, rows, plan, weights)
    assert by_column is not None
    return y, by_column


def _combine_fwd(
    options: Options, rows: Array, plan: DispatchPlan, weights: Array
) -> tuple[tuple[Array, Array], _CombineResiduals]:
    y, by_column = _combine_and_publish(options, rows, plan, weights)
    return (y, by_column), _CombineResiduals(rows, plan, weights, by_column)


def _combine_bwd(
    options: Options, residuals: _CombineResiduals, cotangents: tuple[Array, Array]
) -> tuple[Array, None, Array]:
    rows, plan, weights, by_column = residuals
    g, d_by_column = cotangents
    back = dispatch(options, g, plan).astype(jnp.float32)
    weight = xla.weight_of_rows(by_column, plan)
    d_rows = (weight[:, None] * back).astype(rows.dtype)
    # A row without a token may hold NaN, which the gradient of this gradient would meet.
    held = jnp.where(plan.row_source[:, None] >= 0, rows.astype(jnp.float32), 0)
    d_by_column = d_by_column + xla.in_rows(jnp.sum(held * back, axis=1), plan)
    # Sending the weights is linear: its transpose sends one scalar of each row back.
    send_back = jax.linear_transpose(lambda weights: xla.publish(weights, plan), weights)
    (d_weights,) = send_back(d_by_column)
    return d_rows, None, d_weights


_combine_and_publish.defvjp(_combine_fwd, _combine_bwd)


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
