"""The local interpreter as a module extension, for Bazel 7 and later."""

load(":local_python.bzl", "local_python")

def _local_python_extension_impl(_ctx):
    local_python(name = "local_python", toolchain_type = "@rules_python//python:toolchain_type")

local_python_extension = module_extension(implementation = _local_python_extension_impl)
