"""Measuring the kernels' configurations on the GPU at hand."""

import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ds._core.checks import check, check_integer
from jax_ds._runtime import native, profile
from jax_ds.deep_gemm import ffi, tuned
from jax_ds.deep_gemm.explain import checked_problem
from jax_ds.quantization import Quantized

_ROUNDS = 9
_L2_BYTES, _MAX_COPIES = 60 << 20, 16


def tune(
    m: int,
    n: int,
    k: int,
    *,
    file: str | pathlib.Path,
    mode: str = "dense",
    groups: int = 1,
    group_sizes: Sequence[int] | None = None,
    out_dtype: DTypeLike | None = None,
    expected_rows: int | None = None,
    accumulate: bool = False,
) -> dict[str, float]:
    """Times every configuration of a product on this GPU and notes the best one in `file`.

    Processes that start with `JAX_DS_GEMM_TUNING` naming the file use what it notes wherever these
    sizes occur, and the model's choice elsewhere. The choice becomes a part of the traced program,
    so every process of a run must see the same file.

    Times are those of the profiler, medians over rounds that take turns, with random operands that
    do not stay in L2.

    Args:
      m, n, k, mode, groups, out_dtype, expected_rows: as in `explain`; k a multiple of 16, n of 8.
      file: JSON, made or added to.
      group_sizes: rows (or tokens) of each group to measure with; even ones by default, those
        expected (or a quarter of M) where "masked".
      accumulate: "wgrad" adds to its output.

    Returns:
      Microseconds by configuration, the best first.

    Raises:
      ValueError, TypeError: for sizes or names against these rules.
      RuntimeError: where no kernel can run.
    """
    problem = checked_problem(m, n, k, mode, groups, out_dtype, expected_rows, accumulate)
    check(k % 16 == 0, "k", "must be a multiple of 16", k)
    check(n % 8 == 0, "n", "must be a multiple of 8", n)
    check(mode != "wgrad" or k % 128 == 0, "k", "must be whole blocks of 128 tokens", k)
    sizes = _sizes(problem, group_sizes)
    reason = native.why_not_native()
    if reason is not None:
        raise RuntimeError(reason)
    copies = _operands(problem, sizes)
    us = _measure({name: _call(problem, name) for name, _ in tuned.candidates(problem)}, copies)
    us = dict(sorted(us.items(), key=lambda item: item[1]))
    tuned.write(pathlib.Path(file), jax.local_devices()[0].device_kind, problem, us)
    return us


def _sizes(problem: tuned.Problem, group_sizes: Sequence[int] | None) -> list[int] | None:
    if problem.mode == "dense":
        check(group_sizes is None, "group_sizes", "must be None for dense products", group_sizes)
        return None
    if group_sizes is None:
        if problem.mode == "masked":
            return [problem.expected_rows or max(1, problem.m // 4)] * problem.groups
        if problem.mode == "grouped":
            return [problem.m // problem.groups] * problem.groups
        return [problem.k // 128 // problem.groups * 128] * problem.groups
    rule = f"must be {problem.groups} sizes"
    check(len(group_sizes) == problem.groups, "group_sizes", rule, len(group_sizes))
    sizes = [check_integer("group_sizes", size, 0) for size in group_sizes]
    room = {"grouped": problem.m, "wgrad": problem.k}.get(problem.mode)
    if room is not None:
        check(sum(sizes) <= room, "group_sizes", f"must add up to at most {room}", sum(sizes))
    return sizes


def _operands(problem: tuned.Problem, sizes: list[int] | None) -> list[tuple[Any, ...]]:
    """Copies that together exceed L2: lhs, rhs, group sizes, what is added to."""
    p, blocks = problem, -(-problem.k // 128)
    matrices = (p.groups,) if p.mode in ("grouped", "masked") else ()
    lhs = (p.groups, p.m, p.k) if p.mode == "masked" else (p.m, p.k)
    rhs = (*matrices, p.n, p.k)
    rhs_rows = p.n if p.mode == "wgrad" else -(-p.n // 128)

    def quantized(key: jax.Array, shape: tuple[int, ...], rows: int) -> Quantized:
        values, scales = jax.random.split(key)
        return Quantized(
            jax.random.normal(values, shape, jnp.bfloat16).astype(jnp.float8_e4m3fn),
            jax.random.uniform(scales, (*shape[:-2], rows, blocks), minval=0.5, maxval=2.0),
        )

    def make(key: jax.Array) -> tuple[Any, ...]:
        a, b = jax.random.split(key)
        counts = None if sizes is None else jnp.asarray(sizes, jnp.int32)
        added = jnp.zeros(_out_shape(p), p.output) if p.accumulate else None
        return quantized(a, lhs, p.m), quantized(b, rhs, rhs_rows), counts, added

    size = math.prod(lhs) + math.prod(rhs)
    count = min(_MAX_COPIES, max(2, -(-3 * _L2_BYTES // size)))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def _out_shape(p: tuned.Problem) -> tuple[int, ...]:
    many = p.mode == "masked" or (p.mode == "wgrad" and p.groups > 1)
    return (p.groups, p.m, p.n) if many else (p.m, p.n)


def _call(problem: tuned.Problem, config: str) -> Callable[..., Any]:
    @jax.jit
    def call(lhs: Quantized, rhs: Quantized, sizes: Any, added: Any) -> Any:
        return ffi.launch(problem, config, lhs, rhs, sizes, added, _out_shape(problem))

    return call


def _measure(
    calls: Mapping[str, Callable[..., Any]], copies: Sequence[tuple[Any, ...]]
) -> dict[str, float]:
    """Median microseconds of the kernel that each call launches."""
    for call in calls.values():
        jax.block_until_ready(call(*copies[0]))

    def run() -> None:
        for i in range(_ROUNDS):
            for call in calls.values():
                jax.block_until_ready(call(*copies[i % len(copies)]))

    launches = profile.launches(run)
    times = [launch.duration_ns / 1e3 for launch in launches if "deep_gemm" in launch.name]
    if len(times) != _ROUNDS * len(calls):
        raise RuntimeError(f"{len(times)} kernels in {_ROUNDS} rounds of {len(calls)} calls")
    return {name: statistics.median(times[i :: len(calls)]) for i, name in enumerate(calls)}
