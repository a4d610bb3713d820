"""`python -m jax_ds.doctor`: what will run natively on this machine, what not, and why.

`--compile` compiles every kernel configuration for sm_90a, which needs no GPU, and prints what
each needs; it fails if one does not compile, spills registers, uses a stack frame, or if the
assembler says that it serialised tensor-core instructions or ignored a register hint.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from jax_ds._core import settings
from jax_ds._runtime import native, toolchain

_PACKAGES = (
    "jax-ds",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cuda-nvrtc",
    "nvidia-nccl-cu13",
)
_MIN_NCCL = (2, 30, 4)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; 0 unless `--compile` finds a problem."""
    parser = argparse.ArgumentParser(prog="python -m jax_ds.doctor", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile every kernel for sm_90a")
    parser.add_argument("--room", help="with --compile: only this room's kernels")
    parser.add_argument("--cached", action="store_true", help="with --compile: use the disk cache")
    options = parser.parse_args(arguments)
    if options.compile:
        return _compile(options.room, options.cached)
    _diagnose()
    return 0


def _diagnose() -> None:
    print("versions")
    _row("python", sys.version.split()[0])
    for package in _PACKAGES:
        _row(package, _version(package) or "not installed")
    print("native module")
    _row("module", _attempt(lambda native_module: native_module.__file__))
    _row("kernel sources", str(toolchain.kernel_sources()))
    _row("NVRTC", _attempt(_nvrtc))
    _row("driver", _attempt(_driver))
    _row("GPUs", _attempt(_gpus))
    _row("NCCL", _nccl())
    _row("cache", _cache())
    print("what runs natively")
    reason = native.why_not_native()
    for room in sorted({room for room, _ in _kernels_or_none()}):
        _row(room, "no, through XLA" if reason else "yes")
    if reason:
        _row("because", reason)


def _row(name: str, value: str) -> None:
    print(f"  {name:<18} {value}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attempt(question: Any) -> str:
    try:
        return str(question(native.module()))
    except RuntimeError as error:
        return str(error)


def _nvrtc(module: Any) -> str:
    major, minor, path = module.nvrtc()
    return f"{major}.{minor}, {path}"


def _driver(module: Any) -> str:
    version, _ = module.driver()
    return f"supports CUDA {version // 1000}.{version % 1000 // 10}"


def _gpus(module: Any) -> str:
    try:
        _, devices = module.driver()
    except RuntimeError:
        return "none"
    return ", ".join(f"{name} ({major}.{minor})" for name, major, minor in devices) or "none"


def _nccl() -> str:
    version = _version("nvidia-nccl-cu13")
    needed = ".".join(map(str, _MIN_NCCL))
    cure = f'expert parallelism natively needs {needed}: pip install "jax_ds[cuda13]"'
    if version is None:
        return f"not installed; {cure}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return version if numbers >= _MIN_NCCL else f"{version}; {cure}"


def _cache() -> str:
    folder = settings.read().cache_dir / "kernels"
    files = list(folder.glob("*.kernel")) if folder.is_dir() else []
    size = sum(file.stat().st_size for file in files)
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    note = "" if os.access(parent, os.W_OK) else "; not writable: every process compiles anew"
    return f"{folder}, {len(files)} kernels, {size / 1e6:.1f} MB{note}"


def _kernels_or_none() -> list[tuple[str, Any]]:
    try:
        return list(native.module().kernels())
    except RuntimeError:
        return []


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


def _compile(room: str | None, cached: bool) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
