"""Runs the benchmarks of all rooms, or of those named: `python -m benchmarks [ROOM ...]`.

Each is a process of its own, so that one's memory is free for the next.
"""

import pathlib
import subprocess
import sys

_SHARED = {"__init__", "__main__", "overlap", "ranks", "tables", "timing"}


def main(names: list[str]) -> int:
    """The number of benchmarks that failed."""
    folder = pathlib.Path(__file__).resolve().parent
    known = sorted(file.stem for file in folder.glob("*.py") if file.stem not in _SHARED)
    if unknown := sorted(set(names) - set(known)):
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    failures = 0
    for name in names or known:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        failures += subprocess.run(command, cwd=folder.parent).returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
