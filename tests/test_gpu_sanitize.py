"""What `make gpu-sanitize` makes of a tool's report."""

from typing import Any

import pytest

from tests.gpu import sanitize
from tests.gpu.sanitize import FOUND, Process

_CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
_HAZARDS = """========= COMPUTE-SANITIZER
========= Error: Potential WAR hazard detected at __shared__ 0x1b410 in block (42,0,0) :
=========     Read Thread (3,0,0) at void jax_ds::deep_gemm::Gemm<(int)0>(Params)+0x1140
=========     Write Thread (160,0,0) at void jax_ds::deep_gemm::Gemm<(int)0>(Params)+0x4010
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
_OUTPUT = "   6.9 s  dense 64x512x2048\na warning\n   0.3 s  wgrad\n"


@pytest.mark.parametrize(
    ("room", "status", "log", "expected"),
    [
        ("dense", 0, _CLEAN, (0, 2, "ERROR SUMMARY: 0 errors", {})),
        (
            "dense",
            FOUND,
            _HAZARDS,
            (
                FOUND,
                2,
                "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
                {"jax_ds::deep_gemm::Gemm": 2},
            ),
        ),
        (
            "dense",
            -15,
            _HAZARDS,
            (
                FOUND,
                2,
                "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
                {"jax_ds::deep_gemm::Gemm": 2},
            ),
        ),
        ("dense", -15, "", (-15, 2, "no summary", {})),
        ("canary", FOUND, _CLEAN, (0, 2, "ERROR SUMMARY: 0 errors", {})),
        ("canary", 0, _CLEAN, (1, 2, "ERROR SUMMARY: 0 errors", {})),
        ("canary", -11, "", (-11, 2, "no summary", {})),
    ],
)
def test_reports(room: str, status: int, log: str, expected: tuple[Any, ...]) -> None:
    run = sanitize.read(Process("racecheck", room), status, log, _OUTPUT)
    assert (run.status, run.cases, run.summary, run.kernels) == expected


def test_every_room_runs_under_every_tool() -> None:
    names = [str(process) for process in sanitize.planned(two_ranks=True)]
    assert len(set(names)) == len(names)
    assert set(map(str, sanitize.planned())) < set(names)
    for tool in sanitize.TOOLS:
        assert {f"{tool} {room}" for room in ("canary", *sanitize.ROOMS)} <= set(names)
        assert f"{tool} deep_ep, rank 1 of 2" in names
