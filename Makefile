PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Bytecode is kept even where the environment says otherwise: each worker, and each process that a
# test starts, would compile everything again
RUN_TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST := $(RUN_TESTS) --numprocesses auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup lint types test test-full test-wheel test-slow test-gpu test-newest test-oldest \
    docs demo bench benchmarks bench-gpu

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv and install Tritter into it; repeated when versions change

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy on tritter/ and train.py
	$(BIN)/mypy

test: setup ## the quick tests
	$(PYTEST)

test-full: setup ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-wheel: setup ## the wheel, built, installed and used outside the checkout
	$(RUN_TESTS) -m slow tests/test_wheel.py

test-slow: setup ## the tests that train for minutes
	$(RUN_TESTS) -m slow

test-gpu: setup ## the same jobs on one GPU and on the CPU; minutes
	$(RUN_TESTS) -m gpu tests/test_gpu.py -rs --durations 5

test-newest: ## the quick tests with the newest versions that pyproject.toml admits, in .venv-newest
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --quiet -e '.[dev]'
	$(subst $(BIN),.venv-newest/bin,$(PYTEST))

# Not torch: an old build may not exist for this Python. The dependencies of these stay newer
test-oldest: ## expansions, checkpoints, LoRA experts, trainers with the oldest series of each, in .venv-oldest
	$(PYTHON) -m venv --clear .venv-oldest
	sed -nE '/^dependencies/,/^\]/s/^ *"([a-z_-]+)>=([0-9.]+)".*/\1==\2.*/p' pyproject.toml \
	    | grep -v '^torch==' > .venv-oldest/pins.txt
	.venv-oldest/bin/python -m pip install --quiet --quiet -c .venv-oldest/pins.txt -e '.[trl]' \
	    pytest pytest-xdist hypothesis
	$(subst $(BIN),.venv-oldest/bin,$(PYTEST)) tests/core/expansions tests/checkpoints \
	    tests/methods/experts tests/integrations

docs: setup ## the pages of docs/ as a site in outputs/site; dead links and anchors are errors
	$(BIN)/mkdocs build

demo: setup ## the main job: grow a small model on this Python's own text
	$(BIN)/python train.py

bench: setup ## every expansion with every protection on the main job: 12 runs, one table
	$(BIN)/python train.py -m experiment=ablation

benchmarks: setup ## every benchmark beside its peers, tables in outputs/benchmarks; about an hour
	$(BIN)/python experiments/benchmarks/every.py

bench-gpu: setup ## steps on one GPU beside a bare loop, HF Trainer and PEFT; one table
	$(BIN)/python experiments/benchmarks/gpu.py --output experiments/benchmarks/gpu.csv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Tritter needs Python 3.11 or newer; try: make PYTHON=python3.12 setup")'
	@echo 'Installing Tritter and its packages into $(VENV), which takes some minutes the first time.'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check \
	    -c constraints.txt -e '.[dev]'
	@touch $@
