"""Configurations that were measured instead of estimated: the file that `tune` writes.

A call's configuration is an attribute of its custom call, looked up while tracing, so that compiled
programs and the persistent compilation cache hold what they were traced with.
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

from jax_ds._core import settings
from jax_ds._core.checks import fail
from jax_ds._runtime import native

_VARIABLE = "JAX_DS_GEMM_TUNING"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for, as the handler takes it."""

    mode: str
    output: str
    accumulate: bool
    m: int
    n: int
    k: int
    groups: int
    expected_rows: int = 0  # of a masked group; 0: not known

    def __str__(self) -> str:
        added = ", added" if self.accumulate else ""
        of = f" of {self.expected_rows} rows" if self.expected_rows else ""
        sizes = f"{self.m}x{self.n}x{self.k}, {self.groups} groups{of}"
        return f"{self.mode} {sizes}, {self.output}{added}"


def configuration(problem: Problem) -> str:
    """The configuration measured best for `problem`; empty leaves the choice to the model.

    Raises:
      ValueError: for a file that cannot be read, or names a configuration of another version.
    """
    file = settings.read().gemm_tuning
    if file is None:
        return ""
    entry = _entries(file).get(str(problem))
    if entry is None:
        return ""
    config: str = entry["config"]
    try:
        known = [name for name, _ in candidates(problem)]
    except RuntimeError:  # no native module: lowering for another machine
        return config
    if config not in known:
        fail(_VARIABLE, f"must name one of {known} for {problem}, tune again", config)
    return config


def candidates(problem: Problem, num_sms: int = 132) -> list[tuple[str, float]]:
    """Every configuration for `problem` with the model's time in microseconds, best first."""
    fields = dataclasses.asdict(problem)
    ranked: list[tuple[str, float]] = native.module().gemm_candidates(**fields, num_sms=num_sms)
    return ranked


@functools.cache
def _entries(file: pathlib.Path) -> dict[str, Any]:
    """Read once: what a process traces must not depend on when."""
    try:
        entries: dict[str, Any] = read(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(_VARIABLE, f"must name a file that deep_gemm.tune wrote ({error})", str(file))
    return entries


def read(file: pathlib.Path) -> dict[str, Any]:
    """`str(problem)` to its entry: the best `config` and the measured `us` of all."""
    content = json.loads(file.read_text())
    entries: dict[str, Any] = content["problems"]
    for entry in entries.values():
        if not isinstance(entry["config"], str):
            raise TypeError("config is no string")
    return entries


def write(file: pathlib.Path, device: str, problem: Problem, us: dict[str, float]) -> None:
    """Adds or replaces the entry of `problem`; the file appears as a whole."""
    entries = read(file) if file.exists() else {}
    entries[str(problem)] = {"config": min(us, key=us.__getitem__), "us": us, "device": device}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump({"problems": dict(sorted(entries.items()))}, temporary, indent=1)
    pathlib.Path(temporary.name).replace(file)
