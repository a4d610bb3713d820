"""Static configuration of one call: hashable, passed explicitly to every implementation."""

import dataclasses

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
