# Everything runs inside one virtual environment, which is made on the first call:
#   make VENV=/other/place PYTHON=/path/to/python3.12 ARGS="-k mapping" test

VENV ?= .venv
# Processes for pytest, each with one thread (tests/conftest.py).
WORKERS ?= 2
# For all integration tests together; each waits for nothing longer than it should take, too.
INTEGRATION_SECONDS ?= 1500
# Passed on to pytest or to the quickstart.
ARGS ?=
export VENV PYTHON

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The environment is entered as `activate` does it. PYTHONPATH puts this checkout before the one that
# the environment was made in, for child processes (torchrun) too.
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# Several processes, yet one session: one summary, one closing line. By file, since a file shares what it
# launches (loadgroup has no effect under pytest 9.2 with xdist 3.8).
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help venv check test test-fast test-all test-gpu test-nodes test-integration quickstart clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

venv: ## Make the virtual environment (VENV, .venv by default) or find it right
	@python=$$(bash scripts/find_python.sh) && "$$python" -I scripts/make_venv.py "$(VENV)"

check: venv ## Lint, format, types, shell scripts, Dockerfiles, layering, file sizes, generated pages; changes nothing
	ruff check
	ruff format --check
	mypy
	git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
	git ls-files -z '*.sh' .ci/run | xargs -0 shfmt -i 4 -d
	hadolint docker/Dockerfile docker/Dockerfile.serve
	python scripts/write_settings.py --check
	python -m pytest -q tests/test_layering.py tests/test_file_size.py

test: venv ## All tests but the wide matrices
	$(PYTEST) -m "not wide and not integration" $(ARGS)

test-fast: venv ## Only tests of seconds
	$(PYTEST) -m "not slow and not wide and not integration" $(ARGS)

test-all: venv ## Every test, the wide matrices too
	$(PYTEST) $(ARGS)

test-gpu: venv ## Tests on a GPU with Transformer Engine, in one process
	python -m pytest -m gpu $(ARGS)

test-nodes: venv ## Training over nodes: a real slurm, which is installed where root and apt are there, and hosts
	python -m pytest -m integration tests/integration/test_training_slurm.py tests/integration/test_training_hosts.py $(ARGS)

# A SIGTERM ends what the tests started; whoever is deaf to it is killed.
test-integration: venv ## vLLM, slurm and Docker for real: installs them where root and apt are there
	timeout --foreground --kill-after=120 $(INTEGRATION_SECONDS) \
		python -m pytest -m integration --durations=0 --durations-min=5 tests/integration $(ARGS)

quickstart: venv ## Fine-tune a small DeepSeek-V3 and get a Hugging Face directory back, in minutes
	bash examples/quickstart.sh $(ARGS)

clean: ## Delete caches and build products; the virtual environment stays
	rm -rf build dist megatron_dsv3.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find megatron_dsv3 tools examples benchmarks scripts tests -name __pycache__ -prune -exec rm -rf {} +
