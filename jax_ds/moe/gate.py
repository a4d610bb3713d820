"""Group-limited sigmoid gating and its auxiliary-loss-free load balancing (DeepSeek-V3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_ds._core.checks import (
    check,
    check_dtype,
    check_integer,
    check_number,
    check_rank,
    check_shape,
)
from jax_ds._runtime.choose import Implementation, choose


def group_limited_topk(
    logits: Float[Array, "T E"],
    bias: Float32[Array, " E"],
    *,
    k: int,
    num_groups: int,
    top_groups: int,
    routed_scaling: float = 1.0,
    implementation: Implementation = None,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Chooses k experts for every token, out of the best groups only.

        s = sigmoid(logits)                                     affinity of token and expert
        group score = sum of the two largest s + bias of the group
        ids = top-k of s + bias within the top_groups best groups
        weights = routed_scaling * s[ids] / sum(s[ids])

    The bias steers the choice and nothing else: weights come from the unbiased affinities, and no
    gradient reaches the bias (`update_bias` moves it). Groups are E / num_groups consecutive
    experts; with one group per node, a token travels to at most `top_groups` nodes. Ties go to the
    lower index. Ids come in descending order of s + bias.

    Args:
      logits: [T, E], any float dtype; computed in float32. Differentiable.
      bias: [E] float32.
      k: experts per token.
      num_groups: groups of experts; divides E.
      top_groups: groups a token may use; they must hold at least k experts.
      routed_scaling: factor on the normalised weights (2.5 in DeepSeek-V3).
      implementation: None or "xla"; there is no CUDA kernel.

    Returns:
      expert_ids int32 [T, k] and weights float32 [T, k].

    Raises:
      ValueError, TypeError: a shape, dtype or count breaks a rule above.

    Source: DeepSeek-V3 technical report, sections 2.1.2 and 3.2.2 (arXiv:2412.19437).
    """
    check_dtype("logits", logits, jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
    check_dtype("bias", bias, jnp.float32)
    check_rank("logits", logits, 2)
    check_shape("bias", bias, (logits.shape[1],), "E")
    check_gate(logits.shape[1], k, num_groups, top_groups)
    check_number("routed_scaling", routed_scaling, positive=True)

    def portable(
        logits: Float[Array, "T E"], bias: Float32[Array, " E"]
    ) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
        return _topk(logits, bias, k, num_groups, top_groups, routed_scaling)

    chosen: tuple[Int32[Array, "T k"], Float32[Array, "T k"]] = choose(
        "group_limited_topk", implementation, (logits, bias), xla=portable, cuda=None
    )
    return chosen


def check_gate(experts: int, k: int, num_groups: int, top_groups: int, k_name: str = "k") -> None:
    """Requires counts that leave k experts to choose from."""
    for name, count in ((k_name, k), ("num_groups", num_groups), ("top_groups", top_groups)):
        check_integer(name, count)
    divides = num_groups >= 1 and experts % num_groups == 0
    check(divides, "num_groups", f"must divide the {experts} experts", num_groups)
    rule = f"must lie between 1 and num_groups = {num_groups}"
    check(1 <= top_groups <= num_groups, "top_groups", rule, top_groups)
    reachable = top_groups * (experts // num_groups)
    rule = f"must lie between 1 and the {reachable} reachable experts"
    check(1 <= k <= reachable, k_name, rule, k)


def _topk(
    logits: Float[Array, "T E"],
    bias: Float32[Array, " E"],
    k: int,
    num_groups: int,
    top_groups: int,
    routed_scaling: float,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    tokens, experts = logits.shape
    affinity = jax.nn.sigmoid(logits.astype(jnp.float32))
    biased = jax.lax.stop_gradient(affinity + bias.astype(jnp.float32)[None, :])
    if top_groups < num_groups:
        grouped = biased.reshape(tokens, num_groups, experts // num_groups)
        best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
        _, groups = jax.lax.top_k(best.sum(-1), top_groups)
        allowed = (groups[:, :, None] == jnp.arange(num_groups)[None, None, :]).any(1)
        biased = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
    _, ids = jax.lax.top_k(biased, k)
    chosen = jnp.take_along_axis(affinity, ids, axis=1)
    # Logits below about -88 make every affinity 0; the floor keeps the weights finite.
    total = jnp.maximum(chosen.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return ids.astype(jnp.int32), chosen * (routed_scaling / total)


def update_bias(
    bias: Float32[Array, "*B E"], load: Int32[Array, "*B E"], *, rate: float
) -> Float32[Array, "*B E"]:
    """One balancing step: bias + rate * sign(mean(load) - load), over the last dimension.

    Experts that got more than their share of the step's tokens become less attractive, the others
    more. `load` is summed over all devices, so that every device computes the same bias.

    Args:
      bias: [..., E] float32, leading dimensions for layers.
      load: [..., E] int32, tokens routed to each expert during the step.
      rate: the bias update speed (gamma in the report, 0.001 there), a number or a float32 scalar.

    Returns:
      The new bias, of the shape of `bias`.

    Raises:
      ValueError, TypeError: a shape or dtype breaks a rule above.

    Source: DeepSeek-V3 technical report, section 2.1.2.
    """
    check_dtype("bias", bias, jnp.float32)
    check_dtype("load", load, jnp.int32)
    if not hasattr(rate, "dtype"):  # a schedule may compute it
        check_number("rate", rate)
    check_shape("load", load, bias.shape, "*B E")
    counts = load.astype(jnp.float32)
    return bias + rate * jnp.sign(counts.mean(-1, keepdims=True) - counts)
