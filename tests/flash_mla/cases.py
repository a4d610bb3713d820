"""Named cases of `flash_mla`, shared by tests and benchmarks, and how results are compared."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Implementations that the contract tests run; "cuda" gets the marker `gpu` there.
IMPLEMENTATIONS = ("xla",)

# What a table may hold past a sequence's last page.
_GARBAGE = np.array([-1, 2**31 - 1, -(2**31), 10**6], np.int32)


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call of `decode`; unused slots hold NaN, unused table entries garbage."""

    name: str
    seq_lens: tuple[int, ...]
    tokens: int = 1
    heads: int = 2
    page_size: int = 64
    width: int = 576
    value_dim: int = 512
    causal: bool = True
    scale: float | None = 192**-0.5
    dtype: Any = jnp.bfloat16
    shared_pages: int = 0  # leading pages that all sequences share
    spread: float = 1.0  # factor on q: large values give large logits

    def __str__(self) -> str:
        return self.name

    @property
    def static(self) -> dict[str, Any]:
        return {"causal": self.causal, "scale": self.scale, "value_dim": self.value_dim}


DECODE_CASES = (
    DecodeCase("edges", (0, 1, 63, 64, 65, 200)),
    DecodeCase("new tokens outnumber the sequence", (0, 1, 2, 3, 130, 4), tokens=3, heads=3),
    DecodeCase("several blocks", (129, 700, 256, 257), tokens=2, heads=20, page_size=128),
    DecodeCase("small pages", (17, 0, 300, 16), page_size=16, heads=1),
    DecodeCase("no mask", (1, 300), tokens=4, page_size=32, causal=False, scale=None),
    DecodeCase("shared prefix", (520, 600, 540, 512), tokens=2, shared_pages=8),
    DecodeCase("one long among short", (4097, 1), heads=1),
    DecodeCase("large logits", (100, 33), tokens=2, spread=1e4),
    DecodeCase("float16", (90, 300), heads=12, dtype=jnp.float16),
    DecodeCase("float32, small widths", (5, 300), 2, 3, 16, 24, 16, dtype=jnp.float32),
)


class DecodeInputs(NamedTuple):
    q: jax.Array
    kv_pages: jax.Array
    page_table: jax.Array
    seq_lens: jax.Array


def decode_inputs(case: DecodeCase, seed: int = 0) -> DecodeInputs:
    """Scrambled pages; NaN in every slot without a token and in queries without any key."""
    rng = np.random.default_rng(seed)
    batch, size = len(case.seq_lens), case.page_size
    counts = [-(-length // size) for length in case.seq_lens]
    columns = max(max(counts), 1) + 2
    num_pages = sum(counts) + 3
    pages = np.full((num_pages, size, case.width), np.nan, np.float32)
    table = np.resize(_GARBAGE, (batch, columns))
    free = list(rng.permutation(num_pages))
    shared = [free.pop() for _ in range(case.shared_pages)]
    for b, length in enumerate(case.seq_lens):
        own = [free.pop() for _ in range(counts[b] - len(shared))]
        for column, page in enumerate(shared + own):
            table[b, column] = page
            used = min(size, length - column * size)
            if column >= len(shared) or b == 0:
                pages[page, :used] = rng.standard_normal((used, case.width))
    q = case.spread * rng.standard_normal((batch, case.tokens, case.heads, case.width))
    for b, length in enumerate(case.seq_lens):
        q[b, : max(case.tokens - length, 0)] = np.nan if case.causal else 0.0
    return DecodeInputs(
        jnp.asarray(q, case.dtype),
        jnp.asarray(pages, case.dtype),
        jnp.asarray(table),
        jnp.asarray(case.seq_lens, jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class PrefillCase:
    """One call of `prefill`; packed if `packed` gives the lengths of queries and of keys."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int = 2
    kv_heads: int | None = None
    width: int = 192
    value_dim: int = 128
    rope: int = 0
    causal: bool = True
    dtype: Any = jnp.bfloat16
    packed: tuple[tuple[int, int], ...] = ()
    spread: float = 1.0

    def __str__(self) -> str:
        return self.name


PREFILL_CASES = (
    PrefillCase("one tile", 2, 65, 65),
    PrefillCase("several tiles, shared rope", 2, 300, 300, rope=64),
    PrefillCase("past", 2, 63, 300, rope=64),
    PrefillCase("rows without any key", 2, 300, 129),
    PrefillCase("full", 2, 129, 300, heads=4, kv_heads=2, causal=False, rope=64),
    PrefillCase("one query", 2, 1, 1),
    PrefillCase("same widths, grouped heads", 2, 127, 127, 6, 2, 64, 64),
    PrefillCase("large logits", 2, 80, 80, spread=1e3),
    PrefillCase(
        "packed", 1, 320, 600, rope=64, packed=((0, 3), (100, 100), (1, 1), (7, 0), (200, 480))
    ),
    PrefillCase("packed, one token each", 1, 40, 40, heads=4, packed=((1, 1),) * 37),
    PrefillCase("packed, full", 1, 64, 64, causal=False, packed=((5, 9), (9, 5), (0, 0), (20, 20))),
    PrefillCase("float16", 2, 40, 40, dtype=jnp.float16),
    PrefillCase("float32, small widths", 2, 50, 70, 4, 1, 24, 8, 8, dtype=jnp.float32),
)


class PrefillInputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    k_rope: jax.Array | None
    cu_seqlens_q: jax.Array | None
    cu_seqlens_k: jax.Array | None


def prefill_inputs(case: PrefillCase, seed: int = 0) -> PrefillInputs:
    """Random operands; NaN in padding tokens of a packed batch and in queries without any key."""
    rng = np.random.default_rng(seed)

    def draw(tokens: int, heads: int, width: int, factor: float = 1.0) -> np.ndarray:
        return factor * rng.standard_normal((case.batch, tokens, heads, width))

    kv_heads = case.kv_heads or case.heads
    q = draw(case.queries, case.heads, case.width, case.spread)
    k = draw(case.keys, kv_heads, case.width - case.rope)
    v = draw(case.keys, kv_heads, case.value_dim)
    rope = draw(case.keys, 1, case.rope) if case.rope else None
    offsets: list[np.ndarray | None] = [None, None]
    if case.packed:
        lengths = np.array(case.packed)
        offsets = [np.append(0, np.cumsum(lengths[:, i])).astype(np.int32) for i in range(2)]
        q[:, offsets[0][-1] :] = np.nan
        for x in (k, v) if rope is None else (k, v, rope):
            x[:, offsets[1][-1] :] = np.nan
    elif case.causal:
        q[:, : max(case.queries - case.keys, 0)] = np.nan
    cast = [None if x is None else jnp.asarray(x, case.dtype) for x in (q, k, v, rope)]
    return PrefillInputs(*cast, *(None if o is None else jnp.asarray(o) for o in offsets))


def value_tolerance(dtype: Any) -> float:
    return 1e-5 if dtype == jnp.float32 else 3e-3


def gradient_tolerance(dtype: Any) -> float:
    return 2e-5 if dtype == jnp.float32 else 5e-3


def assert_close(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Anomalies first (NaN, infinities, rows of zeros), then the error relative to the norm."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}"
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        np.testing.assert_array_equal(test(a), test(b), err_msg=f"{name}: positions of {kind}")
    finite = np.isfinite(b)
    zero = (b == 0).all(axis=-1, keepdims=True) & finite
    assert not np.where(zero, a, 0.0).any(), f"{name}: rows that must be zero are not"
    error, b = np.where(finite, a - np.where(finite, b, 0), 0), np.where(finite, b, 0)
    size = np.linalg.norm(b)
    assert np.linalg.norm(error) <= tolerance * size, (
        f"{name}: relative error {np.linalg.norm(error) / size:.2e}, allowed {tolerance:.0e}"
    )
    # The norm alone would hide one wrong row among thousands.
    peak = np.abs(b).max(initial=0.0)
    assert np.abs(error).max(initial=0.0) <= 8 * tolerance * peak, f"{name}: an element is off"


def assert_lse_close(actual: Any, expected: Any) -> None:
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg="lse: positions of -inf")
    finite = np.isfinite(b)
    # A score is a sum of 36 products of 16 columns, and tensor cores cut each partial sum off
    # after 24 bits: up to 36 * 2^-23 of it are lost, of sums as large as the largest score.
    largest = np.abs(b[finite]).max(initial=0.0)
    allowed = max(1e-4, 36 * 2.0**-23 * largest)
    error = np.abs(a[finite] - b[finite])
    assert error.max(initial=0.0) <= allowed, f"lse: off by {error.max():.2e}"
