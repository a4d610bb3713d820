"""Starts the ranks of the bring-up test on this machine, one process and one device each."""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

Processes = list["subprocess.Popen[bytes]"]


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
        return _report(_run(_command(options), gpus, files), files)


def _command(options: argparse.Namespace) -> list[str]:
    given = {"at-least": options.at_least, "timeout": options.timeout, "mib": options.mib}
    command = [sys.executable, "-m", "jax_ds.doctor", "--ranks", str(options.ranks)]
    command += ["--coordinator", f"127.0.0.1:{_free_port()}"]
    for name, value in given.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return command


def _visible_gpus() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES can name them; another process asks, and lets them go."""
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    backend, count = asked.stdout.split()[-2:]
    if backend != "gpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[: int(count)] if visible else [str(i) for i in range(int(count))]


def _run(command: list[str], gpus: list[str], files: list[pathlib.Path]) -> list[int]:
    """Every rank's status; its output goes to its file."""
    processes: Processes = []
    try:
        for rank, file in enumerate(files):
            environment = dict(os.environ)
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[rank]
            with file.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [*command, "--rank", str(rank)],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [process.wait() for process in processes]


def _wait(processes: Processes) -> None:
    """Until all have ended; the others have ten seconds once one has failed."""
    deadline = float("inf")
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if None not in statuses:
            return
        if any(statuses) and deadline == float("inf"):
            deadline = time.monotonic() + 10
        time.sleep(0.05)


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
