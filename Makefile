# The two commands of the README. Each makes .venv with Python 3.11 or newer and installs what is missing.

PYTHON ?= python3
BIN := .venv/bin

# The solver's many small factorizations are done sooner by one BLAS thread than by several that spin beside XLA's own:
# 2.5 s against 7.0 s for 30 steps of 50 edits at key width 2048, on 2 cores, one run each.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test clean

# One malloc arena keeps the peak at 1.8 GiB, where glibc's arena for each thread took it to 2.2.
demo: .venv/.installed
	MALLOC_ARENA_MAX=1 $(BIN)/kedit demo $(ARGS)

# Tests compile far more than they compute: code that XLA does not optimise took 40 CPU-s where optimised took 84
# (tests/editing/test_session.py and test_algebra.py). Two processes, each held to its own share of the cores.
test: .venv/.installed-dev
	XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv build *.egg-info
