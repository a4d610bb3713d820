"""Paged decode on the cases of the marks: `python -m benchmarks.flash_mla`.

FLOPs: `2 B S H len (576 + 512)`; bytes: the cache once, q and out. Pages of 64, bfloat16, scattered
at random; the time includes the schedule, which the kernel makes, and the combination of parts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from jax_ds import flash_mla

Array = jax.Array

_PAGE, _ROW, _VALUE = 64, 576, 512
# One pool for all cases: the largest fits, small ones find many disjoint sets of pages in it.
_POOL = 16_640
_MAX_COPIES = 12


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    heads: int
    length: int
    mark: float  # microseconds of the better of the two best published libraries
    varied: bool = False

    def __str__(self) -> str:
        about = "~" if self.varied else ""
        return f"b={self.batch} s={self.tokens} h={self.heads} len={about}{self.length}"

    def lengths(self) -> np.ndarray:
        """All equal, or drawn from [1/2, 3/2) of the length and scaled to the same total."""
        if not self.varied:
            return np.full(self.batch, self.length)
        drawn = np.random.default_rng(3).uniform(0.5, 1.5, self.batch)
        return np.maximum(1, drawn * self.length * self.batch / drawn.sum()).astype(int)


CASES = (
    Case(128, 1, 128, 4096, 250),
    Case(128, 1, 128, 8192, 480),
    Case(128, 2, 128, 4096, 499),
    Case(128, 2, 128, 8192, 978),
    Case(128, 1, 128, 8192, 546, varied=True),
    Case(16, 1, 128, 16384, 141),
    Case(128, 1, 64, 8192, 291),
    Case(128, 1, 32, 8192, 285),
    Case(128, 1, 16, 8192, 285),
    Case(128, 1, 16, 8192, 310, varied=True),
    Case(64, 1, 16, 8192, 150),
    Case(16, 1, 16, 8192, 47.1),
    Case(128, 1, 16, 1024, 44.1),
    Case(1, 1, 16, 8192, 24.4),
    Case(1, 1, 16, 32768, 43.5),
    Case(1, 1, 128, 32768, 40.0),
)


def _operands(case: Case, pages: Array) -> list[tuple[Array, ...]]:
    """Copies that read disjoint pages of the pool, as many as fit."""
    lengths = case.lengths()
    counts = -(-lengths // _PAGE)
    order = np.random.default_rng(0).permutation(_POOL).astype(np.int32)
    key = jax.random.key(1)
    copies: list[tuple[Array, ...]] = []
    for i in range(min(_MAX_COPIES, _POOL // int(counts.sum()))):
        free = iter(order[i * counts.sum() :])
        table = np.zeros((case.batch, counts.max()), np.int32)
        for b, count in enumerate(counts):
            table[b, :count] = [next(free) for _ in range(count)]
        shape = (case.batch, case.tokens, case.heads, _ROW)
        q = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)
        copies.append((q, pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)))
    return copies


def _row(case: Case, pages: Array) -> timing.Row:
    rows = case.batch * case.tokens * case.heads
    tokens = int(case.lengths().sum())
    return timing.Row(
        str(case),
        functools.partial(flash_mla.decode, implementation="cuda"),
        _operands(case, pages),
        bytes=2.0 * (tokens * _ROW + rows * (_ROW + _VALUE)),
        flops=2.0 * case.tokens * case.heads * tokens * (_ROW + _VALUE),
    )


def _append_row(pages: Array) -> timing.Row:
    batch = 128
    table = jnp.arange(batch * 128, dtype=jnp.int32).reshape(batch, 128)
    lengths = jnp.full(batch, 8000, jnp.int32)
    kv = jax.random.normal(jax.random.key(2), (batch, 1, _ROW), jnp.bfloat16)
    append = functools.partial(flash_mla.append, implementation="cuda")

    def run(pages: Array, kv: Array, table: Array, lengths: Array) -> Any:
        # Without donation XLA copies the pages first; a small cache keeps that copy short.
        return append(pages, kv, table % pages.shape[0], lengths)

    small = pages[:128]
    return timing.Row(
        "append b=128 s=1, with a copy of 128 pages", run, [(small, kv, table, lengths)]
    )


def _read_row(pages: Array) -> timing.Row:
    """What reading alone takes: the largest element of the whole pool."""
    return timing.Row("yardstick read", jnp.max, [(pages,)], bytes=float(pages.nbytes))


def _host_us(heads: int) -> float:
    """Host time of a small call."""
    return timing.host_us(
        functools.partial(flash_mla.decode, implementation="cuda"),
        jnp.ones((1, 1, heads, _ROW), jnp.bfloat16),
        jnp.ones((1, _PAGE, _ROW), jnp.bfloat16),
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones(1, jnp.int32),
    )


def main() -> None:
    pages = jax.random.normal(jax.random.key(0), (_POOL, _PAGE, _ROW), jnp.bfloat16)
    rows = [_row(case, pages) for case in CASES]
    yardsticks = [*timing.yardsticks(), _read_row(pages)]
    timings = timing.measure([*yardsticks, *rows, _append_row(pages)])
    timing.show(timings)
    marks = {str(case): case.mark for case in CASES}
    host = {heads: _host_us(heads) for heads in (16, 128)}
    notes = {"marks_us": marks, "host": {"host_us_per_call": max(host.values())}}
    timing.save("flash_mla", timings, notes)
    print("mark / time")
    for name, mark in marks.items():
        print(f"  {name:34} {mark / timings[name].us:.3f}")
    for heads, us in host.items():
        print(f"host time of a call, h={heads}: {us:.1f} us")


if __name__ == "__main__":
    main()
