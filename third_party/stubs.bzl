"""Stand-ins for repositories that Bazel 4 would download, so that it works without a network.

Bazel 4 still has the C++ and Python rules built in; newer versions take them from the modules of
the same names (MODULE.bazel). BUILD files `load` them in every version.
"""

_RULES_CC = """
cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_proto_library = native.cc_proto_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
objc_library = native.objc_library
"""

_RULES_PYTHON = """
load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_binary = native.py_binary
py_library = native.py_library
py_runtime = native.py_runtime
py_runtime_pair = _py_runtime_pair
py_test = native.py_test
"""

_RULES_JAVA = """
java_binary = native.java_binary
java_import = native.java_import
java_library = native.java_library
java_proto_library = native.java_proto_library
java_runtime = native.java_runtime
java_toolchain = native.java_toolchain
"""

_COVERAGE = """
package(default_visibility = ["//visibility:public"])

# Coverage is not collected; the test runner only wants the labels to exist.
filegroup(name = "coverage_report_generator")

filegroup(name = "lcov_merger")
"""

def _stub_impl(ctx):
    for path, content in ctx.attr.files.items():
        ctx.file(path, content)

_stub = repository_rule(
    implementation = _stub_impl,
    attrs = {"files": attr.string_dict()},
)

def stubs():
    """Declares @rules_cc, @rules_java, @rules_python and @remote_coverage_tools."""
    _stub(name = "rules_cc", files = {
        "BUILD": "",
        "cc/BUILD": """
alias(
    name = "toolchain_type",
    actual = "@bazel_tools//tools/cpp:toolchain_type",
    visibility = ["//visibility:public"],
)
""",
        "cc/defs.bzl": _RULES_CC,
    })
    # Bazel's own packages load it, whatever is built.
    _stub(name = "rules_java", files = {
        "BUILD": "",
        "java/BUILD": "",
        "java/defs.bzl": _RULES_JAVA,
    })
    _stub(name = "rules_python", files = {
        "BUILD": "",
        "python/BUILD": "",
        "python/defs.bzl": _RULES_PYTHON,
    })
    _stub(name = "remote_coverage_tools", files = {"BUILD": _COVERAGE})
