"""The two builds and the checkout agree: no file is in one and forgotten in the other."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CMAKE = pathlib.Path(sys.executable).parent / "cmake"


def _files(*patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}


def _glob(include: list[str], exclude: tuple[str, ...] = (), **_: Any) -> list[str]:
    return sorted(_files(*include) - _files(*exclude))


def _recorder(rules: dict[str, dict[str, Any]], kind: str) -> Callable[..., None]:
    def record(*, name: str, **attributes: Any) -> None:
        rules[name] = {"kind": kind, **attributes}

    return record


@pytest.fixture(scope="module")
def bazel() -> dict[str, dict[str, Any]]:
    """The targets of BUILD by name; a BUILD file is Python apart from what it loads."""
    rules: dict[str, dict[str, Any]] = {}
    scope: dict[str, Any] = {"glob": _glob}
    for ignored in ("load", "package", "exports_files"):
        scope[ignored] = lambda *_, **__: None
    for kind in ("cc_binary", "cc_library", "cc_test", "py_library", "filegroup", "pytest_test"):
        scope[kind] = _recorder(rules, kind)
    exec(compile((ROOT / "BUILD").read_text(), "BUILD", "exec"), scope)
    return rules


@pytest.fixture(scope="module")
def cmake(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A configured CMake build, tests included; nothing is compiled."""
    build = tmp_path_factory.mktemp("cmake")
    options = {
        "Python_EXECUTABLE": sys.executable,
        "JAX_DS_BUILD_TESTS": "ON",
        "CMAKE_MAKE_PROGRAM": CMAKE.parent / "ninja",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
    }
    configure = [CMAKE, "-S", ROOT, "-B", build, "-G", "Ninja", "--log-level=WARNING"]
    subprocess.run(configure + [f"-D{k}={v}" for k, v in options.items()], check=True)
    return build


def _cmake_sources(build: pathlib.Path) -> set[str]:
    commands = json.loads((build / "compile_commands.json").read_text())
    paths = (pathlib.Path(command["file"]) for command in commands)
    ours = (path for path in paths if "site-packages" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in ours}


def test_cmake_compiles_every_host_source(cmake: pathlib.Path) -> None:
    assert _cmake_sources(cmake) == _files("ffi/**/*.cc", "tests/native/**/*.cc")


def test_bazel_compiles_every_host_source(bazel: dict[str, dict[str, Any]]) -> None:
    native = bazel["native"]["srcs"] + bazel["jax_ds/_jax_ds.abi3.so"]["srcs"]
    assert set(native) == _files("ffi/**/*.cc")
    assert set(bazel["native"]["hdrs"]) == _files("ffi/**/*.h")
    tests = [src for rule in bazel.values() if rule["kind"] == "cc_test" for src in rule["srcs"]]
    assert set(tests) == _files("tests/native/**/*.cc", "tests/native/**/*.h")


def _kernel_files() -> set[str]:
    """Every kernel and, transitively, what it includes: what a machine without sources needs."""
    pending, seen = sorted(_files("ffi/**/*.cuh")), set()
    while pending:
        file = pending.pop()
        if file not in seen:
            seen.add(file)
            text = (ROOT / file).read_text()
            pending += [f"ffi/{name}" for name in re.findall(r'^#include "(.+)"', text, re.M)]
    return seen


def test_wheel_carries_every_kernel(cmake: pathlib.Path, tmp_path: pathlib.Path) -> None:
    install = [CMAKE, "--install", cmake, "--prefix", tmp_path, "--component", "kernels"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    root = tmp_path / "jax_ds" / "_kernels"
    carried = {f"ffi/{path.relative_to(root).as_posix()}" for path in root.rglob("*.*")}
    assert carried >= _kernel_files()


def test_bazel_carries_every_kernel(bazel: dict[str, dict[str, Any]]) -> None:
    assert set(bazel["kernels"]["srcs"]) >= _kernel_files()
    assert ":kernels" in bazel["jax_ds"]["data"]


def test_both_builds_carry_the_python_package(bazel: dict[str, dict[str, Any]]) -> None:
    assert set(bazel["jax_ds"]["srcs"]) == _files("jax_ds/**/*.py")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["scikit-build"]["wheel"]["packages"] == ["jax_ds"]


def _list_in_build(name: str) -> set[str]:
    found = re.search(rf"^{name} = \[(.*?)\]", (ROOT / "BUILD").read_text(), re.M | re.S)
    assert found
    return set(re.findall(r'"(.+?)"', found[1]))


def test_bazel_runs_the_test_files(bazel: dict[str, dict[str, Any]]) -> None:
    run = {rule["src"] for rule in bazel.values() if rule["kind"] == "pytest_test"}
    checkout = _list_in_build("CHECKOUT")
    # A file with nothing for a CPU would collect no test.
    only_gpu = re.compile(r"^pytestmark = pytest\.mark\.(multi)?gpu$", re.M)
    files = _files("tests/**/test_*.py")
    on_gpus = {file for file in files if only_gpu.search((ROOT / file).read_text())}
    assert run == files - on_gpus - checkout
    assert all(re.fullmatch(r"tests/test_\w+\.py", file) for file in checkout)


def test_lists_of_bazel_tests_name_files() -> None:
    files = _files("tests/**/test_*.py")
    slow = {file for file in files if "mark.slow" in (ROOT / file).read_text()}
    assert _list_in_build("SLOW") == slow - {"tests/test_builds.py"}
    assert _list_in_build("CHECKOUT") <= files


def test_versions_agree() -> None:
    """pyproject.toml takes it from the package; MODULE.bazel cannot."""
    module = re.search(r'^module\(.*version = "(.+?)"', (ROOT / "MODULE.bazel").read_text(), re.M)
    package = re.search(r'^__version__ = "(.+?)"', (ROOT / "jax_ds/__init__.py").read_text(), re.M)
    assert module
    assert package
    assert module[1] == package[1]


def test_built_against_the_oldest_supported_jaxlib() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [pin for pin in project["build-system"]["requires"] if pin.startswith("jaxlib==")]
    assert pins
    assert pins[0].replace("==", ">=") in project["project"]["dependencies"]
