"""Where the devices of a mesh are, and which of them can exchange records by kernels.

The choice is made while tracing, from where the job's GPUs are, which every process knows alike,
and from the NCCL library of this process: NCCL makes no communicator of ranks whose versions
differ.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.mesh import get_concrete_mesh

from jax_ds._runtime import native

MAX_RANKS = 32
_PLATFORM = "gpu"


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the GPUs it is made of, as far as they are known.

    Attributes:
      axes: names and sizes of the mesh axes.
      gpus: the GPUs of the mesh if they are known, else those of the job; none without a GPU.
      known: whether they are those of the mesh, in the order of its positions.
    """

    axes: dict[str, int]
    gpus: Sequence[Any]
    known: bool

    def groups(self, axes: tuple[str, ...]) -> np.ndarray:
        """Which devices exchange records over `axes`, `[groups, R]`: positions in the mesh.

        The other axes of the mesh enumerate the groups, `axes` the ranks of one.
        """
        names = list(self.axes)
        ids = np.arange(math.prod(self.axes.values()), dtype=np.int64)
        ids = ids.reshape(tuple(self.axes.values()))
        others = [a for a in names if a not in axes]
        order = [names.index(a) for a in (*others, *axes)]
        return ids.transpose(order).reshape(-1, self.size(axes))

    def size(self, axes: tuple[str, ...]) -> int:
        """R, the ranks along `axes`."""
        return math.prod(self.axes[a] for a in axes)


def current() -> Placement:
    """Of the enclosing mesh, while tracing."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    try:
        gpus: Sequence[Any] = jax.devices("cuda")
    except RuntimeError:
        return Placement(axes, (), known=False)
    of_mesh = _mesh_gpus()
    return Placement(axes, gpus if of_mesh is None else of_mesh, known=of_mesh is not None)


def why_no_windows(where: Placement, axes: tuple[str, ...], *, nccl: bool = True) -> str | None:
    """Why ranks cannot address each other's memory, as far as it is known while tracing.

    `nccl`: ask for this process's NCCL too.
    """
    ranks = where.size(axes)
    if ranks > MAX_RANKS:
        return f"its kernels serve at most {MAX_RANKS} ranks, the axis has {ranks}"
    if ranks == 1 or not where.gpus:
        return None  # lowered on a machine without a GPU: as for a machine that has what it takes
    if where.known:
        hosts = max(len(per_host([where.gpus[i] for i in g])) for g in where.groups(axes))
        if hosts > 1:
            return f"its kernels serve the GPUs of one host, a group of this axis has {hosts}"
    gpus_of = per_host(where.gpus)
    most = max(gpus_of.values())
    if len(gpus_of) > 1 and ranks > most:
        return (
            f"its kernels serve the GPUs of one host, the axis has {ranks} ranks and "
            f"a host at most {most} of the GPUs"
        )
    return native.why_not_nccl() if nccl else None


def why_not_by_default(where: Placement, axes: tuple[str, ...]) -> str | None:
    """Why None takes the portable implementation where "cuda" would run; None if it does not."""
    if where.size(axes) == 1:
        return None
    if len({gpu.process_index for gpu in where.gpus}) < len(where.gpus):
        return "the kernels have only run with one process for each GPU"
    if not where.known and len(per_host(where.gpus)) > 1:
        return "without jax.set_mesh it is not known which GPUs of several hosts make up a group"
    return None


def per_host(gpus: Sequence[Any]) -> collections.Counter[int]:
    """How many of the GPUs each host has."""
    return collections.Counter(getattr(gpu, "slice_index", gpu.process_index) for gpu in gpus)


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
