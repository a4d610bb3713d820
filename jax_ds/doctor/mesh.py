"""How expert parallelism travels on a mesh, and why."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ds import deep_ep
from jax_ds._runtime import native
from jax_ds.deep_ep import placement
from jax_ds.deep_ep.placement import Placement
from jax_ds.doctor import links
from jax_ds.doctor.report import row


@dataclasses.dataclass(frozen=True)
class AssumedGpu:
    """A GPU that need not be here, with a process of its own."""

    process_index: int
    slice_index: int  # its host
    device_kind: str = "GPU (assumed)"


def describe(options: argparse.Namespace) -> int:
    """Prints the report on `options.mesh`; 1 where the options contradict each other."""
    try:
        axes = parse_axes(options.mesh)
        expert_axes = _expert_axes(axes, options.axis)
        where = locate(axes, options.gpus_per_host)
    except ValueError as error:
        print(error)
        return 1
    if jax.process_index() == 0:
        print("mesh")
        for name, value in explain(where, expert_axes, options.tokens, options.hidden):
            row(name, value)
        print("this host")
        for name, value in links.describe():
            row(name, value)
    return 0


def parse_axes(text: str) -> dict[str, int]:
    """`node=2,gpu=8` as names and sizes."""
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name or not size.isdigit() or int(size) < 1 or name in axes:
            raise ValueError(f"--mesh: must be like node=2,gpu=8, got {text!r}")
        axes[name] = int(size)
    return axes


def _expert_axes(axes: dict[str, int], text: str | None) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else (list(axes)[-1],)
    if len(set(names)) != len(names) or len(names) > 2 or not set(names) <= set(axes):
        raise ValueError(f"--axis: must be one or two axes of --mesh, got {text!r}")
    return names


def locate(axes: dict[str, int], gpus_per_host: int | None) -> Placement:
    """The mesh on this job's GPUs, as `jax.make_mesh` orders them, or on assumed hosts."""
    size = math.prod(axes.values())
    if gpus_per_host is not None:
        if gpus_per_host < 1:
            raise ValueError(f"--gpus-per-host: must be at least 1, got {gpus_per_host}")
        return Placement(axes, [AssumedGpu(i, i // gpus_per_host) for i in range(size)], known=True)
    devices = jax.devices()
    if devices[0].platform != "gpu":
        return Placement(axes, (), known=False)
    if size > len(devices):
        raise ValueError(
            f"--mesh: has {size} devices, this job {len(devices)} GPUs; "
            "--gpus-per-host describes hosts that are not here"
        )
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices[:size])
    return Placement(axes, list(mesh.devices.flat), known=True)


def explain(
    where: Placement, expert_axes: tuple[str, ...], tokens: int, hidden: int
) -> list[tuple[str, str]]:
    """The report as rows of a name and a sentence."""
    direct = expert_axes[-1:]
    groups = where.groups(expert_axes)
    rows = [
        ("axes", ", ".join(f"{name}={size}" for name, size in where.axes.items())),
        ("GPUs", _gpus(where.gpus)),
        (
            "experts over",
            f"{', '.join(expert_axes)}: {_count(len(groups), 'group')} of "
            f"{_count(groups.shape[1], 'rank')}",
        ),
    ]
    if len(expert_axes) == 2:
        rows.append((f"between {expert_axes[0]}s", _network(where, expert_axes)))
    rows.append((f"along {direct[0]}", _inside(where, direct)))
    why_not_cuda = _why_not_cuda(where, direct)
    why_not_default = why_not_cuda or placement.why_not_by_default(where, direct)
    rows += [
        ("None takes", _answer("the kernels", "the portable implementation", why_not_default)),
        ("'cuda'", _answer("runs", "is an error", why_not_cuda)),
        ("NCCL here", native.why_not_nccl() or _nccl_version()),
        ("buffers", _buffers(where, expert_axes, tokens, hidden, bool(why_not_cuda))),
    ]
    return rows


def _answer(yes: str, no: str, why_not: str | None) -> str:
    return f"{no}: {why_not}" if why_not else yes


def _gpus(gpus: Sequence[Any]) -> str:
    if not gpus:
        return "none here: --gpus-per-host describes hosts that are elsewhere"
    kinds = ", ".join(sorted({gpu.device_kind for gpu in gpus}))
    hosts = _count(len(placement.per_host(gpus)), "host")
    processes = _count(len({gpu.process_index for gpu in gpus}), "process", "processes")
    return f"{len(gpus)} x {kinds}, {hosts}, {processes}"


def _hosts_of_groups(where: Placement, axes: tuple[str, ...]) -> set[int]:
    return {len(placement.per_host([where.gpus[i] for i in g])) for g in where.groups(axes)}


def _inside(where: Placement, axes: tuple[str, ...]) -> str:
    """The direct peers: whether each group lies inside one host."""
    if where.size(axes) == 1:
        return "one rank: nothing travels"
    if not where.gpus:
        return f"groups of {where.size(axes)}, whose GPUs are not known"
    spans = _hosts_of_groups(where, axes)
    if spans == {1}:
        return f"groups of {where.size(axes)}, each inside one host: NVLink, peer memory"
    return f"groups of {where.size(axes)} over up to {max(spans)} hosts: NCCL over the network"


def _network(where: Placement, axes: tuple[str, ...]) -> str:
    """What XLA's collectives cross: a token once per node."""
    first = axes[:1]
    if where.size(first) == 1:
        return "one node: nothing crosses"
    text = f"groups of {where.size(first)}, a token crosses once a node by XLA's all_to_all"
    if not where.gpus:
        return text
    if _hosts_of_groups(where, first) == {1}:
        return f"{text}; all inside one host: NCCL over NVLink, no network"
    return f"{text}: NCCL over the network, RDMA where the cards have it"


def _why_not_cuda(where: Placement, direct: tuple[str, ...]) -> str | None:
    if not where.gpus:
        return "there is no GPU"
    assumed = any(isinstance(gpu, AssumedGpu) for gpu in where.gpus)
    why_not = None if assumed else native.why_not_native()
    return why_not or placement.why_no_windows(where, direct, nccl=not assumed)


def _nccl_version() -> str:
    version = native.module().nccl()
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}, new enough"


def _buffers(
    where: Placement, axes: tuple[str, ...], tokens: int, hidden: int, portable: bool
) -> str:
    if portable:
        return "none: only the kernels have symmetric buffers"
    nodes = where.size(axes[:-1])
    slots = tokens * nodes
    mib = [
        deep_ep.buffer_bytes(
            num_tokens=slots,
            hidden=hidden,
            num_ranks=where.size(axes[-1:]),
            dtype=jnp.float8_e4m3fn,
            training=training,
        )
        >> 20
        for training in (False, True)
    ]
    crossing = f", all crossing to each other node ({nodes - 1})" if nodes > 1 else ""
    return (
        f"{mib[0]} MiB a rank and channel, {mib[1]} in training, for {tokens} FP8 tokens of "
        f"{hidden}{crossing}"
    )


def _count(number: int, name: str, plural: str = "") -> str:
    return f"{number} {name if number == 1 else plural or name + 's'}"
