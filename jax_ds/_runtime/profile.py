"""What the GPUs ran, and for how long: the profiler's record."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData


class Launch(NamedTuple):
    """A kernel or a copy on a stream."""

    start_ns: float
    duration_ns: float
    name: str
    program: str  # the jitted function; not known of what a command buffer launches


def launches(run: Callable[[], Any]) -> list[Launch]:
    """What this process's GPUs ran during `run()`, which must wait for its results; by start."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return sorted(_read(next(pathlib.Path(folder).rglob("*.xplane.pb"))))


def _read(file: pathlib.Path) -> Iterator[Launch]:
    for plane in ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                program = str(dict(event.stats).get("hlo_module", "")).removeprefix("jit_")
                yield Launch(event.start_ns, event.duration_ns, event.name, program)
