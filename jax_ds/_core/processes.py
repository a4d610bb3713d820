"""Starts the ranks of a job on this machine, one process each."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Never


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, as an interrupt does, instead of ending the process at once.

    Only in the main thread, which alone may say so.
    """

    def leave(number: int, frame: Any) -> Never:
        # Once: `timeout` tells its child and then the group of both.
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        # None: a handler that is not Python's, which Python cannot put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@_terminable()
def run(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    files: Sequence[pathlib.Path],
    *,
    cwd: pathlib.Path | None = None,
    timeout: float = float("inf"),
    grace: float = 10.0,
) -> list[int]:
    """Runs a command for each rank, its output in its file; their statuses.

    After a failure the others have `grace` seconds to say for whom they wait. Nothing that was
    started outlives `timeout` seconds, or this call, also where SIGTERM ends it.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, environment, file in zip(commands, environments, files, strict=True):
            with file.open("wb") as output:
                started.append(
                    subprocess.Popen(
                        list(command),
                        cwd=cwd,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        # Whose signals reach all that a rank starts, but not from outside.
                        start_new_session=True,
                    )
                )
        _wait(started, timeout, grace)
    finally:
        _stop(started)
    return [process.wait() for process in started]


def _wait(started: Sequence["subprocess.Popen[bytes]"], timeout: float, grace: float) -> None:
    deadline = time.monotonic() + timeout
    failed = False
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        if not failed and any(process.poll() for process in started):
            failed = True
            deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.05)


def _stop(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal_number)
        _wait(started, timeout=5.0, grace=5.0)
