"""Dispatch and combine over the ranks of one host: `python -m benchmarks.deep_ep [--ranks 8]`.

One process for each rank, on one GPU if need be (tests/gpu/multirank.py says what that takes); rank
0 prints each row as it is measured, and saves. A row is the time of one round, from 50 rounds
unrolled in one program, each behind the one before (the portable implementation of 4096 tokens: 10
rounds), short programs several times one behind the other: the median over repetitions of the
slowest rank. GB/s are what a rank sends to others.
Where ranks share a GPU their traffic adds up in one memory, so compare with the floor of that
machine, with the copy that all ranks make at once, and with the portable implementation of the same
run; NVLink is then not measured.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import overlap, timing
from benchmarks.ranks import Case, Ranks
from jax_ds import deep_ep
from jax_ds.quantization import quantize_1x128
from tests.gpu import multirank

Array = jax.Array

_WARM_CALLS = 6
# A repetition takes about this long. To start a program and to leave a barrier together costs the
# host about 1 ms, which is hidden where programs follow each other.
_REPETITION_US = 20_000


@dataclasses.dataclass(frozen=True)
class Program:
    """One row: a round is `one(before, *operands)`, and is to come after the result `before`."""

    name: str
    one: Callable[..., Any]
    operands: tuple[Any, ...]
    sent: float  # bytes that this rank sends to others
    target: str  # of the custom call, empty for the portable implementation


def _chain(program: Program, rounds: int) -> Callable[..., Any]:
    """`one` again and again, each round behind the one before; the last result."""

    def run(*operands: Any) -> Any:
        result = None
        for _ in range(rounds):
            result = program.one(result, *operands)
        return result

    return run


def _behind(array: Array, before: Any) -> Array:
    """The same array, which XLA can only know once `before` is there: one small kernel.

    A barrier would not do: XLA drops what comes out of it unused, and then the rounds but the last.
    """
    if before is None:
        return array
    first = jax.tree.leaves(before)[0].ravel()[0].astype(jnp.float32)
    # Nothing here is infinite.
    return jnp.where(jnp.isinf(first), jnp.zeros((), array.dtype), array)


def _ids(case: Case, tokens: int, key: Array) -> Array:
    scores = jax.random.uniform(key, (tokens, case.experts))
    return jax.lax.top_k(scores, case.top_k)[1].astype(jnp.int32)


def _sent(ranks: Ranks, needed: Array) -> float:
    """Tokens that this rank sends to others."""

    def count(needed: Array) -> Array:
        own = needed[jax.lax.axis_index("ep")]
        return jnp.sum(needed, dtype=jnp.int32) - jnp.sum(own, dtype=jnp.int32)

    per_rank = ranks.jit(count)(needed)
    return float(np.mean([shard.data for shard in per_rank.addressable_shards]))


def _names(implementation: str) -> str:
    return "kernel" if implementation == "cuda" else "portable"


def _throughput(case: Case, ranks: Ranks, implementation: str) -> list[Program]:
    """`dispatch` and `combine`."""

    def operands(key: Array) -> Any:
        keys = jax.random.split(key, 4)
        plan = deep_ep.plan_dispatch(
            _ids(case, case.tokens, keys[0]),
            num_experts=case.experts,
            axis_name="ep",
            capacity=case.capacity,
        )
        x = jax.random.normal(keys[1], (case.tokens, case.hidden), jnp.bfloat16)
        rows = jax.random.normal(keys[2], (case.capacity, case.hidden), jnp.bfloat16)
        weights = jax.random.uniform(keys[3], (case.tokens, case.top_k))
        return plan, x, quantize_1x128(x), rows, weights

    options: Any = {"implementation": implementation, "num_sms": case.num_sms}

    def dispatch(before: Any, x: Any, plan: Any) -> Any:
        route = dataclasses.replace(plan.route, needed=_behind(plan.route.needed, before))
        return deep_ep.dispatch(x, dataclasses.replace(plan, route=route), **options)

    def combine(before: Any, rows: Array, plan: Any, weights: Array) -> Any:
        return deep_ep.combine(rows, plan, _behind(weights, before), **options)

    plan, x, quantized, rows, weights = ranks.each(operands)
    sent = _sent(ranks, plan.route.needed)
    fp8, bf16 = case.hidden + 4 * (case.hidden // 128), 2 * case.hidden
    name, kernel = _names(implementation), implementation == "cuda"
    target = "jax_ds_deep_ep_dispatch" if kernel else ""
    other = "jax_ds_deep_ep_combine" if kernel else ""
    return [
        Program(f"dispatch fp8 {name}", dispatch, (quantized, plan), sent * fp8, target),
        Program(f"combine bf16 {name}", combine, (rows, plan, weights), sent * bf16, other),
        Program(f"dispatch bf16 {name}", dispatch, (x, plan), sent * bf16, target),
    ]


def _low_latency(case: Case, ranks: Ranks, implementation: str) -> list[Program]:
    """`low_latency_dispatch` and `low_latency_combine`, whole."""

    def order(array: Array, before: Any) -> tuple[Array, Any]:
        """Kernels are ordered by operands that they do not read, at no cost."""
        if implementation == "cuda":
            return array, before
        return _behind(array, before), ()

    def dispatch(before: Any, ids: Array, x: Array) -> Any:
        if before is not None and implementation == "cuda":
            rows, counts, handle = before  # what the kernel makes, or XLA takes its results apart
            before = rows, counts, handle.row_of, handle.column, handle.route.needed
        ids, after = order(ids, before)
        return deep_ep.low_latency_dispatch(
            x,
            ids,
            num_experts=case.experts,
            max_tokens=case.few_tokens,
            axis_name="ep",
            after=after,
            implementation=implementation,  # type: ignore[arg-type]
        )

    def combine(before: Any, weights: Array, rows: Array, handle: Any) -> Array:
        weights, after = order(weights, before)
        return deep_ep.low_latency_combine(
            rows,
            handle,
            weights,
            after=after,
            implementation=implementation,  # type: ignore[arg-type]
        )

    def operands(key: Array) -> Any:
        keys = jax.random.split(key, 4)
        ids = _ids(case, case.few_tokens, keys[0])
        x = jax.random.normal(keys[1], (case.few_tokens, case.hidden), jnp.bfloat16)
        _, _, handle = dispatch(None, ids, x)
        shape = (case.experts // jax.lax.axis_size("ep"), handle.sizes.region, case.hidden)
        rows = jax.random.normal(keys[2], shape, jnp.bfloat16)
        weights = jax.random.uniform(keys[3], (case.few_tokens, case.top_k))
        return ids, x, handle, rows, weights

    ids, x, handle, rows, weights = ranks.each(operands)
    sent = _sent(ranks, handle.route.needed)
    fp8, bf16 = case.hidden + 4 * (case.hidden // 128), 2 * case.hidden
    name, kernel = _names(implementation), implementation == "cuda"
    target = "jax_ds_deep_ep_low_latency_dispatch" if kernel else ""
    other = "jax_ds_deep_ep_low_latency_combine" if kernel else ""
    return [
        Program(f"low latency dispatch fp8 {name}", dispatch, (ids, x), sent * fp8, target),
        Program(
            f"low latency combine bf16 {name}", combine, (weights, rows, handle), sent * bf16, other
        ),
    ]


def _copy(ranks: Ranks) -> list[Program]:
    """What the memory gives when every rank copies: the yardstick."""
    big = ranks.each(lambda key: jax.random.normal(key, (1 << 26,), jnp.bfloat16))

    def negate(before: Any, a: Array) -> Array:
        return -(a if before is None else jax.lax.optimization_barrier(before))

    return [Program("yardstick: negation, bytes moved", negate, (big,), 4.0 * (1 << 26), "")]


def time_program(case: Case, ranks: Ranks, program: Program) -> timing.Timing:
    """The median over repetitions of the slowest rank's time for one round."""
    rounds = case.rounds_of(program.name)
    compiled = ranks.jit(_chain(program, rounds)).lower(*program.operands).compile()
    calls = compiled.as_text().count(f'custom_call_target="{program.target}"')
    if program.target and calls != rounds:
        raise RuntimeError(f"{program.name}: {calls} calls are left of {rounds} rounds")

    def slowest(calls: int) -> float:
        """Microseconds of a round, `calls` of the program enqueued one behind the other."""
        ranks.slowest(0.0)
        start = time.perf_counter()
        for _ in range(calls):
            result = None  # the next has its memory, or XLA would write its graphs anew
            result = compiled(*program.operands)
        jax.block_until_ready(result)
        return ranks.slowest((time.perf_counter() - start) / (calls * rounds) * 1e6)

    # XLA records its command buffers in the first calls, and clocks rise in the next.
    warm = [slowest(1) for _ in range(_WARM_CALLS)][-1]
    calls = max(1, min(case.calls, math.ceil(_REPETITION_US / (warm * rounds))))
    times = [slowest(calls) for _ in range(case.repetitions)]
    kernels = (program.target,) if program.target else ()
    return timing.Timing(float(np.median(times)), min(times), kernels, program.sent, 0.0)


def measure(case: Case, only: str, say: Callable[[str], None]) -> dict[str, timing.Timing]:
    """Rows whose names contain `only`, on every rank alike; `say` hears of each at once."""
    ranks = Ranks()
    groups: list[Callable[[], list[Program]]] = [
        lambda: _copy(ranks),
        lambda: _throughput(case, ranks, "cuda"),
        lambda: _low_latency(case, ranks, "cuda"),
        lambda: _throughput(case, ranks, "xla"),
        lambda: _low_latency(case, ranks, "xla"),
    ]
    timings = {}
    for make in groups:
        for program in make():
            if only not in program.name:
                continue
            row = timings[program.name] = time_program(case, ranks, program)
            say(
                f"{program.name:36} {row.us:9.1f} us  fastest {row.fastest_us:9.1f}  "
                f"{row.bytes / 1e6:7.2f} MB  {row.gb_s:6.0f} GB/s"
            )
    if jax.default_backend() == "gpu":
        deep_ep.check()
    return timings


def main() -> int:
    """Starts the ranks; in a rank, measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=Case.tokens)
    parser.add_argument("--rounds", type=int, default=Case.rounds)
    parser.add_argument("--num-sms", type=int, default=None)
    parser.add_argument(
        "--calls", type=int, default=Case.calls, help="1: await every call of a program by itself"
    )
    parser.add_argument("--only", default="", help="rows whose names contain this; saves nothing")
    parser.add_argument(
        "--overlap", action="store_true", help="show instead what runs while tokens travel"
    )
    parser.add_argument("--nccl", default="", help="libnccl.so.2 to preload")
    options = parser.parse_args()
    if not multirank.started_here():
        launcher = [sys.executable, multirank.__file__, "--ranks", str(options.ranks)]
        launcher += ["--nccl", options.nccl] if options.nccl else []
        worker = [sys.executable, "-m", "benchmarks.deep_ep", *sys.argv[1:]]
        # In this process's place, so that who ends this one ends the ranks.
        os.execv(sys.executable, [*launcher, "--lines", "999", "--", *worker])
    rank, ranks = multirank.join()
    # Where XLA tunes a program, the processes share the work: each must compile it.
    jax.config.update("jax_share_binary_between_hosts", False)
    case = Case(
        tokens=options.tokens,
        rounds=options.rounds,
        num_sms=options.num_sms,
        calls=options.calls,
    )

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    if options.overlap:
        overlap.show(case, say)
        return 0
    timings = measure(case, options.only, say)
    if rank == 0 and not options.only:
        gpus = "one GPU" if multirank.shares_gpu() else f"{ranks} GPUs"
        sizes = {"tokens": case.tokens, "few_tokens": case.few_tokens}
        timing.save("deep_ep", timings, {"ranks": ranks, "on": gpus, **sizes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
