"""Measured configurations: their file, how calls take them, and that all compute the same."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ds import deep_gemm
from jax_ds.deep_gemm import ffi, reference, tuned
from jax_ds.quantization import Quantized, quantize_1x128, quantize_1x128_both, quantize_128x128
from tests.deep_gemm import cases

PROBLEM = tuned.Problem("dense", "bfloat16", False, 64, 256, 512, 1)


def _lowered() -> str:
    def call(x: Any, w: Any) -> Any:
        return deep_gemm.fp8_gemm(quantize_1x128(x), quantize_128x128(w))

    shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 512), (256, 512)))
    return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_calls_take_what_was_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, second = (name for name, _ in tuned.candidates(PROBLEM)[:2])
    other = dataclasses.replace(PROBLEM, m=65)
    file = tmp_path / "folder" / "tuned.json"
    tuned.write(file, "H200", PROBLEM, {best: 9.0, second: 8.0})
    tuned.write(file, "H200", other, {best: 9.0})
    assert set(json.loads(file.read_text())["problems"]) == {str(PROBLEM), str(other)}
    assert 'config = ""' in _lowered()
    monkeypatch.setenv("JAX_DS_GEMM_TUNING", str(file))
    assert f'config = "{second}"' in _lowered()
    assert tuned.configuration(other) == best
    assert tuned.configuration(dataclasses.replace(PROBLEM, m=66)) == ""


def test_a_file_that_does_not_fit_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, broken, old = (tmp_path / name for name in ("missing", "broken", "old"))
    broken.write_text('{"problems": {"a": {"us": {}}}}')
    tuned.write(old, "H200", PROBLEM, {"3x5,legs=7": 1.0})
    for file, message in (
        (missing, "JAX_DS_GEMM_TUNING: must name a file that deep_gemm.tune wrote"),
        (broken, "JAX_DS_GEMM_TUNING: must name a file that deep_gemm.tune wrote"),
        (old, "tune again, got 3x5,legs=7"),
    ):
        monkeypatch.setenv("JAX_DS_GEMM_TUNING", str(file))
        with pytest.raises(ValueError, match=message):
            tuned.configuration(PROBLEM)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"k": 24}, "k: must be a multiple of 16, got 24"),
        ({"n": 12}, "n: must be a multiple of 8, got 12"),
        ({"mode": "wgrad", "k": 144}, "k: must be whole blocks of 128 tokens, got 144"),
        ({"groups": 2}, "groups: must be 1 for dense products, got 2"),
        ({"mode": "grouped", "groups": 2, "group_sizes": [3]}, "group_sizes: must be 2 sizes"),
        (
            {"mode": "grouped", "groups": 2, "group_sizes": [-1, 3]},
            "group_sizes: must be at least 0, got -1",
        ),
        ({"group_sizes": [3]}, "group_sizes: must be None for dense products"),
        ({"accumulate": True}, "accumulate: .*True"),
    ],
)
def test_errors(keywords: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    sizes = {"m": 64, "n": 256, "k": 512}
    with pytest.raises(ValueError, match=message):
        deep_gemm.tune(**{**sizes, **keywords}, file=tmp_path / "none")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["dense", "grouped", "masked", "wgrad"])
def test_tunes_and_notes(mode: str, tmp_path: pathlib.Path) -> None:
    file, groups = tmp_path / "tuned.json", 1 if mode == "dense" else 3
    us = deep_gemm.tune(384, 256, 512, mode=mode, groups=groups, file=file)
    output = "float32" if mode == "wgrad" else "bfloat16"
    problem = tuned.Problem(mode, output, False, 384, 256, 512, groups)
    assert set(us) == {name for name, _ in tuned.candidates(problem)}
    assert all(time > 0 for time in us.values())
    assert tuned.read(file)[str(problem)]["config"] == next(iter(us))


def _names(mode: str, output: str = "bfloat16") -> list[str]:
    problem = tuned.Problem(mode, output, False, 64, 256, 512, 1)
    return [name for name, _ in tuned.candidates(problem)]


def _normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _check(actual: Any, expected: np.ndarray) -> None:
    limit = 2e-4 if actual.dtype == jnp.float32 else 2e-3
    assert cases.error(actual, expected) <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["bfloat16", "float32"])
def test_every_dense_configuration(output: str) -> None:
    """Rows, columns and K that end inside a tile, more tiles than a wave has."""
    for m, n, k in ((1, 136, 144), (65, 520, 1168), (4200, 2312, 272)):
        lhs, rhs = quantize_1x128(_normal((m, k), 1)), quantize_128x128(_normal((n, k), 2))
        expected = reference.gemm(*cases.arrays(lhs, rhs))
        problem = tuned.Problem("dense", output, False, m, n, k, 1)
        for name in _names("dense", output):
            _check(ffi.launch(problem, name, lhs, rhs, None, None, (m, n)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["grouped", "masked"])
def test_every_ragged_configuration(mode: str, output: str) -> None:
    """Groups that end at, before and behind the ends of tiles; NaN where no group is."""
    sizes, n, k = (0, 1, 63, 64, 65, 127, 128, 129, 200, 0, 700), 520, 656
    groups, total = len(sizes), sum(sizes)
    m = total + 77 if mode == "grouped" else 768
    shape = (m, k) if mode == "grouped" else (groups, m, k)
    rhs = quantize_128x128(_normal((groups, n, k), 2))
    lhs, counts = quantize_1x128(_normal(shape, 1)), jnp.asarray(sizes, jnp.int32)
    starts = np.cumsum([0, *sizes])
    used = np.arange(m) < (total if mode == "grouped" else np.asarray(sizes)[:, None])
    expected = np.zeros((*shape[:-1], n), np.float32)
    for g, size in enumerate(sizes):
        place = np.s_[starts[g] : starts[g + 1]] if mode == "grouped" else np.s_[g, :size]
        weights = (np.asarray(rhs.values[g]), np.asarray(rhs.scales[g]))
        expected[place] = reference.gemm(
            np.asarray(lhs.values)[place], np.asarray(lhs.scales)[place], *weights
        )
    lhs = cases.poisoned(lhs, used)
    problem = tuned.Problem(mode, output, False, m, n, k, groups)
    for name in _names(mode, output):
        actual = ffi.launch(problem, name, lhs, rhs, counts, None, (*shape[:-1], n))
        assert not np.asarray(actual, np.float32)[~used].any()
        _check(actual, expected)


@pytest.mark.gpu
def test_every_wgrad_configuration() -> None:
    sizes, n, k = (0, 1, 128, 700, 0, 129), 328, 520
    counts, groups = jnp.asarray(sizes, jnp.int32), len(sizes)
    _, dy = quantize_1x128_both(_normal((1100, n), 1), counts)
    _, x = quantize_1x128_both(_normal((1100, k), 2), counts)
    added = jax.random.normal(jax.random.key(3), (groups, n, k))
    expected, start = np.zeros((groups, n, k), np.float32), 0
    for g, size in enumerate(sizes):
        end = start + -(-size // 128) * 128
        if size:
            expected[g] = reference.gemm(*_tokens(dy, start, end), *_tokens(x, start, end))
        start = end
    problem = tuned.Problem("wgrad", "float32", False, n, k, dy.shape[-1], groups)
    adding = dataclasses.replace(problem, accumulate=True)
    rounded = dataclasses.replace(problem, output="bfloat16")
    for name in _names("wgrad", "float32"):
        _check(ffi.launch(problem, name, dy, x, counts, None, expected.shape), expected)
        total = ffi.launch(adding, name, dy, x, counts, added, expected.shape)
        _check(total, expected + np.asarray(added))
        _check(ffi.launch(rounded, name, dy, x, counts, None, expected.shape), expected)


def _tokens(q: Quantized, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = slice(start // 128, end // 128)
    return np.asarray(q.values)[:, start:end], np.asarray(q.scales)[:, blocks]
