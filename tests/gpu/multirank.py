"""Starts the ranks of a multi-process JAX program on this machine's GPUs, one process each.

    make gpu-test-multirank RANKS=8 [NODES=2] [ARGS="-k scan"]
    python tests/gpu/multirank.py --ranks 8 -- python my_program.py

Without a program it runs the tests marked `multigpu`; arguments after `--` that begin with `-` go
to pytest. `{rank}` in them becomes the rank. A program calls `tests.gpu.multirank.join()` first.
CUDA_VISIBLE_DEVICES says which GPUs to use. Where there are fewer than ranks, ranks share them
under MPS, and NCCL must be 2.30.4 or newer: `--nccl` names the library to use in place of the
installed one. With `--nodes` NCCL takes equal parts of the ranks for separate hosts. Every rank's
output goes to a file, the status of the first to fail is ours, and no rank outlives the timeout.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from jax_ds._core import processes
from tests.gpu.record import ROOT

_TESTS = [
    "tests/deep_ep/test_multirank_low_latency.py",
    "tests/deep_ep/test_multirank.py",
    "tests/deep_ep/test_multinode.py",
    "tests/moe/test_multirank.py",  # takes longest to compile, meanwhile the others run
    "tests/deep_ep/test_stopped_rank.py",  # the last: it ends the use of the GPU
    "-q",
    "-m",
    "multigpu",
    "-p",
    "no:cacheprovider",
    "-o",
    "filterwarnings=default",
]


def join() -> tuple[int, int]:
    """Joins the ranks that `multirank.py` started: (rank, ranks). Call it before using JAX."""
    import jax

    rank, ranks = int(os.environ["JAX_DS_TEST_RANK"]), int(os.environ["JAX_DS_TEST_RANKS"])
    address = os.environ["JAX_DS_TEST_COORDINATOR"]
    # The first rank compiles a program and hands it to the others, by way of the cache.
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_DS_TEST_CACHE"])
    jax.config.update("jax_share_binary_between_hosts", True)
    # Where the first fails, the others are to say so in time.
    jax.config.update("jax_share_binary_between_hosts_timeout_ms", 120_000)
    jax.distributed.initialize(address, ranks, rank, local_device_ids=[0])
    return rank, ranks


def started_here() -> bool:
    """Whether this process is such a rank."""
    return "JAX_DS_TEST_RANK" in os.environ


def shares_gpu() -> bool:
    """Whether this rank has its GPU together with others."""
    return "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ


def visible_gpus() -> list[str]:
    """The GPUs that a program started here may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(gpu) for gpu in range(len(lines))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for everything")
    parser.add_argument(
        "--grace", type=float, default=20.0, help="seconds for the others after a rank has failed"
    )
    parser.add_argument("--nccl", default="", help="libnccl.so.2 to preload")
    parser.add_argument("--logs", default="", help="folder for the ranks' output")
    parser.add_argument("--lines", type=int, default=3, help="lines of rank 0 to show at the end")
    parser.add_argument("program", nargs="*", help="-- program, or arguments of pytest")
    options = parser.parse_args()
    if options.ranks < 1 or options.nodes < 1 or options.ranks % options.nodes:
        parser.error("--ranks must be a positive multiple of --nodes")
    gpus = visible_gpus()
    if not gpus:
        parser.error("no NVIDIA GPU: nvidia-smi lists none")
    command = list(options.program)
    if not command or command[0].startswith("-"):
        command = [sys.executable, "-m", "pytest", *_TESTS, *command]
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(
            options.logs or stack.enter_context(tempfile.TemporaryDirectory(prefix="multirank-"))
        )
        logs.mkdir(parents=True, exist_ok=True)
        mps = stack.enter_context(_mps()) if options.ranks > len(gpus) else {}
        if mps:
            # Programs under a daemon of ours count the GPUs that it has.
            gpus = [str(gpu) for gpu in range(len(gpus))]
        return _run(command, options, gpus, mps, logs)


def _run(
    command: list[str],
    options: argparse.Namespace,
    gpus: list[str],
    mps: dict[str, str],
    logs: pathlib.Path,
) -> int:
    ranks = range(options.ranks)
    shared = {
        **os.environ,
        **mps,
        "JAX_DS_TEST_COORDINATOR": f"127.0.0.1:{processes.free_port()}",
        "JAX_DS_TEST_CACHE": str(logs / "compiled"),
    }
    files = [logs / f"rank{rank}.txt" for rank in ranks]
    statuses = processes.run(
        [[part.replace("{rank}", str(rank)) for part in command] for rank in ranks],
        [
            {**shared, **environment(rank, options.ranks, options.nodes, gpus, options.nccl)}
            for rank in ranks
        ],
        files,
        cwd=ROOT,
        timeout=options.timeout,
        grace=options.grace,
    )
    _report(statuses, files, options.lines)
    # Those that we stopped have negative statuses and say nothing of the cause.
    return max(statuses) or int(any(statuses))


def environment(rank: int, ranks: int, nodes: int, gpus: list[str], nccl: str) -> dict[str, str]:
    """What a rank must find, beside where they meet: its place, its GPU, how NCCL may use it."""
    per_gpu = -(-ranks // len(gpus))
    environment = {
        "JAX_DS_TEST_RANK": str(rank),
        "JAX_DS_TEST_RANKS": str(ranks),
        "JAX_DS_TEST_NODES": str(nodes),
        "CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)],
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_DS_TIMEOUT_S": os.environ.get("JAX_DS_TIMEOUT_S", "10"),
    }
    if per_gpu > 1:
        environment |= {
            "NCCL_MULTI_RANK_GPU_ENABLE": "1",
            "NCCL_MAX_CTAS": "4" if per_gpu <= 4 else "2",
        }
    if nodes > 1:
        node = rank // (ranks // nodes)
        environment |= {"NCCL_HOSTID": f"node{node}", "NCCL_SOCKET_IFNAME": "lo"}
    if nccl:
        environment["LD_PRELOAD"] = str(pathlib.Path(nccl).resolve())
    return environment


def _report(statuses: list[int], files: list[pathlib.Path], shown_lines: int) -> None:
    """The end of what every failed rank and rank 0 wrote."""
    for rank, (status, file) in enumerate(zip(statuses, files, strict=True)):
        lines = file.read_text(errors="replace").splitlines()
        count = 40 if status else shown_lines if rank == 0 else 0
        print(f"---- rank {rank}: status {status}")
        print("\n".join(lines[len(lines) - count :]))


@contextlib.contextmanager
def _mps() -> Iterator[dict[str, str]]:
    """Lets processes run on one GPU at the same time; the environment they need.

    A daemon that runs already, named by CUDA_MPS_PIPE_DIRECTORY, is used and left running.
    """
    running = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    if running and any(pathlib.Path(running).glob("*control*")):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        mine = {
            "CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe",
            "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log",
        }
        environment = {**os.environ, **mine}
        for path in mine.values():
            os.makedirs(path)
        control = "nvidia-cuda-mps-control"
        subprocess.run(
            [control, "-d"], env=environment, check=True, timeout=30, stdin=subprocess.DEVNULL
        )
        try:
            yield mine
        finally:
            subprocess.run([control], input=b"quit\n", env=environment, check=False, timeout=30)


if __name__ == "__main__":
    sys.exit(main())
