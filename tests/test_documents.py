"""The documents tell the truth: examples run, tables are those of the results, names exist."""

import importlib
import inspect
import pathlib
import re
import types
from typing import Any

import pytest

from benchmarks import tables
from jax_ds._core import settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(
    r"^### (\w+)\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.M | re.S
)
ROOMS = ("quantization", "deep_gemm", "flash_mla", "deep_ep", "moe", "models")


def test_an_example_per_system() -> None:
    assert [name for name, _ in EXAMPLES] == ["FlashMLA", "DeepGEMM", "DeepEP"]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_readme_example_runs(name: str, code: str) -> None:
    assert len(code.splitlines()) <= 26
    exec(compile(code, f"README.md, {name}", "exec"), {"__name__": "example"})


def test_tables_are_up_to_date() -> None:
    assert tables.main(["--check"]) == 0


MACHINE = {"gpu": "NVIDIA H200", "jax": "0.11.2", "date": "2026-01-02"}


def test_tables_show_matching_rows_beside_their_yardsticks() -> None:
    rows = {
        "yardstick copy": {"us": 1.0, "gb_s": 4000, "launches": 1},
        "yardstick bf16": {"us": 1.0, "tflops": 800, "launches": 1},
        "small": {"us": 2.25, "gb_s": 1000, "launches": 1},
        "product": {"us": 3.0, "gb_s": 100, "tflops": 1200, "launches": 2},
    }
    text = "a\n<!-- benchmarks room small|product -->\nold\n<!-- end -->\nb\n"
    everything = text.replace(" small|product", "")
    results = {"room": {"rows": rows, "machine": MACHINE}}
    assert tables.fill(everything, results).count("\n| ") == 2 + len(rows)
    lines = tables.fill(text, results).splitlines()
    assert "Measured 2026-01-02, NVIDIA H200, JAX 0.11.2." in lines
    assert "| small | 2.2 | 1000 |  | 1 | 0.25 |" in lines
    assert "| product | 3.0 | 100 | 1200 | 2 | 1.50 |" in lines
    assert (lines[0], lines[-1]) == ("a", "b")
    assert "old" not in lines
    assert not [line for line in lines if line.startswith("| yardstick")]


def test_tables_show_marks_and_leave_out_empty_columns() -> None:
    rows = {
        "bf16 8192x8192x8192": {"us": 1300.0, "tflops": 800, "launches": 0},
        "product": {"us": 4.0, "tflops": 1000, "launches": 0},
    }
    part = {"rows": rows, "marks_us": {"product": 5.0}, "machine": MACHINE}
    assert tables.table(part, "").splitlines() == [
        "| case | µs | TFLOPS | of the yardstick | mark, µs | mark / µs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| bf16 8192x8192x8192 | 1300 | 800 | 1.00 |  |  |",
        "| product | 4.0 | 1000 | 1.25 | 5.0 | 1.25 |",
    ]


def test_the_table_of_startup_times() -> None:
    row = {"kernels": 3, "compile_s": [0.5, 1.25], "read_ms": [2.0, 3.0], "load_ms": [0.1, 0.25]}
    text = "<!-- benchmarks startup -->\n<!-- end -->\n"
    filled = tables.fill(text, {"startup": {"rows": {"deep_gemm": row}, "machine": MACHINE}})
    assert "| deep_gemm | 3 | 0.50, 1.25 | 2.00, 3.00 | 0.10, 0.25 |" in filled.splitlines()


def _overview(name: str, value: Any) -> str:
    """The line of a public name: its signature but for `implementation`, and what it says first."""
    if isinstance(value, types.FunctionType):
        arguments: list[str] = []
        for p in inspect.signature(value).parameters.values():
            if p.kind == p.KEYWORD_ONLY and "*" not in arguments:
                arguments.append("*")
            default = getattr(p.default, "__name__", None) or repr(p.default)
            arguments.append(p.name + ("" if p.default is p.empty else f"={default}"))
        kept = [one for one in arguments if not one.startswith("implementation=")]
        name += "(" + ", ".join(kept[:-1] if kept[-1:] == ["*"] else kept) + ")"
    said, _, _ = (inspect.getdoc(value) or "").partition("\n\n")
    return f"- `{name}`: {' '.join(said.split())}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_overview_says_what_docstrings_say(room: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    section = text.split(f"## jax_ds.{room}\n")[1].split("\n## ")[0]
    lines = {name: line for line, name in re.findall(r"^(- `(\w+).*)$", section, re.M)}
    module = importlib.import_module(f"jax_ds.{room}")
    assert set(lines) == set(module.__all__)
    for name, line in lines.items():
        value = getattr(module, name)
        if isinstance(value, type | types.FunctionType):
            assert line == _overview(name, value)


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_documented(room: str) -> None:
    module = importlib.import_module(f"jax_ds.{room}")
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type | types.FunctionType):
            assert (value.__doc__ or "").strip(), f"{room}.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_argument_is_documented(room: str) -> None:
    module = importlib.import_module(f"jax_ds.{room}")
    for name in module.__all__:
        value = getattr(module, name)
        if not isinstance(value, types.FunctionType):
            continue
        signature = inspect.signature(value)
        _, _, after = (value.__doc__ or "").partition("Args:")
        listed, _, results = after.partition("Returns:")
        missing = set(signature.parameters) - set(re.findall(r"\w+", listed))
        assert not missing, f"{room}.{name}: {missing}"
        assert results or signature.return_annotation is None, f"{room}.{name}: Returns"


@pytest.mark.parametrize("room", ROOMS)
def test_every_attribute_is_documented(room: str) -> None:
    """Where a class lists its attributes, it lists all."""
    module = importlib.import_module(f"jax_ds.{room}")
    for name in module.__all__:
        value = getattr(module, name)
        fields = getattr(value, "__dataclass_fields__", getattr(value, "_fields", ()))
        _, _, listed = (value.__doc__ or "").partition("Attributes:")
        if listed:
            named = set(re.findall(r"\w+", listed))
            assert not set(fields) - named, name


def test_the_readme_has_every_setting() -> None:
    """The table of the module that reads them, word for word."""
    table = [line for line in (settings.__doc__ or "").splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "README.md").read_text()
    reader = (ROOT / "jax_ds" / "_core" / "settings.py").read_text()
    variables = set(re.findall(r'"(JAX_DS_\w+)"', reader))
    assert variables == set(re.findall(r"JAX_DS_\w+", "\n".join(table)))


def test_the_index_lists_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for document in (ROOT / "docs").glob("*.md"):
        assert document.name == "README.md" or f"]({document.name})" in index


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_flags_and_targets_exist() -> None:
    """Every `--flag` that is not another program's, and every `make target`."""
    folders = ("jax_ds", "benchmarks", "examples", "tests/gpu")
    sources = "".join(p.read_text() for f in folders for p in (ROOT / f).rglob("*.py"))
    known = set(re.findall(r'add_argument\(\s*"--([\w-]+)"|DEFINE_\w+\(\s*"(\w+)"', sources))
    flags = {flag for pair in known for flag in pair if flag}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = document.read_text()
        used = set(re.findall(r"--([a-z][\w-]*)", text)) - {"test_tag_filters"}  # Bazel's
        unknown = {flag for flag in used if not flag.startswith("xla_")} - flags
        unknown |= set(re.findall(r"`make ([a-z-]+)", text)) - targets
        assert not unknown, f"{document.name}: {unknown}"
