"""Dispatch and combine from a global view: every rank's arrays side by side, on one device.

The routing is a plain loop over experts and tokens, on the host; the data movement is the equation
in float32 jnp, which JAX differentiates. R ranks, T tokens a rank, K experts a token, E experts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Routing(NamedTuple):
    """What every row holds, and what was counted.

    Attributes:
      expert: the global number of each row's expert, -1 for a row without a token, `[R, C]`.
      source, token: the rank and the number of the token it came from, 0 without one, `[R, C]`.
      group_sizes: rows of each local expert with their filling, `[R, E/R]`.
      expert_counts: without the filling.
      num_dropped: pairs dropped by each rank, `[R]`.
    """

    expert: Int[np.ndarray, "R C"]
    source: Int[np.ndarray, "R C"]
    token: Int[np.ndarray, "R C"]
    group_sizes: Int[np.ndarray, "R E_local"]
    expert_counts: Int[np.ndarray, "R E_local"]
    num_dropped: Int[np.ndarray, " R"]


def route(
    expert_ids: Int[np.ndarray, "R T K"],
    *,
    num_experts: int,
    capacity: int,
    expert_alignment: int = 1,
    num_nodes: int = 1,
    node_capacity: int | None = None,
    region: int | None = None,
) -> Routing:
    """Decides the rows; with a `region`, every expert has that many and they suffice."""
    num_ranks, num_tokens, _ = expert_ids.shape
    experts_each = num_experts // num_ranks
    ranks_each = num_ranks // num_nodes
    wanted: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    num_dropped = np.zeros(num_ranks, np.int32)
    for source in range(num_ranks):
        crossed = [0] * num_nodes
        for token in range(num_tokens):
            experts = sorted({int(e) for e in expert_ids[source, token] if 0 <= e < num_experts})
            for node in range(num_nodes):
                here = [e for e in experts if e // (experts_each * ranks_each) == node]
                if here and node != source // ranks_each and node_capacity is not None:
                    if crossed[node] == node_capacity:
                        num_dropped[source] += len(here)
                        continue
                    crossed[node] += 1
                for expert in here:
                    wanted[expert].append((source, token))

    shape = num_ranks, experts_each
    group_sizes, expert_counts = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    rows = np.zeros((3, num_ranks, capacity), np.int32)
    rows[0] = -1
    for rank in range(num_ranks):
        local = wanted[rank * experts_each : (rank + 1) * experts_each]
        kept = hand_out([len(tokens) for tokens in local], capacity, expert_alignment)
        start = 0
        for e, (tokens, count) in enumerate(zip(local, kept, strict=True)):
            start = start if region is None else e * region
            for i, (source, token) in enumerate(tokens[:count]):
                rows[:, rank, start + i] = rank * experts_each + e, source, token
            padded = -(-count // expert_alignment) * expert_alignment
            group_sizes[rank, e], expert_counts[rank, e] = padded, count
            num_dropped[rank] += len(tokens) - count
            start += padded
    return Routing(rows[0], rows[1], rows[2], group_sizes, expert_counts, num_dropped)


def dispatch(x: Float[Array, "R T H"], routing: Routing) -> Float[Array, "R C H"]:
    """`rows[rank, row] = x[source, token]`, zero for a row without a token."""
    held = (routing.expert >= 0)[:, :, None]
    return jnp.where(held, x[routing.source, routing.token], 0)


def combine(
    rows: Float[Array, "R C H"],
    routing: Routing,
    weights: Float[Array, "R T K"],
    expert_ids: Int[np.ndarray, "R T K"],
    partial_dtype: Any = jnp.float32,
    num_nodes: int = 1,
) -> Float[Array, "R T H"]:
    """`y[source, token] = sum of weight * rows[rank, row]`, float32.

    Rows of one rank are added first and rounded to `partial_dtype`; with several nodes, so are the
    sums of a node.
    """
    num_ranks, num_tokens, _ = weights.shape
    held = routing.expert >= 0
    named = expert_ids[routing.source, routing.token] == routing.expert[:, :, None]
    each = weights[routing.source, routing.token]
    weight = jnp.sum(jnp.where(named & held[:, :, None], each, 0), axis=2)
    terms = weight[:, :, None] * jnp.where(held[:, :, None], rows.astype(jnp.float32), 0)
    partial = jnp.zeros((num_ranks, num_ranks, num_tokens, rows.shape[2]), jnp.float32)
    here = jnp.arange(num_ranks)[:, None]
    partial = partial.at[here, routing.source, routing.token].add(terms)
    partial = partial.astype(partial_dtype).astype(jnp.float32)
    nodes = jnp.sum(partial.reshape(num_nodes, -1, *partial.shape[1:]), axis=1)
    if num_nodes > 1:
        nodes = nodes.astype(partial_dtype).astype(jnp.float32)
    return jnp.sum(nodes, axis=0)


def hand_out(counts: Sequence[int], capacity: int, alignment: int) -> list[int]:
    """Hands out the capacity a unit at a time, in rounds over the experts that still want one."""
    kept = [0] * len(counts)
    left = capacity // alignment
    while left and any(k < c for k, c in zip(kept, counts, strict=True)):
        for e, count in enumerate(counts):
            if left and kept[e] < count:
                kept[e] = min(count, kept[e] + alignment)
                left -= 1
    return kept
