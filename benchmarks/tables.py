"""Writes the tables of the documents from the recorded results: `python -m benchmarks.tables`.

A table stands between `<!-- benchmarks ROOM PATTERN -->` and `<!-- end -->` and shows the rows of
results/h200.json whose names match the pattern, all without one, and when they were measured; the
room `all` stands for a section per room. `--check` changes nothing and fails where a document is
out of date.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h200.json"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")

# What a row's rate is divided by: the same rate of the first of these that the run has.
_YARDSTICKS = {"gb_s": ("yardstick copy",), "tflops": ("yardstick bf16", "bf16 8192x8192x8192")}
_BLOCK = re.compile(r"(<!-- benchmarks (\w+)( [^\n]+?)? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(part: Mapping[str, Any], pattern: str) -> str:
    """A Markdown table of a room's rows; columns that would be empty are left out."""
    rows = part["rows"]
    if "compile_s" in next(iter(rows.values()), {}):
        return _startup_table(rows)
    marks = part.get("marks_us", {})
    lines: list[tuple[str, ...]] = [
        ("case", "µs", "GB/s", "TFLOPS", "launches", "of the yardstick", "mark, µs", "mark / µs")
    ]
    for name, row in rows.items():
        if re.search(pattern, name):
            us, mark = row["us"], marks.get(name)
            cells = [name, _short(us), row.get("gb_s", ""), row.get("tflops", "")]
            cells += [row["launches"] or "", _relative(row, rows)]
            cells += [_short(mark), f"{mark / us:.2f}"] if mark else ["", ""]
            lines.append(tuple(map(str, cells)))
    return _markdown(lines)


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _markdown(lines: list[tuple[str, ...]]) -> str:
    """The first line is the head, the first column the only one of words."""
    wanted = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    head, *body = ([line[i] for i in wanted] for line in lines)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *body))


def _section(part: Mapping[str, Any], pattern: str) -> str:
    """A room's table, and when and with what it was measured."""
    machine = part["machine"]
    measured = f"Measured {machine['date']}, {machine['gpu']}, JAX {machine['jax']}"
    if "ranks" in part:
        measured += f"; {part['ranks']} ranks on {part['on']}, {part['tokens']} tokens a rank"
        if "few_tokens" in part:
            measured += f", {part['few_tokens']} with low latency"
    if "host_us_per_call" in part.get("host", {}):
        measured += f"; a call costs the host {part['host']['host_us_per_call']:.1f} µs"
    return f"{table(part, pattern)}\n{measured}.\n"


def _startup_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the kernels of a room, median and largest."""
    lines: list[tuple[str, ...]] = [
        ("kernels of", "number", "compiling, s", "reading from the cache, ms", "loading, ms")
    ]
    for room, row in rows.items():
        pairs = [
            "{:.2f}, {:.2f}".format(*row[what]) for what in ("compile_s", "read_ms", "load_ms")
        ]
        lines.append((room, str(row["kernels"]), *pairs))
    return _markdown(lines)


def _relative(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The larger of both ratios: what bounds the case decides the yardstick."""
    ratios = []
    for unit, names in _YARDSTICKS.items():
        yardstick = next((rows[name] for name in names if name in rows), {})
        if row.get(unit) and yardstick.get(unit):
            ratios.append(row[unit] / yardstick[unit])
    return f"{max(ratios):.2f}" if ratios else ""


def fill(text: str, results: Mapping[str, Any]) -> str:
    """`text` with every table written anew; a room without results gets a sentence."""

    def block(match: re.Match[str]) -> str:
        begin, room, pattern, end = match.groups()
        if room == "all":
            parts = [f"## {name}\n\n{_section(part, '')}" for name, part in results.items()]
            return begin + "\n" + "\n".join(parts) + "\n" + end
        if room not in results:
            return f"{begin}Not measured yet.\n{end}"
        return f"{begin}\n{_section(results[room], (pattern or '').strip())}\n{end}"

    return _BLOCK.sub(block, text)


def main(arguments: list[str]) -> int:
    """0, or 1 where `--check` finds an outdated document."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    status = 0
    for document in DOCUMENTS:
        text = document.read_text()
        filled = fill(text, results)
        if filled == text:
            continue
        if "--check" in arguments:
            print(f"{document.relative_to(ROOT)}: out of date, run `python -m benchmarks.tables`")
            status = 1
        else:
            document.write_text(filled)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
