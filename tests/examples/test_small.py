"""The examples of twenty lines print what they should; `test_train.py` runs expert_parallel.py."""

import pathlib
import re
import runpy

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def test_fp8_linear_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "fp8_linear.py"))
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < 0.01 * losses[0]


def test_flash_mla_decode_attends(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "flash_mla_decode.py"))
    printed = capsys.readouterr().out
    assert printed.startswith("out (2, 1, 16, 512) bfloat16 mean square ")
    # A mean of unit normals under softmax weights: smaller than one of them.
    assert 0 < float(printed.split()[-1]) < 1
