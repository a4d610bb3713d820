"""What the last run of the GPU tests covered: the record's place and the sources it vouches for."""

import hashlib
import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "gpu" / "results.json"
# One line: why the record is older than the sources, or not complete. A complete run removes it.
PENDING = ROOT / "tests" / "gpu" / "PENDING"
# What a complete record of the tests holds: (ranks, nodes they make up).
RUNS = {"1 process": (1, 1), "2 ranks": (2, 1), "8 ranks": (8, 1), "8 ranks in 2 nodes": (8, 2)}


def sources_sha256(root: pathlib.Path = ROOT) -> str:
    """A digest of every kernel and handler source under ffi/, names and contents."""
    digest = hashlib.sha256()
    files = [f for f in (root / "ffi").rglob("*") if f.suffix in (".cuh", ".h", ".cc")]
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def load() -> dict[str, Any]:
    """What is recorded; empty without a record."""
    record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return record


def store(part: dict[str, Any]) -> None:
    """Replaces these keys of the record; the rest stays."""
    record = load() | part
    new = RESULTS.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(RESULTS)
    if vouches(record, sources_sha256()):
        PENDING.unlink(missing_ok=True)


def vouches(record: dict[str, Any], digest: str) -> bool:
    """Whether tests and sanitizer have seen these sources and found nothing."""
    sanitizer = record.get("sanitizer", {})
    return (
        record.get("sources_sha256") == digest
        and record["complete"]
        and sanitizer.get("sources_sha256") == digest
        and not any(run["status"] for run in sanitizer["runs"].values())
    )
