"""The record of the GPU tests must be of these sources, or say why it is not."""

import pathlib

from tests.gpu import sanitize
from tests.gpu.record import PENDING, RUNS, load, sources_sha256


def _pending() -> str:
    """The one line that excuses a record; empty without any."""
    return PENDING.read_text().strip() if PENDING.exists() else ""


def test_the_record_is_of_these_sources() -> None:
    record, digest = load(), sources_sha256()
    parts = (record, record.get("sanitizer", {}))
    if all(part.get("sources_sha256") == digest for part in parts):
        return
    reason = _pending()
    assert reason and "\n" not in reason, (
        "ffi/ has changed since the GPU tests last ran: run `make gpu-test gpu-sanitize` on a "
        "Hopper GPU, or say in one line in tests/gpu/PENDING why not"
    )


def test_every_run_is_recorded_and_none_failed() -> None:
    record = load()
    if not record:
        # Then the test above demands the reason.
        return
    runs = record["runs"]
    assert record["complete"] == (
        set(runs) == set(RUNS) and not any(r["status"] for r in runs.values())
    )
    # A part that did not come to its end must be explained; the tests of one process cannot be.
    assert record["complete"] or _pending()
    assert runs["1 process"]["status"] == 0
    for name, run in runs.items():
        outcomes = run["outcomes"]
        failed = [test for test, outcome in outcomes.items() if outcome.startswith("failed")]
        assert bool(failed) == bool(run["status"]), name
        assert failed or "passed" in outcomes.values(), name


def test_the_sanitizer_found_nothing() -> None:
    runs = load().get("sanitizer", {}).get("runs", {})
    for name, run in runs.items():
        # One that did not come to its end must be explained; what was found cannot be.
        assert run["status"] == 0 or (run["status"] != sanitize.FOUND and _pending()), name
        assert run["status"] or run["cases"] or "canary" in name, name
        assert not run["status"] if "canary" in name else not run["kernels"], name
    assert not runs or set(map(str, sanitize.planned())) <= set(runs)


def test_the_digest_covers_names_and_contents(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ffi").mkdir()
    digests = {sources_sha256(tmp_path)}
    (tmp_path / "ffi" / "a.cuh").write_text("x")
    digests.add(sources_sha256(tmp_path))
    (tmp_path / "ffi" / "a.cuh").write_text("y")
    digests.add(sources_sha256(tmp_path))
    (tmp_path / "ffi" / "a.cuh").rename(tmp_path / "ffi" / "b.cuh")
    digests.add(sources_sha256(tmp_path))
    (tmp_path / "ffi" / "notes.md").write_text("not a source")
    digests.add(sources_sha256(tmp_path))
    assert len(digests) == 4
