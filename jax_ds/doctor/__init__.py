"""`python -m jax_ds.doctor`: what will run natively on this machine, what not, and why.

    python -m jax_ds.doctor                             versions, native module, GPUs, cache
    python -m jax_ds.doctor --compile                   every kernel, for sm_90a, without a GPU
    python -m jax_ds.doctor --mesh node=2,gpu=8 --axis node,gpu --gpus-per-host 8
    python -m jax_ds.doctor --ranks 8                   a bring-up test: every link, one by one

`--compile` prints what each configuration needs; it fails if one does not compile, spills
registers, uses a stack frame, or if the assembler says that it serialised tensor-core instructions
or ignored a register hint.

`--mesh` says how expert parallelism over `--axis` travels on a mesh of this job's devices, or of
hosts with `--gpus-per-host` GPUs that need not be here: NVLink or network, kernels or portable, and
why.

`--ranks` starts as many processes here, each with one GPU (without a GPU, on the CPU), and lets
every pair exchange data: through XLA's collectives, and inside a host through the kernels. It
prints the rate and a verdict of every link. On several hosts, start it once for each GPU with
`--rank` and `--coordinator`, or with `--distributed` where jax.distributed knows the cluster.
"""

import argparse
from collections.abc import Sequence

from jax_ds.doctor import bringup, kernels, launch, mesh, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is asked for; 0 unless a problem was found."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rank is not None and None in (options.ranks, options.coordinator):
        parser.error("--rank: needs --ranks and --coordinator too")
    if options.compile:
        return kernels.compile_all(options.room, options.cached)
    if options.ranks is None and not options.distributed:
        if options.mesh is None:
            report.diagnose()
            return 0
        return mesh.describe(options)
    if options.rank is None and not options.distributed:
        return launch.start(options)
    bringup.join(options)
    return bringup.run(options) if options.mesh is None else mesh.describe(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_ds.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--compile", action="store_true", help="compile every kernel for sm_90a")
    parser.add_argument("--room", help="with --compile: only this room's kernels")
    parser.add_argument("--cached", action="store_true", help="with --compile: use the disk cache")
    group = parser.add_argument_group("the path of a mesh")
    group.add_argument("--mesh", metavar="NAME=N,...", help="names and sizes of its axes")
    group.add_argument("--axis", metavar="NAME[,NAME]", help="of the experts; else the last")
    group.add_argument("--gpus-per-host", type=int, metavar="N", help="of hosts that are not here")
    group.add_argument("--tokens", type=int, default=4096, help="of a rank, for the buffers' size")
    group.add_argument("--hidden", type=int, default=7168, help="likewise")
    group = parser.add_argument_group("bring-up")
    group.add_argument("--ranks", type=int, metavar="N", help="processes, one device each")
    group.add_argument("--rank", type=int, metavar="R", help="join as this one of them")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of rank 0, with --rank")
    group.add_argument("--distributed", action="store_true", help="join as the cluster says")
    group.add_argument("--device", type=int, default=0, help="GPU of this rank among the visible")
    group.add_argument("--mib", type=float, help="data of one message; 64, or 1 on the CPU")
    group.add_argument("--at-least", type=float, default=0.0, help="GB/s that a link must reach")
    group.add_argument("--timeout", type=float, default=60.0, help="seconds for each exchange")
    return parser
