"""The native module: loading, registration, compilation by many, and what users read without it."""

import concurrent.futures
import importlib
import json
import pathlib
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from jax_ds._runtime import native

KERNEL = """
template <int kFactor>
__global__ void scale(int* x) { x[threadIdx.x] *= kFactor; }
"""

# Compiles kernels below `root`, with a cache there too; prints what `body` leaves in `result`.
PROGRAM = """
import concurrent.futures, json, pathlib, sys
from jax_ds._core import settings
from jax_ds._runtime import native, toolchain

root = pathlib.Path(sys.argv[1])
toolchain.kernel_sources = lambda: root
if sys.argv[2:]:
    toolchain.nvrtc_candidates = lambda: sys.argv[2:]
settings.read = lambda: settings.Settings(cache_dir=root / "cache", timeout_s=60.0)
module = native.module()
spec = lambda *arguments, **keywords: module.KernelSpec("kernel.cuh", *arguments, **keywords)
{body}
print(json.dumps(result))
"""


def start(root: pathlib.Path, body: str, nvrtc: Sequence[str] = ()) -> subprocess.Popen[str]:
    program = PROGRAM.format(body=textwrap.dedent(body))
    command = [sys.executable, "-c", program, str(root), *nvrtc]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> Any:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def run(root: pathlib.Path, body: str, nvrtc: Sequence[str] = ()) -> Any:
    return finish(start(root, body, nvrtc))


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "kernel.cuh").write_text(KERNEL)
    return tmp_path


def test_names() -> None:
    module = native.module()
    targets, types = module.targets(), module.types()
    assert targets and types
    assert all(name.startswith("jax_ds_") for name in [*targets, *types])
    assert all({"instantiate", "execute"} <= set(stages) for stages in targets.values())
    assert all(set(t) == {"type_id", "type_info"} for t in types.values())


def test_every_kernel_configuration_is_listed_once() -> None:
    specs = [(s.file, s.entry, *s.options, s.shared_bytes) for _, s in native.module().kernels()]
    assert specs and len(specs) == len(set(specs))


def test_registration_happens_once_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    monkeypatch.setattr(jax.ffi, "register_ffi_type", lambda name, *_, **__: calls.update([name]))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, *_, **__: calls.update([name]))
    registration = native._Registration()
    registration._configured = True  # the process's module is
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: registration.register(), range(32)))
    assert set(calls) == set(native.module().targets()) | set(native.module().types())
    assert set(calls.values()) == {1}


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", no_module)
    monkeypatch.setattr(native, "_registration", native._Registration())
    sentence = "the native module cannot be loaded .*: pip install jax_ds again"
    with pytest.raises(RuntimeError, match=sentence):
        native.module()
    reason = native.why_not_native()
    assert reason is not None and "pip install jax_ds again" in reason
    monkeypatch.setattr(native, "_has_gpu", lambda: False)
    native.ensure_registered()  # nothing could run: tracing and lowering go on
    monkeypatch.setattr(native, "_has_gpu", lambda: True)
    with pytest.raises(RuntimeError, match=sentence):
        native.ensure_registered()


def test_other_chips_are_named() -> None:
    assert native._why_no_device([("NVIDIA A100", 8, 0), ("NVIDIA H200", 9, 0)]) is None
    reason = native._why_no_device([("NVIDIA A100", 8, 0)])
    assert reason is not None and "compute capability 9.0" in reason and "NVIDIA A100" in reason
    assert "none" in (native._why_no_device([]) or "")


def test_one_process_compiles_and_the_others_wait(root: pathlib.Path) -> None:
    body = "result = module.compile(spec('scale<3>'))['cached']"
    processes = [start(root, body) for _ in range(4)]
    assert sorted(finish(process) for process in processes) == [False, True, True, True]
    assert [file.suffix for file in (root / "cache" / "kernels").iterdir()] == [".kernel"]


def test_one_thread_compiles_and_the_others_wait(root: pathlib.Path) -> None:
    body = """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        result = list(pool.map(lambda _: module.compile(spec("scale<3>"))["cached"], range(8)))
    """
    assert sorted(run(root, body)) == [False] + 7 * [True]


def test_the_cache_heals_and_follows_the_source(root: pathlib.Path) -> None:
    body = """
    file = None
    def cached(factor=3, **keywords):
        return module.compile(spec(f"scale<{factor}>", **keywords))["cached"]
    result = [cached(), cached()]
    (file,) = (root / "cache" / "kernels").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    result += [cached(), cached()]
    file.write_text("foreign")
    result += [cached(), cached()]
    (root / "kernel.cuh").write_text((root / "kernel.cuh").read_text() + "// changed")
    result += [cached(), cached(), cached(factor=4), cached(options=["-DX"])]
    result += [cached(shared_bytes=8)]
    """
    healed = [False, True] * 3
    assert run(root, body) == [*healed, False, True, False, False, True]


def test_a_broken_kernel_is_an_error_with_the_log_and_can_be_mended(root: pathlib.Path) -> None:
    body = """
    result = []
    (root / "kernel.cuh").write_text("__global__ void broken( {")
    for _ in range(2):
        try:
            module.get_kernel(spec("broken"))
        except RuntimeError as error:
            result.append(str(error))
    (root / "kernel.cuh").write_text("__global__ void broken() {}")
    module.get_kernel(spec("broken"))
    """
    first, second = run(root, body)
    assert first == second
    assert "kernel kernel.cuh (broken) does not compile" in first and "expected" in first


def test_configuring_twice_is_refused(root: pathlib.Path) -> None:
    body = """
    try:
        module.configure(str(root), "", [])
        result = ""
    except RuntimeError as error:
        result = str(error)
    """
    assert run(root, body) == "jax_ds: the kernel compiler is configured already"


def test_without_nvrtc_the_cure_is_named(root: pathlib.Path) -> None:
    body = """
    try:
        module.compile(spec("scale<3>"))
    except RuntimeError as error:
        result = str(error)
    """
    message = run(root, body, nvrtc=[str(root / "libnvrtc.so.13")])
    assert message.startswith("jax_ds: NVRTC, the CUDA run-time compiler")
    assert 'pip install "jax[cuda13]"' in message
