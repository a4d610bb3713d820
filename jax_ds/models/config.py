"""Sizes and choices of a DeepSeek-V3 model."""

import dataclasses
from typing import Literal

from jax_ds._core.checks import check, check_choice, check_integer, check_number
from jax_ds._runtime.choose import Implementation, check_implementation
from jax_ds.moe.gate import check_gate

LATENT = 512  # compressed keys and values of one token
ROPE = 64  # rotary part, shared by all heads
NOPE = 128  # position-free part of a head's query and key
VALUE = 128  # a head's value
CACHE_WIDTH = LATENT + ROPE
PAGE_SIZE = 64
SOFTMAX_SCALE = (NOPE + ROPE) ** -0.5

_COUNTS = (
    "vocab",
    "hidden",
    "num_layers",
    "num_heads",
    "dense_ffn",
    "num_experts",
    "top_k",
    "num_groups",
    "top_groups",
    "expert_ffn",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 model (arXiv:2412.19437). Head sizes and the latent width are the report's.

    Attributes:
      axis_name: mesh axis of the experts, or ("node", "gpu").
      vocab: number of tokens, the rows of the embedding and of the output head.
      hidden: width of the residual stream.
      num_layers, num_dense_layers: all layers; how many of the first have a dense MLP.
      num_heads: query heads, which share one latent row per token.
      q_lora: width of the compressed queries; None projects queries directly.
      dense_ffn, expert_ffn, shared_ffn: inner widths of the MLPs; shared_ffn 0: no shared expert.
      num_experts, top_k, num_groups, top_groups, routed_scaling: gating, as in
        `jax_ds.moe.group_limited_topk`.
      capacity_factor: as in `jax_ds.moe.moe_layer`; None never drops a token.
      rope_theta: base of the rotary embedding's wavelengths.
      norm_eps: added to the mean square in every RMS norm.
      precision: "fp8" or "bf16" for the products of projections, MLPs and experts. Embedding,
        router, norms, attention and the output head are never quantized.
      remat: recompute each layer in the backward pass instead of saving its activations.
      unroll: write the layers out instead of scanning over them: larger programs, no stacked
        activations, which XLA's CPU backend copies.
      implementation: as everywhere in jax_ds.

    Raises:
      ValueError, TypeError: a size, count or choice against these rules.
    """

    axis_name: str | tuple[str, ...] = "ep"
    vocab: int = 256
    hidden: int = 256
    num_layers: int = 4
    num_dense_layers: int = 1
    num_heads: int = 2
    q_lora: int | None = None
    dense_ffn: int = 512
    num_experts: int = 16
    top_k: int = 4
    num_groups: int = 4
    top_groups: int = 2
    expert_ffn: int = 128
    shared_ffn: int = 128
    routed_scaling: float = 1.0
    capacity_factor: float | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    precision: Literal["fp8", "bf16"] = "fp8"
    remat: bool = False
    unroll: bool = False
    implementation: Implementation = None

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp8", "bf16"))
        check_implementation(self.implementation)
        for name in _COUNTS:
            check_integer(name, getattr(self, name), 1)
        for name in ("num_dense_layers", "shared_ffn"):
            check_integer(name, getattr(self, name), 0)
        if self.q_lora is not None:
            check_integer("q_lora", self.q_lora, 1)
        for name in ("routed_scaling", "rope_theta", "norm_eps"):
            check_number(name, getattr(self, name), positive=True)
        if self.capacity_factor is not None:
            check_number("capacity_factor", self.capacity_factor, positive=True)
        check(
            self.num_dense_layers < self.num_layers,
            "num_dense_layers",
            f"must lie between 0 and num_layers - 1 = {self.num_layers - 1}",
            self.num_dense_layers,
        )
        check_gate(self.num_experts, self.top_k, self.num_groups, self.top_groups, k_name="top_k")

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
