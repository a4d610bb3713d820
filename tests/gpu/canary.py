"""Launches canary.cuh, without JAX: a sanitizer that finds no fault there sees no kernel."""

import ctypes
import os
import pathlib
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

_THREADS, _BYTES = 64, 16


def _machine_code(folder: str) -> tuple[bytes, bytes]:
    """Cubin and name of the kernel, as the disk cache holds them: four lines, then the payload."""
    os.environ["JAX_DS_CACHE_DIR"] = folder  # before anything reads the settings
    from jax_ds._runtime import native

    module = native.module()
    module.compile(module.KernelSpec("../tests/gpu/canary.cuh", "jax_ds::canary"))
    (file,) = pathlib.Path(folder).rglob("*.kernel")
    *_, sizes, payload = file.read_bytes().split(b"\n", 4)
    symbol, log, _ = map(int, sizes.split())
    return payload[symbol + log :], payload[:symbol]


def main() -> int:
    """The driver's status after the launch."""
    with tempfile.TemporaryDirectory() as folder:
        code, name = _machine_code(folder)
    cuda = ctypes.CDLL("libcuda.so.1")
    context, module, function, memory = (ctypes.c_void_p() for _ in range(4))
    device = ctypes.c_int()

    def call(name: str, *arguments: Any) -> None:
        status = getattr(cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {status}")

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxPushCurrent_v2", context)
    call("cuModuleLoadData", ctypes.byref(module), code)
    call("cuModuleGetFunction", ctypes.byref(function), module, name)
    call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(_BYTES))
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
    call("cuLaunchKernel", function, 1, 1, 1, _THREADS, 1, 1, 0, None, parameters, None)
    return int(cuda.cuCtxSynchronize())


if __name__ == "__main__":
    main()
