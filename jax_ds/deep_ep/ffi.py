"""The communication kernels' custom calls: shapes and attributes, and the sizes they take.

The kernels serve the devices of one mesh axis, which can address each other's memory; over
(node, gpu) those of the GPU axis, after XLA's collectives have crossed the node axis.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jax_ds._runtime.call import ffi_call
from jax_ds.deep_ep import placement
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes
from jax_ds.deep_ep.xla import at_least_one, stage
from jax_ds.quantization import Quantized

MAX_COLUMNS = 32
MAX_SMS = 132
# A token's bytes travel in pieces of 16.
PIECE = 16


def exchange(
    name: str,
    outputs: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    attributes: Mapping[str, Any],
) -> list[Any]:
    """The communicating call `name` of this room; a batch of calls is made one after the other."""
    return ffi_call(
        f"jax_ds_deep_ep_{name}",
        outputs,
        *operands,
        attributes=attributes,
        vmap_method="sequential",
        communicates=True,
    )


def dispatch(x: Shaped[Array, "T H"] | Quantized, plan: DispatchPlan, num_sms: int | None) -> Any:
    """`rows[c] = x` of row c's token; `[C, H]`, Quantized if x is."""
    values, *scales = (x.values, x.scales) if isinstance(x, Quantized) else (x,)
    values, *scales = stage(plan, *(at_least_one(a) for a in (values, *scales)))
    capacity = plan.row_source.shape[0]
    outputs = [jax.ShapeDtypeStruct((capacity, a.shape[1]), a.dtype) for a in (values, *scales)]
    rows = exchange(
        "dispatch",
        outputs,
        axis_index(plan.sizes),
        plan.route.needed,
        plan.row_source,
        plan.row_of,
        values,
        *scales,
        attributes={
            **_attributes(plan, values, num_sms),
            "num_scales": scales[0].shape[1] if scales else 0,
        },
    )
    return Quantized(*rows) if scales else rows[0]


def combine(
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    weights: Float[Array, "T K"] | None,
    num_sms: int | None,
) -> tuple[Float[Array, "T H"], Float[Array, "B J"] | None]:
    """`y[t] = sum_k weights_tk * rows[row of (t, k)]`, and the weights as `xla.publish` has them.

    Without weights every row counts once.
    """
    needed = plan.route.needed
    shape = needed.shape[1], rows.shape[1]
    # One result where there are two, y and behind it the weights: XLA awaits a call of two at once.
    words = jnp.uint16 if rows.dtype.itemsize == 2 else jnp.uint32
    width = 4 // rows.dtype.itemsize
    size = math.prod(shape), 0 if weights is None else plan.row_of.size * width
    (made,) = exchange(
        "combine",
        [jax.ShapeDtypeStruct((sum(size),), words)],
        axis_index(plan.sizes),
        needed,
        plan.row_of,
        plan.column,
        rows,
        *([] if weights is None else stage(plan, at_least_one(weights))),
        attributes={
            **_attributes(plan, rows, num_sms),
            "dtype": rows.dtype.name,
            "top_k": plan.sizes.top_k,
        },
    )
    y = jax.lax.bitcast_convert_type(made[: size[0]].reshape(shape), rows.dtype)
    result: Array = plan.route.settle(y)[: plan.sizes.num_tokens].astype(rows.dtype)
    if weights is None:
        return result, None
    by_column = made[size[0] :].reshape(*plan.row_of.shape, *([width] if width > 1 else []))
    return result, jax.lax.bitcast_convert_type(by_column, jnp.float32)


def unsupported(sizes: PlanSizes, x: Any, num_sms: int | None) -> str | None:
    """Why the kernels cannot move tokens like those of x `[_, H]`; None if they can."""
    values = x.values if isinstance(x, Quantized) else x
    width = values.shape[1] * values.dtype.itemsize
    if sizes.top_k > MAX_COLUMNS:
        return f"its kernels serve at most {MAX_COLUMNS} experts per token"
    if width == 0 or width % PIECE:
        return f"its kernels move tokens of a multiple of {PIECE} bytes, these have {width}"
    if num_sms is not None and num_sms > MAX_SMS:
        return f"num_sms is at most {MAX_SMS}"
    return placement.why_no_windows(placement.current(), sizes.direct_axes)


def not_by_default(sizes: PlanSizes) -> str | None:
    """Why None takes the portable implementation where "cuda" would run; None if it does not."""
    return placement.why_not_by_default(placement.current(), sizes.direct_axes)


def _attributes(plan: DispatchPlan, x: Shaped[Array, "_ H"], num_sms: int | None) -> dict[str, Any]:
    num_ranks, num_tokens = plan.route.needed.shape
    return {
        "groups": placement.current().groups(plan.sizes.direct_axes).reshape(-1),
        "num_ranks": num_ranks,
        "channel": plan.sizes.channel,
        "num_tokens": num_tokens,
        "token_bytes": x.shape[1] * x.dtype.itemsize,
        # An i64 for the handler, also where NumPy's int32 was given.
        "num_sms": int(num_sms or 0),
    }


def axis_index(sizes: PlanSizes) -> Int[Array, ""]:
    """The rank among those that exchange records, which the kernels compare with NCCL's."""
    return jnp.asarray(jax.lax.axis_index(sizes.direct_axes), jnp.int32)
