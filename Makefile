# The two commands of the README. Each makes .venv with Python 3.11 or newer and installs what is missing.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

# BLAS threads that are idle sleep after 2^14 cycles; by default they spin for 2^26, 20 ms or so, on cores that XLA needs (the
# README has times). One malloc arena keeps the peak at 1.6 GiB; glibc's arena for each thread took 0.4 more.
demo: .venv/.installed
	OPENBLAS_THREAD_TIMEOUT=$${OPENBLAS_THREAD_TIMEOUT:-14} MALLOC_ARENA_MAX=1 $(BIN)/kedit demo $(ARGS)

# Tests compile far more than they compute: code that XLA does not optimise took 40 CPU-s where optimised took 84
# (tests/editing/test_session.py and test_algebra.py). Two processes, each held to its own share of the cores, with one BLAS
# thread each.
test: .venv/.installed-dev
	OPENBLAS_NUM_THREADS=1 XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

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
