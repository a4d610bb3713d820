"""What `make gpu-test` makes of pytest's reports."""

import argparse
import pathlib
import threading

import pytest

from tests.gpu import run

_REPORT = """<testsuites><testsuite>
  <testcase classname="t" name="good" />
  <testcase classname="t" name="bad"><failure message="wrong\n  value">...</failure></testcase>
  <testcase classname="t" name="broken"><error message="no device">...</error></testcase>
  <testcase classname="t" name="unfit"><skipped message="needs a peer">...</skipped></testcase>
</testsuite></testsuites>"""


def test_every_outcome_says_why(tmp_path: pathlib.Path) -> None:
    report = tmp_path / "all.xml"
    report.write_text(_REPORT)
    assert run._outcomes(report) == {
        "t::good": "passed",
        "t::bad": "failed: wrong value",
        "t::broken": "failed: no device",
        "t::unfit": "skipped: needs a peer",
    }


@pytest.mark.parametrize(
    ("gpus", "devices"),
    [
        ("0", ["0", "0", "0", "0"]),
        ("1", ["1", "1", "1", "1"]),
        ("2,5", ["5", "2,5", "2", "5"]),
        ("GPU-a,GPU-b,GPU-c", ["GPU-c", "GPU-a,GPU-b", "GPU-a", "GPU-b"]),
    ],
)
def test_parts_use_the_visible_gpus(
    gpus: str, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each part's processes see, in the order of RUNS."""
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(
        run,
        "_run",
        lambda command, environment, count: seen.append(environment) or run.Run(0, 0, {}),
    )
    options = argparse.Namespace(nccl="", timeout=1)
    held = {gpu: threading.Lock() for gpu in run.visible_gpus()}
    parts = [run._part(name, held, options) for name in run.RUNS]
    assert seen == [{"CUDA_VISIBLE_DEVICES": names} for names in devices]
    assert [part.gpus for part in parts] == [len(names.split(",")) for names in devices]


def test_a_part_waits_for_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_run", lambda *_: run.Run(0, 0, {}))
    held = {"0": threading.Lock(), "1": threading.Lock()}
    options = argparse.Namespace(nccl="", timeout=1)
    with held["1"]:
        waiting = threading.Thread(target=run._part, args=("2 ranks", held, options))
        waiting.start()
        run._part("8 ranks", {"0": threading.Lock(), "1": held["1"]}, options)  # needs only "0"
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_the_slowest_tests_are_told(tmp_path: pathlib.Path) -> None:
    """A test of several ranks took as long as on the slowest of them."""
    for rank, seconds in enumerate((3.0, 1.0)):
        (tmp_path / f"{rank}.xml").write_text(
            f'<s><testcase classname="t" name="a" time="{seconds}" />'
            '<testcase classname="t" name="b" time="2.5" /></s>'
        )
    reports = sorted(tmp_path.glob("*.xml"))
    assert run._slowest(reports) == {"t::a": 3.0, "t::b": 2.5}
    assert run._slowest(reports, count=1) == {"t::a": 3.0}


def test_a_failure_on_any_rank_is_one() -> None:
    merged = run._merged(
        [
            {"a": "passed", "b": "skipped: x", "c": "passed"},
            {"a": "failed: y", "b": "skipped: x", "c": "skipped: z"},
            {},
        ]
    )
    assert merged == {"a": "failed: y", "b": "skipped: x", "c": "passed"}


@pytest.mark.parametrize(("left", "complete"), [(0, True), (1, False)])
def test_only_all_runs_are_complete(left: int, complete: bool) -> None:
    runs = {name: run.Run(0, 1.0, {"t": "passed"}) for name in list(run.RUNS)[left:]}
    assert run._complete(runs) is complete
    runs["1 process"] = run.Run(1, 1.0, {"t": "failed: x"})
    assert not run._complete(runs)


def test_what_failed_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.Run(
        1, 9.0, {"t.a::x[1]": "failed: no", "t.a::y": "passed", "t.b::z": "failed: no"}
    )
    asked = []

    def repeat(nccl: str, environment: dict[str, str], tests: list[str]) -> run.Run:
        asked.extend(tests)
        return run.Run(1, 1.0, {"t.a::x[1]": "passed", "t.b::z": "failed: still"})

    monkeypatch.setattr(run, "_one_process", repeat)
    after = run._repeat_failed(before, "", {})
    assert asked == ["t/a.py::x[1]", "t/b.py::z"]
    assert after.outcomes == {"t.a::x[1]": "passed", "t.a::y": "passed", "t.b::z": "failed: still"}
    assert after.status == 1 and list(after.repeated) == ["t.a::x[1]", "t.b::z"]
    monkeypatch.setattr(run, "_one_process", lambda *_: run.Run(0, 1.0, {"t.b::z": "passed"}))
    assert run._repeat_failed(after, "", {}).status == 0
    # Ended by its limit: not repeated, and no success. Without a report there is nothing to name.
    assert run._repeat_failed(run.Run(-15, 1.0, {"t.a::y": "passed"}), "", {}).status == -15
    with pytest.raises(SystemExit):
        run._repeat_failed(run.Run(1, 1.0, {"all": "failed: no report"}), "", {})
