"""What the doctor says of a mesh, on GPUs that are not here, and of the cards that join hosts."""

import pathlib
from typing import Any

import jax.numpy as jnp
import pytest

from jax_ds import deep_ep, doctor
from jax_ds._runtime import native
from jax_ds.deep_ep.placement import Placement
from jax_ds.doctor import links, mesh


def _report(*arguments: str) -> dict[str, str]:
    options = doctor._parser().parse_args(arguments)
    axes = mesh.parse_axes(options.mesh)
    where = mesh.locate(axes, options.gpus_per_host)
    expert_axes = tuple(options.axis.split(","))
    return dict(mesh.explain(where, expert_axes, options.tokens, options.hidden))


@pytest.mark.parametrize(
    ("mesh", "axis", "per_host", "wanted"),
    [
        (
            "ep=8",
            "ep",
            "8",
            {
                "along ep": "groups of 8, each inside one host: NVLink, peer memory",
                "None takes": "the kernels",
                "'cuda'": "runs",
                "experts over": "ep: 1 group of 8 ranks",
            },
        ),
        (
            "data=2,ep=8",
            "ep",
            "8",
            {"None takes": "the kernels", "experts over": "ep: 2 groups of 8 ranks"},
        ),
        (
            "ep=16",
            "ep",
            "8",
            {
                "along ep": "groups of 16 over up to 2 hosts: NCCL over the network",
                "None takes": "the portable implementation: its kernels serve the GPUs of one "
                "host, a group of this axis has 2",
                "buffers": "none: only the kernels have symmetric buffers",
            },
        ),
        (
            "node=2,gpu=8",
            "node,gpu",
            "8",
            {
                "between nodes": "groups of 2, a token crosses once a node by XLA's all_to_all: "
                "NCCL over the network, RDMA where the cards have it",
                "along gpu": "groups of 8, each inside one host: NVLink, peer memory",
                "None takes": "the kernels",
            },
        ),
        (
            "gpu=8,node=2",
            "node,gpu",
            "8",
            {"along gpu": "groups of 8 over up to 2 hosts: NCCL over the network"},
        ),
        (
            "node=2,gpu=4",
            "node,gpu",
            "8",
            {
                "between nodes": "groups of 2, a token crosses once a node by XLA's all_to_all; "
                "all inside one host: NCCL over NVLink, no network"
            },
        ),
        (
            "node=1,gpu=8",
            "node,gpu",
            "8",
            {"between nodes": "one node: nothing crosses", "None takes": "the kernels"},
        ),
        (
            "ep=64",
            "ep",
            "72",
            {"'cuda'": "is an error: its kernels serve at most 32 ranks, the axis has 64"},
        ),
        ("data=8,ep=1", "ep", "8", {"along ep": "one rank: nothing travels"}),
    ],
)
def test_hosts_that_are_not_here(
    mesh: str, axis: str, per_host: str, wanted: dict[str, str]
) -> None:
    report = _report("--mesh", mesh, "--axis", axis, "--gpus-per-host", per_host)
    assert {name: report[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("shape", "axis", "tokens"), [("gpu=8", "gpu", 4096), ("node=2,gpu=8", "node,gpu", 8192)]
)
def test_buffers_hold_what_crosses_too(shape: str, axis: str, tokens: int) -> None:
    text = _report("--mesh", shape, "--axis", axis, "--gpus-per-host", "8")["buffers"]
    plain, training = (
        deep_ep.buffer_bytes(
            num_tokens=tokens,
            hidden=7168,
            num_ranks=8,
            dtype=jnp.float8_e4m3fn,
            training=training,
        )
        >> 20
        for training in (False, True)
    )
    assert text.startswith(f"{plain} MiB a rank and channel, {training} in training")


def test_without_a_gpu() -> None:
    report = _report("--mesh", "ep=8", "--axis", "ep")
    assert report["None takes"] == "the portable implementation: there is no GPU"
    assert report["'cuda'"] == "is an error: there is no GPU"
    assert "--gpus-per-host" in report["GPUs"]


class Gpu:
    """A GPU of this job, as JAX shows it."""

    device_kind = "NVIDIA H200"

    def __init__(self, process_index: int, slice_index: int) -> None:
        self.process_index, self.slice_index = process_index, slice_index


@pytest.mark.parametrize(
    ("processes", "nccl", "native_problem", "default", "cuda"),
    [
        (4, None, None, "the kernels", "runs"),
        (1, None, None, "the portable implementation: the kernels have only run with", "runs"),
        (4, "NCCL is 2.28.9", None, "the portable implementation: NCCL is", "is an error: NCCL"),
        (4, None, "no Hopper", "the portable implementation: no H", "is an error: no Hopper"),
    ],
    ids=["process each", "one process", "old NCCL", "other chip"],
)
def test_gpus_of_this_job(
    processes: int,
    nccl: str | None,
    native_problem: str | None,
    default: str,
    cuda: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "why_not_nccl", lambda: nccl)
    monkeypatch.setattr(native, "why_not_native", lambda: native_problem)
    monkeypatch.setattr(mesh, "_nccl_version", lambda: "2.32.3")
    gpus: list[Any] = [Gpu(i % processes, 0) for i in range(4)]
    report = dict(mesh.explain(Placement({"ep": 4}, gpus, known=True), ("ep",), 16, 256))
    count = mesh._count(processes, "process", "processes")
    assert report["GPUs"] == f"4 x NVIDIA H200, 1 host, {count}"
    assert report["None takes"].startswith(default)
    assert report["'cuda'"].startswith(cuda)
    assert report["NCCL here"] == (nccl or "2.32.3")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mesh", "ep"], "--mesh: must be like node=2,gpu=8, got 'ep'"),
        (["--mesh", "ep=0"], "--mesh: must be like node=2,gpu=8, got 'ep=0'"),
        (["--mesh", "a=2,a=2"], "--mesh: must be like node=2,gpu=8, got 'a=2,a=2'"),
        (
            ["--mesh", "a=2,b=2", "--axis", "c"],
            "--axis: must be one or two axes of --mesh, got 'c'",
        ),
        (["--mesh", "a=2", "--gpus-per-host", "0"], "--gpus-per-host: must be at least 1, got 0"),
    ],
)
def test_mistakes(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(arguments) == 1
    assert capsys.readouterr().out.strip() == sentence


def test_the_last_axis_is_the_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--mesh", "data=2,ep=4", "--gpus-per-host", "8"]) == 0
    text = capsys.readouterr().out
    assert "ep: 2 groups of 4 ranks" in text
    assert "NVLink" in text and "RDMA" in text


def test_nvlink_of_each_gpu() -> None:
    link = "\t Link {}: 26.562 GB/s\n"
    gpu = "GPU {}: NVIDIA H200 (UUID: GPU-1)\n"
    full = "".join(gpu.format(i) + "".join(link.format(j) for j in range(18)) for i in range(8))
    assert links.nvlink(full) == "8 GPUs: 18 links, 478 GB/s each way"
    inactive = gpu.format(0) + "\t Link 0: <inactive>\n"
    assert links.nvlink(inactive) == "1 GPUs: no active link"
    mixed = gpu.format(0) + link.format(0) + gpu.format(1)
    assert links.nvlink(mixed) == "2 GPUs: no active link or 1 links, 27 GB/s each way"
    assert links.nvlink("") == "unknown: nvidia-smi shows none"


def test_cards_between_hosts(tmp_path: pathlib.Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN"), ("mlx5_2", "4: ACTIVE")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    modules = tmp_path / "modules"
    modules.write_text("nvidia_peermem 16384 0 - Live 0x0\n")
    assert links.rdma(tmp_path, modules) == (
        "mlx5_0 400 Gb/sec (4X NDR), mlx5_2 400 Gb/sec (4X NDR); nvidia_peermem is loaded"
    )
    modules.write_text("")
    assert links.rdma(tmp_path, modules).endswith("nvidia_peermem is not loaded")
    assert links.rdma(tmp_path / "nothing", modules).startswith("no active card")
