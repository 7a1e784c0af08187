# Everything runs in .venv, which the first command that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
JOBS ?= auto

.PHONY: help setup train reproduce test test-all check format clean

help:  ## Show this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED)  ## Make .venv with everything in it

$(INSTALLED): pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'stalewise needs Python 3.11 or newer; use make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== requirements-dev.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

train: $(INSTALLED)  ## Train ResNet-20 on handwritten digits with DSP on 3 processes; ARGS="--help" for options
	$(BIN)/stalewise train $(ARGS)

reproduce: $(INSTALLED)  ## Run all experiments at smoke scale; ARGS="--scale short --data PATH" for real ones
	$(BIN)/stalewise reproduce all $(ARGS)

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(INSTALLED)  ## Lint, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was built, but not runs
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
