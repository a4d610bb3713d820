"""The communication kernels' custom calls: groups of ranks, shapes and attributes.

The kernels serve one mesh axis whose devices can address each other's memory. Which calls they
take is decided while tracing, from facts that are equal on every process.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jax_ds._runtime import native
from jax_ds._runtime.call import ffi_call
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes
from jax_ds.deep_ep.route import FlatRoute
from jax_ds.deep_ep.xla import at_least_one
from jax_ds.quantization import Quantized

MAX_RANKS = 32
MAX_COLUMNS = 32
MAX_SMS = 132
# A token's bytes travel in pieces of 16.
_PIECE = 16


def dispatch(x: Shaped[Array, "T H"] | Quantized, plan: DispatchPlan, num_sms: int | None) -> Any:
    """`rows[c] = x` of row c's token; `[C, H]`, Quantized if x is."""
    values, *scales = (x.values, x.scales) if isinstance(x, Quantized) else (x,)
    values = at_least_one(values)
    scales = [at_least_one(s) for s in scales]
    capacity = plan.row_source.shape[0]
    outputs = [jax.ShapeDtypeStruct((capacity, a.shape[1]), a.dtype) for a in (values, *scales)]
    rows = ffi_call(
        "jax_ds_deep_ep_dispatch",
        outputs,
        _axis_index(plan.sizes),
        _flat(plan).needed,
        plan.row_source,
        plan.row_of,
        values,
        *scales,
        attributes={
            **_attributes(plan, values, num_sms),
            "num_scales": scales[0].shape[1] if scales else 0,
        },
        vmap_method="sequential",
        communicates=True,
    )
    return Quantized(*rows) if scales else rows[0]


def combine(
    rows: Float[Array, "C H"],
    plan: DispatchPlan,
    by_column: Float[Array, "B J"] | None,
    num_sms: int | None,
) -> Float[Array, "T H"]:
    """`y[t] = sum over t's rows c of w_c * rows[c]`; w_c is 1 without weights."""
    needed = _flat(plan).needed
    (y,) = ffi_call(
        "jax_ds_deep_ep_combine",
        [jax.ShapeDtypeStruct((needed.shape[1], rows.shape[1]), rows.dtype)],
        _axis_index(plan.sizes),
        needed,
        plan.row_of,
        plan.column,
        rows,
        *([] if by_column is None else [by_column]),
        attributes={**_attributes(plan, rows, num_sms), "dtype": rows.dtype.name},
        vmap_method="sequential",
        communicates=True,
    )
    result: Array = y[: plan.sizes.num_tokens]
    return result


def unsupported(sizes: PlanSizes, x: Any, num_sms: int | None) -> str | None:
    """Why the kernels cannot move tokens like those of x `[_, H]`; None if they can."""
    values = x.values if isinstance(x, Quantized) else x
    width = values.shape[1] * values.dtype.itemsize
    if len(sizes.axis_name) != 1:
        return "its kernels serve one mesh axis, not (node, gpu)"
    if sizes.num_ranks > MAX_RANKS:
        return f"its kernels serve at most {MAX_RANKS} ranks, the axis has {sizes.num_ranks}"
    if sizes.columns > MAX_COLUMNS:
        return f"its kernels serve at most {MAX_COLUMNS} experts of a rank per token"
    if width == 0 or width % _PIECE:
        return f"its kernels move tokens of a multiple of {_PIECE} bytes, these have {width}"
    if num_sms is not None and num_sms > MAX_SMS:
        return f"num_sms is at most {MAX_SMS}"
    return None if sizes.num_ranks == 1 else _why_no_windows()


def not_by_default(sizes: PlanSizes) -> str | None:
    """Why None takes the portable implementation where "cuda" would run; None if it does not."""
    if sizes.num_ranks == 1:
        return None
    try:
        gpus = jax.devices("cuda")
    except RuntimeError:
        return None
    if len({gpu.process_index for gpu in gpus}) < len(gpus):
        return "the kernels have only run with one process for each GPU"
    return None


def groups(axis_name: tuple[str, ...]) -> np.ndarray:
    """Which devices exchange records, `[groups, R]`: positions in `mesh.devices.flat`.

    The other axes of the enclosing mesh enumerate the groups, `axis_name` the ranks of one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ids = np.arange(mesh.size, dtype=np.int64).reshape(mesh.axis_sizes)
    others = [a for a in mesh.axis_names if a not in axis_name]
    order = [mesh.axis_names.index(a) for a in (*others, *axis_name)]
    return ids.transpose(order).reshape(-1, jax.lax.axis_size(axis_name))


def _why_no_windows() -> str | None:
    """Why ranks cannot address each other's memory, as far as every process knows it alike."""
    try:
        gpus = jax.devices("cuda")
    except RuntimeError:
        return None  # lowered on a machine without a GPU: as for a machine that has what it takes
    hosts = {getattr(gpu, "slice_index", gpu.process_index) for gpu in gpus}
    if len(hosts) > 1:
        return f"its kernels serve the GPUs of one host, there are {len(hosts)}"
    return native.why_not_nccl()


def _attributes(plan: DispatchPlan, x: Shaped[Array, "_ H"], num_sms: int | None) -> dict[str, Any]:
    return {
        "groups": groups(plan.sizes.axis_name).reshape(-1),
        "num_ranks": plan.sizes.num_ranks,
        "channel": plan.sizes.channel,
        "num_tokens": _flat(plan).needed.shape[1],
        "token_bytes": x.shape[1] * x.dtype.itemsize,
        "num_sms": num_sms or 0,
    }


def _axis_index(sizes: PlanSizes) -> Int[Array, ""]:
    """The rank, which the kernels compare with NCCL's."""
    return jnp.asarray(jax.lax.axis_index(sizes.axis_name), jnp.int32)


def _flat(plan: DispatchPlan) -> FlatRoute:
    assert isinstance(plan.route, FlatRoute)
    return plan.route
