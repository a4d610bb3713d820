"""What the kernels' custom calls are made of, without a GPU: groups, attributes, choices, bytes."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ds import deep_ep
from jax_ds._runtime import native
from jax_ds.deep_ep import ffi, placement
from jax_ds.quantization import quantize_1x128

Array = jax.Array

T, K, H, E = 5, 2, 256, 16


class Gpu:
    """A device as far as the choice looks at it."""

    compute_capability = "9.0"
    platform = "gpu"
    device_kind = "NVIDIA H200"

    def __init__(self, process_index: int, slice_index: int = 0) -> None:
        self.process_index = process_index
        self.slice_index = slice_index


def _mesh(shape: tuple[int, ...], axes: tuple[str, ...], order: Any = None) -> jax.sharding.Mesh:
    devices = np.array(jax.devices())[np.arange(8) if order is None else order].reshape(shape)
    return jax.sharding.Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize(
    ("shape", "axes", "names"),
    [
        ((8,), ("ep",), ("ep",)),
        ((2, 4), ("data", "ep"), ("ep",)),
        ((4, 2), ("ep", "data"), ("ep",)),
        ((2, 2, 2), ("a", "ep", "b"), ("ep",)),
        ((2, 2, 2), ("x", "data", "y"), ("y", "x")),
    ],
)
@pytest.mark.parametrize("permuted", [False, True])
def test_groups_are_those_of_collectives(
    shape: tuple[int, ...], axes: tuple[str, ...], names: tuple[str, ...], permuted: bool
) -> None:
    """Every device gathers the positions of its group, in the order of its ranks."""
    order = np.random.default_rng(0).permutation(8) if permuted else None
    mesh = _mesh(shape, axes, order)
    made = {}

    def per_device(position: Array) -> Array:
        made["groups"] = placement.current().groups(names)
        return jax.lax.all_gather(position[0], names)[None]

    mapped = jax.shard_map(
        per_device, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False
    )
    gathered = np.asarray(jax.jit(mapped)(np.arange(8)))
    groups = made["groups"]
    assert sorted(groups.reshape(-1)) == list(range(8))
    for position, group in enumerate(gathered):
        np.testing.assert_array_equal(group, groups[np.argwhere(groups == position)[0, 0]])


def _lowered(implementation: str | None = None, **changes: Any) -> str:
    """A dispatch of FP8 and a combine, lowered for CUDA on a mesh with a data axis."""
    mesh = _mesh((2, 4), ("data", "ep"))
    sizes = {"tokens": T, "hidden": H, "num_sms": None, "dtype": jnp.bfloat16, "weighted": False}
    sizes |= changes

    def per_device(ids: Array, x: Array) -> Any:
        plan = deep_ep.plan_dispatch(ids, num_experts=E, axis_name="ep", channel=3)
        sms = {"num_sms": sizes["num_sms"], "implementation": implementation}
        quantized = deep_ep.dispatch(quantize_1x128(x), plan, **sms)
        weights = jnp.ones(ids.shape) if sizes["weighted"] else None
        y = deep_ep.combine(deep_ep.dispatch(x, plan, **sms), plan, weights, **sms)
        return quantized, y

    spec = P(("data", "ep"))
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec)
    ids = jax.ShapeDtypeStruct((8 * sizes["tokens"], K), jnp.int32)
    x = jax.ShapeDtypeStruct((8 * sizes["tokens"], sizes["hidden"]), sizes["dtype"])
    return jax.jit(mapped).trace(ids, x).lower(lowering_platforms=("cuda",)).as_text()


def _calls(text: str) -> list[dict[str, str]]:
    """The attributes of every communication kernel."""
    lines = [line for line in text.splitlines() if "custom_call @jax_ds_deep_ep" in line]
    return [dict(re.findall(r"(\w+) = ([^,{}]+) : i64", line)) for line in lines]


def test_attributes() -> None:
    text = _lowered(num_sms=np.int32(12))
    tokens = {"channel": "3", "num_ranks": "4", "num_sms": "12", "num_tokens": str(T)}
    fp8 = tokens | {"token_bytes": str(H), "num_scales": "2"}
    dispatch = tokens | {"token_bytes": str(2 * H), "num_scales": "0"}
    combine = tokens | {"token_bytes": str(2 * H), "top_k": str(K)}
    found = sorted(map(str, (dict(sorted(call.items())) for call in _calls(text))))
    assert found == sorted(str(dict(sorted(c.items()))) for c in (fp8, dispatch, combine))
    assert text.count("groups = dense<[0, 1, 2, 3, 4, 5, 6, 7]>") == 3
    assert text.count('_xla_stream_annotation = "collective"') >= 3


@pytest.mark.parametrize(("dtype", "word"), [(jnp.bfloat16, 2), (jnp.float32, 4)])
def test_combine_has_one_result(dtype: Any, word: int) -> None:
    """Sums, and behind them the weights of the rows: XLA awaits a call of two results at once."""
    text = _lowered(weighted=True, dtype=dtype)
    (call,) = (line for line in text.splitlines() if "custom_call @jax_ds_deep_ep_combine" in line)
    columns = min(K, E // 4)
    size = T * H + 4 * T * columns * 4 // word
    assert call.rstrip().endswith(f"-> tensor<{size}xui{8 * word}>")


def test_both_results_of_a_dispatch_go_through_one_barrier() -> None:
    """Or XLA takes the pair apart on the stream of the call, and runs nothing beside it."""
    text = _lowered()
    (pair,) = re.findall(r"(%\w+):2 = func.call @compute_on\S*\(", text)
    placed = re.findall(rf"(%\w+) = .*@annotate_device_placement\({pair}#[01]\)", text)
    assert len(placed) == text.count(f"{pair}#") == 2
    assert f"stablehlo.optimization_barrier {', '.join(placed)} :" in text


def test_no_tokens_still_take_part() -> None:
    """A rank without tokens sends one empty slot: every rank must be in every round."""
    calls = _calls(_lowered(tokens=0))
    assert [call["num_tokens"] for call in calls] == ["1"] * 3


def test_odd_sizes_stay_portable() -> None:
    text = _lowered(hidden=130)
    assert not _calls(text)
    assert "all_to_all" in text


@pytest.mark.parametrize(
    ("gpus", "nccl", "reason"),
    [
        ([Gpu(0), Gpu(1)], None, None),
        ([Gpu(0), Gpu(1)], "NCCL is 2.28.9", "NCCL is 2.28.9"),
        (
            [Gpu(i, i // 4) for i in range(8)],
            None,
            "its kernels serve the GPUs of one host, the axis has 8 ranks and a host at most 4 of "
            "the GPUs",
        ),
        ([Gpu(i, i // 8) for i in range(16)], None, None),
    ],
)
def test_what_all_processes_know_decides(
    gpus: list[Gpu], nccl: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda name=None: gpus if name else devices())
    monkeypatch.setattr(native, "why_not_nccl", lambda: nccl)
    seen = []

    def per_device(x: Array) -> Array:
        ids = jnp.zeros((x.shape[0], 1), jnp.int32)
        plan = deep_ep.plan_dispatch(ids, num_experts=8, axis_name="ep", implementation="xla")
        seen.append(ffi.unsupported(plan.sizes, x, None))
        return x

    mesh = _mesh((8,), ("ep",))
    jax.eval_shape(
        jax.shard_map(per_device, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")),
        jax.ShapeDtypeStruct((8, 64), jnp.bfloat16),
    )
    assert seen == [reason]


@pytest.mark.parametrize(("processes", "default"), [((0, 1), True), ((0, 0), False)])
def test_default_only_with_a_process_for_each_gpu(
    processes: tuple[int, ...], default: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [Gpu(index) for index in processes]
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda name=None: gpus if name else devices())
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus)
    monkeypatch.setattr(native, "why_not_nccl", lambda: None)
    assert bool(_calls(_lowered())) == default
    assert len(_calls(_lowered("cuda"))) == 3


class SetMesh:
    """What `jax.set_mesh` leaves for tracing."""

    def __init__(self, axes: dict[str, int], gpus: list[Gpu]) -> None:
        self.axis_names, self.axis_sizes = tuple(axes), tuple(axes.values())
        self.devices = np.array(gpus).reshape(self.axis_sizes)


@pytest.mark.parametrize(
    ("host_of", "known", "kernels"),
    [
        (lambda i: i // 4, True, True),  # a group on each of two hosts
        (lambda i: i % 2, True, False),  # groups over both hosts
        (lambda i: i // 4, False, False),
        (lambda i: 0, False, True),
    ],
    ids=["inside", "across", "unknown", "one host"],
)
def test_the_groups_of_the_axis_decide(
    host_of: Any, known: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [Gpu(i, host_of(i)) for i in range(8)]
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda name=None: gpus if name else devices())
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus[:1])
    monkeypatch.setattr(native, "why_not_nccl", lambda: None)
    if known:
        mesh = SetMesh({"data": 2, "ep": 4}, gpus)
        monkeypatch.setattr(placement, "get_concrete_mesh", lambda: mesh)
    assert len(_calls(_lowered())) == (3 if kernels else 0)
    if known and not kernels:
        with pytest.raises(NotImplementedError, match="a group of this axis has 2;"):
            _lowered("cuda")
    else:  # where a group can fit on a host, the caller may know that it does
        assert len(_calls(_lowered("cuda"))) == 3


def test_set_mesh_tells_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = _mesh((2, 4), ("data", "ep"), np.arange(8)[::-1])
    seen = []

    def per_device(x: Array) -> Array:
        seen.append(placement._mesh_gpus())
        return x

    def trace() -> None:
        spec = P(("data", "ep"))
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=spec, out_specs=spec)
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((8,), jnp.float32))

    with jax.set_mesh(mesh):
        trace()
        assert seen.pop() is None  # these are no GPUs
        monkeypatch.setattr(placement, "_PLATFORM", "cpu")
        trace()
    assert seen.pop() == jax.devices()[::-1]
    trace()
    assert seen.pop() is None


def test_buffer_bytes() -> None:
    """Slots of every rank, rounded up to a size class, and a page of signals a window."""
    given = {"num_tokens": 4096, "hidden": 7168, "num_ranks": 8}
    slots, mib = 8 * 4096, 1 << 20
    assert slots * 14336 == 448 * mib
    bf16, combine = 4096 + 448 * mib, 4096 + 480 * mib  # 449 MiB with the weights
    assert deep_ep.buffer_bytes(**given) == bf16 + combine
    fp8 = 4096 + 240 * mib  # records of 7168 values and 56 scales, aligned: 7424 bytes, 232 MiB
    quantized = given | {"dtype": jnp.float8_e4m3fn}
    assert deep_ep.buffer_bytes(**quantized) == fp8 + combine
    assert deep_ep.buffer_bytes(**quantized, training=True) == fp8 + combine + bf16
    assert deep_ep.buffer_bytes(num_tokens=1, hidden=8, num_ranks=1) == 2 * (4096 + 4 * mib)
    # 2048 records of 3968 values and 31 scales, which align to 4096 bytes, and of 7936 + 32.
    exact = {"num_tokens": 2048, "hidden": 3968, "num_ranks": 1, "dtype": jnp.float8_e4m3fn}
    assert deep_ep.buffer_bytes(**exact) == 4096 + 8 * mib + 4096 + 16 * mib
    few = quantized | {"num_tokens": 128, "low_latency": True}
    # 1024 slots of 7424 + 32 and 14336 + 32 bytes: 7.28 and 14.03 MiB.
    assert deep_ep.buffer_bytes(**few) == 2 * (4096 + 15 * mib // 2) + 2 * (4096 + 15 * mib)
    with pytest.raises(ValueError, match="training: must be False for low latency"):
        deep_ep.buffer_bytes(**few, training=True)


def test_nothing_to_report_without_kernels() -> None:
    deep_ep.check()


def test_what_was_recorded_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "communication_failures", lambda: ["one", "two"])
    with pytest.raises(RuntimeError, match=r"^one; two$"):
        deep_ep.check()
