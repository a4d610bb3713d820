"""The training example as a user runs it: several processes, interruption, serving."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "--hidden=64",
    "--layers=2",
    "--heads=1",
    "--experts=8",
    "--batch=8",
    "--length=16",
    "--precision=bf16",
    "--capacity_factor=0",
    "--steps=3",
    "--data=" + str(ROOT / "jax_ds"),
)


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PYTHON": sys.executable,
    "JAX_PLATFORMS": "cpu",
    "NPROC": "32",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of the same program compile it once between them."""
    return ENVIRONMENT | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _run(*command: str | pathlib.Path, env: dict[str, str] = ENVIRONMENT) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _losses(folder: pathlib.Path) -> list[float]:
    with (folder / "loss.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def single(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, str]:
    """A run in one process with eight devices."""
    folder = tmp_path_factory.mktemp("single")
    train = ROOT / "examples" / "train_deepseek_v3.py"
    return folder, _run(sys.executable, train, *SMALL, f"--out={folder}", env=environment)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(
    single: tuple[pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    launcher = ROOT / "examples" / "multi_process.sh"
    _run(launcher, "2", *SMALL, "--nodecode", f"--out={tmp_path}")
    losses = _losses(tmp_path)
    assert len(losses) == 3
    np.testing.assert_allclose(losses, _losses(single[0]), rtol=1e-3)


@pytest.mark.slow
def test_the_run_leaves_what_it_promises(single: tuple[pathlib.Path, str]) -> None:
    folder, output = single
    names = {file.name for file in folder.iterdir()}
    assert names == {"checkpoint.npz", "weights.npz", "config.json", "loss.csv", "loss.png"}
    for words in ("byte bigram", "Expert load", "tokens per second", "import "):
        assert words in output


@pytest.mark.slow
def test_interrupted_and_resumed(
    single: tuple[pathlib.Path, str], environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """Ctrl-C saves after the step it meets; --resume ends with the uninterrupted losses, also
    from losses ahead of the checkpoint, and changes nothing where the run has ended."""
    train = ROOT / "examples" / "train_deepseek_v3.py"
    command = [sys.executable, train, *SMALL, "--nodecode", f"--out={tmp_path}"]
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    # The line before the first step: the signal meets the step that traces and compiles.
    first = process.stdout.readline()
    assert "parameters" in first
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 130, output
    assert "Interrupted after step 1; saved." in output
    assert len(_losses(tmp_path)) == 1
    with (tmp_path / "loss.csv").open("a") as file:  # as if killed before the checkpoint
        file.write("1,99.0\n")
    for _ in range(2):
        _run(*command, "--resume", env=environment)
        assert _losses(tmp_path) == _losses(single[0])


@pytest.mark.slow
def test_killed_between_checkpoints(environment: dict[str, str], tmp_path: pathlib.Path) -> None:
    """What is on the disk after a kill: a checkpoint of some step, with the losses up to it."""
    train = ROOT / "examples" / "train_deepseek_v3.py"
    command = [sys.executable, train, *SMALL, f"--out={tmp_path}", "--steps=100000"]
    process = subprocess.Popen(
        [*map(str, command), "--save_every=2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "weights.npz").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with np.load(tmp_path / "checkpoint.npz") as state:
        step = int(state[".step"])
    assert step >= 2
    assert step % 2 == 0
    assert len(_losses(tmp_path)) >= step


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--mesh=8x"], "--mesh: must be a number or NODESxGPUS, got '8x'"),
        (["--batch=7"], "--batch: must be a multiple of the 8 devices, got 7"),
        (["--experts=12"], "--experts: must be a multiple of the 8 devices and of the 4 groups, "),
        (["--resume"], "--resume: must have a checkpoint in --out, got "),
        (["--data=nowhere"], "--data: must name a file or a folder, got 'nowhere'"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence(
    flags: list[str], sentence: str, tmp_path: pathlib.Path
) -> None:
    _ends_with(sentence, f"--out={tmp_path / 'out'}", *flags)


@pytest.mark.slow
def test_another_model_is_not_resumed(single: tuple[pathlib.Path, str]) -> None:
    sentence = "--resume: must be of a model of these sizes, .params.embedding: must be "
    _ends_with(sentence, f"--out={single[0]}", "--resume", "--hidden=128")


def _ends_with(sentence: str, *flags: str) -> None:
    train = ROOT / "examples" / "train_deepseek_v3.py"
    done = subprocess.run(
        [sys.executable, train, *SMALL, *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in done.stderr


def test_a_clone_without_installation(tmp_path: pathlib.Path) -> None:
    """From any folder, with nothing of ours on the path."""
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    command = [sys.executable, ROOT / "examples" / "expert_parallel.py", "--mesh=2"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)


def test_expert_parallel_changes_nothing() -> None:
    """Of the short examples the one that makes devices, so in a process of its own."""
    output = _run(sys.executable, ROOT / "examples" / "expert_parallel.py")
    assert output.startswith("largest difference from 2 x:")
    assert float(output.split()[-1]) == 0.0
