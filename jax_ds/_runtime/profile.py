"""What the GPUs ran, and for how long: the profiler's record."""

import pathlib
import tempfile
import warnings
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


def launches(
    run: Callable[[], Any], *, planes: str = "/device:GPU", lines: str = "Stream"
) -> list[Launch]:
    """What this process's GPUs ran during `run()`, which must wait for its results; by start.

    `planes` and `lines` are how the names of those parts of the record begin that are read.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        with warnings.catch_warnings():
            # JAX warns when it first makes the type of an event's details, and where warnings are
            # errors it then ends the process.
            warnings.simplefilter("ignore")
            return sorted(_read(file, planes, lines))


def _read(file: pathlib.Path, planes: str, lines: str) -> Iterator[Launch]:
    for plane in ProfileData.from_file(str(file)).planes:
        if not plane.name.startswith(planes):
            continue
        for line in plane.lines:
            if not line.name.startswith(lines):
                continue
            for event in line.events:
                program = str(dict(event.stats).get("hlo_module", "")).removeprefix("jit_")
                yield Launch(event.start_ns, event.duration_ns, event.name, program)
