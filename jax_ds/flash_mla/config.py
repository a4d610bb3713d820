"""What one call consists of, passed explicitly to every implementation: choices and operands."""

import dataclasses
from typing import NamedTuple

import jax

from jax_ds._runtime.choose import Implementation


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """What `decode` fixes at trace time; `scale` is already a number."""

    scale: float
    causal: bool
    value_dim: int
    implementation: Implementation


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """What `prefill` fixes at trace time; `scale` is already a number."""

    scale: float
    causal: bool
    implementation: Implementation


class PrefillOperands(NamedTuple):
    """The arrays of `prefill`, as its public function has checked them."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    k_rope: jax.Array | None = None
    cu_seqlens_q: jax.Array | None = None
    cu_seqlens_k: jax.Array | None = None


class PrefillResiduals(NamedTuple):
    """What the forward pass of `prefill` keeps for the backward pass."""

    operands: PrefillOperands
    out: jax.Array
    lse: jax.Array
