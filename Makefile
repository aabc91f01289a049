# One environment, .venv, is made on first use and again only when pyproject.toml or setup.cfg changes.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
JOBS ?= 2
BENCH ?= overhead
SEED ?= 0
SECONDS ?= 1200
BIN := $(VENV)/bin
# Tests and benchmarks compare with them; their samplers need nothing of what their training does.
PUBLISHED := k-diffusion denoising-diffusion-pytorch torchcfm

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-oldest fuzz check mutants docs bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo ## a pendulum, robot paths and pictures, sequentially and in parallel
	$(BIN)/parasolver demo --overwrite

test: $(VENV)/.dev ## run the tests, except the slow ones
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(VENV)/.dev ## run all tests, with many more random examples
	$(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=thorough

test-oldest: ## run README's ten lines, the core's tests and some adapters' with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) -m tests.oldest > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt \
	  --editable '.[demo,diffusers,timm]' pytest pytest-timeout hypothesis array-api-strict scipy
	$(OLDEST)/bin/python -m pytest -m "not slow" -W default tests/test_oldest.py tests/core \
	  $(addprefix tests/adapters/test_,distributed.py dit.py graphs.py pipelines.py samplers.py wrapping.py) \
	  "tests/docs/test_examples.py::test_readme_example_finds_the_mean_of_its_data"

fuzz: $(VENV)/.dev ## hold random programs against the plain loop: make fuzz SEED=0 SECONDS=1200
	@failed=0; for part in solve "solve --device" odeint; do \
	  PYTHONPATH=.:adapters $(BIN)/python -m tests.fuzz.$$part --seed $(SEED) --seconds $(SECONDS) || failed=1; \
	done; exit $$failed

check: $(VENV)/.dev ## lint, formatting, types, import contracts, documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory docs

mutants: $(VENV)/.dev ## change the code in many small ways and count what the tests notice: SEED=0 SECONDS=1200
	PYTHONPATH=.:adapters $(BIN)/python -m tests.mutants --seed $(SEED) --seconds $(SECONDS) --workers $(JOBS)

docs: $(VENV)/.dev ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -E -q docs docs/_build/html

bench: $(VENV)/.dev ## run one benchmark: make bench BENCH=overhead
	$(BIN)/python -m benchmarks.$(BENCH)

clean: ## remove what was built; the environment .venv stays
	rm -rf build dist *.egg-info docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Installing `dev` installs `demo` too; `make demo` alone leaves out the developer's tools.
$(VENV)/.demo: pyproject.toml setup.cfg | $(BIN)/python
	@echo 'Installing into $(VENV); PyTorch is large, the first time takes minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.cfg | $(BIN)/python
	@echo 'Installing into $(VENV); PyTorch is large, the first time takes minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PUBLISHED)
	@touch $(VENV)/.demo $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'ParaSolver needs Python 3.11 or newer; choose one with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo 'This Python cannot create environments; on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
