# `make` or `make help` lists the targets. demo and test set everything up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Packages are compiled at their first import, once; with this set, in every process again.
unexport PYTHONDONTWRITEBYTECODE

BENCH_MODEL ?= ../shared/models/babyllama-105
BENCH_TRAIN ?= ../shared/data/tinystories/train.parquet
BENCH_TEXT ?= ../shared/data/tinystories/validation.parquet

.DEFAULT_GOAL := help
.PHONY: help demo test slow setup lint types regression bench lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: setup ## Run the whole pipeline on a small model (CPU, offline, minutes) and say where the report is
	$(BIN)/dvc repro
	@echo "The report: $(CURDIR)/data/report/report.html"

test: setup ## Run the tests, but those that take long
	$(BIN)/pytest -n 2 -m "not slow"

slow: setup ## Run the tests that take long: flows and sweeps on scratch repositories, several processes, measured memory
	$(BIN)/pytest -n 2 -m slow

setup: $(READY) ## Make .venv with the locked versions (demo and test do it when needed)

lint: setup ## Check style, spelling and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

types: setup ## Check the types of apiq/ and ci/
	$(BIN)/pyright

regression: setup ## Run the pipeline on a tiny profile and compare its metrics with ci/metrics.json
	$(BIN)/python -m ci.regression

bench: setup ## Measure the engine, and perplexity by method: BENCH_MODEL, BENCH_TRAIN, BENCH_TEXT (see benchmarks/README.md)
	$(BIN)/python -m benchmarks.engine --dtypes float32
	$(BIN)/python -m benchmarks.quality $(BENCH_MODEL) --calibration $(BENCH_TRAIN) --text $(BENCH_TEXT)

lock: ## Pin anew what pyproject.toml asks for, keeping pinned versions that still fit
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --fork-strategy fewest --python-version 3.11 \
	  --no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.lock
	@# torch asks for its CUDA packages by itself where its wheel is built for CUDA.
	grep -vE '^(nvidia-|cuda-)' requirements.lock > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ## Remove .venv and what the pipeline wrote, but not DVC's cache of it
	rm -rf $(VENV) .apiq_work .pytest_cache .ruff_cache
	cd data && rm -rf model calibration quantized refined finetuned evaluation report timing tracking

# uv reads pip's find-links only when told; where it cannot install, pip does.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { echo \
	  "apiq needs Python 3.11 or newer as \`$(PYTHON)\`; name another with PYTHON=, as in: make PYTHON=python3.12 demo" >&2; exit 1; }
	@echo "Installing the versions of requirements.lock into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' requirements.lock)
	@links=$$($(BIN)/python -m pip config list | sed -n "s/.*find-links='\(.*\)'$$/\1/p" | tail -n 1); \
	  UV_FIND_LINKS="$$links" $(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock \
	  || { echo "uv could not install them; pip does"; $(BIN)/python -m pip install --quiet --requirement requirements.lock; }
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@if test ! -e .git; then $(BIN)/dvc config --local core.no_scm true; \
	  elif grep -qs no_scm .dvc/config.local; then $(BIN)/dvc config --local --unset core.no_scm; fi
	@touch $@
