"""Compiles every kernel configuration for sm_90a, which needs no GPU, and finds what is wrong."""

import concurrent.futures
import dataclasses
import os
import re
from typing import Any

from jax_ds._runtime import native


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel configuration and what became of it."""

    room: str
    name: str
    report: dict[str, Any] | None
    error: str = ""

    @property
    def problem(self) -> str:
        """Why this configuration is not acceptable; empty if it is."""
        if self.report is None:
            return self.error
        if self.report["clean"]:
            return ""
        parts = []
        if self.report["spill_stores"] or self.report["spill_loads"]:
            parts.append("spills registers")
        if self.report["stack"]:
            parts.append("uses a stack frame")
        return "; ".join(parts + self.report["remarks"])


def _short(spec: Any) -> str:
    """The entry without its namespaces, and the options."""
    return " ".join([re.sub(r"\w+::", "", spec.entry), *spec.options])


def _compile_one(kernel: tuple[str, Any], cached: bool) -> Compiled:
    room, spec = kernel
    try:
        report = native.module().compile(spec, use_cache=cached)
    except RuntimeError as error:
        return Compiled(room, _short(spec), None, str(error))
    return Compiled(room, _short(spec), report)


def compile_all(room: str | None, cached: bool) -> int:
    major, minor, path = native.module().nvrtc()
    kernels = [kernel for kernel in native.module().kernels() if room in (None, kernel[0])]
    if not kernels:
        print(f"no kernels in room {room!r}")
        return 1
    print(f"NVRTC {major}.{minor} ({path}), sm_90a, {len(kernels)} kernels")
    header = ("registers", "shared B", "stack B", "spill B", "cubin kB", "seconds")
    print(" ".join(f"{name:>9}" for name in header), " kernel")
    problems = 0
    # NVRTC compiles in parallel; the calls release the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda kernel: _compile_one(kernel, cached), kernels):
            problems += bool(result.problem)
            _print_compiled(result)
    print(f"{len(kernels)} kernels, {problems} with problems")
    return 1 if problems else 0


def _print_compiled(result: Compiled) -> None:
    if result.report is not None:
        r = result.report
        columns: list[Any] = [
            r["registers"],
            r["static_shared"] + r["dynamic_shared"],
            r["stack"],
            r["spill_stores"] + r["spill_loads"],
            r["cubin_bytes"] // 1000,
            f"{r['seconds']:.2f}",
        ]
        print(" ".join(f"{column:>9}" for column in columns), f" {result.room}: {result.name}")
    if result.problem:
        print(f"PROBLEM in {result.room}: {result.name}: {result.problem}")
