"""What Bazel takes from a Python interpreter of this machine; nothing is downloaded.

The interpreter is $JAX_DS_PYTHON, else .venv/bin/python of this repository (made by `make setup`),
else python3.12 or python3 of the path. It must have nanobind, jaxlib and, for tests, the rest of
pyproject.toml's requirements. The repository offers

  :python_headers  Python.h
  :nanobind        nanobind, compiled against Python's stable ABI
  :xla_ffi         jaxlib's headers of the FFI
  :toolchain       the interpreter itself, for py_test
"""

_PROBE = """
import os, sys, sysconfig
assert sys.version_info >= (3, 12), "Python 3.12 or newer is needed, this is " + sys.version
import jaxlib, nanobind
print(sysconfig.get_path("include"))
print(os.path.dirname(nanobind.__file__))
print(os.path.join(os.path.dirname(jaxlib.__file__), "include"))
"""

_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python_headers",
    hdrs = glob(["python/**/*.h"]),
    # Python 3.12's stable ABI: one module for every later version.
    defines = ["Py_LIMITED_API=0x030C0000"],
    includes = ["python"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob(["nanobind/include/**/*.h"]),
    copts = ["-std=c++17", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"],
    includes = ["nanobind/include"],
    linkstatic = True,
    local_defines = ["NB_BUILD", "NB_COMPACT_ASSERTIONS"],
    textual_hdrs = glob(
        ["nanobind/src/*.cpp", "nanobind/src/*.h"],
        exclude = ["nanobind/src/nb_combined.cpp"],
    ),
    deps = [":python_headers", ":robin_map"],
)

cc_library(
    name = "robin_map",
    hdrs = glob(["nanobind/ext/robin_map/include/**/*.h"]),
    includes = ["nanobind/ext/robin_map/include"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["xla_ffi/**/*.h"]),
    includes = ["xla_ffi"],
)

py_runtime(
    name = "runtime",
    interpreter_path = "{interpreter}",
    python_version = "PY3",
)

py_runtime_pair(
    name = "runtimes",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtimes",
    toolchain_type = "{toolchain_type}",
)
"""

def _find_interpreter(ctx):
    given = ctx.os.environ.get("JAX_DS_PYTHON")
    if given:
        return ctx.path(given)
    venv = ctx.path(Label("//:BUILD")).dirname.get_child(".venv").get_child("bin").get_child("python")
    return venv if venv.exists else ctx.which("python3.12") or ctx.which("python3")

def _local_python_impl(ctx):
    interpreter = _find_interpreter(ctx)
    if not interpreter:
        fail("no Python found: set JAX_DS_PYTHON to an interpreter with jaxlib and nanobind")
    probe = ctx.execute([interpreter, "-c", _PROBE])
    if probe.return_code:
        fail("%s cannot build jax_ds, set JAX_DS_PYTHON to one that can (`make setup` makes one):\n%s" %
             (interpreter, probe.stderr))
    for name, path in zip(["python", "nanobind", "xla_ffi"], probe.stdout.splitlines()):
        ctx.symlink(path, name)
    ctx.file("BUILD", _BUILD.format(
        interpreter = interpreter,
        toolchain_type = ctx.attr.toolchain_type,
    ))

local_python = repository_rule(
    implementation = _local_python_impl,
    attrs = {"toolchain_type": attr.string(mandatory = True)},
    environ = ["JAX_DS_PYTHON", "PATH"],
    local = True,
)
