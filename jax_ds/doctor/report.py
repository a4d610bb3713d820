"""What this machine has, and what will run natively on it."""

import importlib.metadata
import os
import re
import sys
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


def diagnose() -> None:
    print("versions")
    row("python", sys.version.split()[0])
    for package in _PACKAGES:
        row(package, _version(package) or "not installed")
    print("native module")
    row("module", _attempt(lambda native_module: native_module.__file__))
    row("kernel sources", str(toolchain.kernel_sources()))
    row("NVRTC", _attempt(_nvrtc))
    row("driver", _attempt(_driver))
    row("GPUs", _attempt(_gpus))
    row("NCCL", _nccl())
    row("cache", _cache())
    print("what runs natively")
    reason = native.why_not_native()
    for room in sorted({room for room, _ in _kernels_or_none()}):
        row(room, "no, through XLA" if reason else "yes")
    if reason:
        row("because", reason)


def row(name: str, value: str) -> None:
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
