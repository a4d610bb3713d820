"""What benchmarks over ranks share: sizes, and programs on the mesh of all ranks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes as in the papers: DeepSeek-V3 with uniform routing."""

    tokens: int = 4096
    few_tokens: int = 128  # low latency
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    rounds: int = 50
    repetitions: int = 11
    num_sms: int | None = None
    calls: int = 8  # the most calls of a program whose results are in memory at once

    @property
    def capacity(self) -> int:
        """An eighth above the mean load."""
        return -(-self.tokens * self.top_k * 9 // 8 // 128) * 128

    def rounds_of(self, name: str) -> int:
        slow = "portable" in name and "low latency" not in name
        return min(10, self.rounds) if slow else self.rounds


class Ranks:
    """The mesh of all ranks, and programs on it: arguments and results have a leading rank axis."""

    def __init__(self) -> None:
        self.mesh = jax.make_mesh((jax.device_count(),), ("ep",), axis_types=(AxisType.Auto,))

    def jit(self, function: Callable[..., Any]) -> Any:
        def per_rank(*args: Any) -> Any:
            return jax.tree.map(lambda a: a[None], function(*jax.tree.map(lambda a: a[0], args)))

        spec = P("ep")
        return jax.jit(jax.shard_map(per_rank, mesh=self.mesh, in_specs=spec, out_specs=spec))

    def each(self, function: Callable[[Array], Any]) -> Any:
        """`function(key of the rank)` on every rank."""
        ranks = jax.device_put(np.arange(self.mesh.size), jax.NamedSharding(self.mesh, P("ep")))
        return self.jit(lambda r: function(jax.random.fold_in(jax.random.key(0), r)))(ranks)

    def slowest(self, mine: float) -> float:
        """The largest of the ranks' numbers; they leave it together."""
        sharding = jax.NamedSharding(self.mesh, P("ep"))
        local = [jax.device_put(np.full(1, mine, np.float32), d) for d in self.mesh.local_devices]
        numbers = jax.make_array_from_single_device_arrays((self.mesh.size,), sharding, local)
        return float(np.asarray(self._largest(numbers))[0])

    @functools.cached_property
    def _largest(self) -> Any:
        def largest(a: Array) -> Array:
            return jax.lax.pmax(a, "ep")

        return jax.jit(jax.shard_map(largest, mesh=self.mesh, in_specs=P("ep"), out_specs=P()))
