"""The native module: loading it, setting it up, registering its custom calls with XLA."""

import importlib
import threading
from types import ModuleType
from typing import Any

import jax

from jax_ds._core import settings
from jax_ds._runtime import toolchain

_PLATFORM = "CUDA"
_HOPPER = (9, 0)


class _Registration:
    """Does its work once, whichever thread asks first; after a failure, again when asked again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._configured = False
        self._registered = False

    def module(self) -> ModuleType:
        native = importlib.import_module("jax_ds._jax_ds")
        with self._lock:
            if not self._configured:
                native.configure(
                    source_root=str(toolchain.kernel_sources()),
                    cache_dir=str(settings.read().cache_dir / "kernels"),
                    nvrtc=toolchain.nvrtc_candidates(),
                )
                native.configure_communication(
                    nccl=toolchain.nccl_candidates(), timeout_s=settings.read().timeout_s
                )
                self._configured = True
        return native

    def register(self) -> None:
        if self._registered:
            return
        native = self.module()
        with self._lock:
            if self._registered:
                return
            # XLA looks a state's type up when it registers the handlers.
            for name, registration in native.types().items():
                jax.ffi.register_ffi_type(name, registration, platform=_PLATFORM)
            for name, stages in native.targets().items():
                jax.ffi.register_ffi_target(name, stages, platform=_PLATFORM)
            self._registered = True


_registration = _Registration()


def module() -> ModuleType:
    """The native module, set up for this process; RuntimeError with the cure where it's missing."""
    try:
        return _registration.module()
    except ImportError as error:
        raise RuntimeError(_missing(error)) from error


def ensure_registered() -> None:
    """Makes our custom calls known to XLA's CUDA platform; idempotent, from any thread.

    Without the native module this does nothing where there is no GPU to run them, so that
    programs can still be traced and lowered; with a GPU it is a RuntimeError.
    """
    try:
        _registration.register()
    except ImportError as error:
        if _has_gpu():
            raise RuntimeError(_missing(error)) from error


def why_not_native() -> str | None:
    """Why this process cannot run our kernels, as one sentence with the cure; None if it can."""
    try:
        native = module()
        _, devices = native.driver()
        native.nvrtc()
    except RuntimeError as error:
        return str(error)
    return _why_no_device(devices)


def why_not_nccl() -> str | None:
    """Why this process's NCCL has no symmetric windows, as one sentence; None if it has."""
    try:
        module().nccl()
    except RuntimeError as error:
        return str(error)
    return None


def communication_failures() -> list[str]:
    """What waits for other ranks on this process's GPUs have recorded, one sentence each."""
    try:
        failures: list[str] = module().communication_failures()
    except RuntimeError:
        return []  # without the native module no kernel has waited
    return failures


def _why_no_device(devices: list[tuple[str, int, int]]) -> str | None:
    if any((major, minor) == _HOPPER for _, major, minor in devices):
        return None
    names = ", ".join(sorted({name for name, _, _ in devices})) or "none"
    return (
        "jax_ds: the kernels need a Hopper GPU (compute capability 9.0), the GPUs here are: "
        f"{names}; use implementation='xla' on other chips"
    )


def _has_gpu() -> bool:
    try:
        gpus: list[Any] = jax.local_devices(backend="cuda")
    except RuntimeError:
        return False
    return bool(gpus)


def _missing(error: ImportError) -> str:
    return f"jax_ds: the native module cannot be loaded ({error}): pip install jax_ds again"
