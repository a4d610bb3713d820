"""Named cases of `deep_gemm`, shared by tests and benchmarks, and how results are compared."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ds.quantization import Quantized, reference

# Implementations that the contract tests run; "cuda" gets the marker `gpu` there.
IMPLEMENTATIONS = ("xla", "cuda")

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(2, shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.abs(rng.standard_normal(shape))


def badly_scaled(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows over twelve decades, blocks of a row over four."""
    rows = 10.0 ** rng.uniform(-6, 6, (*shape[:-1], 1))
    blocks = 10.0 ** rng.uniform(-2, 2, (*shape[:-1], -(-shape[-1] // 128)))
    return rng.standard_normal(shape) * rows * np.repeat(blocks, 128, -1)[..., : shape[-1]]


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """`[M, K] x [N, K]`, or its weight gradient with M tokens."""

    name: str
    m: int
    n: int
    k: int
    draw: Draw = normal
    out_dtype: Any = jnp.float32
    scale_dtype: str = "float32"

    def __str__(self) -> str:
        return self.name


GEMM_CASES = (
    GemmCase("1x8x128", 1, 8, 128),
    GemmCase("63x136x256", 63, 136, 256),
    GemmCase("64x128x16", 64, 128, 16),
    GemmCase("65x264x144", 65, 264, 144),
    GemmCase("127x24x1280 bfloat16", 127, 24, 1280, out_dtype=jnp.bfloat16),
    GemmCase("129x128x400 ue8m0", 129, 128, 400, scale_dtype="ue8m0"),
    GemmCase("heavy-tailed", 33, 40, 2048, heavy),
    GemmCase("all positive", 33, 40, 2048, positive),
    GemmCase("badly scaled", 33, 40, 512, badly_scaled),
)


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """Groups of rows among M; rows past their sum hold NaN."""

    name: str
    group_sizes: tuple[int, ...]
    m: int
    n: int = 40
    k: int = 272
    draw: Draw = normal
    out_dtype: Any = jnp.float32

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> jax.Array:
        return jnp.asarray(self.group_sizes, jnp.int32)


GROUPED_CASES = (
    GroupedCase("around a tile", (0, 1, 127, 128, 129, 0), 400),
    GroupedCase("no tail", (65, 63), 128),
    GroupedCase("one row", (0, 1, 0), 1, out_dtype=jnp.bfloat16),
    GroupedCase("all in one group", (0, 0, 150, 0), 151),
    GroupedCase("all empty", (0, 0, 0), 30),
    GroupedCase("no rows", (0, 0), 0),
    GroupedCase("one group", (37,), 50),
    GroupedCase("many small groups", (3, 0, 1, 7) * 8, 100, n=16, k=32),
    GroupedCase("large bfloat16", (100, 28), 140, n=136, k=128, out_dtype=jnp.bfloat16),
    GroupedCase("heavy-tailed", (60, 70), 140, k=1024, draw=heavy),
    GroupedCase("badly scaled", (60, 70), 140, draw=badly_scaled),
)

# Each group's rows among M of its own.
MASKED_CASES = (
    GroupedCase("empty, full, some", (0, 70, 3, 64, 65), 70),
    GroupedCase("one row of one", (1, 0), 1),
    GroupedCase("all empty", (0, 0), 20),
    GroupedCase("bfloat16", (9, 130), 140, n=136, k=128, out_dtype=jnp.bfloat16),
)


def random(draw: Draw, shape: tuple[int, ...], seed: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
    return draw(np.random.default_rng(seed), shape).astype(dtype)


def quantized_rows(case: GemmCase | GroupedCase, shape: tuple[int, ...], seed: int) -> Quantized:
    """Made by NumPy, so that a case compiles nothing but what it tests."""
    scale_dtype = getattr(case, "scale_dtype", "float32")
    return _quantized(reference.quantize_1x128(random(case.draw, shape, seed), scale_dtype))


def quantized_weights(case: GemmCase | GroupedCase, shape: tuple[int, ...], seed: int) -> Quantized:
    scale_dtype = getattr(case, "scale_dtype", "float32")
    return _quantized(reference.quantize_128x128(random(case.draw, shape, seed), scale_dtype))


def quantized_columns(case: GroupedCase, width: int, seed: int) -> Quantized:
    """Along tokens; what comes after the last group's padding holds NaN."""
    x = random(case.draw, (case.m, width), seed)
    values, scales = reference.quantize_columns(x, list(case.group_sizes))
    padded = sum(-(-size // 128) * 128 for size in case.group_sizes)
    values[:, padded:] = np.nan
    scales[:, padded // 128 :] = np.nan
    return _quantized((values, scales))


def poisoned(q: Quantized, used: np.ndarray) -> Quantized:
    """NaN, in values and scales, in the rows that `used` does not mark."""
    values, scales = np.array(q.values), np.array(q.scales)
    values[~used] = np.nan
    scales[~used] = np.nan
    return _quantized((values, scales))


def _quantized(pair: tuple[np.ndarray, np.ndarray]) -> Quantized:
    return Quantized(jnp.asarray(pair[0]), jnp.asarray(pair[1]))


def arrays(*operands: Quantized) -> list[np.ndarray]:
    """Values and scales in the reference's order of arguments."""
    return [np.asarray(array) for q in operands for array in (q.values, q.scales)]


def error(actual: Any, expected: Any) -> float:
    """Relative Frobenius error; 0 where both are all zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / norm) if norm else float(np.abs(actual).sum())


def assert_close(
    actual: jax.Array, expected: np.ndarray, draw: Draw = normal, *, kernel: bool = False
) -> None:
    """The bounds on a product of quantized operands, whose values are exact.

    Over all entries in the Frobenius norm, row by row where rows differ in scale. Results of few
    entries are not rounded to bfloat16 evenly, so there every entry has its own bound.

    Tensor cores keep 14 bits of a block's sum, so single entries of a `kernel` may be several
    standard deviations off, and a row that badly scaled columns leave one large entry may lose
    what cancels in one sum: wider there. The bound over all entries is the same.
    """
    assert np.isfinite(np.asarray(actual, np.float32)).all()
    bound = 2e-4 if draw is normal else 1e-3
    if actual.dtype != jnp.bfloat16:
        assert error(actual, expected) <= bound
    elif actual.size >= 4096:
        assert error(actual, expected) <= 2e-3
    else:
        spread = (
            (5 if kernel else 1) * bound * np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
        )
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, 2.0**-8, spread)
    if draw is badly_scaled:
        rows = np.asarray(expected, np.float64).reshape(-1, expected.shape[-1])
        got = np.asarray(actual, np.float64).reshape(rows.shape)
        bound = 2.0**-8 if actual.dtype == jnp.bfloat16 else bound  # one entry may be the row
        assert max(map(error, got, rows), default=0) <= (10 if kernel else 1) * bound
