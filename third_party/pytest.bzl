"""A pytest file as a Bazel test."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest_test(name, src, deps, data = [], tags = [], size = "medium"):
    """Runs the tests of one file.

    Args:
      name: of the target.
      src: path of the file from the repository's root.
      deps: libraries it needs.
      data: files it reads.
      tags: of the target; `slow` ones are left out by `--test_tag_filters=-slow`.
      size: Bazel's size class, which sets the timeout.
    """
    py_test(
        name = name,
        size = size,
        srcs = ["//third_party:pytest_main.py", src],
        args = ["$(rootpath %s)" % src],
        data = data + [src],
        # XLA's thread pool for eight virtual devices, as in the Makefile.
        env = {"NPROC": "32"},
        main = "//third_party:pytest_main.py",
        tags = tags,
        deps = deps,
    )
