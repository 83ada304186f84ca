# The two commands of the README, and what they need. Everything is installed into .venv from requirements.txt, in one pass.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-compile test-compile-all lint clean

# XLA's temporary memory is new in every step; in pages of 2 MiB that costs a tenth less time (bench/results/README.md). Without glibc it means nothing.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: .venv/installed
	$(BIN)/python -m launch.quickstart --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not compile"

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not compile"

# Every kernel through the compilers of TPUs and of NVIDIA's GPUs, which need no such device; in an environment of their own, since JAX complains wherever it
# finds a library for TPUs and none in the machine. Its CUDA plugin comes without the libraries it would run on; of those it compiles with ptxas alone.
test-compile test-compile-all: export PATH := $(CURDIR)/.venv-compile/cuda:$(PATH)
test-compile: .venv-compile/installed
	.venv-compile/bin/python -m pytest -n 2 -m "compile and not slow" tests/compile

# And sizes between, and more whole train steps of DeepSeek-V3.2's shape: minutes each.
test-compile-all: .venv-compile/installed
	.venv-compile/bin/python -m pytest -n 2 -m compile tests/compile

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv-compile/installed: requirements.txt
	$(PYTHON) -m venv .venv-compile
	.venv-compile/bin/pip install --quiet --disable-pip-version-check -r requirements.txt "jax[tpu]"
	version=$$(.venv-compile/bin/python -c "import jax; print(jax.__version__)") && .venv-compile/bin/pip install --quiet --disable-pip-version-check --no-deps \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version "nvidia-cuda-nvcc>=13,<13.1"
	ln -sfn $$(ls -d $(CURDIR)/.venv-compile/lib/python3*/site-packages/nvidia/cu13/bin) .venv-compile/cuda
	@touch $@

clean:
	rm -rf .venv .venv-compile .jax_cache .pytest_cache .ruff_cache
