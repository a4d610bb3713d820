"""Named cases of `quantization`, shared by tests and benchmarks, and how results are compared."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_ds import quantization
from jax_ds.quantization import Quantized, reference

# Implementations that the contract tests run; "cuda" gets the marker `gpu` there.
IMPLEMENTATIONS = ("xla", "cuda")

Pair = tuple[np.ndarray, np.ndarray]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _wide(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows from 1e-30 to 1e30 and values of a row over six decades."""
    row = 10.0 ** rng.uniform(-30, 30, (*shape[:-1], 1))
    return row * rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 0, shape)


def _tiny(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Around 2**-107, where a block starts to count as zero, and down to subnormals."""
    return rng.standard_normal(shape) * 2.0 ** rng.uniform(-140, -104, (*shape[:-1], 1))


def _huge(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(rng.standard_normal(shape) * 2e38, -3e38, 3e38)


def _anomalies(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """NaN of both signs, infinities, blocks of zeros and of negative zeros between numbers."""
    x = rng.standard_normal(shape)
    flat = x.reshape(-1, shape[-1])
    for row, value in enumerate((np.nan, np.inf, -np.inf, -np.nan)):
        flat[row % len(flat), 1 % shape[-1]] = value
    flat[4 % len(flat), :] = 0.0
    flat[5 % len(flat), :] = -0.0
    return x


def _boundaries(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Halfway between two FP8 codes, where a quotient that is off by one bit changes the code."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    middle = (codes[1:] + codes[:-1]) / 2
    x = rng.choice(np.concatenate([codes, middle, -middle]), shape)
    x[..., 0] = 448
    return x * rng.uniform(1, 2, (*shape[:-1], 1)) * 2.0 ** rng.integers(-20, 20, (*shape[:-1], 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """An `[M, K]` operand and how its rows fall into groups (None: ungrouped)."""

    name: str
    shape: tuple[int, int]
    make: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = _normal
    dtype: Any = jnp.float32
    group_sizes: tuple[int, ...] | None = None
    scale_dtype: str = "float32"

    def __str__(self) -> str:
        return self.name

    @property
    def seed(self) -> int:
        return sum(map(ord, self.name))

    def operand(self, batch: tuple[int, ...] = ()) -> jax.Array:
        with np.errstate(over="ignore"):
            x = self.make(np.random.default_rng(self.seed), (*batch, *self.shape))
            return jnp.asarray(x.astype(np.float32)).astype(self.dtype)

    def sizes(self) -> jax.Array | None:
        return None if self.group_sizes is None else jnp.asarray(self.group_sizes, jnp.int32)


CASES = (
    Case("one value", (1, 1)),
    Case("one block", (1, 128), dtype=jnp.bfloat16, group_sizes=(0, 1)),
    Case("short of a block", (127, 127), group_sizes=(127,)),
    Case("past a block", (129, 129), group_sizes=(0, 128, 0, 1)),
    Case("ragged bfloat16", (130, 300), dtype=jnp.bfloat16, group_sizes=(3, 0, 100, 27)),
    Case("aligned", (256, 256), dtype=jnp.bfloat16, group_sizes=(128, 128)),
    Case("more groups than rows", (5, 200), group_sizes=(1, 0, 0, 2, 0, 1, 0, 1, 0, 0)),
    Case("all groups empty", (7, 130), group_sizes=(0, 0, 0)),
    Case("no rows", (0, 130), group_sizes=(0, 0)),
    Case("wide", (140, 260), _wide, group_sizes=(9, 131)),
    Case("wide ue8m0", (140, 260), _wide, jnp.bfloat16, scale_dtype="ue8m0"),
    Case("tiny", (150, 140), _tiny, group_sizes=(20, 130)),
    Case("tiny ue8m0", (150, 140), _tiny, scale_dtype="ue8m0"),
    Case("huge", (8, 140), _huge),
    Case("huge ue8m0", (8, 140), _huge, scale_dtype="ue8m0"),
    Case("anomalies", (140, 260), _anomalies, group_sizes=(2, 138)),
    Case("anomalies ue8m0", (140, 260), _anomalies, jnp.bfloat16, scale_dtype="ue8m0"),
    Case("boundaries", (100, 384), _boundaries),
    Case("boundaries ue8m0", (12, 384), _boundaries, jnp.bfloat16, scale_dtype="ue8m0"),
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A quantizer of x (and group sizes) and its reference, as lists of results in one order."""

    name: str
    run: Callable[..., Any]
    expect: Callable[[np.ndarray, tuple[int, ...] | None, str], list[Pair]]

    def __str__(self) -> str:
        return self.name


def _transposed(pair: Pair) -> Pair:
    return pair[0].T, pair[1].T


def _square_both(x: np.ndarray, sizes: Any, scale_dtype: str) -> list[Pair]:
    pair = reference.quantize_128x128(x, scale_dtype)
    return [pair, _transposed(pair)]


def _both(x: np.ndarray, sizes: Any, scale_dtype: str) -> list[Pair]:
    rows = reference.quantize_1x128(x, scale_dtype)
    return [rows, reference.quantize_columns(x, sizes, scale_dtype)]


OPERATIONS = (
    Operation(
        "quantize_1x128",
        lambda x, sizes, **kw: [quantization.quantize_1x128(x, **kw)],
        lambda x, sizes, scale_dtype: [reference.quantize_1x128(x, scale_dtype)],
    ),
    Operation(
        "quantize_128x128",
        lambda x, sizes, **kw: [quantization.quantize_128x128(x, **kw)],
        lambda x, sizes, scale_dtype: [reference.quantize_128x128(x, scale_dtype)],
    ),
    Operation(
        "quantize_1x128_both",
        lambda x, sizes, **kw: list(quantization.quantize_1x128_both(x, sizes, **kw)),
        _both,
    ),
    Operation(
        "quantize_128x128_both",
        lambda x, sizes, **kw: list(quantization.quantize_128x128_both(x, **kw)),
        _square_both,
    ),
)

# Their results may differ from the reference by one FP8 code.
SWIGLU_OPERATIONS = (
    Operation(
        "swiglu_quantize_1x128",
        lambda x, sizes, **kw: [quantization.swiglu_quantize_1x128(x, **kw)],
        lambda x, sizes, scale_dtype: [reference.quantize_1x128(reference.swiglu(x), scale_dtype)],
    ),
    Operation(
        "swiglu_quantize_1x128_both",
        lambda x, sizes, **kw: list(quantization.swiglu_quantize_1x128_both(x, sizes, **kw)),
        lambda x, sizes, scale_dtype: _both(reference.swiglu(x), sizes, scale_dtype),
    ),
)

SWIGLU_CASES = (
    Case("one value", (1, 2)),
    Case("ragged bfloat16", (130, 600), dtype=jnp.bfloat16, group_sizes=(3, 0, 100, 27)),
    Case("aligned", (256, 512), dtype=jnp.bfloat16, group_sizes=(128, 128)),
    Case("saturated", (20, 256), lambda rng, shape: 30 * rng.standard_normal(shape)),
    Case("no rows", (0, 256), group_sizes=(0, 0)),
)


def bits(values: Any) -> np.ndarray:
    return np.asarray(values).view(np.uint8)


def assert_same_bits(actual: list[Quantized], expected: list[Pair], used: int) -> None:
    """Bit for bit; of the first result, only the first `used` rows are specified."""
    assert len(actual) == len(expected)
    for i, (q, (values, scales)) in enumerate(zip(actual, expected, strict=True)):
        assert q.shape == values.shape
        rows = used if i == 0 else None
        np.testing.assert_array_equal(bits(q.values)[:rows], bits(values)[:rows])
        stop = None if q.block == (128, 128) else rows
        np.testing.assert_array_equal(np.asarray(q.scales)[:stop], scales[:stop])


def assert_within_one_code(actual: list[Quantized], expected: list[Pair], used: int) -> None:
    """Scales to float32 rounding of silu, values to one FP8 code."""
    for i, (q, (values, scales)) in enumerate(zip(actual, expected, strict=True)):
        assert q.shape == values.shape
        rows = used if i == 0 else None
        np.testing.assert_allclose(np.asarray(q.scales)[:rows], scales[:rows], rtol=1e-5)
        apart = _ordinal(bits(q.values)[:rows]) - _ordinal(bits(values)[:rows])
        assert np.abs(apart).max(initial=0) <= 1


def _ordinal(codes: np.ndarray) -> np.ndarray:
    """The position of a code among all values in increasing order; both zeros are 0."""
    magnitude = (codes & 0x7F).astype(np.int32)
    return np.where(codes & 0x80, -magnitude, magnitude)
