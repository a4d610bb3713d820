"""The plan of a dispatch: which token becomes which row, worked out on the device.

A rank first learns, through the route, the expert ids of every token sent to it. Each (token,
local expert) pair is one row; a token that names an expert twice has one row for it. A pair is
addressed as (buffer slot b, column j) with J = min(K, E_local) columns: the local expert's number
if a token can need all of them, else the first of the token's K ids that names the expert.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from jax_ds.deep_ep.hierarchy import NodeRoute, node_route
from jax_ds.deep_ep.route import FlatRoute, flat_route


@dataclasses.dataclass(frozen=True)
class PlanSizes:
    """The static part of a plan.

    Attributes:
      axis_name: the mesh axes; two are (node, gpu).
      num_ranks: R, devices along `axis_name`.
      num_experts: E.
      num_tokens: T, tokens of each rank.
      top_k: K, experts a token may name.
      capacity: C, rows a rank can receive.
      expert_alignment: each expert's rows start at a multiple of it.
      channel: which buffers the communicating calls use.
      region: rows of each expert for the low-latency functions, None where experts share C.
    """

    axis_name: tuple[str, ...]
    num_ranks: int
    num_experts: int
    num_tokens: int
    top_k: int
    capacity: int
    expert_alignment: int
    channel: int
    region: int | None = None

    @property
    def experts_per_rank(self) -> int:
        """E_local."""
        return self.num_experts // self.num_ranks

    @property
    def direct_axes(self) -> tuple[str, ...]:
        """The mesh axes whose ranks send to each other directly: over (node, gpu) the second.

        The low-latency functions take several axes as one.
        """
        return self.axis_name[-1:] if self.region is None else self.axis_name

    @property
    def columns(self) -> int:
        """J, the most local experts that one token can need."""
        return min(self.top_k, self.experts_per_rank)


class TokensSent(NamedTuple):
    """Records that a rank stores or sends to others in one dispatch, or receives in one combine."""

    to_ranks: Int[Array, ""]  # over NVLink: other ranks of the axis, or other GPUs of the node
    to_nodes: Int[Array, ""]  # over the network, filling not counted; 0 over one axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchPlan:
    """Where every token goes: what `plan_dispatch` returns; a pytree of arrays of one rank.

    Attributes:
      group_sizes: rows of each local expert, int32 `[E_local]`, ready for a grouped product. With
        `expert_alignment` they count the zero rows that fill up to the next expert's start.
      expert_counts: tokens of each local expert, int32 `[E_local]`, without that filling.
      num_dropped: (token, expert) pairs dropped by this rank, int32 `[]`: for lack of `capacity`
        here, or of `node_capacity` on the way from here. The sum over `axis_name` is the total.
      row_source: the pair in row c, `b * J + j`, -1 for a row without a token, int32 `[C]`.
      row_of: the row of a pair, -1 for none, int32 `[B, J]`.
      column: the column j of id k of the token in slot b, -1 where the id is not of this rank,
        int32 `[B, K]`.
      route: how tokens travel.
      sizes: the static part.
    """

    group_sizes: Int[Array, " E_local"]
    expert_counts: Int[Array, " E_local"]
    num_dropped: Int[Array, ""]
    row_source: Int[Array, " C"]
    row_of: Int[Array, "B J"]
    column: Int[Array, "B K"]
    route: FlatRoute | NodeRoute
    sizes: PlanSizes = dataclasses.field(metadata={"static": True})

    def tokens_sent(self) -> TokensSent:
        """How many records the kernels send from this rank; call it inside `jax.shard_map`.

        Times the bytes of a record this is the traffic of its links: H * itemsize for tokens, and
        4 * ceil(H/128) for the scales of a Quantized.
        """
        here = jax.lax.axis_index(self.sizes.direct_axes)
        needed = self.route.needed
        other = jnp.arange(needed.shape[0], dtype=jnp.int32)[:, None] != here
        to_ranks = jnp.sum(needed & other, dtype=jnp.int32)
        return TokensSent(to_ranks, self.route.num_crossing())


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of this rank, sorted by (expert, source rank, token); those of no expert last."""

    expert: Int[Array, " BJ"]
    order: Int[Array, " BJ"]
    first: Int[Array, " E_local"]
    counts: Int[Array, " E_local"]


def make_plan(
    expert_ids: Int[Array, "T K"], sizes: PlanSizes, node_capacity: int | None
) -> DispatchPlan:
    """Routes the tokens and numbers the rows; see `plan_dispatch`."""
    ids = valid_ids(expert_ids, sizes)
    lost = jnp.zeros((), jnp.int32)
    route: FlatRoute | NodeRoute
    if len(sizes.axis_name) == 2:
        node_axis, gpu_axis = sizes.axis_name
        route, received, lost_ids = node_route(
            ids,
            num_experts=sizes.num_experts,
            node_capacity=min(node_capacity or ids.shape[0], ids.shape[0]),
            axis_name=(node_axis, gpu_axis),
        )
        lost = jnp.sum(lost_ids & first_mention(ids), dtype=jnp.int32)
    else:
        route = flat_route(ids, num_experts=sizes.num_experts, axis_name=sizes.axis_name)
        # Ids travel raised by one: an empty slot is zero, and then reads as -1.
        received = route.spread(ids + 1) - 1
    return plan_rows(route, received, lost, sizes)


def plan_rows(
    route: FlatRoute | NodeRoute,
    received: Int[Array, "B K"],
    lost: Int[Array, ""],
    sizes: PlanSizes,
) -> DispatchPlan:
    """Numbers the rows of the tokens whose ids a rank received; `lost` counts earlier drops."""
    column, local = local_pairs(received, sizes)
    pairs = sort_pairs(local, route.source_rank(), sizes)
    if sizes.region is None:
        kept = share_capacity(pairs.counts, sizes.capacity, sizes.expert_alignment)
        group_sizes = round_up(kept, sizes.expert_alignment)
        starts = jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes
    else:
        kept = group_sizes = pairs.counts
        starts = jnp.arange(sizes.experts_per_rank, dtype=jnp.int32) * sizes.region
    row_source, row_of = number_rows(pairs, kept, starts, sizes)
    return DispatchPlan(
        group_sizes=group_sizes,
        expert_counts=kept,
        num_dropped=jnp.sum(pairs.counts - kept, dtype=jnp.int32) + lost,
        row_source=row_source,
        row_of=row_of,
        column=column,
        route=route,
        sizes=sizes,
    )


def valid_ids(expert_ids: Int[Array, "T K"], sizes: PlanSizes) -> Int[Array, "T K"]:
    """The ids, -1 where one names no expert; a single such token where a rank has none."""
    if not sizes.num_tokens:  # nothing can be gathered from an empty array
        return jnp.full((1, sizes.top_k), -1, jnp.int32)
    known = (expert_ids >= 0) & (expert_ids < sizes.num_experts)
    return jnp.where(known, expert_ids, -1)


def first_mention(ids: Int[Array, "B K"]) -> Bool[Array, "B K"]:
    """Whether an id is the token's first of its value."""
    k = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return _first_equal(ids) == k[None, :]


def _first_equal(ids: Int[Array, "B K"]) -> Int[Array, "B K"]:
    """The position of the token's first id equal to id k."""
    equal = ids[:, :, None] == ids[:, None, :]
    return jnp.argmax(equal, axis=2).astype(jnp.int32)


def local_pairs(
    received: Int[Array, "B K"], sizes: PlanSizes
) -> tuple[Int[Array, "B K"], Int[Array, "B J"]]:
    """The column of every received id, and the local expert of every column; -1 for none."""
    experts = sizes.experts_per_rank
    local = received - jax.lax.axis_index(sizes.axis_name).astype(jnp.int32) * experts
    here = (received >= 0) & (local >= 0) & (local < experts)
    if experts < sizes.top_k:
        column = jnp.where(here, local, -1)
    else:
        column = jnp.where(here, _first_equal(received), -1)
    return column, in_columns(column, local, sizes.columns, jnp.max, -1)


def in_columns(
    column: Int[Array, "B K"],
    values: Num[Array, "B K"],
    columns: int,
    reduce: Callable[..., Array],
    empty: int,
) -> Num[Array, "B J"]:
    """Reduces the values of the ids that share a column; `empty` where none does."""
    j = jnp.arange(columns, dtype=jnp.int32)
    mine = column[:, None, :] == j[None, :, None]
    return reduce(jnp.where(mine, values[:, None, :], empty), axis=2)


def sort_pairs(local: Int[Array, "B J"], source: Int[Array, " B"], sizes: PlanSizes) -> Pairs:
    """Brings the pairs into row order."""
    experts, ranks = sizes.experts_per_rank, sizes.num_ranks
    expert = jnp.where(local < 0, experts, local)
    # Slots of one source rank lie in token order, so a stable sort needs no token in its key.
    key = (expert * ranks + source[:, None]).reshape(-1)
    key, order = jax.lax.sort_key_val(key, jnp.arange(key.size, dtype=jnp.int32))
    bounds = jnp.arange(experts + 1, dtype=jnp.int32) * ranks
    first = jnp.sum(key[None, :] < bounds[:, None], axis=1, dtype=jnp.int32)
    return Pairs(expert=key // ranks, order=order, first=first[:-1], counts=jnp.diff(first))


def share_capacity(
    counts: Int[Array, " E_local"], capacity: int, alignment: int
) -> Int[Array, " E_local"]:
    """How many rows each expert keeps: all up to a common level, so the busiest lose first.

    In units of `alignment` rows, u_e = ceil(counts_e / alignment) and the budget is
    U = floor(capacity / alignment). Expert e keeps min(u_e, level) units for the largest level
    with sum_e min(u_e, level) <= U; what is left of U goes, one unit each, to the first experts
    cut off. sum_e min(u_e, l) is concave and piecewise linear in l: the least of its n lines
    "the i smallest whole, the others l", so the level is the greatest of their solutions.
    """
    units = -(-counts // alignment)
    budget = capacity // alignment
    ascending = jnp.sort(units)
    smaller = jnp.cumsum(ascending, dtype=jnp.int32) - ascending
    others = counts.shape[0] - jnp.arange(counts.shape[0], dtype=jnp.int32)
    level = jnp.max((budget - smaller) // others)
    cut = units > level
    left = budget - jnp.sum(jnp.minimum(units, level), dtype=jnp.int32)
    turn = jnp.cumsum(cut, dtype=jnp.int32) - 1
    kept = jnp.minimum(units, level) + (cut & (turn < left))
    return jnp.minimum(counts, kept * alignment)


def number_rows(
    pairs: Pairs, kept: Int[Array, " E_local"], starts: Int[Array, " E_local"], sizes: PlanSizes
) -> tuple[Int[Array, " C"], Int[Array, "B J"]]:
    """Gives the first `kept` pairs of each expert the rows from `starts` on; both directions."""
    last = kept.shape[0] - 1
    expert = jnp.minimum(pairs.expert, last)
    index = jnp.arange(pairs.expert.size, dtype=jnp.int32)
    turn = index - pairs.first[expert]
    has_row = (pairs.expert <= last) & (turn < kept[expert])
    row = jnp.where(has_row, starts[expert] + turn, -1)
    row_of = jnp.zeros_like(row).at[pairs.order].set(row, unique_indices=True)

    c = jnp.arange(sizes.capacity, dtype=jnp.int32)
    expert = jnp.sum(starts[None, 1:] <= c[:, None], axis=1, dtype=jnp.int32)
    turn = c - starts[expert]
    pair = pairs.order[jnp.minimum(pairs.first[expert] + turn, index.size - 1)]
    return jnp.where(turn < kept[expert], pair, -1), row_of.reshape(-1, sizes.columns)


def round_up(counts: Int[Array, " E_local"], alignment: int) -> Int[Array, " E_local"]:
    return -(-counts // alignment) * alignment
