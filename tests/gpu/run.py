"""Runs the tests that need a Hopper GPU and records their outcomes: `make gpu-test`.

Extra arguments go to pytest; with any, nothing is recorded, because the run is not complete.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.gpu.record import PENDING, RESULTS, ROOT, sources_sha256

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvrtc", "nvidia-nccl-cu13")
# Compiling on the host dominates; the processes share the GPU.
_PROCESSES = 6


def main(arguments: list[str]) -> int:
    """Pytest's exit status."""
    digest = sources_sha256()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        status = _pytest(report, arguments)
        outcomes = _outcomes(report) if report.exists() else {}
    if arguments:
        return status
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **_machine(),
        "sources_sha256": digest,
        "complete": status == 0,
        "outcomes": outcomes,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if status == 0:
        PENDING.unlink(missing_ok=True)
    print(f"{RESULTS.relative_to(ROOT)}: {len(outcomes)} tests, pytest's status {status}")
    return status


def _pytest(report: pathlib.Path, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:benchmark"]
    command += [f"--junitxml={report}"]
    if not any(argument.startswith("-n") for argument in arguments):
        command += ["-n", str(_PROCESSES)]
    # Several processes on one GPU: none may take all its memory at the start.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode


def _outcomes(report: pathlib.Path) -> dict[str, str]:
    outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes[name] = {"failure": "failed", "error": "failed"}.get(*kinds[:1] or [""], "passed")
        if kinds[:1] == ["skipped"]:
            outcomes[name] = "skipped"
    return dict(sorted(outcomes.items()))


def _machine() -> dict[str, Any]:
    """GPU and versions, from a process of its own: this one must not hold the GPU."""
    code = (
        "import json; from jax_ds._runtime import native;"
        "print(json.dumps([native.module().driver(), native.module().nvrtc()[:2]]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (driver, gpus), nvrtc = json.loads(output.splitlines()[-1])
    versions = {"python": sys.version.split()[0], "nvrtc": ".".join(map(str, nvrtc))}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"gpu": gpus[0][0], "cuda_driver": driver, "versions": versions}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
