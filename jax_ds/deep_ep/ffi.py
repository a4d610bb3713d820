"""The communication kernels' custom calls: groups of ranks, shapes and attributes.

The kernels serve the devices of one mesh axis, which can address each other's memory; over
(node, gpu) those of the GPU axis, after XLA's collectives have crossed the node axis. Which calls
they take is decided while tracing, from where the job's GPUs are, which every process knows alike,
and from the NCCL library of this process: NCCL makes no communicator of ranks whose versions
differ.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.mesh import get_concrete_mesh
from jaxtyping import Array, Float, Int, Shaped

from jax_ds._runtime import native
from jax_ds._runtime.call import ffi_call
from jax_ds.deep_ep.plan import DispatchPlan, PlanSizes
from jax_ds.deep_ep.xla import at_least_one, stage
from jax_ds.quantization import Quantized

MAX_RANKS = 32
MAX_COLUMNS = 32
MAX_SMS = 132
# A token's bytes travel in pieces of 16.
_PIECE = 16
_PLATFORM = "gpu"


def dispatch(x: Shaped[Array, "T H"] | Quantized, plan: DispatchPlan, num_sms: int | None) -> Any:
    """`rows[c] = x` of row c's token; `[C, H]`, Quantized if x is."""
    values, *scales = (x.values, x.scales) if isinstance(x, Quantized) else (x,)
    values, *scales = stage(plan, *(at_least_one(a) for a in (values, *scales)))
    capacity = plan.row_source.shape[0]
    outputs = [jax.ShapeDtypeStruct((capacity, a.shape[1]), a.dtype) for a in (values, *scales)]
    rows = ffi_call(
        "jax_ds_deep_ep_dispatch",
        outputs,
        _axis_index(plan.sizes),
        plan.route.needed,
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
    needed = plan.route.needed
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
    result: Array = plan.route.settle(y)[: plan.sizes.num_tokens].astype(rows.dtype)
    return result


def unsupported(sizes: PlanSizes, x: Any, num_sms: int | None) -> str | None:
    """Why the kernels cannot move tokens like those of x `[_, H]`; None if they can."""
    values = x.values if isinstance(x, Quantized) else x
    width = values.shape[1] * values.dtype.itemsize
    ranks = jax.lax.axis_size(sizes.direct_axes)
    if ranks > MAX_RANKS:
        return f"its kernels serve at most {MAX_RANKS} ranks, the axis has {ranks}"
    if sizes.columns > MAX_COLUMNS:
        return f"its kernels serve at most {MAX_COLUMNS} experts of a rank per token"
    if width == 0 or width % _PIECE:
        return f"its kernels move tokens of a multiple of {_PIECE} bytes, these have {width}"
    if num_sms is not None and num_sms > MAX_SMS:
        return f"num_sms is at most {MAX_SMS}"
    return None if ranks == 1 else _why_no_windows(sizes.direct_axes)


def not_by_default(sizes: PlanSizes) -> str | None:
    """Why None takes the portable implementation where "cuda" would run; None if it does not."""
    if jax.lax.axis_size(sizes.direct_axes) == 1:
        return None
    gpus = _gpus()
    if len({gpu.process_index for gpu in gpus}) < len(gpus):
        return "the kernels have only run with one process for each GPU"
    if _mesh_gpus() is None and len(_per_host(gpus)) > 1:
        return "without jax.set_mesh it is not known which GPUs of several hosts make up a group"
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


def _why_no_windows(axes: tuple[str, ...]) -> str | None:
    """Why ranks cannot address each other's memory, as far as it is known while tracing."""
    gpus = _gpus()
    if not gpus:
        return None  # lowered on a machine without a GPU: as for a machine that has what it takes
    mesh = _mesh_gpus()
    if mesh is not None:
        hosts = max(len(_per_host([mesh[i] for i in g])) for g in groups(axes))
        if hosts > 1:
            return f"its kernels serve the GPUs of one host, a group of this axis has {hosts}"
    per_host = _per_host(gpus)
    most = max(per_host.values())
    ranks = jax.lax.axis_size(axes)
    if len(per_host) > 1 and ranks > most:
        return (
            f"its kernels serve the GPUs of one host, the axis has {ranks} ranks and "
            f"a host at most {most} of the GPUs"
        )
    return native.why_not_nccl()


def _gpus() -> Sequence[Any]:
    """The GPUs of the mesh where they are known, else those of the job; none without a GPU."""
    try:
        gpus: Sequence[Any] = jax.devices("cuda")
    except RuntimeError:
        return ()
    return _mesh_gpus() or gpus


def _mesh_gpus() -> Sequence[Any] | None:
    """The GPUs of the enclosing mesh, by position; None where tracing does not know them.

    `jax.shard_map(mesh=...)` leaves nothing but names and sizes of axes, `jax.set_mesh` the
    devices too; JAX has no public way to ask for them under `jit`.
    """
    mesh, here = get_concrete_mesh(), jax.sharding.get_abstract_mesh()
    if (mesh.axis_names, mesh.axis_sizes) != (here.axis_names, here.axis_sizes):
        return None
    devices = list(mesh.devices.flat)
    return devices if all(d.platform == _PLATFORM for d in devices) else None


def _per_host(gpus: Sequence[Any]) -> collections.Counter[int]:
    """How many of the GPUs each host has."""
    return collections.Counter(getattr(gpu, "slice_index", gpu.process_index) for gpu in gpus)


def _attributes(plan: DispatchPlan, x: Shaped[Array, "_ H"], num_sms: int | None) -> dict[str, Any]:
    num_ranks, num_tokens = plan.route.needed.shape
    return {
        "groups": groups(plan.sizes.direct_axes).reshape(-1),
        "num_ranks": num_ranks,
        "channel": plan.sizes.channel,
        "num_tokens": num_tokens,
        "token_bytes": x.shape[1] * x.dtype.itemsize,
        # An i64 for the handler, also where NumPy's int32 was given.
        "num_sms": int(num_sms or 0),
    }


def _axis_index(sizes: PlanSizes) -> Int[Array, ""]:
    """The rank among those that exchange records, which the kernels compare with NCCL's."""
    return jnp.asarray(jax.lax.axis_index(sizes.direct_axes), jnp.int32)
