"""Checks an installed jax_ds against the checkout this file lies in; run by CI with the interpreter
of an environment that has nothing but the wheel, from a folder outside the checkout."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_ds
from jax_ds import quantization
from jax_ds._runtime import native

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    installed = pathlib.Path(jax_ds.__file__).parent
    assert not installed.is_relative_to(ROOT), f"{installed} is the checkout, not the wheel"
    package = {
        path.relative_to(ROOT / "jax_ds"): path
        for pattern in ("**/*.py", "py.typed")
        for path in (ROOT / "jax_ds").glob(pattern)
    }
    kernels = {
        pathlib.Path("_kernels") / path.relative_to(ROOT / "ffi"): path
        for pattern in ("**/*.cuh", "**/kernels/*.h")
        for path in (ROOT / "ffi").glob(pattern)
    }
    for name, source in (package | kernels).items():
        file = installed / name
        assert file.is_file(), f"{name} is not in the wheel"
        assert file.read_bytes() == source.read_bytes(), f"{name} differs from the checkout"
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    extra = {p for p in found if p.suffix not in (".pyc", ".so")} - set(package | kernels)
    assert not extra, f"the wheel carries {sorted(map(str, extra))}"
    assert native.module().targets(), "the native module has no custom calls"
    q = jax.jit(quantization.quantize_1x128)(jnp.ones((3, 128)))
    np.testing.assert_array_equal(np.asarray(quantization.dequantize(q)), 1.0)
    print(f"{len(package)} modules, {len(kernels)} kernel files, {sys.executable}: the wheel works")


if __name__ == "__main__":
    main()
