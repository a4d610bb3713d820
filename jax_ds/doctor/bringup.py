"""The bring-up test as one of its ranks: every link, one by one, with a rate and a verdict.

In round k of a tournament every rank has one partner; both send each other a message several times
in one program and check what arrived. XLA's collectives carry it (NCCL over NVLink or the network,
Gloo between CPUs), and among the GPUs of a host the kernels of `deep_ep` once more. Whoever waits
too long says for whom and ends.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds._runtime import native
from jax_ds.deep_ep import placement
from jax_ds.deep_ep.placement import Placement

Array = jax.Array

AXES = ("host", "gpu")
_HIDDEN = 1024
# Odd, so that a message ends at the partner.
_REPEATS = 15
# The fastest of these counts: other work on the machine must not make a link slow.
_TIMES = 3
# Of the median of links of its kind: below it a link is slow.
_SLOW = 0.7


@dataclasses.dataclass(frozen=True)
class Measured:
    """What two ranks found about the link between them."""

    ranks: tuple[int, int]
    one_host: bool
    by: str  # "collectives" or "kernels"
    gb_per_s: float  # each way; the slower of both ranks' figures
    correct: bool


def join(options: argparse.Namespace) -> None:
    """Makes this process one of the ranks."""
    if options.distributed:
        jax.distributed.initialize()
        return
    # Ours comes first: JAX's timeout ends in a stack trace.
    patience = int(options.timeout) + 60
    absent = f"rank {options.rank}: not all {options.ranks} ranks came to {options.coordinator}"
    with _bounded(options.timeout, absent):
        jax.distributed.initialize(
            options.coordinator,
            options.ranks,
            options.rank,
            local_device_ids=[options.device],
            initialization_timeout=patience,
        )


def run(options: argparse.Namespace) -> int:
    """Measures all links; rank 0 prints them. 1 if any is not OK, on every rank."""
    devices = jax.devices()
    if len(devices) != jax.process_count():
        raise SystemExit("doctor --ranks: must have one device a process; see --device")
    where = arrange(devices)
    # In our order: a rank is a position in the mesh.
    grid = np.array(where.gpus).reshape(tuple(where.axes.values()))
    mesh = jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)
    on_gpu = devices[0].platform == "gpu"
    mib = options.mib or (64.0 if on_gpu else 1.0)
    tokens = max(1, round(mib * 2**20 / (4 * _HIDDEN)))
    why_no_kernels = _why_no_kernels(where, on_gpu)
    _say(_introduction(devices, mib, on_gpu, why_no_kernels))
    measured = list(_collectives(mesh, where, tokens, options.timeout))
    if why_no_kernels is None:
        measured += _kernels(mesh, where, tokens, options.timeout)
    # Cores that the ranks share make any rate; only what arrived is judged there.
    share = _SLOW if on_gpu else 0.0
    verdicts = [(link, verdict(link, measured, share, options.at_least)) for link in measured]
    bad = [word for _, word in verdicts if word != "OK"]
    for link, word in verdicts:
        if word != "OK" or len(devices) <= 16:
            _say(line(link, word))
    _say(f"{len(verdicts)} links, {len(bad)} with problems")
    return 1 if bad else 0


def arrange(devices: list[Any]) -> Placement:
    """Devices by host, as a (host, gpu) mesh if all hosts have equally many, else as one row."""
    hosts = placement.per_host(devices)
    if len(set(hosts.values())) > 1:
        return Placement({"host": 1, "gpu": len(devices)}, devices, known=True)
    order = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.id))
    return Placement({"host": len(hosts), "gpu": len(devices) // len(hosts)}, order, known=True)


def partners(ranks: int) -> list[list[int]]:
    """Rounds of a tournament in which each pair meets once: the partner of every rank, or itself.

    The circle method: one rank stays, the others move on by one place a round.
    """
    even = ranks + ranks % 2
    rounds = []
    for turn in range(even - 1):
        ring = [(turn + i) % (even - 1) for i in range(even - 1)]
        pairs = [(even - 1, ring[0])]
        pairs += [(ring[i], ring[-i]) for i in range(1, even // 2)]
        partner = list(range(ranks))
        for a, b in pairs:
            if max(a, b) < ranks:
                partner[a], partner[b] = b, a
        rounds.append(partner)
    return rounds


def verdict(link: Measured, among: list[Measured], share: float, at_least: float) -> str:
    """OK, slow or failed: a link must reach `share` of the median of its kind, and `at_least`."""
    if not link.correct:
        return "failed"
    alike = [o.gb_per_s for o in among if (o.by, o.one_host) == (link.by, link.one_host)]
    floor = max(at_least, share * statistics.median(alike))
    return "OK" if link.gb_per_s >= floor else "slow"


def line(link: Measured, word: str) -> str:
    """A row of the table."""
    where = "inside a host" if link.one_host else "between hosts"
    a, b = link.ranks
    return f"  {a:>3} - {b:<3} {where}, {link.by:<11} {link.gb_per_s:8.2f} GB/s each way  {word}"


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _introduction(devices: list[Any], mib: float, on_gpu: bool, why_no_kernels: str | None) -> str:
    text = f"{len(devices)} ranks on {devices[0].device_kind}, messages of {mib:g} MiB"
    if not on_gpu:
        return f"{text}; without GPUs, over Gloo: the rates say nothing of NVLink or RDMA"
    return f"{text}; collectives only: {why_no_kernels}" if why_no_kernels else text


def _why_no_kernels(where: Placement, on_gpu: bool) -> str | None:
    if not on_gpu:
        return "there is no GPU"
    if where.size(("gpu",)) == 1:
        return "a host has one rank"
    return native.why_not_native() or placement.why_no_windows(where, ("gpu",))


def _message(rank: Array | int, tokens: int) -> Array:
    """What a rank sends: small whole numbers, others for every rank."""
    index = jnp.arange(tokens * _HIDDEN, dtype=jnp.int32) + 31 * rank
    return (index % 8191).astype(jnp.float32).reshape(tokens, _HIDDEN)


def _program(mesh: jax.sharding.Mesh, exchange_with: Callable[[Array], Any], tokens: int) -> Any:
    """Jitted: `_REPEATS` exchanges with a partner; elements that are not what it sent."""

    def per_rank(partner: Array) -> tuple[Array, Array]:
        rank = jax.lax.axis_index(AXES)
        exchange = exchange_with(partner[0])
        y = jax.lax.fori_loop(0, _REPEATS, lambda _, x: exchange(x), _message(rank, tokens))
        return y[None], jnp.sum(y != _message(partner[0], tokens), dtype=jnp.int32)[None]

    return jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES)))


def _collectives(
    mesh: jax.sharding.Mesh, where: Placement, tokens: int, timeout: float
) -> Iterator[Measured]:
    """Every pair of ranks, through XLA's collectives."""
    for partner in partners(len(where.gpus)):
        pairs = [(a, b) for a, b in enumerate(partner) if a != b]
        permute = functools.partial(jax.lax.ppermute, axis_name=AXES, perm=pairs)
        program = _program(mesh, functools.partial(_always, permute), tokens)
        yield from _meet(mesh, where, program, partner, "collectives", tokens, timeout)


def _always(exchange: Callable[[Array], Array], _: Array) -> Callable[[Array], Array]:
    return exchange


def _kernels(
    mesh: jax.sharding.Mesh, where: Placement, tokens: int, timeout: float
) -> Iterator[Measured]:
    """Every pair inside a host, through the dispatch kernel: each rank holds one expert."""
    hosts, gpus = where.axes["host"], where.axes["gpu"]

    def exchange_with(partner: Array) -> Callable[[Array], Array]:
        ids = jnp.full((tokens, 1), partner % gpus, jnp.int32)
        plan = deep_ep.plan_dispatch(ids, num_experts=gpus, axis_name="gpu", capacity=tokens)
        return lambda x: deep_ep.dispatch(x, plan, implementation="cuda")

    program = _program(mesh, exchange_with, tokens)
    for partner in partners(gpus):
        everywhere = [host * gpus + p for host in range(hosts) for p in partner]
        yield from _meet(mesh, where, program, everywhere, "kernels", tokens, timeout)
    deep_ep.check()


def _meet(
    mesh: jax.sharding.Mesh,
    where: Placement,
    program: Any,
    partner: list[int],
    by: str,
    tokens: int,
    timeout: float,
) -> list[Measured]:
    """One round: runs the program, times it three more times, gathers what all ranks found."""
    rank = [d.process_index for d in where.gpus].index(jax.process_index())
    sharding = NamedSharding(mesh, P(AXES))
    given = jax.make_array_from_callback(
        (len(partner),), sharding, lambda index: np.asarray(partner, np.int32)[index]
    )
    with _bounded(timeout, f"rank {rank}: nothing came from rank {partner[rank]} by {by}"):
        compiled = program.lower(given).compile()
        jax.block_until_ready(compiled(given))
        seconds, wrong = float("inf"), 0
        for _ in range(_TIMES):
            multihost_utils.sync_global_devices("together")
            start = time.perf_counter()
            _, counted = jax.block_until_ready(compiled(given))
            seconds = min(seconds, (time.perf_counter() - start) / _REPEATS)
            wrong += int(np.asarray(counted.addressable_data(0))[0])
        mine = np.array([seconds, wrong], np.float64)
        found = np.asarray(multihost_utils.process_allgather(mine))
    # Gathered by process; ranks are positions in the mesh.
    found = found[[d.process_index for d in where.gpus]]
    size = tokens * _HIDDEN * 4
    return [
        Measured(
            (a, b),
            one_host=len(placement.per_host([where.gpus[a], where.gpus[b]])) == 1,
            by=by,
            gb_per_s=size / max(found[a, 0], found[b, 0]) / 1e9,
            correct=not found[[a, b], 1].any(),
        )
        for a, b in enumerate(partner)
        if a < b
    ]


@contextlib.contextmanager
def _bounded(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the process with the sentence if the block takes longer."""
    timer = threading.Timer(seconds, _give_up, (sentence, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(sentence: str, seconds: float) -> None:
    # NCCL and Gloo wait without end inside C++: no exception could reach them.
    print(f"failed: {sentence} within {seconds:g} s", flush=True)
    os._exit(1)
