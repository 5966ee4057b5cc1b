# Two commands do everything: `make demo` and `make test`. Each installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint install dev constraints clean

demo: install
	$(BIN)/saddlepoint demo

test: dev lint
	$(BIN)/python -m pytest

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("saddlepoint needs Python 3.11 or newer; got " + sys.version.split()[0] + "; try: make PYTHON=python3.12 demo") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)

# torch goes first and by its exact version, so that no other package draws a larger build.
$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/bin/python
	@echo "installing into $(VENV) (about two minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

constraints: dev
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' | grep -v -E '^(nvidia|triton|cuda)' > constraints.txt

clean:
	rm -rf $(VENV) runs build dist
