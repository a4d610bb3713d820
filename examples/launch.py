"""Devices for the examples: virtual ones on a CPU, GPUs where there are any, several processes.

Import this module before jax, and call `start` before any other use of jax.
"""

import importlib.util
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

# In a clone without an installed jax_ds the clone's sources serve.
if importlib.util.find_spec("jax_ds") is None:
    sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

# XLA sizes its CPU thread pool by this variable. Eight virtual devices that wait for each other
# need more threads than a small machine has cores.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
from absl import app, flags, logging

_MESH = flags.DEFINE_string(
    "mesh", "8", "expert-parallel devices: '8', or '2x4' for two nodes of four"
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the processes that the cluster's environment describes (Slurm, ...)"
)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program; a mistake in its flags ends it with the sentence that says so."""

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except ValueError as error:
            if not str(error).startswith("--"):
                raise
            sys.exit(str(error))

    app.run(guarded)


def start() -> tuple[jax.sharding.Mesh, str | tuple[str, ...]]:
    """Joins the other processes, if any; returns the mesh and the name of its expert axis."""
    logging.set_verbosity(logging.WARNING)
    sizes = _sizes()
    wanted = math.prod(sizes)
    processes = _NUM_PROCESSES.value or 1
    if wanted % processes:
        raise ValueError(f"--mesh: must be a multiple of the {processes} processes, got {wanted}")
    jax.config.update("jax_num_cpu_devices", wanted // processes)
    if _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, processes, _PROCESS_ID.value)
    elif _DISTRIBUTED.value:
        jax.distributed.initialize()
    devices = jax.device_count()
    if devices != wanted:  # GPUs: as many as there are, in nodes only where that comes out even
        nodes = sizes[0] if len(sizes) == 2 else 0
        sizes = (nodes, devices // nodes) if nodes and devices % nodes == 0 else (devices,)
    names = ("ep",) if len(sizes) == 1 else ("node", "gpu")
    return jax.make_mesh(sizes, names), names[0] if len(names) == 1 else names


def _sizes() -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in _MESH.value.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"--mesh: must be a number or NODESxGPUS, got {_MESH.value!r}")
    return sizes


def shard(batch: np.ndarray[Any, Any], mesh: jax.sharding.Mesh) -> jax.Array:
    """Splits a batch that every process holds whole over all devices of the mesh."""
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])
