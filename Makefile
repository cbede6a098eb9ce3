# Everything starts here: `make` lists the targets. The first run makes .venv (about two minutes).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Its pages about editable installs, of which newer versions of pip print several, are not ours.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One thread: tensors of tests are small, and threads of several processes would wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
RUN := $(TEST_ENV) $(BIN)/python
# Two processes by file; PROCESSES=0 runs all in one.
PROCESSES := 2
PYTEST := $(RUN) -m pytest -n $(PROCESSES) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-alone test-oldest lint format docs clean gpu gpu-tests gpu-speed gpu-fusion gpu-trial gpu-wheels

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	@echo "making $(VENV), a Python environment of its own"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml callbacks/pyproject.toml
	@echo "installing seglab, torch and what else it needs into $(VENV): some minutes, $(VENV)/pip.log says what"
	@$(PIP) --log $(VENV)/pip.log -e ./callbacks -e .
	@touch $@

$(VENV)/developer: $(VENV)/installed
	@echo "installing what the tests need into $(VENV): some minutes, $(VENV)/pip.log says what"
	@$(PIP) --log $(VENV)/pip.log -e ./callbacks -e '.[dev]'
	@touch $@

# Parity with MMSegmentation is tested where its Python can be had; without it those tests are skipped.
$(VENV)/mmsegmentation: $(VENV)/developer benchmarks/mmsegmentation.txt
	@if $(PIP) --retries 1 --no-deps -r benchmarks/mmsegmentation.txt; \
	then touch $@; \
	else echo "MMSegmentation could not be installed: the tests that compare with it are skipped"; fi

install: $(VENV)/installed  ## Make .venv and install both distributions into it
	@echo "ready: $(BIN)/seglab --help, or make quickstart"

quickstart: $(VENV)/installed  ## Train a small network on generated scenes: CPU, no download, a few minutes
	@echo "$(BIN)/python train.py fit --config configs/quickstart.yaml"
	@$(BIN)/python train.py fit --config configs/quickstart.yaml

test: $(VENV)/mmsegmentation  ## Run the tests (a few minutes on two cores)
	$(PYTEST) -m "not slow and not gpu"

SLOW := $(RUN) -m pytest -q -m "slow and not gpu"

# One process for each file, those with most tests first: what one file leaves in a process (compiled
# graphs, threads of other runtimes) cannot break another, and loaders may fork.
test-slow: $(VENV)/mmsegmentation  ## Run the slow tests, one process for each file: ranks, clean environments
	@found=$$($(SLOW) --collect-only) || { echo "$$found"; exit 1; }; \
	echo "$$found" | sed -n 's/::.*//p' | sort | uniq -c | sort -rn | awk '{print $$2}' \
	| xargs -P $(patsubst 0,1,$(PROCESSES)) -I FILE sh -c 'said=$$($(SLOW) FILE 2>&1); code=$$?; echo "FILE: exit status $$code"; echo "$$said" | tail -n 200; exit $$code'

test-alone:  ## Install callbacks/ alone into an empty environment and run its tests there
	rm -rf .venv-alone
	$(PYTHON) -m venv .venv-alone
	.venv-alone/bin/python -m pip install --quiet --upgrade pip
	.venv-alone/bin/python -m pip install --quiet ./callbacks pytest
	cd callbacks && $(TEST_ENV) ../.venv-alone/bin/python -m pytest -c ../pyproject.toml --rootdir .. tests
	.venv-alone/bin/python -c "import scale_equalization, sys; sys.exit('lightning' in sys.modules)"
	rm -rf .venv-alone callbacks/build callbacks/*.egg-info

# With a folder gpu-wheels/ nothing is fetched: what it holds goes beside the packages that PYTHON has.
ifneq ($(wildcard gpu-wheels/*.whl),)
GPU := gpu-packages/installed
RUN_GPU := PYTHONPATH=gpu-packages $(PYTHON) benchmarks/gpu.py
else
GPU := $(VENV)/mmsegmentation
RUN_GPU := $(BIN)/python benchmarks/gpu.py
endif

gpu-packages/installed: $(wildcard gpu-wheels/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --find-links gpu-wheels --no-deps --upgrade --target gpu-packages -r benchmarks/gpu_wheels.txt
	@touch $@

gpu: $(GPU)  ## Tests and benchmarks on a GPU; writes gpu-report/report.md (gpu-tests, gpu-speed, gpu-fusion: its parts)
	$(RUN_GPU) --minutes 120

gpu-tests gpu-speed gpu-fusion: gpu-%: $(GPU)  # ten minutes at most each; repeated, they go on where they stopped
	$(RUN_GPU) $*

gpu-trial: $(GPU)  ## Every job of `make gpu` at its smallest, on the CPU
	CUDA_VISIBLE_DEVICES= $(RUN_GPU) --small --minutes 30 --out gpu-report/trial

gpu-wheels:  ## Fetch what `make gpu` needs on a machine without package registry (under 60 MB)
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d gpu-wheels -r benchmarks/gpu_wheels.txt
	@du -sh gpu-wheels

test-oldest:  ## The callback's tests with the oldest torch and lightning it supports (fetches 3 GB)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet "torch==2.6.*" lightning==2.6.4 "numpy>=2" ./callbacks pytest
	cd callbacks && $(TEST_ENV) ../.venv-oldest/bin/python -m pytest -c ../pyproject.toml --rootdir .. tests -m "not slow"
	rm -rf callbacks/build callbacks/*.egg-info

lint: $(VENV)/developer  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/developer  ## Build the documentation site into docs/_build; warnings are errors
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo docs/_build/index.html

format: $(VENV)/developer  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment, caches and build products; logs stay
	rm -rf $(VENV) .venv-alone .venv-oldest gpu-packages .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info callbacks/*.egg-info callbacks/build docs/_build
