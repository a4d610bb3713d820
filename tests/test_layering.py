"""Imports point one way, in Python and in C++."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What each room may import besides itself.
PYTHON_ARROWS = {
    "_core": set(),
    "_runtime": {"_core"},
    "quantization": {"_runtime", "_core"},
    "deep_gemm": {"quantization", "_runtime", "_core"},
    "flash_mla": {"quantization", "_runtime", "_core"},
    "deep_ep": {"quantization", "_runtime", "_core"},
    "moe": {"deep_gemm", "deep_ep", "flash_mla", "quantization", "_runtime", "_core"},
    "models": {"moe", "deep_gemm", "deep_ep", "flash_mla", "quantization", "_runtime", "_core"},
    "doctor": {"deep_ep", "_runtime", "_core"},
}
SYSTEMS = {"quantization", "deep_gemm", "flash_mla", "deep_ep"}

# Likewise below ffi/. Files under kernels/ are data to the host code, apart from the headers that
# a kernel and its plan share.
CPP_ARROWS = {
    "support": set(),
    "jit": {"support", "kernels"},
    "comm": {"jit", "support", "kernels"},
    "kernels": set(),
    # As in Python, all three systems may quantize.
    **{system: {"quantization", "comm", "jit", "support", "kernels"} for system in SYSTEMS},
    "module.cc": {*SYSTEMS, "comm", "jit", "support"},
}

# What a room hands to the module: the description names the room's kernels.
CPP_EXCEPTIONS = {("support/room.h", "jit/spec.h")}


def _imports(path: pathlib.Path) -> set[str]:
    """The modules of jax_ds that a file imports, as dotted names below jax_ds."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("jax_ds.") for name in names if name.startswith("jax_ds.")}


def _python_files() -> list[pathlib.Path]:
    files = sorted((ROOT / "jax_ds").rglob("*.py"))
    assert files
    return files


def _room(path: pathlib.Path, root: pathlib.Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


@pytest.mark.parametrize("room", PYTHON_ARROWS)
def test_python_imports_point_one_way(room: str) -> None:
    for path in _python_files():
        if _room(path, ROOT / "jax_ds") == room:
            imported = {name.split(".")[0] for name in _imports(path)} - {room}
            assert imported <= PYTHON_ARROWS[room], path


def test_every_room_has_its_arrows() -> None:
    rooms = {_room(path, ROOT / "jax_ds") for path in _python_files()} - {"__init__"}
    assert rooms == set(PYTHON_ARROWS)


def test_moe_and_models_use_public_names_only() -> None:
    """What is built on the systems takes nothing from behind their doors."""
    for path in _python_files():
        if _room(path, ROOT / "jax_ds") in ("moe", "models"):
            for name in _imports(path):
                room, *rest = name.split(".")
                assert room not in SYSTEMS or len(rest) <= 1, f"{path}: {name}"
                assert not rest or not rest[0].startswith("_") or room.startswith("_"), name


def test_reference_code_shares_nothing() -> None:
    for path in sorted((ROOT / "jax_ds").rglob("reference.py")):
        assert not _imports(path), path


def test_one_reader_of_the_environment() -> None:
    """`_core/settings.py` it is; the doctor shows what the machine has set, and hands it on."""
    readers = {
        path.relative_to(ROOT / "jax_ds").as_posix()
        for path in _python_files()
        if re.search(r"os\.environ|os\.getenv|environb", path.read_text())
    }
    assert {r for r in readers if not r.startswith("doctor/")} == {"_core/settings.py"}


def test_one_custom_call_site() -> None:
    callers = {
        path.relative_to(ROOT / "jax_ds").as_posix()
        for path in _python_files()
        if re.search(r"jax\.ffi\.(ffi_call|register)", path.read_text())
    }
    assert callers == {"_runtime/call.py", "_runtime/native.py"}


def _cpp_files() -> list[pathlib.Path]:
    return [p for p in sorted((ROOT / "ffi").rglob("*")) if p.suffix in (".cc", ".h", ".cuh")]


def test_cpp_includes_point_one_way() -> None:
    for path in _cpp_files():
        file = path.relative_to(ROOT / "ffi")
        room = file.parts[0]
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            if name.startswith("xla/") or (file.as_posix(), name) in CPP_EXCEPTIONS:
                continue
            assert (ROOT / "ffi" / name).is_file(), f"{path}: {name} is not a path below ffi/"
            target = name.split("/")[0]
            assert target == room or target in CPP_ARROWS[room], f"{path}: {name}"


def test_kernels_do_not_depend_on_host_code() -> None:
    for path in _cpp_files():
        if "kernels" in path.relative_to(ROOT / "ffi").parts:
            for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
                assert "kernels/" in name, f"{path}: {name}"


def test_host_code_includes_no_device_code() -> None:
    for path in _cpp_files():
        if path.suffix == ".cc" or (path.suffix == ".h" and "kernels" not in path.parts):
            includes = re.findall(r'^#include "(.+)"', path.read_text(), re.M)
            assert not [name for name in includes if name.endswith(".cuh")], path


def test_nothing_prints_exits_or_traps() -> None:
    """Errors are exceptions and statuses; a trap would kill every process on the GPU."""
    loud = r"\b(printf|puts|abort|_?exit|assert|__trap)\s*\(|std::c(out|err)|\btrap;"
    for path in _cpp_files():
        assert not re.search(loud, path.read_text()), path
    quiet = [path for path in _python_files() if "doctor" not in path.parts]
    assert len(quiet) > 50
    for path in quiet:
        assert not re.search(r"\b(print|exit|breakpoint)\(", path.read_text()), path
