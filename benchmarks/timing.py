"""Kernel times on a GPU through JAX alone, the same way in every benchmark.

A row's time is the device time in which any kernel or copy that one call launches runs (or those
that the row names), the median over rounds. Versions are interleaved in every round, operands
rotate through copies that together exceed the L2 cache, and yardsticks (copy bandwidth, a bf16
product) are measured in the same run, because the chip's clocks depend on load and temperature:
compare ratios.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_ds._runtime import profile
from jax_ds._runtime.profile import Launch

RESULTS = pathlib.Path(__file__).parent / "results"
_L2_BYTES = 60 << 20
_MAX_COPIES = 64
_HOST_ROUNDS = 200
_FEW_CALLS, _MANY_CALLS = 4, 24
# Options of XLA: every call is launched by itself. A command buffer would hide which program a
# kernel belongs to, and what a call costs the host.
NO_COMMAND_BUFFERS = {"xla_gpu_graph_min_graph_size": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing to time: `function(*operands)`, jitted here, with what it moves and computes."""

    name: str
    function: Callable[..., Any]
    operands: Sequence[tuple[Any, ...]]  # copies of the arguments, taken in turn
    bytes: float = 0.0
    flops: float = 0.0
    kernel: str = ""  # count only what has this in its name


@dataclasses.dataclass(frozen=True)
class Timing:
    """Device time of one call."""

    us: float  # median over rounds
    fastest_us: float
    kernels: tuple[str, ...]  # names of what one call launches, in order
    bytes: float
    flops: float

    @property
    def gb_s(self) -> float:
        return self.bytes / self.us / 1e3

    @property
    def tflops(self) -> float:
        return self.flops / self.us / 1e6


def rotate(make: Callable[[jax.Array], tuple[Any, ...]], seed: int = 0) -> list[tuple[Any, ...]]:
    """Operands from `make(key)`, as many copies as it takes to exceed L2 three times over."""
    keys = jax.random.split(jax.random.key(seed), _MAX_COPIES)
    first = make(keys[0])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    copies = min(_MAX_COPIES, max(2, -(-3 * _L2_BYTES // max(size, 1))))
    return [first] + [make(key) for key in keys[1:copies]]


def yardsticks() -> list[Row]:
    """The state of the machine in this run: two ways to move 1 GiB, and a bf16 product."""
    big = jax.random.normal(jax.random.key(0), (1 << 28,), jnp.bfloat16)
    a = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    copies = [(big,), (big + 1,)]
    return [
        Row("yardstick copy", jnp.copy, copies, bytes=4.0 * big.size),
        Row("yardstick negation", lambda x: -x, copies, bytes=4.0 * big.size),
        Row("yardstick bf16", lambda x: x @ x.T, [(a,), (a + 1,)], flops=2.0 * 8192**3),
    ]


def measure(rows: Sequence[Row], *, rounds: int = 11) -> dict[str, Timing]:
    """Times all rows, interleaved; prints nothing."""
    labels = {
        row.name: f"row{i}_{re.sub(r'[^a-zA-Z0-9]+', '_', row.name)}" for i, row in enumerate(rows)
    }
    compiled = {row.name: _compile(row, labels[row.name]) for row in rows}
    for row in rows:
        jax.block_until_ready(compiled[row.name](*row.operands[0]))

    def run() -> None:
        for i in range(rounds):
            for row in rows:
                operands = row.operands[i % len(row.operands)]
                jax.block_until_ready(compiled[row.name](*operands))

    launches = defaultdict(list)
    for launch in profile.launches(run):
        launches[launch.program].append(launch)
    return {row.name: _timing(row, launches[labels[row.name]], rounds) for row in rows}


def _compile(row: Row, label: str) -> Callable[..., Any]:
    def call(*operands: Any) -> Any:
        return row.function(*operands)

    call.__name__ = label
    return jax.jit(call).lower(*row.operands[0]).compile(compiler_options=NO_COMMAND_BUFFERS)


def _timing(row: Row, launches: Sequence[Launch], rounds: int) -> Timing:
    launches = [launch for launch in launches if row.kernel in launch.name]
    count, rest = divmod(len(launches), rounds)
    if rest or not count:
        raise RuntimeError(
            f"{row.name}: {len(launches)} launches in {rounds} rounds; calls must launch alike"
        )
    calls = [launches[i * count : (i + 1) * count] for i in range(rounds)]
    # The first round may still warm caches.
    times = [_busy(call) / 1e3 for call in calls[1:]]
    names = tuple(launch.name for launch in calls[-1])
    return Timing(statistics.median(times), min(times), names, row.bytes, row.flops)


def _busy(call: Sequence[Launch]) -> float:
    """Nanoseconds in which anything of the call ran: a dependent launch may overlap the one
    before."""
    total, until = 0.0, float("-inf")
    for launch in call:
        end = launch.start_ns + launch.duration_ns
        total += max(0.0, end - max(launch.start_ns, until))
        until = max(until, end)
    return total


def host_us(call: Callable[..., Any], varied: Any, *shared: Any) -> float:
    """Microseconds that one more warm `call(varied, *shared)` adds to a jitted step on the host.

    The difference between programs of few and of many such calls, over their number; they take
    turns, because a host's speed drifts. Both take the same arguments, `varied` once for each of
    the many calls, so that no two calls are alike and Python has the same to do; and both give one
    number, a sum over all results, which is one kernel of XLA's. What is left is what XLA, the
    call's handler and the driver need.
    """

    def program(calls: int) -> Callable[[], Any]:
        def run(varied: list[Any], shared: tuple[Any, ...]) -> Any:
            results = jax.tree.leaves([call(one, *shared) for one in varied[:calls]])
            return sum(result[(0,) * result.ndim].astype(jnp.float32) for result in results)

        operands = [varied] * _MANY_CALLS, shared
        lowered = jax.jit(run, keep_unused=True).lower(*operands)
        compiled = lowered.compile(compiler_options=NO_COMMAND_BUFFERS)
        return functools.partial(compiled, *operands)

    programs = {calls: program(calls) for calls in (_FEW_CALLS, _MANY_CALLS)}
    times: dict[int, list[float]] = {calls: [] for calls in programs}
    for _ in range(_HOST_ROUNDS):
        for calls, run in programs.items():
            start = time.perf_counter()
            out = run()
            times[calls].append(1e6 * (time.perf_counter() - start))
            jax.block_until_ready(out)
    few, many = (statistics.median(times[calls]) for calls in (_FEW_CALLS, _MANY_CALLS))
    return (many - few) / (_MANY_CALLS - _FEW_CALLS)


def machine() -> dict[str, str]:
    """What results depend on."""
    device = jax.local_devices()[0]
    return {
        "gpu": device.device_kind,
        "jax": jax.__version__,
        "platform": device.client.platform_version.splitlines()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def results_file() -> pathlib.Path:
    """`results/h200.json` on an H200, and so on."""
    chip = jax.local_devices()[0].device_kind.lower().replace("nvidia", "").split()[0]
    return RESULTS / f"{chip}.json"


def save(room: str, timings: Mapping[str, Timing], notes: Mapping[str, Any] | None = None) -> None:
    """Stores what `measure` found."""
    rows = {
        name: {
            "us": round(t.us, 2),
            "fastest_us": round(t.fastest_us, 2),
            **({"gb_s": round(t.gb_s)} if t.bytes else {}),
            **({"tflops": round(t.tflops)} if t.flops else {}),
            "launches": len(t.kernels),
        }
        for name, t in timings.items()
    }
    store(room, {**(notes or {}), "rows": rows})


def store(room: str, part: Mapping[str, Any]) -> None:
    """Replaces `room`'s part of the results file, keeping the other rooms' parts."""
    file = results_file()
    results = json.loads(file.read_text()) if file.exists() else {}
    results[room] = {"machine": machine(), **part}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def show(timings: Mapping[str, Timing]) -> None:
    """A table of all rows."""
    width = max(map(len, timings))
    print(f"{'':{width}} {'us':>9} {'GB/s':>6} {'TFLOPS':>6} {'launches':>8}")
    for name, t in timings.items():
        gb_s = f"{t.gb_s:.0f}" if t.bytes else ""
        tflops = f"{t.tflops:.0f}" if t.flops else ""
        print(f"{name:{width}} {t.us:9.2f} {gb_s:>6} {tflops:>6} {len(t.kernels):>8}")
