"""Mixture of experts as in DeepSeek-V3: gating, load balancing and the expert-parallel layer."""

from jax_ds.moe.api import MoEParams, MoEStats, moe_layer
from jax_ds.moe.gate import group_limited_topk, update_bias

__all__ = ["MoEParams", "MoEStats", "group_limited_topk", "moe_layer", "update_bias"]
