# Two commands on a fresh clone: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test lint bench gpu studies clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[hf,cluster,notebooks,frameworks,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/moesim demo -o demo-out --force

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python -m tests.bench

gpu: $(READY)
	$(BIN)/python -m moesim.demo.measure

studies: $(READY)
	$(BIN)/python -m moesim.studies.systems -o reports/systems.md

clean:
	rm -rf $(VENV) .bench demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
