"""What runs while tokens travel: `python -m benchmarks.deep_ep --overlap`.

The MoE layer of one rank, forward and backward and with few tokens, as the profiler sees it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.ranks import Case, Ranks
from jax_ds._runtime import profile
from jax_ds.moe import MoEParams, moe_layer
from jax_ds.quantization import quantize_128x128

Array = jax.Array


def _parameters(case: Case, key: Array) -> MoEParams:
    """Of a layer with a shared expert: 8 experts a rank, FFN 2048."""
    experts, ffn = 8, 2048
    keys = jax.random.split(key, 5)

    def draw(key: Array, *shape: int) -> Array:
        return jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5

    everywhere = experts * jax.lax.axis_size("ep")
    return MoEParams(
        router=draw(keys[0], everywhere, case.hidden).astype(jnp.float32),
        bias=jnp.zeros(everywhere),
        gate_up=draw(keys[1], experts, 2 * ffn, case.hidden),
        down=draw(keys[2], experts, case.hidden, ffn),
        shared_gate_up=draw(keys[3], 2 * ffn, case.hidden),
        shared_down=draw(keys[4], case.hidden, ffn),
    )


def training_layer(case: Case, ranks: Ranks) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The layer forward and backward."""

    def operands(key: Array) -> Any:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (case.tokens, case.hidden), jnp.bfloat16)
        return x, _parameters(case, keys[1])

    def both(x: Array, params: MoEParams) -> Any:
        def forward(x: Array, params: MoEParams) -> Array:
            return moe_layer(x, params, axis_name="ep", k=case.top_k, capacity_factor=1.25)[0]

        y, pull = jax.vjp(forward, x, params)
        return y, pull(jnp.tanh(y))  # the backward pass needs the forward's result

    return both, ranks.each(operands)


def decoding_layer(case: Case, ranks: Ranks) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The layer with few tokens and quantized weights; low latency, in halves."""

    def operands(key: Array) -> Any:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (case.few_tokens, case.hidden), jnp.bfloat16)
        params = _parameters(case, keys[1])
        weights = ("gate_up", "down", "shared_gate_up", "shared_down")
        quantized: Any = {name: quantize_128x128(getattr(params, name)) for name in weights}
        return x, params._replace(**quantized)

    def forward(x: Array, params: MoEParams) -> Array:
        return moe_layer(x, params, axis_name="ep", k=case.top_k, low_latency=True)[0]

    return forward, ranks.each(operands)


# How XLA may launch what it has scheduled: one by one, or in graphs. These know nothing of streams,
# and order what they hold in one row, by data, or as the schedule has it.
_LAUNCHING: dict[str, Any] = {
    "one by one": timing.NO_COMMAND_BUFFERS,
    "in graphs": {},
    "in graphs, CONCURRENT": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    "in graphs, LHS": {"xla_gpu_command_buffer_scheduling_mode": "LHS"},
}


def show(case: Case, say: Callable[[str], None]) -> None:
    """What runs while tokens travel: kernels in the order of their start, and the time shared."""
    ranks = Ranks()
    for title, make in (("decoding layer", decoding_layer), ("training layer", training_layer)):
        function, arguments = make(case, ranks)
        lowered = ranks.jit(function).lower(*arguments)
        for launching, options in _LAUNCHING.items():
            ran = _ran(ranks, lowered.compile(compiler_options=options), arguments)
            until = max(one.start_ns + one.duration_ns for one in ran)
            say(f"{title}, {launching}: {(until - ran[0].start_ns) / 1e3:.1f} us")
            for line in _timeline(ran):
                say(line)


def _ran(ranks: Ranks, program: Any, arguments: Any) -> list[profile.Launch]:
    """What one warm call launches on this rank's GPU."""
    for _ in range(3):
        jax.block_until_ready(program(*arguments))

    def run() -> None:
        for _ in range(2):
            ranks.slowest(0.0)
            jax.block_until_ready(program(*arguments))

    def belongs(launch: profile.Launch) -> bool:
        """What a graph launches names no program, nor do the copies of `slowest`."""
        return launch.program == "per_rank" or not (launch.program or "Memcpy" in launch.name)

    ran = list(filter(belongs, profile.launches(run)))
    return ran[len(ran) // 2 :]


def _timeline(ran: list[profile.Launch]) -> Iterator[str]:
    for one in ran:
        start = (one.start_ns - ran[0].start_ns) / 1e3
        line = f"{start:9.1f} us  +{one.duration_ns / 1e3:7.1f}  {one.name[:70]}"
        if "deep_ep" in one.name:
            beside = sum(_shared_ns(one, other) for other in ran if other is not one)
            line += f"  with {beside / 1e3:.1f} us of others beside it"
        yield line


def _shared_ns(a: profile.Launch, b: profile.Launch) -> float:
    end = min(a.start_ns + a.duration_ns, b.start_ns + b.duration_ns)
    return max(0.0, end - max(a.start_ns, b.start_ns))
