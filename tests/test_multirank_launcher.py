"""The launcher of multi-rank tests, on programs that need neither JAX nor a GPU."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCHER = pathlib.Path(__file__).parent / "gpu" / "multirank.py"

_PROGRAM = """
import os, sys, time
rank, ranks = int(os.environ["JAX_DS_TEST_RANK"]), int(os.environ["JAX_DS_TEST_RANKS"])
print("rank", rank, "of", ranks, "on", os.environ["CUDA_VISIBLE_DEVICES"],
      "host", os.environ.get("NCCL_HOSTID"), "shared", "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ)
"""


def _run(
    tmp_path: pathlib.Path, program: str, *options: str, gpus: str = "0,1,2,3"
) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "program.py"
    file.write_text(_PROGRAM + program)
    command = [sys.executable, str(LAUNCHER), "--logs", str(tmp_path / "logs"), *options]
    return subprocess.run(
        [*command, "--", sys.executable, str(file)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_rank_has_its_gpu_and_host(tmp_path: pathlib.Path) -> None:
    result = _run(tmp_path, "", "--ranks", "4", "--nodes", "2")
    assert result.returncode == 0, result.stderr
    for rank in range(4):
        log = (tmp_path / "logs" / f"rank{rank}.txt").read_text().strip()
        assert log == f"rank {rank} of 4 on {rank} host node{rank // 2} shared False"
        assert f"---- rank {rank}: status 0" in result.stdout


def test_only_visible_gpus_are_used(tmp_path: pathlib.Path) -> None:
    result = _run(tmp_path, "", "--ranks", "2", gpus="3,1")
    assert result.returncode == 0, result.stderr
    for rank, gpu in enumerate((3, 1)):
        log = (tmp_path / "logs" / f"rank{rank}.txt").read_text()
        assert f"on {gpu} host None shared False" in log


def test_an_mps_daemon_that_runs_is_used(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on one GPU need MPS; there is no daemon to start here, and none is started."""
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text("1")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    program = 'print(os.environ["CUDA_MPS_PIPE_DIRECTORY"])'
    result = _run(tmp_path, program, "--ranks", "2", gpus="0")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "logs" / "rank1.txt").read_text().splitlines()
    assert lines == ["rank 1 of 2 on 0 host None shared True", str(tmp_path)]


def test_a_failure_ends_the_others_and_is_the_status(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    program = "time.sleep(40) if rank == 0 else sys.exit(3 * (rank == 1))"
    result = _run(tmp_path, program, "--ranks", "3", "--grace", "0.5")
    assert result.returncode == 3
    assert time.monotonic() - start < 20
    assert "---- rank 0: status -15" in result.stdout
    assert "rank 0 of 3" in result.stdout


def test_nothing_outlives_the_timeout(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(40)"
    result = _run(tmp_path, program, "--ranks", "1", "--timeout", "1")
    assert result.returncode != 0
    assert time.monotonic() - start < 20
    assert "---- rank 0: status -9" in result.stdout


def test_nothing_outlives_the_launcher(tmp_path: pathlib.Path) -> None:
    """A time limit of whoever started it ends it by SIGTERM, some of them twice."""
    program = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    program += "print(os.getpid(), flush=True); time.sleep(600)"
    logs = [tmp_path / f"rank{rank}.txt" for rank in range(2)]
    launcher = [sys.executable, str(LAUNCHER), "--logs", str(tmp_path), "--ranks", "2", "--"]
    running = subprocess.Popen(
        [*launcher, sys.executable, "-c", program],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"},
    )
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    time.sleep(0.3)
    running.terminate()
    assert running.wait(20) == 128 + signal.SIGTERM
    for log in logs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)


def test_without_a_gpu_it_says_so(tmp_path: pathlib.Path) -> None:
    result = _run(tmp_path, "", gpus="")
    assert result.returncode == 2
    assert "no NVIDIA GPU" in result.stderr


def test_a_program_may_name_its_rank(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(LAUNCHER), "--ranks", "2", "--", "touch", f"{tmp_path}/{{rank}}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1"]
