# One verb each. PYTHON picks the interpreter for the virtual environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= smollm2-135m-moe8
STAMP  := $(VENV)/.xdeepserve-stamp
SOURCES := pyproject.toml $(shell find native -type f 2>/dev/null)

.PHONY: setup serve demo check test test-fast test-all bench clean

setup: $(STAMP)  ## make the virtual environment, build the native core, install everything

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q -e '.[test,dev]'
	touch $(STAMP)

serve: setup  ## serve the default model on http://127.0.0.1:8000
	$(BIN)/xdeepserve serve $(MODEL)

demo: setup  ## start a server, ask one question with streaming, stop
	$(BIN)/xdeepserve demo $(MODEL)

check: setup  ## lint, types, import contract, sizes, config docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py
	$(BIN)/python tools/check_config_docs.py
	$(BIN)/python tools/check_forbidden.py

test: setup  ## every test that CI runs
	$(BIN)/python -m pytest -m "not soak"

test-fast: setup  ## unit and contract tests only
	$(BIN)/python -m pytest tests/unit tests/contract -m "not slow and not weights"

test-all: setup  ## everything, soak tests included
	$(BIN)/python -m pytest

bench: setup  ## the benchmark suite; each program ends in one JSON line
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf build $(VENV)
