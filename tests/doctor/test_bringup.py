"""The bring-up test: who meets whom, verdicts, and processes that exchange data on the CPU."""

import itertools
import os
import subprocess
import sys

import pytest

from jax_ds import doctor
from jax_ds._core import processes
from jax_ds.doctor import bringup, launch
from jax_ds.doctor.bringup import Measured


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16])
def test_every_pair_meets_once(ranks: int) -> None:
    met = []
    for partner in bringup.partners(ranks):
        assert [partner[p] for p in partner] == list(range(ranks))
        met += [(a, b) for a, b in enumerate(partner) if a < b]
    assert sorted(met) == list(itertools.combinations(range(ranks), 2))


class Device:
    def __init__(self, id: int, slice_index: int) -> None:
        self.id = self.process_index = id
        self.slice_index = slice_index


@pytest.mark.parametrize(
    ("hosts", "axes", "order"),
    [
        ([0, 0, 0, 0], {"host": 1, "gpu": 4}, [0, 1, 2, 3]),
        ([0, 1, 0, 1], {"host": 2, "gpu": 2}, [0, 2, 1, 3]),
        ([0, 1, 1], {"host": 1, "gpu": 3}, [0, 1, 2]),
    ],
)
def test_ranks_of_one_host_are_neighbours(
    hosts: list[int], axes: dict[str, int], order: list[int]
) -> None:
    where = bringup.arrange([Device(i, host) for i, host in enumerate(hosts)])
    assert where.axes == axes
    assert [device.id for device in where.gpus] == order


def _link(gb_per_s: float, *, correct: bool = True, one_host: bool = True) -> Measured:
    return Measured((0, 1), one_host, "collectives", gb_per_s, correct)


def test_a_link_is_compared_with_its_kind() -> None:
    usual, slow, network = _link(300.0), _link(200.0), _link(45.0, one_host=False)
    wrong = _link(310.0, correct=False)
    among = [usual, usual, slow, network, wrong]
    words = [bringup.verdict(link, among, 0.7, 0.0) for link in (usual, slow, network, wrong)]
    assert words == ["OK", "slow", "OK", "failed"]
    assert bringup.verdict(usual, among, 0.7, 350.0) == "slow"
    assert bringup.verdict(slow, among, 0.0, 0.0) == "OK"


def test_one_process_is_no_bring_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--ranks", "1"]) == 1
    assert capsys.readouterr().out == "--ranks: must be at least 2, got 1\n"


def test_a_rank_alone_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.main(["--rank", "1", "--ranks", "2"])
    assert "--rank: needs --ranks and --coordinator too" in capsys.readouterr().err


def test_more_ranks_than_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_visible_gpus", lambda: ["0", "1"])
    assert doctor.main(["--ranks", "4"]) == 1
    assert "must be at most the 2 GPUs of this machine, got 4" in capsys.readouterr().out


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_processes_on_the_cpu_exchange_data() -> None:
    """Three ranks, so that one has no partner in each round."""
    command = [sys.executable, "-m", "jax_ds.doctor", "--ranks", "3", "--mib", "0.25"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 ranks on cpu, messages of 0.25 MiB; without GPUs, over Gloo" in done.stdout
    assert done.stdout.count("GB/s each way  OK") == 3
    assert "3 links, 0 with problems" in done.stdout


@pytest.mark.slow
def test_a_rate_that_cannot_be_reached_is_a_problem() -> None:
    command = [sys.executable, "-m", "jax_ds.doctor", "--ranks", "2", "--mib", "0.1"]
    done = subprocess.run(
        [*command, "--at-least", "1e6"],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "GB/s each way  slow" in done.stdout
    assert "1 links, 1 with problems" in done.stdout
    assert "ended with status" not in done.stdout


@pytest.mark.slow
def test_ranks_that_do_not_come_are_missed() -> None:
    address = f"127.0.0.1:{processes.free_port()}"
    command = [sys.executable, "-m", "jax_ds.doctor", "--ranks", "2", "--rank", "0"]
    command += ["--coordinator", address, "--timeout", "3"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    sentence = f"failed: rank 0: not all 2 ranks came to {address} within 3 s"
    assert done.stdout.splitlines() == [sentence]


@pytest.mark.slow
def test_a_rank_that_stops_is_named() -> None:
    """Rank 1 joins and then does nothing: rank 0 says so and ends."""
    address = f"127.0.0.1:{processes.free_port()}"
    idle = f"""
import time, jax
jax.distributed.initialize({address!r}, 2, 1)
jax.devices()
time.sleep(60)
"""
    stopped = subprocess.Popen(
        [sys.executable, "-c", idle],
        env=_environment(),
        stderr=subprocess.DEVNULL,
    )
    command = [sys.executable, "-m", "jax_ds.doctor", "--ranks", "2", "--rank", "0"]
    command += ["--coordinator", address, "--timeout", "5"]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=60
        )
    finally:
        stopped.kill()
        stopped.wait()
    assert done.returncode == 1
    sentence = "failed: rank 0: nothing came from rank 1 by collectives within 5 s"
    assert sentence in done.stdout, done.stdout + done.stderr
