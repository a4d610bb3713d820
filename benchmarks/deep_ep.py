"""Dispatch and combine over the ranks of one host: `python -m benchmarks.deep_ep [--ranks 8]`.

One process for each rank, on one GPU if need be (tests/gpu/multirank.py says what that takes); rank
0 prints and saves. A row is the time of one round, from 50 rounds in one program that depend on
each other: the median over repetitions of the slowest rank. Where ranks share a GPU their traffic
adds up in one memory, so compare with the floor of that machine, and with the portable
implementation of the same run; NVLink is not measured.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import timing
from jax_ds import deep_ep
from jax_ds.deep_ep import DispatchPlan
from jax_ds.quantization import quantize_1x128
from tests.gpu import multirank

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes as in the papers: DeepSeek-V3 with uniform routing."""

    tokens: int = 4096
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    rounds: int = 50
    repetitions: int = 5
    num_sms: int | None = None

    @property
    def capacity(self) -> int:
        """An eighth above the mean load."""
        return -(-self.tokens * self.top_k * 9 // 8 // 128) * 128


def _chain(rounds: int, one: Callable[[Any], Any], operand: Any) -> Any:
    """`one(operand)` again and again, each after the one before; the last result."""
    result = one(operand)
    for _ in range(rounds - 1):
        operand, _ = jax.lax.optimization_barrier((operand, result))
        result = one(operand)
    return result


def _programs(case: Case, mesh: jax.sharding.Mesh, implementation: str) -> dict[str, Any]:
    """Name to (program, operands), each on all ranks."""
    spec = P("ep")

    def on_ranks(function: Callable[..., Any]) -> Any:
        def per_rank(*args: Any) -> Any:
            return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

        return jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=spec, out_specs=spec))

    def operands(seed: Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), seed), 4)
        ids = jax.lax.top_k(jax.random.uniform(keys[0], (case.tokens, case.experts)), case.top_k)[1]
        plan = deep_ep.plan_dispatch(
            ids.astype(jnp.int32),
            num_experts=case.experts,
            axis_name="ep",
            capacity=case.capacity,
        )
        x = jax.random.normal(keys[1], (case.tokens, case.hidden), jnp.bfloat16)
        rows = jax.random.normal(keys[2], (case.capacity, case.hidden), jnp.bfloat16)
        weights = jax.random.uniform(keys[3], (case.tokens, case.top_k))
        return plan, x, quantize_1x128(x), rows, weights

    options: dict[str, Any] = {"implementation": implementation, "num_sms": case.num_sms}

    def dispatch(plan: DispatchPlan, x: Any) -> Any:
        return _chain(case.rounds, lambda x: deep_ep.dispatch(x, plan, **options), x)

    def combine(plan: DispatchPlan, rows: Array, weights: Array) -> Array:
        y: Array = _chain(case.rounds, lambda r: deep_ep.combine(r, plan, weights, **options), rows)
        return y

    ranks = jax.device_put(np.arange(mesh.size), jax.NamedSharding(mesh, spec))
    plan, x, quantized, rows, weights = on_ranks(operands)(ranks)
    return {
        "dispatch fp8": (on_ranks(dispatch), (plan, quantized)),
        "dispatch bf16": (on_ranks(dispatch), (plan, x)),
        "combine bf16": (on_ranks(combine), (plan, rows, weights)),
    }


def _slowest(mesh: jax.sharding.Mesh) -> Callable[[float], float]:
    """The largest of the ranks' numbers."""
    spec = P("ep")
    largest = jax.jit(
        jax.shard_map(lambda a: jax.lax.pmax(a, "ep"), mesh=mesh, in_specs=spec, out_specs=P())
    )

    def over_ranks(mine: float) -> float:
        local = [
            jax.device_put(np.full(1, mine, np.float32), device) for device in mesh.local_devices
        ]
        shape, sharding = (mesh.size,), jax.NamedSharding(mesh, spec)
        all_of_them = jax.make_array_from_single_device_arrays(shape, sharding, local)
        return float(np.asarray(largest(all_of_them))[0])

    return over_ranks


def _sent(plan: DispatchPlan, mesh: jax.sharding.Mesh) -> float:
    """Tokens that the mean rank sends to other ranks."""

    def count(needed: Array) -> Array:
        own = needed[0, jax.lax.axis_index("ep")]
        return jax.lax.pmean(jnp.sum(needed, dtype=jnp.int32) - jnp.sum(own, dtype=jnp.int32), "ep")

    mapped = jax.shard_map(count, mesh=mesh, in_specs=P("ep"), out_specs=P())
    return float(np.asarray(jax.jit(mapped)(plan.route.needed)))


def measure(case: Case, implementations: tuple[str, ...]) -> dict[str, timing.Timing]:
    """On every rank alike: the times and, as `bytes`, what a rank sends to others."""
    mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(AxisType.Auto,))
    slowest = _slowest(mesh)
    timings = {}
    for implementation in implementations:
        for name, (program, operands) in _programs(case, mesh, implementation).items():
            jax.block_until_ready(program(*operands))
            times = []
            for _ in range(case.repetitions):
                slowest(0.0)  # the ranks start together
                start = time.perf_counter()
                jax.block_until_ready(program(*operands))
                times.append(slowest((time.perf_counter() - start) / case.rounds * 1e6))
            sent = _sent(operands[0], mesh)
            record = case.hidden * (1 if "fp8" in name else 2)
            record += 4 * (case.hidden // 128) if "fp8" in name else 0
            timings[f"{name} {implementation}"] = timing.Timing(
                float(np.median(times)), min(times), (name,), sent * record, 0.0
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
    parser.add_argument("--nccl", default="", help="libnccl.so.2 to preload")
    options = parser.parse_args()
    if not multirank.started_here():
        launcher = [sys.executable, multirank.__file__, "--ranks", str(options.ranks)]
        launcher += ["--nccl", options.nccl] if options.nccl else []
        worker = [sys.executable, "-m", "benchmarks.deep_ep", *sys.argv[1:]]
        return subprocess.run([*launcher, "--lines", "30", "--", *worker]).returncode
    rank, ranks = multirank.join()
    case = Case(tokens=options.tokens, rounds=options.rounds, num_sms=options.num_sms)
    timings = measure(case, ("cuda", "xla"))
    if rank == 0:
        timing.show(timings)
        gpus = "one GPU" if multirank.shares_gpu() else f"{ranks} GPUs"
        timing.save("deep_ep", timings, {"ranks": ranks, "on": gpus, "tokens": case.tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main())
