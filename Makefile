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

# Every kernel through the TPU's own compiler, which needs no TPU; in an environment of its own, since JAX complains wherever it finds that compiler and no TPU.
test-compile: .venv-compile/installed
	.venv-compile/bin/python -m pytest -n 2 -m "compile and not slow" tests/compile

# And sizes between, and whole train steps of DeepSeek-V3.2's shape, which take the compiler some minutes each.
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
	@touch $@

clean:
	rm -rf .venv .venv-compile .jax_cache .pytest_cache .ruff_cache
