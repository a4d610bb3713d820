"""Over (node, gpu): what crosses which link, counted, and what the kernels' calls are made of."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep, moe
from jax_ds._runtime import native
from jax_ds.deep_ep import placement
from jax_ds.quantization import quantize_1x128
from tests.deep_ep import cases
from tests.deep_ep.cases import RANKS, TOKENS, TOP_K, Setup
from tests.deep_ep.harness import on_mesh
from tests.deep_ep.test_kernel_calls import Gpu, SetMesh

Array = jax.Array

AXES = ("node", "gpu")
SETUPS = {
    shape: Setup(f"{shape[0]} nodes", mesh=shape, axes=AXES, expert_axes=AXES, num_experts=32)
    for shape in ((2, 4), (4, 2), (8, 1))
}
FLAT = Setup("flat", num_experts=32)


def _needed_elsewhere(ids: np.ndarray, ranks_each: int) -> np.ndarray:
    """Other units of `ranks_each` ranks that hold an expert of each token, `[RANKS, TOKENS]`."""
    unit = np.where((ids >= 0) & (ids < 32), ids // (32 // RANKS * ranks_each), -1)
    here = np.arange(RANKS) // ranks_each
    return np.array(
        [
            [len(set(token) - {-1, here[rank]}) for token in tokens]
            for rank, tokens in enumerate(unit)
        ]
    )


@pytest.mark.parametrize("routing", ["uniform", "duplicates", "not_experts", "one_rank", "none"])
def test_over_one_axis_a_token_goes_once_to_each_rank(routing: str) -> None:
    ids = cases.expert_ids(routing, 32)

    def run(ids: Array) -> Any:
        return deep_ep.plan_dispatch(ids, num_experts=32, axis_name="ep").tokens_sent()

    sent = on_mesh(FLAT, run)(ids)
    np.testing.assert_array_equal(sent.to_ranks, _needed_elsewhere(ids, 1).sum(axis=1))
    assert not sent.to_nodes.any()


@pytest.mark.parametrize("routing", ["uniform", "duplicates", "not_experts", "one_rank", "none"])
@pytest.mark.parametrize("shape", SETUPS, ids=str)
def test_over_two_axes_a_token_crosses_once_to_each_node(
    shape: tuple[int, int], routing: str
) -> None:
    """And then goes once to each GPU of that node but the one it arrived at."""
    ids = cases.expert_ids(routing, 32)

    def run(ids: Array) -> Any:
        return deep_ep.plan_dispatch(ids, num_experts=32, axis_name=AXES).tokens_sent()

    sent = on_mesh(SETUPS[shape], run)(ids)
    np.testing.assert_array_equal(sent.to_nodes, _needed_elsewhere(ids, shape[1]).sum(axis=1))
    rank = np.where((ids >= 0) & (ids < 32), ids // (32 // RANKS), -1)
    same_gpu = np.arange(RANKS)[:, None] % shape[1]
    others = sum(
        len({r for r in token if r >= 0 and r % shape[1] != same_gpu[source, 0]})
        for source, tokens in enumerate(rank)
        for token in tokens
    )
    assert sent.to_ranks.sum() == others


def test_groups_of_the_gate_bound_the_nodes_of_a_token() -> None:
    """With a group a node and two groups a token, a token crosses to at most two nodes."""
    setup = SETUPS[4, 2]
    logits = np.random.default_rng(0).standard_normal((RANKS, TOKENS, 32)).astype(np.float32)

    def run(logits: Array) -> Any:
        ids, _ = moe.group_limited_topk(
            logits, jnp.zeros(32), k=8, num_groups=4, top_groups=2, implementation="xla"
        )
        best = jax.lax.top_k(logits, 8)[1].astype(jnp.int32)
        plans = [deep_ep.plan_dispatch(i, num_experts=32, axis_name=AXES) for i in (ids, best)]
        return [plan.route.node_slot >= 0 for plan in plans]

    limited, free = (crosses.sum(axis=1) for crosses in on_mesh(setup, run)(logits))
    assert limited.max() == 2
    assert free.max() == 3


# ---- what the compiled program sends over which axis -----------------------------------------


def _program(implementation: str | None, shape: tuple[int, int], **changes: Any) -> str:
    """FP8 dispatch and bfloat16 combine with weights over 8 devices, lowered for CUDA."""
    given = {"tokens": 24, "node_capacity": 10, "hidden": 256, "axis_name": AXES, **changes}
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)

    def per_device(ids: Array, x: Array, weights: Array) -> Any:
        plan = deep_ep.plan_dispatch(
            ids, num_experts=32, axis_name=given["axis_name"], node_capacity=given["node_capacity"]
        )
        options = {"implementation": implementation}
        rows = deep_ep.dispatch(quantize_1x128(x), plan, **options)
        y = rows.values.astype(jnp.bfloat16)
        return deep_ep.combine(y, plan, weights, **options)

    spec = P(AXES)
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec)
    tokens = RANKS * given["tokens"]
    ids = jax.ShapeDtypeStruct((tokens, TOP_K), jnp.int32)
    x = jax.ShapeDtypeStruct((tokens, given["hidden"]), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((tokens, TOP_K), jnp.float32)
    return jax.jit(mapped).trace(ids, x, weights).lower(lowering_platforms=("cuda",)).as_text()


_ITEM = {"i32": 4, "f32": 4, "bf16": 2, "ui8": 1}


def _messages(text: str, axis: str) -> list[int]:
    """Bytes of each collective over `axis`, what stays on the rank included."""
    found = []
    for line in text.splitlines():
        if f'axis_ref<name = "{axis}">' in line:
            assert "stablehlo.all_to_all" in line
            shape, item = re.findall(r"-> tensor<((?:\d+x)+)(\w+)>", line)[0]
            found.append(int(np.prod([int(n) for n in shape[:-1].split("x")])) * _ITEM[item])
    return sorted(found)


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)], ids=str)
def test_bytes_of_the_node_axis(shape: tuple[int, int]) -> None:
    """N * P records of ids, of tokens with scales, of weights, of sums: nothing else crosses."""
    nodes, gpus = shape
    slots = nodes * 10
    wanted = sorted([slots * 4 * TOP_K, slots * 4 * TOP_K, slots * (256 + 2 * 4), slots * 2 * 256])
    staged = gpus * (24 + (nodes - 1) * 10)
    kernels, portable = _program(None, shape), _program("xla", shape)
    for text in (kernels, portable):
        assert _messages(text, "node") == wanted
    # Inside a node ids travel by XLA; tokens, weights and sums by the kernels.
    small = staged * 4 * TOP_K
    assert _messages(kernels, "gpu") == [small]
    assert _messages(portable, "gpu") == sorted([small, small, staged * 264, staged * 512])


def _calls(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if "custom_call @jax_ds_deep_ep" in line]
    return [dict(re.findall(r"(\w+) = ([^,{}]+) : i64", line)) for line in lines]


def test_attributes_of_the_kernels() -> None:
    """Groups are the nodes; a rank has its own tokens and node_capacity of every other node."""
    text = _program(None, (4, 2))
    dispatch, combine = _calls(text)
    common = {"num_ranks": "2", "num_tokens": str(24 + 3 * 10), "num_sms": "0", "channel": "0"}
    assert dispatch == common | {"token_bytes": "256", "num_scales": "2"}
    assert combine == common | {"token_bytes": "512", "top_k": "3"}
    assert text.count("groups = dense<[0, 1, 2, 3, 4, 5, 6, 7]>") == 2


def test_swapped_axes_make_other_groups() -> None:
    """The second name is the axis of the GPUs, wherever it stands in the mesh."""
    text = _program(None, (4, 2), axis_name=("gpu", "node"))
    assert [call["num_ranks"] for call in _calls(text)] == ["4", "4"]
    assert text.count("groups = dense<[0, 2, 4, 6, 1, 3, 5, 7]>") == 2


def _on(monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], *, known: bool) -> None:
    """Makes `gpus` those of the job, in the order of a (2, 4) mesh."""
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda name=None: gpus if name else devices())
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus[:1])
    monkeypatch.setattr(native, "why_not_nccl", lambda: None)
    if known:
        mesh = SetMesh({"node": 2, "gpu": 4}, gpus)
        monkeypatch.setattr(placement, "get_concrete_mesh", lambda: mesh)


@pytest.mark.parametrize(
    ("host_of", "known", "kernels"),
    [
        (lambda i: i // 4, True, True),
        (lambda i: i // 2, True, False),
        (lambda i: i % 2, True, False),
        (lambda i: i // 4, False, False),
        (lambda i: 0, False, True),
    ],
    ids=["a host each", "two hosts a node", "across", "unknown", "one host"],
)
def test_none_takes_the_kernels_where_a_node_is_inside_a_host(
    host_of: Any, known: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on(monkeypatch, [Gpu(i, host_of(i)) for i in range(8)], known=known)
    assert len(_calls(_program(None, (2, 4)))) == (2 if kernels else 0)
    if known and not kernels:
        with pytest.raises(NotImplementedError, match=r"a group of this axis has 2;"):
            _program("cuda", (2, 4))
    else:
        assert len(_calls(_program("cuda", (2, 4)))) == 2


@pytest.mark.parametrize("rank", range(8))
def test_every_process_decides_alike(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the choice depends on which of the devices are local."""
    gpus = [Gpu(i, i // 4) for i in range(8)]
    _on(monkeypatch, gpus, known=True)
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus[rank : rank + 1])
    monkeypatch.setattr(jax, "process_index", lambda *_: rank)
    assert len(_calls(_program(None, (2, 4)))) == 2


def test_one_gpu_a_node_needs_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    _on(monkeypatch, [Gpu(i, i) for i in range(8)], known=False)
    monkeypatch.setattr(native, "why_not_nccl", lambda: "NCCL is missing")
    calls = _calls(_program(None, (8, 1)))
    assert [call["num_ranks"] for call in calls] == ["1", "1"]
