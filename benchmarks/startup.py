"""What a kernel costs before it first runs: `python -m benchmarks.startup`.

Cold: NVRTC compiles it, a few kernels at a time as programs ask for them. Cached: another process
has; it is read from the disk, checked against its sources, and loaded on the GPU.
"""

import concurrent.futures
import os
import re
import statistics
import tempfile
from typing import Any

import jax

from benchmarks import timing

# Of a program's kernels about so many are compiled at once, by as many threads of XLA.
_AT_ONCE = 4


def _name(spec: Any) -> str:
    return " ".join([re.sub(r"\w+::", "", spec.entry), *spec.options])


def measure(module: Any) -> dict[str, dict[str, dict[str, float]]]:
    """{room: {kernel: seconds to compile, milliseconds to read and to load}}; the disk cache must
    be empty."""
    kernels = list(module.kernels())
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        reports = list(pool.map(lambda kernel: module.compile(kernel[1]), kernels))
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for (room, spec), report in zip(kernels, reports, strict=True):
        if report["cached"]:
            raise RuntimeError(f"{_name(spec)}: was in the cache before it was compiled")
        read, load = module.load(spec)
        rows.setdefault(room, {})[_name(spec)] = {
            "compile_s": round(report["seconds"], 3),
            "read_ms": round(1e3 * read, 2),
            "load_ms": round(1e3 * load, 2),
        }
    return rows


def summary(kernels: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Median and largest of a room's kernels."""
    result: dict[str, Any] = {"kernels": len(kernels)}
    for what in ("compile_s", "read_ms", "load_ms"):
        values = [row[what] for row in kernels.values()]
        result[what] = [round(statistics.median(values), 3), max(values)]
    return result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Before anything reads the settings.
        os.environ["JAX_DS_CACHE_DIR"] = folder
        from jax_ds._runtime import native

        module = native.module()
        # As in a program, where XLA keeps the driver's context: making one takes longer.
        jax.block_until_ready(jax.numpy.zeros(1))
        module.load(module.kernels()[0][1])
        for file in os.scandir(os.path.join(folder, "kernels")):
            os.remove(file)
        rooms = measure(module)
    rows = {room: summary(kernels) for room, kernels in sorted(rooms.items())}
    for room, kernels in sorted(rooms.items()):
        for name, row in kernels.items():
            print(
                f"{row['compile_s']:7.2f} s {row['read_ms']:7.2f} {row['load_ms']:7.2f} ms  "
                f"{room}: {name}"
            )
    for room, row in rows.items():
        print(room, row)
    timing.store("startup", {"rows": rows})


if __name__ == "__main__":
    main()
