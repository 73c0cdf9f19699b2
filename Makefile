# Each target sets up what it needs in .venv by itself: Python 3.11 or later and make are all it takes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
export TWOTOWER_OUT ?= $(CURDIR)/out
# compiled once and kept: hundreds of processes of the tests start sooner
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo check test lint format types unit bench bench-gpu kernels bench-scale bench-pipeline chaos stress fuzz quality tiny noise docs clean

help: ## show the targets and what they do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## run jobs/demo.yaml; completions land in out/demo
	$(BIN)/python -m pipeline run jobs/demo.yaml

check: lint types unit ## format, types, rules for imports and quick tests: a minute, before each commit

# three processes: tests wait for clusters and servers, so two cores are busy with three
test: lint types ## all tests, as CI runs them
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

# tests that start no Ray and no server and compute little
unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m 'not (ray or server or slow)'

bench: $(VENV)/.dev ## the engine against lockstep, layouts on simulated GPUs: tests/benchmarks/out/engine.json
	$(BIN)/python -m tests.benchmarks.engine

bench-gpu: $(VENV)/.dev ## forwards over their floors, tokens/s at the released size: tests/benchmarks/out/gpu.json
	$(BIN)/python -m tests.benchmarks.gpu

kernels: $(VENV)/.dev ## compile every Triton kernel for an H100, on any machine
	$(BIN)/python -m tests.gpu.compile

bench-scale: $(VENV)/.dev ## 2,000,000 rows through two replicas whose engine computes nothing
	$(BIN)/python -m tests.benchmarks.scale

bench-pipeline: $(VENV)/.dev ## what the driver costs, 256 simulated replicas, Ray Data beside it: tests/benchmarks/out/pipeline.json
	$(BIN)/python -m tests.benchmarks.pipeline

chaos: $(VENV)/.dev ## 100,000 rows a seed while everything is killed and storage fails: tests/chaos/out/chaos.json
	$(BIN)/python -m tests.chaos.run

stress: $(VENV)/.dev ## all tests five times in a row, beside two processes that keep the cores busy
	$(BIN)/python -m tests.stress

fuzz: $(VENV)/.dev ## every reader of foreign bytes under a coverage-guided fuzzer, a minute each
	$(BIN)/python -m tests.fuzz.run --seconds 60 all

quality: $(VENV)/.dev ## what builtin:tiny writes, against the right answers: tests/benchmarks/out/quality.json
	$(BIN)/python -m tests.benchmarks.quality

tiny: $(VENV)/.runtime ## train builtin:tiny again, from the seed; stopped, it goes on where it was
	$(BIN)/python -m model.builtin.train

noise: $(VENV)/.runtime ## make builtin:noise again, bit for bit
	$(BIN)/python -m model.builtin.noise

docs: $(VENV)/.runtime ## make docs/configuration.md again from the settings of a job
	$(BIN)/python -m pipeline.config.reference > docs/configuration.md

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) out

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# --no-build-isolation: the build tool is pinned by constraints.txt as well
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): a minute or two"
	$(PIP) install -c constraints.txt pip setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the test tools into $(VENV)"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@# its Triton files alone: no compiler, none of what the rest of it wants
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  $(PIP) install -c constraints.txt --no-deps --no-build-isolation mamba-ssm
	@touch $@
