"""Starts the ranks of the bring-up test on this machine, one process and one device each."""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

from jax_ds._core import processes


def start(options: argparse.Namespace) -> int:
    """Prints what rank 0 says, and the last of a rank that failed; 0 if all links are OK."""
    ranks = options.ranks
    if ranks < 2:
        print(f"--ranks: must be at least 2, got {ranks}")
        return 1
    gpus = _visible_gpus()
    if gpus and len(gpus) < ranks:
        print(
            f"--ranks: must be at most the {len(gpus)} GPUs of this machine, got {ranks}; ranks "
            "that share a GPU are started under MPS, with --rank and --coordinator"
        )
        return 1
    with tempfile.TemporaryDirectory(prefix="bring-up-") as folder:
        files = [pathlib.Path(folder, f"rank{rank}.txt") for rank in range(ranks)]
        command = _command(options)
        commands = [[*command, "--rank", str(rank)] for rank in range(ranks)]
        return _report(processes.run(commands, _environments(ranks, gpus), files), files)


def _command(options: argparse.Namespace) -> list[str]:
    given = {"at-least": options.at_least, "timeout": options.timeout, "mib": options.mib}
    command = [sys.executable, "-m", "jax_ds.doctor", "--ranks", str(options.ranks)]
    command += ["--coordinator", f"127.0.0.1:{processes.free_port()}"]
    for name, value in given.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return command


def _environments(ranks: int, gpus: list[str]) -> list[dict[str, str]]:
    """One GPU each, where there are any."""
    return [
        {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus[rank]} if gpus else {})}
        for rank in range(ranks)
    ]


def _visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES can name them; another process asks, and lets them go."""
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    backend, count = asked.stdout.split()[-2:]
    if backend != "gpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[: int(count)] if visible else [str(i) for i in range(int(count))]


def _report(statuses: list[int], files: list[pathlib.Path]) -> int:
    lines = [file.read_text(errors="replace").splitlines() for file in files]
    # Where all ranks came to the end they agree, and rank 0 has printed what they found.
    agree = len(set(statuses)) == 1 and any("links, " in line for line in lines[0])
    print("\n".join(lines[0]))
    for rank, status in enumerate(statuses):
        if status and not agree:
            last = lines[rank][-1] if lines[rank] else "it said nothing"
            print(f"rank {rank} ended with status {status}: {last}")
    return int(any(statuses))
