"""The doctor's report, and that it finds what is wrong with a kernel."""

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

from jax_ds import doctor
from jax_ds._runtime import native
from tests.runtime.test_native import run

CLEAN = {
    "registers": 32,
    "static_shared": 0,
    "dynamic_shared": 1024,
    "stack": 0,
    "spill_stores": 0,
    "spill_loads": 0,
    "remarks": [],
    "clean": True,
    "cubin_bytes": 5000,
    "seconds": 0.25,
}


def _module(monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]) -> None:
    spec = SimpleNamespace(entry="jax_ds::room::kernel<jax_ds::room::Config<3>>", options=["-DX"])
    module = SimpleNamespace(
        kernels=lambda: [("room", spec)],
        nvrtc=lambda: (13, 0, "libnvrtc.so.13"),
        compile=lambda spec, use_cache: report,
    )
    monkeypatch.setattr(native, "module", lambda: module)


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for word in ("python", "jaxlib", "NVRTC", "driver", "GPUs", "NCCL", "cache", "quantization"):
        assert word in text


def test_a_clean_kernel_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _module(monkeypatch, CLEAN)
    assert doctor.main(["--compile"]) == 0
    text = capsys.readouterr().out
    assert "room: kernel<Config<3>> -DX" in text
    assert "1 kernels, 0 with problems" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill_loads": 8}, "spills registers"),
        ({"stack": 16}, "uses a stack frame"),
        ({"remarks": ["(C7514) wgmma serialized"]}, "(C7514) wgmma serialized"),
    ],
)
def test_a_problem_fails(
    change: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _module(monkeypatch, {**CLEAN, **change, "clean": False})
    assert doctor.main(["--compile"]) == 1
    assert f"PROBLEM in room: kernel<Config<3>> -DX: {words}" in capsys.readouterr().out


def test_an_unknown_room_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _module(monkeypatch, CLEAN)
    assert doctor.main(["--compile", "--room", "cellar"]) == 1
    assert "no kernels in room 'cellar'" in capsys.readouterr().out


def test_the_assembler_s_log_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    (tmp_path / "kernel.cuh").write_text("""
        // Templates: a compilation holds only what its entry names.
        template <int> __global__ void clean(int* x) { x[threadIdx.x] = 1; }
        template <int> __global__ void stack(int* x) {
          int many[64];
          for (int i = 0; i < 64; ++i) many[x[i] & 63] = i;
          x[0] = many[x[64] & 63];
        }
        template <int> __global__ void spills(float* x) {
          float v[64];
          #pragma unroll
          for (int i = 0; i < 64; ++i) v[i] = x[i * 1024];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 64; ++i) x[i * 1024 + 1] = v[i] * v[63 - i];
        }
        template <int> __global__ void ignored(float* x) {
          asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
          x[0] = 1;
        }
    """)
    body = """
    reports = [module.compile(spec(name)) for name in ("clean<0>", "stack<0>", "ignored<0>")]
    reports.append(module.compile(spec("spills<0>", options=["--maxrregcount=24"])))
    keys = ("clean", "stack", "spill_stores", "spill_loads", "remarks", "registers")
    result = [[report[key] for key in keys] for report in reports]
    """
    clean, stack, ignored, spills = run(tmp_path, body)
    assert clean[:5] == [True, 0, 0, 0, []] and clean[5] > 0
    assert not stack[0] and stack[1] >= 256
    assert not ignored[0] and "(C75" in ignored[4][0]
    assert not spills[0] and spills[2] > 0 and spills[3] > 0
