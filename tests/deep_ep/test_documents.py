"""The numbers of docs/deep_ep.md follow from bytes and rates, and its code runs."""

import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_ds import deep_ep, deep_gemm

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "deep_ep.md").read_text()

T, K, E, H = 4096, 8, 256, 7168
FP8, BF16 = H + 4 * H // 128, 2 * H
NVLINK, NETWORK = 450e9, 50e9
ALLOWED_NODES = 4


def _spread(units: int, allowed: int) -> float:
    """Units that K distinct experts lie on: `allowed` of them hold all, the others none."""
    experts, each = E * allowed // units, E // units
    if experts == each:
        return 1.0
    return allowed * (1 - math.comb(experts - each, K) / math.comb(experts, K))


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table below a header that begins so."""
    _, _, after = PAGE.partition(heading)
    assert after, heading
    lines = after.splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def _number(cell: str) -> float:
    return float(re.findall(r"[\d.]+", cell)[0])


def _agrees(cell: str, value: float) -> None:
    """The cell shows `value`, rounded to the digits it has."""
    number = re.findall(r"[\d.]+", cell)[0]
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    assert abs(float(number) - value) <= half * 1.01, (cell, value)


def test_one_node() -> None:
    other_ranks = _spread(8, 8) * 7 / 8
    rows = _rows("H200, one node, uniform routing |")
    for (_, megabytes, at_nvlink, published), record in zip(rows, (FP8, BF16), strict=True):
        sent = T * other_ranks * record
        _agrees(megabytes, sent / 1e6)
        _agrees(at_nvlink, sent / NVLINK * 1e3)
        rate, milliseconds = published.split(":")
        _agrees(milliseconds, sent / (_number(rate) * 1e9) * 1e3)


@pytest.mark.parametrize(
    ("heading", "record"),
    [
        ("| nodes | other nodes of a token |", FP8),
        ("| nodes | bfloat16: MB needed |", BF16),
    ],
    ids=["fp8", "bf16"],
)
def test_several_nodes(heading: str, record: int) -> None:
    for nodes, *cells in _rows(heading):
        count = int(nodes)
        allowed = min(count, ALLOWED_NODES)
        other_nodes = _spread(count, allowed) * (count - 1) / count
        ranks = _spread(8 * count, 8 * allowed)
        slots = min(T, math.ceil(1.25 * T * other_nodes / (count - 1)))
        if record == FP8:
            _agrees(cells.pop(0), other_nodes)
            _agrees(cells.pop(0), slots)
        needed, sent, at_network, inside, at_nvlink = cells
        crossing = (count - 1) * slots * record
        # One in eight of the ranks is where the token arrives.
        forwarded = T * ranks * 7 / 8 * record
        _agrees(needed, T * other_nodes * record / 1e6)
        _agrees(sent, crossing / 1e6)
        _agrees(at_network, crossing / NETWORK * 1e3)
        _agrees(inside, forwarded / 1e6)
        _agrees(at_nvlink, forwarded / NVLINK * 1e3)


def test_ranks_that_a_token_needs() -> None:
    match = re.search(r"other ranks: ([\d.]+) for R = 8, E = 256, K = 8", PAGE)
    assert match is not None
    _agrees(match[1], _spread(8, 8) * 7 / 8)


BLOCKS = re.findall(r"^```python\n(.*?)```", PAGE, re.M | re.S)


def test_every_block_of_code_is_run_here() -> None:
    assert len(BLOCKS) == 2


def _on_eight_devices(function: Callable[..., Any]) -> jax.Array:
    """`function(x, expert_ids, weights)` for 16 tokens of 256 a device, two of 16 experts each."""
    mesh = jax.make_mesh((8,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (128, 256), jnp.bfloat16)
    ids = jax.random.randint(jax.random.key(1), (128, 2), 0, 16)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep"))
    return jax.jit(mapped)(x, ids, jnp.ones((128, 2)))


def test_the_layer_runs() -> None:
    """With experts that are grouped products by the identity: y is twice x, as weights are 1."""
    names: dict[str, Any] = {
        "deep_ep": deep_ep,
        "E": 16,
        "experts": lambda rows, w_up, w_down, sizes: deep_gemm.bf16_grouped_gemm(rows, w_up, sizes),
    }
    exec(BLOCKS[0], names)
    identity = jnp.broadcast_to(jnp.eye(256, dtype=jnp.bfloat16)[None], (2, 256, 256))

    def run(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        ids = jnp.stack([ids[:, 0], (ids[:, 0] + 1) % 16], axis=1)  # two different ones
        y: jax.Array = names["layer"](x, ids, weights, identity, None)
        return y - 2 * x

    assert not _on_eight_devices(run).any()


def test_the_halves_run() -> None:
    def run(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        names = {"deep_ep": deep_ep, "E": 16, "x": x, "expert_ids": ids, "shared_expert": jnp.tanh}
        exec(BLOCKS[1], names)
        assert names["rows"].shape == (2, 8 * 128, 256)
        return names["group_sizes"]

    # A token that names an expert twice has one row for it.
    assert 128 <= int(_on_eight_devices(run).sum()) <= 256
