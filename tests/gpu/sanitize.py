"""Runs small calls of every kernel under compute-sanitizer: `make gpu-sanitize`.

    python3 tests/gpu/sanitize.py [--timeout 300] [--two-ranks [--nccl libnccl.so.2]] [ROOM ...]

Every room of `sanitized.py` runs under memcheck and racecheck, all processes side by side on one
GPU, the first that CUDA_VISIBLE_DEVICES names. Only our kernels are watched. A kernel with faults,
`canary.cuh`, must be found faulty, or the run failed. What was found goes beside the tests'
outcomes in results.json, unless only some rooms ran. With `--two-ranks` deep_ep also runs with two
ranks that take turns on the GPU; `--nccl` names the NCCL for them, 2.30.4 or newer.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from jax_ds._core import processes
from tests.gpu import multirank, record

TOOLS = ("memcheck", "racecheck")
ROOMS = ("deep_ep", "dense", "grouped", "wgrad", "decode", "prefill", "quantization")
FOUND = 9  # the status that says so
# A sanitizer and its program talk over one of ten ports from its own on.
_PORTS = range(20000, 30000, 10)
_HERE = pathlib.Path(__file__).parent
_ENVIRONMENT = {
    # Every array an allocation of its own: then its end is known.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip(),
    # Ranks under the sanitizer are slow, and wait for each other's turns.
    "JAX_DS_TIMEOUT_S": "60",
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One tool over one room, or over a rank of it."""

    tool: str
    room: str
    rank: int = 0
    ranks: int = 1

    def __str__(self) -> str:
        rank = f", rank {self.rank} of {self.ranks}" if self.ranks > 1 else ""
        return f"{self.tool} {self.room}{rank}"

    def command(self, log: pathlib.Path, port: int) -> list[str]:
        tool = [_sanitizer(), "--tool", self.tool, "--port", str(port), "--log-file", str(log)]
        tool += ["--kernel-name", "kns=jax_ds", "--error-exitcode", str(FOUND)]
        tool += ["--num-callers-host", "1", "--target-processes", "application-only"]
        program = ["canary.py"] if self.room == "canary" else ["sanitized.py", self.room]
        return [*tool, sys.executable, str(_HERE / program[0]), *program[1:]]

    def environment(self, nccl: str, port: int, compiled: pathlib.Path) -> dict[str, str]:
        result = {**os.environ, **_ENVIRONMENT}
        if self.ranks > 1:
            gpu = multirank.visible_gpus()[:1]
            result |= multirank.environment(self.rank, self.ranks, 1, gpu, nccl)
            result["JAX_DS_TEST_COORDINATOR"] = f"127.0.0.1:{port}"
            result["JAX_DS_TEST_CACHE"] = str(compiled)
        return result


def planned(rooms: Sequence[str] = ROOMS, two_ranks: bool = False) -> list[Process]:
    """What a run of these rooms consists of."""
    one = [Process(tool, room) for tool in TOOLS for room in ("canary", *rooms)]
    two = [Process(tool, "deep_ep", rank, 2) for tool in TOOLS for rank in range(2)]
    return one + (two if two_ranks else [])


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process found."""

    status: int
    cases: int  # that ran
    summary: str  # the tool's last line
    kernels: dict[str, int]  # the kernels that its report names, and how often


def read(process: Process, status: int, log: str, output: str) -> Run:
    """The canary is as it should be where the tool found its faults.

    A program that fails of what was found, or is ended, keeps its own status: then the report says.
    """
    kernels = dict(Counter(re.findall(r" at (?:void )?(jax_ds::[\w:]+)", log)))
    if process.room == "canary":
        status = {FOUND: 0, 0: 1}.get(status, status)
    elif kernels:
        status = FOUND
    summaries = re.findall(r"[A-Z]+ SUMMARY: .*", log)
    return Run(
        status,
        len(re.findall(r"^ *[\d.]+ s  ", output, re.MULTILINE)),
        summaries[-1] if summaries else "no summary",
        kernels,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--two-ranks", action="store_true", help="of deep_ep, too")
    parser.add_argument("--nccl", default="", help="libnccl.so.2 for two ranks")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for everything")
    parser.add_argument("--logs", help="folder for what the processes write")
    parser.add_argument(
        "rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; default: all"
    )
    options = parser.parse_args()
    if not set(options.rooms) <= set(ROOMS):
        parser.error(f"rooms are {', '.join(ROOMS)}")
    digest, start = record.sources_sha256(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        logs = pathlib.Path(options.logs or folder)
        logs.mkdir(parents=True, exist_ok=True)
        plan = planned(options.rooms or ROOMS, options.two_ranks)
        runs = _run(plan, options, logs)
        # The sanitizer itself crashes at times, at its start. What met the limit would again.
        done = (0, FOUND, -signal.SIGTERM, -signal.SIGKILL)
        again = [process for process in plan if runs[str(process)].status not in done]
        if again:
            print("once more:", ", ".join(map(str, again)), flush=True)
            runs |= _run(again, options, logs)
    seconds = round(time.monotonic() - start, 1)
    print(f"{seconds} s")
    if not options.rooms:
        found = {name: dataclasses.asdict(run) for name, run in runs.items()}
        record.store({"sanitizer": {"sources_sha256": digest, "seconds": seconds, "runs": found}})
    return int(any(run.status for run in runs.values()))


def _run(planned: list[Process], options: argparse.Namespace, logs: pathlib.Path) -> dict[str, Run]:
    meet = {tool: processes.free_port() for tool in TOOLS}
    texts = [logs / f"{process}.txt" for process in planned]
    statuses = processes.run(
        [
            process.command(logs / f"{process}.log", port)
            for process, port in zip(planned, _PORTS, strict=False)
        ],
        [
            process.environment(options.nccl, meet[process.tool], logs / f"{process.tool} compiled")
            for process in planned
        ],
        texts,
        cwd=record.ROOT,
        timeout=options.timeout,
        grace=options.timeout,
    )
    runs: dict[str, Run] = {}
    for process, status, text in zip(planned, statuses, texts, strict=True):
        log, output = text.with_suffix(".log"), text.read_text(errors="replace")
        run = read(process, status, log.read_text() if log.exists() else "", output)
        runs[str(process)] = run
        print(f"{process}: status {run.status}, {run.cases} cases, {run.summary}")
        for kernel, count in run.kernels.items():
            print(f"  {count:5} in {kernel}")
        if run.status not in (0, FOUND):
            print(*output.splitlines()[-20:], sep="\n", flush=True)
    return runs


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(found):
        raise SystemExit("no compute-sanitizer: it comes with the CUDA toolkit")
    return found


if __name__ == "__main__":
    sys.exit(main())
