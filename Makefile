# What there is to do here; `make` alone lists it. Everything happens in .venv, build/ and .lab/ of this folder.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python >= 3.10 of this machine. Another one: make setup PYTHON=/path/to/python3
PYTHON ?= $(shell for one in python3 python3.13 python3.12 python3.11 python3.10; do \
    $$one -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$one && break; done)
# More options for pip, for example: make setup PIP_OPTIONS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_OPTIONS ?=
# For `make image`; --help of `launcher image build` lists the options.
FLAVOUR ?= cuda
IMAGE_OPTIONS ?=
ONLY_BUILT ?=
# More options for pytest, for example: make test TESTS=tests/lab PYTEST_OPTIONS='-x -k kill'
TESTS ?= tests
PYTEST_OPTIONS ?=
DEMO_STEPS ?= 40
# For `make bench`, for example: BENCH_OPTIONS='--pairs 9'
BENCH_OPTIONS ?=

PY := .venv/bin/python
LAUNCHER := .venv/bin/launcher
PYTEST := $(PY) -m pytest
STAMP := .venv/.launcher-setup
DEMO := $(CURDIR)/build/demo
# Quick tests that need neither Docker nor sshd nor torch.
QUICK := $(wildcard tests/pure tests/inside tests/docs)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(STAMP) ## Create .venv with the launcher, the local engine's torch and the tools

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	    printf 'setup: there is no Python >= 3.10\n  next: apt-get install python3 python3-venv, or make setup PYTHON=/path/to/python3\n' >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    printf 'setup: %s cannot make virtual environments\n  next: apt-get install python3-venv\n' "$(PYTHON)" >&2; exit 1; fi
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m venv --clear .venv; fi
	$(PY) -m pip install $(PIP_OPTIONS) --editable '.[local,dev]'
	@touch $@

# A home of its own: the demo meets nobody's clusters, keys or containers.
.PHONY: demo
demo: setup ## Train, save and re-load a small GPT on this machine, without SSH and Docker
	@mkdir -p '$(DEMO)'; export HOME='$(DEMO)' LAUNCHER_STATE='$(DEMO)/state' PATH="$$PWD/.venv/bin:$$PATH"; \
	tell() { printf '\n$$ %s\n' "$$*"; "$$@"; }; \
	tell launcher up examples/local.yaml; \
	trap 'tell launcher down -c examples/local.yaml' EXIT; \
	tell launcher run -c examples/local.yaml --stage 3 --port auto \
	    examples/train.py --steps $(DEMO_STEPS) --log-every 5; \
	printf '\nthe model: %s\n' "$$(ls -t '$(DEMO)'/.launcher/local/local/checkpoints/*/final/model.safetensors | head -n 1)"

.PHONY: test
test: setup ## Run all tests; sshd and a Docker engine are needed (.ci/machine gets them where it may)
	@without=(); if ! nvidia-smi -L >/dev/null 2>&1; then without=(-m 'not gpu'); fi; \
	.ci/machine $(PYTEST) $(TESTS) "$${without[@]}" $(PYTEST_OPTIONS)

.PHONY: matrix
matrix: setup ## Train every ZeRO stage, offload, precision and way on three nodes (about twenty minutes)
	@LAUNCHER_TEST_MATRIX=all .ci/machine $(PYTEST) tests/lab/test_matrix.py $(PYTEST_OPTIONS)

.PHONY: faults
faults: setup ## Try every fault on three nodes in containers, and print a table of what came of it
	@LAUNCHER_TEST_FAULTS=all .ci/machine $(PYTEST) tests/lab/test_faults.py $(PYTEST_OPTIONS)

.PHONY: lint
lint: setup ## Lint, format, types, storeys; writes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

.PHONY: check
check: lint ## The same, and the quick tests
	$(PYTEST) $(QUICK) -m 'not oracle' -q

.PHONY: fix
fix: setup ## Mend what ruff can mend; writes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: golden
golden: setup ## Write the golden files anew; look at the difference before you commit it
	LAUNCHER_GOLDEN=write $(PYTEST) tests/pure -q
	@git diff --stat -- tests

.PHONY: image
image: setup ## Build the image: make image FLAVOUR=cuda|cpu IMAGE_OPTIONS='--wheels wheels'
	$(LAUNCHER) image build --flavour $(FLAVOUR) $(IMAGE_OPTIONS)

.PHONY: lock
lock: setup ## Pin all packages of the image anew, from docker/requirements.txt; look at the difference
	PATH="$$PWD/.venv/bin:$$PATH" $(PY) docker/lock.py

.PHONY: lab
lab: setup ## Start three nodes (sshd and dockerd each) in containers; prints their inventory
	@. .ci/site.sh; $(PY) -m tests.testbed.lab up

.PHONY: lab-down
lab-down: setup ## Remove these nodes with all that is on them
	@$(PY) -m tests.testbed.lab down

# The same recipe as the laboratory's inventory, so that one image serves both. ONLY_BUILT=yes: not if it must be built.
.PHONY: smoke
smoke: FLAVOUR = cpu
smoke: setup ## Train a few steps on CPUs in one container, by plain docker run; FLAVOUR=cuda: in the CUDA image
	@.ci/machine bash -euo pipefail -c '\
	    build() { $(LAUNCHER) image build --flavour $(FLAVOUR) \
	        $${LAUNCHER_TEST_WHEELS:+--wheels "$$LAUNCHER_TEST_WHEELS"} \
	        $${LAUNCHER_TEST_CA_BUNDLE:+--ca-bundle "$$LAUNCHER_TEST_CA_BUNDLE"} \
	        $${LAUNCHER_TEST_APT_MIRROR:+--apt-mirror "$$LAUNCHER_TEST_APT_MIRROR"} \
	        $${LAUNCHER_TEST_BASE:+--base "$$LAUNCHER_TEST_BASE"} "$$@"; }; \
	    if [ -n "$(ONLY_BUILT)" ]; then \
	        image=$$(build --dry-run 2>/dev/null); \
	        docker image inspect "$$image" >/dev/null 2>&1 || { echo "smoke: $$image is not built here"; exit 0; }; \
	    fi; \
	    image=$$(build); \
	    $(PY) -m tests.testbed.smoke "$$image"'

# Three nodes of its own, gone at the end.
.PHONY: bench
bench: setup ## Measure: from `launcher run` to the first line of the job, beside a script by hand
	@.ci/machine bash -euo pipefail -c '\
	    trap "$(PY) -m tests.testbed.lab down --prefix bench" EXIT; \
	    $(PY) -m tests.benchmarks.launch --prefix bench $(BENCH_OPTIONS)'

bench-export: setup ; $(PY) -m tests.benchmarks.export $(BENCH_OPTIONS) ## Measure: exporting a checkpoint, beside DeepSpeed's zero_to_fp32
