"""What the last run of the GPU tests covered: the record's place and the sources it vouches for."""

import hashlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "gpu" / "results.json"
# One line: why the record is older than the sources, or not complete. A complete run removes it.
PENDING = ROOT / "tests" / "gpu" / "PENDING"
# What a complete record holds: (ranks, nodes they make up).
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
