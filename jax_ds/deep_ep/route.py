"""How tokens travel over one mesh axis: every rank sends straight to every other.

A route moves records (a token's hidden vector, its expert ids, its weights) from their owner to
the ranks that need them, and back. It knows nothing of experts' rows. On arrival a record lies in
a slot of the receiver's *buffer* [B, W]; here slot `r * T + t` holds token t of source rank r, so
B = R*T. `spread` fills the buffers; `collect` returns one partial sum for each slot to the owner.

XLA's `all_to_all` has static sizes: each pair of ranks exchanges T slots, whatever the routing.
A token that a rank does not need is zero in its slot.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatRoute:
    """Routing over `axis_name`; several axes count as one, ranks numbered row-major.

    Attributes:
      needed: whether rank r needs token t of this rank, `[R, T]`.
      axis_name: the mesh axes.
    """

    needed: Bool[Array, "R T"]
    axis_name: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def num_nodes(self) -> int:
        """All ranks count as one node: each reaches every other directly."""
        return 1

    def stage(self, x: Shaped[Array, "T W"]) -> Shaped[Array, "T W"]:
        """What this rank has to spread: its own tokens."""
        return x

    def settle(self, sums: Float[Array, "T W"]) -> Float[Array, "T W"]:
        """A token's result from the sums that `stage`'s slots have received: they are it."""
        return sums

    def num_crossing(self) -> Int[Array, ""]:
        """Tokens that leave this node by the network: none that this route knows of."""
        return jnp.zeros((), jnp.int32)

    def spread(self, x: Shaped[Array, "T W"]) -> Shaped[Array, "B W"]:
        """Each token goes once to each rank that needs it; empty slots are zero."""
        send = mask_slots(self.needed, x)
        return exchange(send, self.axis_name).reshape(-1, x.shape[1])

    def send_back(self, parts: Float[Array, "B W"]) -> Float[Array, "R T W"]:
        """Each rank's partial sum of every token, at the token's owner."""
        num_ranks, num_tokens = self.needed.shape
        return exchange(parts.reshape(num_ranks, num_tokens, parts.shape[1]), self.axis_name)

    def collect(self, parts: Float[Array, "B W"]) -> Float[Array, "T W"]:
        """The float32 sum, in rank order, of the partial sums that the ranks made of a token."""
        return sum_in_order(self.send_back(parts))

    def source_rank(self) -> Int[Array, " B"]:
        """The rank that each buffer slot is filled from."""
        num_ranks, num_tokens = self.needed.shape
        return jnp.repeat(jnp.arange(num_ranks, dtype=jnp.int32), num_tokens)


def flat_route(
    expert_ids: Int[Array, "T K"], *, num_experts: int, axis_name: tuple[str, ...]
) -> FlatRoute:
    """The route of `expert_ids` (-1: none) over `axis_name`."""
    num_ranks = jax.lax.axis_size(axis_name)
    rank_of = owner(expert_ids, num_experts // num_ranks)
    return FlatRoute(needed_by(rank_of, num_ranks), axis_name)


def owner(expert_ids: Int[Array, "T K"], experts_each: int) -> Int[Array, "T K"]:
    """Which of several ranks (or nodes) with `experts_each` experts holds an expert; -1 of -1."""
    return jnp.where(expert_ids < 0, -1, expert_ids // experts_each)


def needed_by(owners: Int[Array, "T K"], num_owners: int) -> Bool[Array, "N T"]:
    """Whether owner n holds one of token t's experts."""
    each = jnp.arange(num_owners, dtype=jnp.int32)
    return jnp.any(owners[None, :, :] == each[:, None, None], axis=2)


def mask_slots(needed: Bool[Array, "N T"], x: Shaped[Array, "T W"]) -> Shaped[Array, "N T W"]:
    """A copy of x for each destination, zero where it is not needed."""
    return jnp.where(needed[:, :, None], x[None], jnp.zeros((), x.dtype))


def exchange(blocks: Shaped[Array, "N S W"], axis_name: tuple[str, ...]) -> Shaped[Array, "N S W"]:
    """Block n goes to rank n of the axis; the result's block n came from rank n."""
    arrived: Array = jax.lax.all_to_all(blocks, axis_name, 0, 0, tiled=True)
    return arrived


def sum_in_order(parts: Float[Array, "N ..."]) -> Float[Array, "..."]:
    """`parts[0] + parts[1] + ...` in float32, in this order, so that the result is one value."""
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total
