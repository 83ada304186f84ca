# Everything is installed into .venv, in one pass, from requirements.txt and pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
# The newest Python that the machine has, for `make test-newest`.
NEWEST ?= $(shell for python in python3.13 "$$HOME"/.pyenv/versions/3.13.*/bin/python3.13; do \
    $$python -c '' 2>/dev/null && echo $$python && break; done)

.PHONY: quickstart test test-fast test-all test-newest test-newest-all test-compile \
    test-compile-all lint format clean

# XLA allocates its temporary memory anew in every step; in pages of 2 MiB that takes a tenth less
# time (bench/results/README.md). Without glibc the variable means nothing.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: .venv/installed
	$(BIN)/python -m launch.quickstart --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not compile"

# No whole commands, public checkpoints, interpreted kernels or meshes.
LIGHT := not slow and not compile and not command and not golden and not kernel and not mesh

# Nor what compiles for long: while you work.
test-fast: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(LIGHT) and not heavy"

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not compile"

# On the newest Python, and so on the newest jax, where the machine has that Python.
test-newest: AMONG := $(LIGHT) and not heavy
test-newest-all: AMONG := $(LIGHT)
test-newest test-newest-all:
	@if [ -z "$(NEWEST)" ]; then echo "test-newest: skipped, as there is no python3.13 here"; else \
	    $(MAKE) .venv-newest/installed && .venv-newest/bin/python -m pytest -n 2 --dist worksteal \
	        -m "$(AMONG)"; fi

# Every kernel goes through the compilers of TPUs and of NVIDIA's GPUs, which need no such device.
# They have an environment of their own, since JAX complains wherever it finds a library for TPUs
# and none in the machine. Its CUDA plugin comes without the libraries that it would run on; of
# those, compiling takes ptxas alone.
test-compile test-compile-all: export PATH := $(CURDIR)/.venv-compile/cuda:$(PATH)
test-compile: .venv-compile/installed
	.venv-compile/bin/python -m pytest -n 2 -m "compile and not slow" tests/compile

# Sizes between, and more whole train steps of DeepSeek-V3.2's shape, take minutes each.
test-compile-all: .venv-compile/installed
	.venv-compile/bin/python -m pytest -n 2 -m compile tests/compile

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

format: .venv/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/lint: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[lint]"
	@touch $@

.venv-newest/installed: requirements.txt pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv-compile/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/pip install --quiet --disable-pip-version-check -e ".[tpu]"
	version=$$(.venv-compile/bin/python -c "import jax; print(jax.__version__)") && \
	    .venv-compile/bin/pip install --quiet --disable-pip-version-check --no-deps \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version "nvidia-cuda-nvcc>=13,<13.1"
	ln -sfn $$(ls -d $(CURDIR)/.venv-compile/lib/python3*/site-packages/nvidia/cu13/bin) .venv-compile/cuda
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-compile .jax_cache .pytest_cache .ruff_cache *.egg-info
