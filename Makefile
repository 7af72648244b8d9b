# `make` or `make help` lists the targets. All files go to .venv, data/ and outputs/ in this checkout; Horovod wheels go to
# ~/.cache/tsm-at-scale.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
export PYTHON
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# A stamp's name contains a hash of the pinned versions, their files' hashes and the project's requirements: a change of any installs
# again, and a second call does nothing. The tool settings in pyproject.toml are not hashed.
PINS := $(shell { cat constraints.txt requirements.lock; sed '/^\[tool\./,$$d' pyproject.toml; } | sha256sum | cut -c1-16)
BASE := $(VENV)/.base-$(PINS)
DEV := $(VENV)/.dev-$(PINS)
# The same for the packages of web/, which package-lock.json pins, with their hashes.
WEB := web/node_modules/.installed-$(shell sha256sum web/package-lock.json | cut -c1-16)

# Options of `make smoke`: make smoke BACKEND=horovod ARGS='seed=1'
BACKEND ?= torch
EXPERIMENT ?= smoke
# Two processes share the cores.
HALF_THE_CORES := $(shell n=$$(( $$(nproc) / 2 )); echo $$(( n > 0 ? n : 1 )))

PYTEST := $(BIN)/python -m pytest
# Tests of whole jobs, launchers and clusters. They wait for much of their time, while all other tests compute.
JOBS := tests/jobs tests/launch tests/slurm tests/soak tests/tools
# Marks the lines of a target that runs beside another, but for pytest's last. On Ctrl-C it passes on what pytest says last.
MARKED = 2>&1 | { trap '' INT; sed --unbuffered -E '/^=* ?[0-9]+ (passed|failed|error)/! s/^/$@: /'; }

.PHONY: help setup dev web smoke smoke-torch smoke-horovod smoke-single horovod check test test-jobs test-others test-gpu test-fake-gpu \
    lint format faults bench cluster clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(BASE)  ## .venv with the pinned dependencies: no root, no Horovod, no DALI, no system FFmpeg

$(BASE): | constraints.txt requirements.lock pyproject.toml
	tools/setup_venv.sh $(VENV) core
	@rm -f $(VENV)/.base-*
	@touch $@

dev: $(DEV)  ## the same with what lint and tests need

$(DEV): $(BASE)
	tools/setup_venv.sh $(VENV) core mpi torchcodec dali dev lamb debug sweep onnx flow tensorboard
	@rm -f $(VENV)/.dev-*
	@touch $@

web: $(WEB)  ## the browser demo's packages, in web/node_modules (needs npm)

# No package's own script runs.
$(WEB): | web/package-lock.json
	@command -v npm >/dev/null || { echo "web: no npm. Fix: apt-get install npm" >&2; exit 1; }
	npm ci --prefix web --ignore-scripts --no-audit --no-fund
	@touch $@

smoke: smoke-$(BACKEND)  ## train a small model on generated clips with 2 processes; BACKEND=torch|horovod|single ARGS=...

smoke-torch: data/shapes
	OMP_NUM_THREADS=$(HALF_THE_CORES) $(BIN)/python launch/local.py --processes 2 \
	    train.py experiment=$(EXPERIMENT) distributed=torch $(ARGS)

smoke-horovod: horovod data/shapes
	OMP_NUM_THREADS=$(HALF_THE_CORES) $(BIN)/horovodrun --gloo -np 2 \
	    $(BIN)/python train.py experiment=$(EXPERIMENT) distributed=horovod $(ARGS)

smoke-single: data/shapes
	$(BIN)/python train.py experiment=$(EXPERIMENT) $(ARGS)

# Always run prepare.py: it keeps a complete data set.
.PHONY: data/shapes
data/shapes: $(BASE)
	$(BIN)/python prepare.py shapes

horovod: $(BASE)  ## build Horovod for the installed torch (minutes once, then cached), prove it with 2 processes
	@$(BIN)/python -m tools.horovod

lint: $(DEV)  ## ruff, mypy, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	tools/lint_shell.sh

format: $(DEV)  ## rewrite what lint would complain about, where that is safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint  ## lint and the fast tests: minutes
	$(PYTEST) -m "not slow and not gpu and not fake_gpu"

# Run the steps in sequence, even under make -j, and the tests in two processes at a time.
test:  ## everything but the GPU tests; installs system packages first where it may; FORBID_SKIPS=1 fails on a skipped test
	tools/install_system_packages.sh
	$(MAKE) lint
	$(MAKE) web
	$(MAKE) horovod
	$(MAKE) --jobs=2 --keep-going test-jobs test-others test-fake-gpu

test-jobs: $(DEV)  ## the tests of whole jobs, launchers and clusters, without lint and GPU tests
	$(PYTEST) -m "not gpu and not fake_gpu" --durations=50 -o cache_dir=.pytest_cache/jobs $(JOBS) $(MARKED)

test-others: $(DEV)  ## all other tests, without lint and GPU tests
	$(PYTEST) -m "not gpu and not fake_gpu" --durations=50 -o cache_dir=.pytest_cache/others $(addprefix --ignore=,$(JOBS)) $(MARKED)

test-gpu: $(DEV)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

test-fake-gpu: $(DEV)  ## the host code of torch's CUDA build, on a GPU that computes nothing (tests/fake_gpu): no GPU needed
	tests/fake_gpu/run.sh $(BIN)/python -m pytest -m fake_gpu -o cache_dir=.pytest_cache/fake_gpu $(MARKED)

faults: $(DEV) horovod  ## kill jobs at 50 random moments, which must end bit-equal to one left alone; 1,000 broken files; 45 minutes
	@mkdir -p outputs
	$(BIN)/python tests/soak/kill_runs.py --kills 50 --json outputs/faults.json $(ARGS)
	$(BIN)/python tests/soak/clean_run.py --json outputs/clean.json
	$(BIN)/python tests/soak/bad_corpus.py --files 1000 --decodes 20000 --json outputs/bad_corpus.json

bench: $(BASE)  ## run every program in benchmarks/; one page in outputs/benchmarks/index.html; ARGS="--quick" or "--only step"
	$(BIN)/python benchmarks/run_all.py $(ARGS)

cluster:  ## a real Slurm of 4 nodes on this machine, to try launch/ on; needs root; tools/slurm_emulator/cluster.sh down ends it
	tools/install_system_packages.sh
	tools/slurm_emulator/cluster.sh up 4

clean:  ## remove .venv and tool caches; keeps data/, outputs/ and the Horovod wheel cache
	rm -rf $(VENV) web/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
