"""The examples' data: what is held out stays out, batches repeat, the bigram is a bigram."""

import importlib.util
import itertools
import pathlib
import sys
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def text() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_text", EXAMPLES / "text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_text"] = module
    spec.loader.exec_module(module)
    return module


def test_the_split(text: ModuleType, tmp_path: pathlib.Path) -> None:
    """Every byte is in one part, and every sixteenth block is held out."""
    block = 1 << 15
    (tmp_path / "a").write_bytes(bytes([65]) * block + bytes([66]) * 15 * block)
    (tmp_path / "b").write_bytes(bytes([67]) * (block // 2))
    (tmp_path / "c").write_bytes(b"\0binary")
    parts = text.load([str(tmp_path)])
    assert np.bincount(parts.held_out).nonzero()[0].tolist() == [65, 67]
    assert set(parts.train) == {66}
    assert parts.held_out.size == block + block // 2


def test_the_default_is_the_standard_library(text: ModuleType) -> None:
    parts = text.load([], limit=1 << 18)
    assert parts.train.size + parts.held_out.size == 1 << 18
    assert b"import " in parts.train.tobytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [str(folder / "none")], "--data: must name a file or a folder"),
        (lambda folder: [str(folder)], "--data: must hold at least 65536 bytes of text, got 0"),
    ],
)
def test_errors(text: ModuleType, tmp_path: pathlib.Path, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.load(make(tmp_path))  # type: ignore[operator]


def test_batches_depend_on_seed_and_step_alone(text: ModuleType) -> None:
    data = np.arange(1000, dtype=np.uint32).astype(np.uint8)
    draw = lambda step, seed: text.batch(data, step, size=4, length=9, seed=seed)  # noqa: E731
    np.testing.assert_array_equal(draw(3, 1), draw(3, 1))
    assert not np.array_equal(draw(3, 1), draw(4, 1))
    assert not np.array_equal(draw(3, 1), draw(3, 2))
    windows = draw(3, 1)
    assert windows.shape == (4, 10) and windows.dtype == np.int32
    assert (np.diff(windows, axis=1) % 256 == 1).all()
    first, second = text.held_out_batches(data, batches=2, size=3, length=9)
    assert first.shape == second.shape == (3, 10)
    assert first[0, 0] == 0 and second[-1, 0] == 990 % 256


def test_the_bigram(text: ModuleType) -> None:
    """Against the formula, count by count."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4, 500).astype(np.uint8)
    window = rng.integers(0, 5, (3, 20)).astype(np.int32)
    losses = []
    for row in window:
        for before, after in itertools.pairwise(row):
            pair = sum(train[i] == before and train[i + 1] == after for i in range(499))
            total = sum(train[:-1] == before)
            losses.append(-np.log((pair + 0.1) / (total + 25.6)))
    np.testing.assert_allclose(text.bigram_loss(train, [window]), np.mean(losses), rtol=1e-9)
