"""How tokens travel over two mesh axes, ("node", "gpu"): over the network once per node.

Rank `n * G + g` is GPU g of node n. A token bound for another node m crosses once, to the same GPU
g of that node, which forwards it inside the node to each GPU that needs it. Partial sums come back
the same way: node m's GPU g adds those of its node's GPUs and sends one sum over the network.

The network carries at most `node_capacity` = P tokens from a rank to one other node; the first P
that need the node, in token order, are kept. After crossing, a token lies in one of
U = T + (N-1)*P *staged* slots: first this rank's own tokens, then P slots from each other node,
nearest next node first. The receiver's buffer holds the staged slots of its node's G GPUs:
B = G*U.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_ds.deep_ep.route import exchange, mask_slots, needed_by, owner, sum_in_order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeRoute:
    """Routing over two axes.

    Attributes:
      node_token: which of this rank's tokens fills slot p to node m, -1 for none, `[N, P]`.
      node_slot: the inverse: the slot of token t to node m, -1 for none, `[N, T]`.
      needed: whether GPU g of this node needs staged slot u, `[G, U]`.
      node_axis, gpu_axis: the mesh axes.
    """

    node_token: Int[Array, "N P"]
    node_slot: Int[Array, "N T"]
    needed: Bool[Array, "G U"]
    node_axis: str = dataclasses.field(metadata={"static": True})
    gpu_axis: str = dataclasses.field(metadata={"static": True})

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.node_token.shape[0]

    def stage(self, x: Shaped[Array, "T W"]) -> Shaped[Array, "U W"]:
        """Sends each token once to each other node that needs it; this GPU's staged slots."""
        if self.num_nodes == 1:
            return x
        return _cross_nodes(x, self.node_token, self.node_axis)

    def num_crossing(self) -> Int[Array, ""]:
        """Tokens that this rank sends to other nodes, once to each node that needs one."""
        return jnp.sum(self.node_token >= 0, dtype=jnp.int32)

    def spread(self, x: Shaped[Array, "T W"]) -> Shaped[Array, "B W"]:
        """Each token once to each node, then once to each rank of it that needs it."""
        return self.forward(self.stage(x))

    def forward(self, staged: Shaped[Array, "U W"]) -> Shaped[Array, "B W"]:
        """Staged tokens to the GPUs of this node that need them."""
        arrived = exchange(mask_slots(self.needed, staged), (self.gpu_axis,))
        return arrived.reshape(-1, staged.shape[1])

    def collect(self, parts: Float[Array, "B W"]) -> Float[Array, "T W"]:
        """The sum of a token's partial sums: over a node's GPUs, rounded, then over the nodes."""
        num_gpus, num_staged = self.needed.shape
        parts = exchange(parts.reshape(num_gpus, num_staged, parts.shape[1]), (self.gpu_axis,))
        return self.settle(sum_in_order(parts).astype(parts.dtype))

    def settle(self, sums: Float[Array, "U W"]) -> Float[Array, "T W"]:
        """Sends the sums of other nodes' tokens back; the float32 sum, in node order, of a token's.

        What crosses the network has the dtype of `sums`, rounded to it once.
        """
        if self.num_nodes == 1:
            return sums
        num_nodes, num_slots = self.node_token.shape
        num_tokens, width = self.node_slot.shape[1], sums.shape[1]
        own, others = sums[:num_tokens], sums[num_tokens:]
        others = others.reshape(num_nodes - 1, num_slots, width)
        back = exchange(_by_node(others, self.node_axis), (self.node_axis,))
        here = jax.lax.axis_index(self.node_axis)

        crossed = jnp.take_along_axis(back, jnp.maximum(self.node_slot, 0)[:, :, None], axis=1)
        crossed = jnp.where(self.node_slot[:, :, None] >= 0, crossed, 0)
        each_node = jnp.arange(num_nodes, dtype=jnp.int32)[:, None, None]
        return sum_in_order(jnp.where(each_node == here, own[None], crossed))

    def source_rank(self) -> Int[Array, " B"]:
        """The rank that each buffer slot is filled from."""
        num_gpus = self.needed.shape[0]
        num_nodes, num_slots = self.node_token.shape
        here = jax.lax.axis_index(self.node_axis).astype(jnp.int32)
        own = jnp.full(self.node_slot.shape[1], here, jnp.int32)
        others = jnp.repeat(_others(here, num_nodes), num_slots)
        gpu = jnp.arange(num_gpus, dtype=jnp.int32)[:, None]
        return (jnp.concatenate([own, others])[None, :] * num_gpus + gpu).reshape(-1)


def node_route(
    expert_ids: Int[Array, "T K"],
    *,
    num_experts: int,
    node_capacity: int,
    axis_name: tuple[str, str],
) -> tuple[NodeRoute, Int[Array, "B K"], Bool[Array, "T K"]]:
    """The route of `expert_ids` (-1: none), the ids of each buffer slot, and the ids lost.

    Lost are those of tokens that `node_capacity` keeps from crossing.
    """
    node_axis, gpu_axis = axis_name
    num_nodes, num_gpus = jax.lax.axis_size(node_axis), jax.lax.axis_size(gpu_axis)
    here = jax.lax.axis_index(node_axis)
    experts_each = num_experts // (num_nodes * num_gpus)

    node_of = owner(expert_ids, experts_each * num_gpus)
    each_node = jnp.arange(num_nodes, dtype=jnp.int32)
    crosses = needed_by(node_of, num_nodes) & (each_node != here)[:, None]
    node_token, node_slot = _slots(crosses, node_capacity)
    lost = crosses & (node_slot < 0)
    lost_ids = jnp.any((node_of[None] == each_node[:, None, None]) & lost[:, :, None], axis=0)

    # What this GPU forwards depends on the ids it staged. They travel raised by one: an empty
    # slot is zero, and then reads as -1.
    staged_ids = _cross_nodes(expert_ids + 1, node_token, node_axis) - 1
    rank_of = owner(staged_ids, experts_each)
    needed = needed_by(jnp.where(rank_of < 0, -1, rank_of - here * num_gpus), num_gpus)
    route = NodeRoute(node_token, node_slot, needed, node_axis, gpu_axis)
    return route, route.forward(staged_ids + 1) - 1, lost_ids


def _slots(
    crosses: Bool[Array, "N T"], capacity: int
) -> tuple[Int[Array, "N P"], Int[Array, "N T"]]:
    """Packs the tokens bound for each node into its slots, in token order; both directions."""
    position = jnp.cumsum(crosses, axis=1, dtype=jnp.int32) - 1
    node_slot = jnp.where(crosses & (position < capacity), position, -1)
    # A stable sort puts the tokens that cross first.
    order = jnp.argsort(~crosses, axis=1, stable=True)[:, :capacity].astype(jnp.int32)
    filled = jnp.arange(capacity, dtype=jnp.int32)[None, :] <= position[:, -1:]
    return jnp.where(filled, order, -1), node_slot


def _cross_nodes(
    x: Shaped[Array, "T W"], node_token: Int[Array, "N P"], node_axis: str
) -> Shaped[Array, "U W"]:
    """Sends tokens to the other nodes; returns the staged slots of this GPU."""
    num_nodes = node_token.shape[0]
    token = node_token[:, :, None]
    send = jnp.where(token >= 0, x[jnp.maximum(node_token, 0)], jnp.zeros((), x.dtype))
    arrived = exchange(send, (node_axis,))
    here = jax.lax.axis_index(node_axis)
    others = arrived[_others(here, num_nodes)]
    return jnp.concatenate([x, others.reshape(-1, x.shape[1])])


def _others(here: Int[Array, ""], num_nodes: int) -> Int[Array, "N-1"]:
    """The other nodes, the next one first."""
    return (here + 1 + jnp.arange(num_nodes - 1, dtype=jnp.int32)) % num_nodes


def _by_node(others: Float[Array, "N-1 P W"], node_axis: str) -> Float[Array, "N P W"]:
    """Blocks of the other nodes, nearest next node first, put into node order; zero for here."""
    num_nodes = others.shape[0] + 1
    here = jax.lax.axis_index(node_axis)
    padded = jnp.concatenate([others, jnp.zeros((1, *others.shape[1:]), others.dtype)])
    return padded[(jnp.arange(num_nodes, dtype=jnp.int32) - here - 1) % num_nodes]
