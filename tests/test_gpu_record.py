"""What `make gpu-test` makes of pytest's reports."""

import pathlib

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
