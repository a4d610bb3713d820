"""Finding the run-time compiler and the kernel sources."""

import pathlib
from types import SimpleNamespace

import pytest

from jax_ds._runtime import toolchain


def test_wheels_come_before_the_loader(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "cu13" / "lib" / "libnvrtc.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: spec)
    candidates = toolchain.nvrtc_candidates()
    assert (candidates[0], candidates[-1]) == (str(library), "libnvrtc.so.13")


def test_without_wheels_the_loader_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "_TOOLKIT_FOLDERS", ())
    assert toolchain.nvrtc_candidates() == ["libnvrtc.so.13"]


def test_the_kernel_sources_are_there():
    root = toolchain.kernel_sources()
    assert (root / "quantization" / "kernels" / "rows.cuh").is_file()
    assert (root / "kernels" / "ptx.cuh").is_file()
