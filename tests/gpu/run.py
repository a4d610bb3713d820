"""Runs the tests that need a Hopper GPU and records every outcome: `make gpu-test`.

    python3 tests/gpu/run.py [--nccl /path/to/libnccl.so.2] [--timeout 300] [--only PART]
                             [arguments of pytest]

It needs the native module (`make setup`, or built elsewhere and put beside jax_ds/__init__.py) and,
of the interpreter that runs it, JAX for CUDA, pytest, pytest-xdist and hypothesis. First come the
tests of one process, then those of several ranks, which share the GPUs there are; ranks need NCCL
2.30.4 or newer: `--nccl` names one to use in place of the installed one. CUDA_VISIBLE_DEVICES says
which GPUs to use; parts that need different ones run side by side. `--only` repeats a part,
`--failed` the failed tests of one process; both keep what else the record says if it is of the same
sources. With arguments for pytest only the first part runs and nothing is recorded, because the run
is not complete.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.gpu.multirank import visible_gpus
from tests.gpu.record import ROOT, RUNS, load, sources_sha256, store

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvrtc")
# Compiling on the host dominates; the processes share the GPU.
_PROCESSES = max(1, min(15, (os.cpu_count() or 1) - 1))
# Searching the fastest product takes longer than the tests' small ones run.
_XLA_FLAGS = "--xla_gpu_autotune_level=0"
_MACHINE = """
import json
from jax_ds._runtime import native
module = native.module()
nccl = native.why_not_nccl() or module.nccl()
print(json.dumps([module.driver(), module.nvrtc()[:2], nccl]))
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of one of RUNS."""

    status: int
    seconds: float
    outcomes: dict[str, str]  # "passed", "skipped: why" or "failed: how", by test
    slowest: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds of a few tests
    gpus: int = 1  # that the ranks had
    repeated: Sequence[str] = ()  # tests that ran once more because they had failed

    def count(self, outcome: str) -> int:
        return sum(value.startswith(outcome) for value in self.outcomes.values())


def main() -> int:
    """Zero if everything ran and nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nccl", default="", help="libnccl.so.2 for the tests of several ranks")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each part of ranks")
    parser.add_argument(
        "--only", action="append", choices=RUNS, help="a part to run, may be repeated; default all"
    )
    parser.add_argument(
        "--failed", action="store_true", help="repeat only the recorded failures of one process"
    )
    options, arguments = parser.parse_known_args()
    if arguments:
        return _one_process(options.nccl, {}, arguments).status
    digest, machine = sources_sha256(), _machine(options.nccl)
    recorded = _recorded(digest)
    if options.failed and "1 process" not in recorded:
        parser.error("--failed: there is no record of these sources")
    names = ["1 process"] if options.failed else options.only or RUNS
    wanted = {name: RUNS[name] for name in names}
    if not isinstance(machine["nccl"], int):
        print(f"no tests of several ranks: {machine['nccl']}")
        wanted = {name: shape for name, shape in wanted.items() if shape == (1, 1)}
    runs = {name: run for name, run in recorded.items() if name not in wanted}
    gpus = {name: threading.Lock() for name in visible_gpus()}
    with concurrent.futures.ThreadPoolExecutor(len(RUNS)) as pool:
        before = recorded if options.failed else {}
        parts = {pool.submit(_part, name, gpus, options, before.get(name)): name for name in wanted}
        for part in concurrent.futures.as_completed(parts):
            # After every part: a run that is killed later has recorded what it had.
            runs[parts[part]] = part.result()
            _record(digest, machine, runs)
    return 0 if _complete(runs) else 1


def _part(
    name: str,
    gpus: dict[str, threading.Lock],
    options: argparse.Namespace,
    before: Run | None = None,
) -> Run:
    """One of RUNS, alone on its GPUs: ranks that wait for each other cannot take turns.

    Of the run `before`, if any, only what failed.
    """
    ranks, nodes = RUNS[name]
    devices = _devices(ranks, nodes, list(gpus))
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
    with contextlib.ExitStack() as held:
        for gpu in sorted(devices):
            held.enter_context(gpus[gpu])
        if before:
            run = _repeat_failed(before, options.nccl, environment)
        elif ranks == 1:
            run = _one_process(options.nccl, environment, [])
        else:
            run = _ranks(ranks, nodes, environment, options)
    return dataclasses.replace(run, gpus=len(devices))


def _devices(ranks: int, nodes: int, gpus: list[str]) -> list[str]:
    """Those of `gpus` that a part runs on: one for each rank, or one for all."""
    if ranks == 1:
        return gpus[-1:]
    return gpus[:ranks] if ranks <= len(gpus) else [gpus[(nodes - 1) % len(gpus)]]


def _recorded(digest: str) -> dict[str, Run]:
    """What the record says of these sources."""
    record = load()
    if record.get("sources_sha256") != digest:
        return {}
    return {name: Run(**run) for name, run in record["runs"].items()}


def _one_process(nccl: str, environment: dict[str, str], arguments: list[str]) -> Run:
    command = ["env", f"LD_PRELOAD={nccl}"] if nccl else []
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:benchmark"]
    if not any(argument.startswith("-n") for argument in arguments):
        command += ["-n", str(_PROCESSES)]
    return _run([*command, "--junitxml={reports}/all.xml", *arguments], environment, 1)


def _repeat_failed(run: Run, nccl: str, environment: dict[str, str]) -> Run:
    """`run` with the outcomes of its failed tests when they are run once more."""
    failed = [test for test, outcome in run.outcomes.items() if outcome.startswith("failed")]
    parts = [test.partition("::") for test in failed]
    if not all(file and name for file, _, name in parts):
        raise SystemExit("a process left no report: repeat it with --only '1 process'")
    if not failed:
        return run
    tests = [f"{file.replace('.', '/')}.py::{name}" for file, _, name in parts]
    again = _one_process(nccl, environment, tests)
    merged = dataclasses.replace(
        run, outcomes=run.outcomes | again.outcomes, repeated=sorted({*run.repeated, *failed})
    )
    return dataclasses.replace(merged, status=1 if merged.count("failed") else again.status)


def _ranks(ranks: int, nodes: int, environment: dict[str, str], options: argparse.Namespace) -> Run:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "multirank.py")]
    command += ["--ranks", str(ranks), "--nodes", str(nodes), "--lines", "1"]
    command += ["--timeout", str(options.timeout)]
    command += ["--nccl", options.nccl] if options.nccl else []
    return _run([*command, "--", "--junitxml={reports}/{rank}.xml"], environment, ranks)


def _run(command: list[str], environment: dict[str, str], count: int) -> Run:
    """Runs `command`, which leaves `count` reports in the folder that {reports} stands for."""
    environment = {**os.environ, **environment}
    # Several processes on one GPU: none may take all its memory at the start.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}".strip()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [word.replace("{reports}", folder) for word in command]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        reports = sorted(pathlib.Path(folder).glob("*.xml"))
        outcomes, slowest = _merged([_outcomes(file) for file in reports]), _slowest(reports)
        if len(reports) < count:
            outcomes["all"] = f"failed: {count - len(reports)} of {count} processes left no report"
    return Run(status, round(time.monotonic() - start, 1), outcomes, slowest)


def _cases(report: pathlib.Path) -> Iterator[tuple[str, ET.Element]]:
    for case in ET.parse(report).getroot().iter("testcase"):
        yield f"{case.get('classname')}::{case.get('name')}", case


def _outcomes(report: pathlib.Path) -> dict[str, str]:
    outcomes = {}
    for name, case in _cases(report):
        outcome = "passed"
        for child in case:
            reason = " ".join(child.get("message", "").split())[:200]
            if child.tag in ("failure", "error"):
                outcome = f"failed: {reason}"
            elif child.tag == "skipped":
                outcome = f"skipped: {reason}"
        outcomes[name] = outcome
    return outcomes


def _slowest(reports: list[pathlib.Path], count: int = 5) -> dict[str, float]:
    """Seconds of the slowest tests, on the rank where each took longest."""
    seconds: dict[str, float] = {}
    for report in reports:
        for name, case in _cases(report):
            seconds[name] = max(seconds.get(name, 0.0), float(case.get("time", 0)))
    return dict(sorted(seconds.items(), key=lambda item: -item[1])[:count])


def _merged(ranks: list[dict[str, str]]) -> dict[str, str]:
    """A test's outcome over all ranks: it failed where any failed, and passed where any passed."""
    order = ("failed", "passed", "skipped")
    merged: dict[str, str] = {}
    for outcomes in ranks:
        for name, outcome in outcomes.items():
            seen = [outcome, *([merged[name]] if name in merged else [])]
            merged[name] = min(seen, key=lambda value: order.index(value.split(":")[0]))
    return dict(sorted(merged.items()))


def _complete(runs: dict[str, Run]) -> bool:
    return set(runs) == set(RUNS) and not any(run.status for run in runs.values())


def _record(digest: str, machine: dict[str, Any], runs: dict[str, Run]) -> None:
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **machine,
        "sources_sha256": digest,
        "complete": _complete(runs),
        "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
    }
    store(record)
    for name, run in runs.items():
        counts = ", ".join(f"{run.count(what)} {what}" for what in ("passed", "failed", "skipped"))
        print(f"{name}, {run.gpus} GPUs: {counts} in {run.seconds} s, status {run.status}")
        for test, seconds in run.slowest.items():
            print(f"  {seconds:6.1f} s  {test}", flush=True)


def _machine(nccl: str) -> dict[str, Any]:
    """GPU and versions, from a process of its own: this one must not hold the GPU."""
    environment = {**os.environ, **({"LD_PRELOAD": nccl} if nccl else {})}
    output = subprocess.run(
        [sys.executable, "-c", _MACHINE],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (driver, gpus), nvrtc, nccl_version = json.loads(output.splitlines()[-1])
    versions = {"python": sys.version.split()[0], "nvrtc": ".".join(map(str, nvrtc))}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = {"gpu": gpus[0][0], "gpus": len(gpus), "cuda_driver": driver}
    return {**gpu, "nccl": nccl_version, "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
