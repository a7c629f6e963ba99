# `make` lists the targets. Everything runs in .venv, which `make setup` fills.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))

RECIPE ?= recipes/gpt_tiny_zero2.yaml
# All GPUs where there are some, else two processes on the CPU.
RANKS ?= $(shell n=$$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true; echo $$(( n > 0 ? n : 2 )))
ARGS ?=
PYTEST_ARGS ?=
# A test waits more than it computes: for ranks to start, for daemons, for time limits.
WORKERS ?= 3

LINT := ruff format --check .; ruff check .; mypy .

# First on the PATH: the `deepspeed` launcher starts ranks with the python that it finds there, and
# the compiler's ninja lies there too. A virtual environment that is active must not shine through.
export PATH := $(ROOT)/.venv/bin:$(PATH)
# Nor may each process compile all of the project's modules again, as PYTHONDONTWRITEBYTECODE has it.
unexport PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## List the targets
	@echo "Targets (RECIPE=$(RECIPE), RANKS=$(RANKS)):"
	@grep -hE '^[a-z-]+:.*## ' $(ROOT)/Makefile | sed -E 's/^([a-z-]+):.*## /  \1|/' | column -t -s '|' \
		2>/dev/null || grep -hE '^[a-z-]+:.*## ' $(ROOT)/Makefile

.PHONY: setup
setup: ## Make .venv with the pinned dependencies
	@bash scripts/setup.sh

.PHONY: train
train: setup ## Train RECIPE on RANKS GPUs (CPU processes where there is no GPU); ARGS="--set train.steps=30"
	@deepspeed --log_level warning --num_gpus $(RANKS) launch/train.py --config $(RECIPE) $(ARGS)

.PHONY: setup-test
setup-test:
	@bash scripts/setup.sh test

# DeepSpeed's C++ ops are built beside the rest of the set-up, lint and the tests that do without; a test
# that needs them waits.
# The build is a process group of its own (set -m), to be ended with its compilers where a check fails.
.PHONY: test test-all
test: MARKS = not gpu and not matrix
test: ## Check format, lint and types, and run the tests: a representative of each kind (PYTEST_ARGS)
test-all: MARKS = not gpu
test-all: ## The same with the whole matrix of cases
test test-all: setup
	@log=$$(mktemp); set -m; python scripts/build_ops.py >"$$log" 2>&1 & ops=$$!; set +m; \
	trap 'kill -- -$$ops 2>/dev/null || true; rm -f "$$log"' EXIT; \
	bash scripts/setup.sh test; \
	$(LINT); \
	code=0; \
	python -m pytest -m "$(MARKS)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) || code=$$?; \
	wait $$ops || { cat "$$log"; exit 1; }; \
	exit $$code

.PHONY: test-gpu
test-gpu: setup-test ## Run the tests that need GPUs
	@DS_ACCELERATOR=cuda python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

.PHONY: ops
ops: setup-test ## Build DeepSpeed's C++ ops for the CPU ahead of time
	@python scripts/build_ops.py

.PHONY: lint
lint: setup-test ## Check format, lint and types
	@$(LINT)

.PHONY: format
format: setup-test ## Put the code into its format
	@ruff format .
	@ruff check --fix .

.PHONY: clean
clean: ## Remove .venv, built ops and caches; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
