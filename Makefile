# make demo: environment, pipeline, results. make test: environment, tests. Both start from a clean clone.
SHELL := bash
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Extra words for pip, for example an index with CPU-only builds of torch.
PIP_FLAGS ?=
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: venv demo test lint clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	specflow init
	dvc repro
	specflow results

test: venv
	pytest

lint: venv
	ruff check .
	ruff format --check .
	mypy

# Everything that a run makes; the shared download cache stays.
clean:
	rm -rf artifacts report .specflow mlflow.db mlartifacts dvc_plots
