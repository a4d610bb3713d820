"""Named cases of the layer, and its inputs."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ds.moe import MoEParams


@dataclasses.dataclass(frozen=True)
class MoECase:
    """One layer over all devices of a mesh."""

    name: str
    mesh: tuple[int, ...] = (8,)
    tokens: int = 16  # per device
    hidden: int = 128
    ffn: int = 64
    shared: int = 32
    experts: int = 16
    k: int = 4
    num_groups: int = 4
    top_groups: int = 2
    precision: str = "fp8"
    favourite: int | None = None  # the expert that every token likes

    def __str__(self) -> str:
        return self.name

    @property
    def axis_name(self) -> Any:
        return "ep" if len(self.mesh) == 1 else ("node", "gpu")

    @property
    def gating(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
            "routed_scaling": 1.5,
        }

    @property
    def layer(self) -> dict[str, Any]:
        """Keywords of `moe_layer`."""
        return {**self.gating, "axis_name": self.axis_name, "precision": self.precision}


CASES = (
    MoECase("fp8, 8 ranks"),
    MoECase("fp8, 2x4 ranks, ragged blocks", (2, 4), hidden=80, ffn=40, shared=0),
    MoECase("bf16, 8 ranks", precision="bf16"),
    MoECase("fp8, 1 rank, one favourite", (1,), tokens=40, experts=4, k=2, favourite=1),
)


class Inputs(NamedTuple):
    x: Any
    params: MoEParams
    cotangent: Any


def inputs(case: MoECase, seed: int = 0) -> Inputs:
    """Unsharded inputs."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    c = case
    tokens = c.tokens * int(np.prod(c.mesh))
    bias = rng.uniform(-0.1, 0.1, c.experts).astype(np.float32)
    if c.favourite is not None:
        bias[c.favourite] = 10
    params = MoEParams(
        router=normal(c.experts, c.hidden, scale=c.hidden**-0.5),
        bias=bias,
        gate_up=normal(c.experts, 2 * c.ffn, c.hidden, scale=c.hidden**-0.5),
        down=normal(c.experts, c.hidden, c.ffn, scale=c.ffn**-0.5),
        shared_gate_up=normal(2 * c.shared, c.hidden, scale=c.hidden**-0.5) if c.shared else None,
        shared_down=normal(c.hidden, c.shared, scale=c.shared**-0.5) if c.shared else None,
    )
    x = jnp.asarray(normal(tokens, c.hidden), jnp.bfloat16)
    return Inputs(x, params, jnp.asarray(normal(tokens, c.hidden), jnp.bfloat16))


def make_mesh(case: MoECase, axis_type: Any = jax.sharding.AxisType.Auto) -> jax.sharding.Mesh:
    names = (case.axis_name,) if isinstance(case.axis_name, str) else case.axis_name
    devices = jax.devices()[: int(np.prod(case.mesh))]
    return jax.make_mesh(case.mesh, names, (axis_type,) * len(names), devices=devices)


def param_specs(case: MoECase, params: MoEParams) -> MoEParams:
    experts = jax.P(case.axis_name)
    return jax.tree.map(lambda _: jax.P(), params)._replace(gate_up=experts, down=experts)
