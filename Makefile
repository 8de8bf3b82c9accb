# Two commands: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo smoke table-full test lint format clean

help:
	@echo "make demo    train a Dynamic-LLaVA on real images, evaluate it in both harnesses, print the table (20 min, 2 cores)"
	@echo "make test    run the test suite"
	@echo "make smoke   every benchmark's miniature through both harnesses, each cell of the table checked (10 min)"
	@echo "make lint    ruff and mypy"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about five minutes; most of it downloads PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch>=2.6" "torchvision>=0.21"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[eval,demo,dev]"
	@touch $(READY)

demo: setup
	$(PY) -m dynllava_plugin.demo

smoke: setup
	$(PY) -m dynllava_plugin.evaluation.smoke

# The committed table: every test question instead of a sample (hours on 2 cores).
table-full: setup
	$(PY) -m dynllava_plugin.demo --full

test: setup
	$(PY) -m pytest

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
