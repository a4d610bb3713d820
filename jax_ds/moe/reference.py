"""The layer's equations in float32, every expert on every token; tests compare with them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def group_limited_topk(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"],
    *,
    k: int,
    num_groups: int,
    top_groups: int,
    routed_scaling: float = 1.0,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Ids and weights by stable sorts; see `jax_ds.moe.group_limited_topk`."""
    tokens, experts = logits.shape
    s = 1.0 / (1.0 + jnp.exp(-logits.astype(jnp.float32)))
    biased = jax.lax.stop_gradient(s) + bias.reshape(1, experts)
    group_of = jnp.arange(experts) // (experts // num_groups)
    columns = []
    for group in range(num_groups):
        members = biased[:, group * experts // num_groups : (group + 1) * experts // num_groups]
        columns.append(-jnp.sort(-members, axis=1)[:, :2].sum(axis=1))
    order = jnp.argsort(-jnp.stack(columns, axis=1), axis=1, stable=True)
    rank_of_group = jnp.argsort(order, axis=1)
    open_to = rank_of_group[:, group_of] < top_groups
    ids = jnp.argsort(jnp.where(open_to, -biased, jnp.inf), axis=1, stable=True)[:, :k]
    rows = jnp.arange(tokens)[:, None].repeat(k, axis=1)
    chosen = s[rows, ids]
    weights = routed_scaling * chosen / chosen.sum(axis=1, keepdims=True)
    return ids.astype(jnp.int32), weights


def experts(
    x: Float[Array, "T H"], gate_up: Float[Array, "E 2F H"], down: Float[Array, "E H F"]
) -> Float32[Array, "E T H"]:
    """down (silu(g) * v), [g, v] = gate_up x, for every expert and every token."""
    product = jnp.einsum("th,enh->etn", x.astype(jnp.float32), gate_up)
    width = product.shape[2] // 2
    gate, up = product[..., :width], product[..., width:]
    return jnp.einsum("etf,ehf->eth", gate / (1.0 + jnp.exp(-gate)) * up, down)


def moe_layer(
    x: Float[Array, "T H"],
    weights: Float[Array, "T k"],
    ids: Int32[Array, "T k"],
    gate_up: Float[Array, "E 2F H"],
    down: Float[Array, "E H F"],
    shared_gate_up: Float[Array, "2Fs H"] | None = None,
    shared_down: Float[Array, "H Fs"] | None = None,
) -> Float32[Array, "T H"]:
    """The sum over experts, unsharded and dense: every expert sees every token."""
    everyone = jnp.arange(gate_up.shape[0], dtype=jnp.int32)
    named = ids[:, :, None] == everyone[None, None, :]
    dense = jnp.where(named, weights[:, :, None], 0.0).sum(axis=1)  # [T, E]
    y = jnp.einsum("te,eth->th", dense, experts(x, gate_up, down))
    if shared_gate_up is not None and shared_down is not None:
        y = y + experts(x, shared_gate_up[None], shared_down[None])[0]
    return y
