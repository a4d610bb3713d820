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

_COPY, _PRODUCT = "yardstick copy", "yardstick bf16"
_BLOCK = re.compile(r"(<!-- benchmarks (\w+)( [^\n]+?)? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: Mapping[str, Mapping[str, Any]], pattern: str) -> str:
    """A Markdown table; the last column relates a row to the run's own yardstick."""
    if "compile_s" in next(iter(rows.values()), {}):
        return _startup_table(rows)
    lines = [
        "| case | µs | GB/s | TFLOPS | launches | of the yardstick |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        if re.search(pattern, name):
            cells = [name, f"{row['us']:.1f}", row.get("gb_s", ""), row.get("tflops", "")]
            cells += [row["launches"], _relative(row, rows)]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _section(part: Mapping[str, Any], pattern: str) -> str:
    """A room's table, and when and with what it was measured."""
    machine = part["machine"]
    measured = f"Measured {machine['date']}, {machine['gpu']}, JAX {machine['jax']}."
    return f"{table(part['rows'], pattern)}\n{measured}\n"


def _startup_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the kernels of a room, median and largest."""
    lines = [
        "| kernels of | number | compiling, s | reading from the cache, ms | loading, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for room, row in rows.items():
        pairs = ["{}, {}".format(*row[what]) for what in ("compile_s", "read_ms", "load_ms")]
        lines.append("| " + " | ".join([room, str(row["kernels"]), *pairs]) + " |")
    return "\n".join(lines) + "\n"


def _relative(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What bounds the case decides the yardstick: the product where there are operations."""
    unit, yardstick = ("tflops", _PRODUCT) if row.get("tflops") else ("gb_s", _COPY)
    if not row.get(unit) or not rows.get(yardstick, {}).get(unit):
        return ""
    return f"{row[unit] / rows[yardstick][unit]:.2f}"


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
