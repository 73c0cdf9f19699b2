# Each target installs what it needs into .venv by itself. Only make and Python 3.11 or later must be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
export TWOTOWER_OUT ?= $(CURDIR)/out
# Python may keep compiled code, so that the hundreds of processes that the tests start begin sooner.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo check test lint format types unit bench bench-gpu kernels bench-scale bench-pipeline chaos stress fuzz quality tiny noise docs clean

help: ## show the targets, and what each of them does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## run jobs/demo.yaml, which writes completions to out/demo
	$(BIN)/python -m pipeline run jobs/demo.yaml

check: lint types unit ## check format, types and imports, and run the quick tests: about a minute, before each commit

# Tests often wait for clusters and servers, so three processes keep two cores busy.
test: lint types ## check format and types, and run all tests, as CI does
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## sort imports, fix what ruff can fix, and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

# These tests start neither Ray nor a server, and compute little.
unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m 'not (ray or server or slow)'

bench: $(VENV)/.dev ## compare the engine with static batches, and simulate layouts on GPUs; writes tests/benchmarks/out/engine.json
	$(BIN)/python -m tests.benchmarks.engine

bench-gpu: $(VENV)/.dev ## measure forwards against their floors, and tokens/s at the released size; writes tests/benchmarks/out/gpu.json
	$(BIN)/python -m tests.benchmarks.gpu

kernels: $(VENV)/.dev ## compile every Triton kernel for an H100, on any machine
	$(BIN)/python -m tests.gpu.compile

bench-scale: $(VENV)/.dev ## send 2,000,000 rows through two replicas whose engine computes nothing
	$(BIN)/python -m tests.benchmarks.scale

bench-pipeline: $(VENV)/.dev ## measure the driver with 256 simulated replicas, and compare with Ray Data; writes tests/benchmarks/out/pipeline.json
	$(BIN)/python -m tests.benchmarks.pipeline

chaos: $(VENV)/.dev ## kill processes and fail the store under 100,000 rows per seed, then try each other fault; writes tests/chaos/out/chaos.json
	$(BIN)/python -m tests.chaos.run

stress: $(VENV)/.dev ## run all tests five times in a row, beside two processes that keep the cores busy
	$(BIN)/python -m tests.stress

fuzz: $(VENV)/.dev ## fuzz every reader of untrusted bytes for a minute each, guided by coverage
	$(BIN)/python -m tests.fuzz.run --seconds 60 all

quality: $(VENV)/.dev ## compare what builtin:tiny writes with the right answers; writes tests/benchmarks/out/quality.json
	$(BIN)/python -m tests.benchmarks.quality

tiny: $(VENV)/.runtime ## train builtin:tiny again from its seed; a training that was stopped continues
	$(BIN)/python -m model.builtin.train

noise: $(VENV)/.runtime ## make builtin:noise again, bit for bit
	$(BIN)/python -m model.builtin.noise

docs: $(VENV)/.runtime ## write docs/configuration.md again from the settings of a job
	$(BIN)/python -m pipeline.config.reference > docs/configuration.md

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) out

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# --no-build-isolation makes pip build with the tools that constraints.txt pins.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV): one to three minutes, longer on a busy machine"
	$(PIP) install -c constraints.txt pip setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the test tools into $(VENV)"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@# Only the Triton files of mamba-ssm: they need no compiler and none of its other dependencies.
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  $(PIP) install -c constraints.txt --no-deps --no-build-isolation mamba-ssm
	@touch $@
