"""Entry of every Bazel test target: runs pytest on the file it is given.

Bazel runs it in a folder that mirrors the repository; results go to Bazel's log.
"""

import os
import sys

import pytest

if __name__ == "__main__":
    cache = os.path.join(os.environ.get("TEST_TMPDIR", "."), "cache")
    os.environ.setdefault("JAX_DS_CACHE_DIR", cache)
    os.environ.setdefault("HOME", cache)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", *sys.argv[1:]]))
