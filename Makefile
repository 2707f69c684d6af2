# make quickstart     the whole path on a real small model: about ten minutes on two cores (STEPS=8 shortens training)
# make test           the tests
# make check          lint, format and types
# make test-slow      full sweeps, minutes each
# make test-cluster   real hosts, Slurm, images
# make soak           short runs under random faults, an hour long (MINUTES=5 SEED=1)
# make format         rewrite the code in the project's format
# make clean          remove what these commands made: .venv, work/quickstart, caches
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := llamapro data_tools launch
STEPS ?=
PYTEST_ARGUMENTS ?=
MINUTES ?= 60
SEED ?=

.PHONY: help install check format test test-slow test-cluster soak quickstart clean

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(INSTALLED)

# DeepSpeed is a source distribution whose build looks at the torch that is already there, so torch goes first; its
# kernels are built on first use. pip reads its own settings, so an index or wheel folder of the machine is honoured.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older; name one: make PYTHON=python3.11 …" >&2; exit 2; }
	@echo "installing into .venv: PyTorch, DeepSpeed and the rest of constraints.txt"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --constraint constraints.txt \
	  torch setuptools wheel ninja numpy packaging psutil py-cpuinfo
	@DS_BUILD_OPS=0 $(BIN)/pip install -qq --no-build-isolation --constraint constraints.txt \
	  --editable '.[dev]'
	@rm -rf .mypy_cache  # it would remember what was not installed
	@touch $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not cluster and not gpu" $(PYTEST_ARGUMENTS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow" $(PYTEST_ARGUMENTS)

# pytest ends with 5 when nothing is collected.
test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m "cluster" $(PYTEST_ARGUMENTS) || test $$? -eq 5

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

quickstart: $(INSTALLED)
	$(BIN)/python -m launch.quickstart $(if $(STEPS),--steps $(STEPS))

clean:
	rm -rf .venv build dist work/quickstart *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
