# Everything runs from a fresh clone; nothing needs to be activated. `make help` lists the targets.
#
# The first call makes .venv inside the clone: the oldest supported jax, the one whose headers the
# native module is built against, and the tools. The module is built into jax_ds/, so programs run
# from the sources; kernels are read from ffi/ and compiled when they are first used.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# A Python of version 3.12 or newer that can make environments; `make PYTHON=...` overrides it.
PYTHON ?=
VENV := .venv
NEWEST := .venv-newest
PY := $(VENV)/bin/python
# XLA sizes its CPU thread pool by it; eight virtual devices need more threads than a small machine
# has cores, or collectives can deadlock.
export NPROC ?= 32
PYTEST := -m pytest -q
# The CPU tests are about the CPU backend on machines with a GPU too.
ON_CPU := JAX_PLATFORMS=cpu

CPP_SOURCES := $(shell find ffi tests -name '*.cc' -o -name '*.h' -o -name '*.cuh')
HOST_SOURCES := $(shell find ffi \( -name '*.cc' -o -name '*.h' \))
NATIVE := jax_ds/_jax_ds.abi3.so

define find_python
for candidate in $(PYTHON) python3.12 python3 python3.13 python3.14 python; do \
  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' \
      >/dev/null 2>&1; then echo "$$candidate"; exit 0; fi; \
done; \
echo 'jax_ds needs Python 3.12 or newer with the venv module: none of $(PYTHON) python3.12' \
  'python3 python3.13 python3.14 is one; install it or say make PYTHON=/path/to/python3.12' >&2; \
exit 1
endef

# Requirements of pyproject.toml, one a line. $(1): "pinned" or "newest"; $(2): extras.
define requirements
import re, sys, tomllib
kind, *extras = sys.argv[1:]
project = tomllib.load(open("pyproject.toml", "rb"))
lines = list(project["project"]["dependencies"])
for extra in extras:
    lines += project["project"]["optional-dependencies"][extra]
if kind == "pinned":
    pins = [line for line in project["build-system"]["requires"] if line.startswith("jaxlib==")]
    lines += pins + [re.sub("^jaxlib", "jax", pin) for pin in pins]
print("\n".join(lines))
endef
export requirements

GPU_EXTRA = $(shell if ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; then echo cuda13; fi)

.PHONY: help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 27

$(VENV)/.installed: pyproject.toml
	@python=$$($(find_python)); "$$python" -m venv $(VENV)
	$(PY) -c "$$requirements" pinned demo test dev $(GPU_EXTRA) > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	echo "$(CURDIR)" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/jax_ds_sources.pth"
	touch $@

$(NEWEST)/.installed: pyproject.toml
	@python=$$($(find_python)); "$$python" -m venv $(NEWEST)
	$(NEWEST)/bin/python -c "$$requirements" newest demo test $(GPU_EXTRA) > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(NEWEST)/requirements.txt
	touch $@

# Headers come from the environment's jaxlib, the pinned one.
build/native/build.ninja: $(VENV)/.installed CMakeLists.txt
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/native -G Ninja --log-level=WARNING \
	  -DCMAKE_BUILD_TYPE=Release -DJAX_DS_BUILD_TESTS=ON -DPython_EXECUTABLE="$(CURDIR)/$(PY)"
	touch $@

# Ninja has jobs of its own; it cannot join make's (MAKEFLAGS) from a recipe.
# Moved into place, because a running program may have the old module mapped.
$(NATIVE): build/native/build.ninja $(HOST_SOURCES)
	MAKEFLAGS= PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/native --target _jax_ds
	cp build/native/_jax_ds.abi3.so $@.new
	mv $@.new $@

.PHONY: setup
setup: $(VENV)/.installed $(NATIVE)  ## make .venv and build the native module

.PHONY: demo
demo: setup  ## train a small DeepSeek-V3 on text and decode from it; ARGS="--steps 50 --precision bf16"
	$(PY) examples/train_deepseek_v3.py $(ARGS)

# Two at a time with `make -j2 -O test`.
.PHONY: test
test: test-oldest test-newest test-native  ## all CPU tests: pytest on the oldest and newest jax, and native ones

.PHONY: test-oldest
test-oldest: setup  ## pytest on the oldest supported jax
	$(ON_CPU) $(PY) $(PYTEST) $(ARGS)

.PHONY: test-fast
test-fast: setup  ## pytest without the tests that start processes or train
	$(ON_CPU) $(PY) $(PYTEST) -m "not gpu and not multigpu and not slow" $(ARGS)

.PHONY: test-native
test-native: $(NATIVE)  ## C++ unit tests of what runs on the host
	MAKEFLAGS= PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/native
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ctest --test-dir build/native --output-on-failure

# The contract of every room and what leans on the newest corners of jax: varying types, the choice
# by platform, streams, transformations, the layer and a training step. Messages, properties and
# host code are the same on every release.
ON_NEWEST := $(wildcard tests/*/test_contract.py) tests/core tests/test_lowering.py \
  tests/test_x64.py tests/deep_ep/test_transforms.py tests/moe/test_moe_layer.py \
  tests/models/test_training.py
.PHONY: test-newest
test-newest: setup $(NEWEST)/.installed  ## what depends on jax, on its newest release
	$(ON_CPU) $(NEWEST)/bin/python $(PYTEST) -m "not gpu and not multigpu and not slow" \
	  $(ON_NEWEST) $(ARGS)

.PHONY: format
format: $(VENV)/.installed  ## rewrite Python and C++ in the house format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

.PHONY: lint
lint: $(VENV)/.installed  ## formats, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

.PHONY: doctor
doctor: setup  ## what this machine has, what will run natively and why; ARGS=--compile compiles all kernels
	$(PY) -m jax_ds.doctor $(ARGS)

.PHONY: gpu-test
gpu-test: setup  ## the tests that need a Hopper GPU; writes tests/gpu/results.json; NCCL=/path/to/libnccl.so.2
	$(PY) tests/gpu/run.py $(if $(NCCL),--nccl $(NCCL)) $(ARGS)

.PHONY: gpu-sanitize
gpu-sanitize: setup  ## small calls of all kernels under compute-sanitizer; into the same file
	$(PY) tests/gpu/sanitize.py $(if $(NCCL),--nccl $(NCCL)) $(ARGS)

RANKS ?= 8
NODES ?= 1
NCCL ?=
.PHONY: gpu-test-multirank
gpu-test-multirank: setup  ## tests with RANKS=8 processes [NODES=2] on the GPUs there are; NCCL=/path/to/libnccl.so.2
	$(PY) tests/gpu/multirank.py --ranks $(RANKS) --nodes $(NODES) $(if $(NCCL),--nccl $(NCCL)) -- $(ARGS)

.PHONY: bench
bench: setup  ## all benchmarks, on a GPU machine; writes benchmarks/results/ and the documents' tables
	$(PY) -m benchmarks $(ARGS)
	$(PY) -m benchmarks.tables

.PHONY: wheel
wheel: $(VENV)/.installed  ## dist/jax_ds-*.whl, built in an environment of its own
	rm -f dist/jax_ds-*.whl
	$(PY) -m pip wheel --disable-pip-version-check --no-deps -w dist .

.PHONY: bazel
bazel: $(VENV)/.installed  ## the same build and tests through Bazel
	JAX_DS_PYTHON="$(CURDIR)/$(PY)" bazel build //...
	JAX_DS_PYTHON="$(CURDIR)/$(PY)" bazel test --test_tag_filters=-slow //...

.PHONY: clean
clean:  ## remove what the other targets made, environments too
	rm -rf $(VENV) $(NEWEST) build dist demo-out $(NATIVE) .pytest_cache .mypy_cache .ruff_cache
