# Everything runs in .venv, which the first target that needs it sets up (for CPU; `make gpu` wants one of your own).
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
# Only for users whose package index has no CPU build of torch.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

.DEFAULT_GOAL := help
.PHONY: help setup demo words test test-chaos test-all chaos gpu lint clean-clone-test

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.installed ## make .venv with everything pinned (CPU)

# Packages for CPU would break an environment that somebody else has made, such as one for GPUs. `.begun` tells one
# that was left half-way.
$(VENV)/.installed: pyproject.toml deploy/requirements-cpu.txt
	@test ! -e $(VENV)/bin/python || test -e $@ || test -e $(VENV)/.begun || { echo "$(VENV) was not set up by make, \
so nothing is installed into it: run $(VENV)/bin/sdft demo or $(VENV)/bin/python -m pytest, or give another VENV="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; give one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@mkdir -p $(VENV) && touch $(VENV)/.begun
	$(PYTHON) -m venv $(VENV)
	@echo "Installing about 190 packages (4 GB on disk, some minutes) ..."
	$(PIP) "torch==2.13.0+cpu" || $(PIP) --extra-index-url $(TORCH_INDEX) "torch==2.13.0+cpu"
	$(PIP) -r deploy/requirements-cpu.txt
	$(PIP) --no-build-isolation --editable .
	@touch $@

demo: setup ## teach a small model a new word with SDFT and with SFT (3 minutes)
	$(BIN)/sdft demo

words: setup ## teach three words in sequence by three methods with three seeds (45 minutes)
	$(BIN)/sdft lab sequence --out runs/words
	$(BIN)/sdft continual runs/words/plan.yaml

test: setup ## the tests but for the next ones (13 to 35 minutes)
	$(BIN)/python -m pytest -m "not slow and not chaos" $(TESTS)

test-chaos: setup ## those that stop or kill parts of whole runs (12 to 25 minutes)
	$(BIN)/python -m pytest -m "chaos and not slow" $(TESTS)

test-all: setup ## both, and those that do at length what others do in short or in parts
	$(BIN)/python -m pytest $(TESTS)

KILLS ?= 50
chaos: setup ## inject every fault (20 minutes), then kill a run's processes at random (25 minutes), with a table of each
	$(BIN)/python -m pytest $(TESTS) --fault-table -q
	PYTHONPATH=tests:tests/e2e $(BIN)/python tests/e2e/chaos.py --kills $(KILLS)

# What `make gpu` may take in all, seconds: tests at most half of it. Its figures go to the folder GPU_OUT.
WITHIN ?= 480
GPU_OUT ?= runs/gpu
gpu: ## on a machine with a GPU, VENV=FOLDER of an environment with the extras `gpu` and `dev`: its tests, and all figures in one table
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "No GPU for the torch in \
$(VENV): python3 -m venv venv && venv/bin/pip install -e '.[gpu,dev]', then make gpu VENV=venv"; exit 1; }
	@test -z "$$(ls -A $(GPU_OUT) 2>/dev/null)" || { echo "$(GPU_OUT) is already in use: give another as GPU_OUT=FOLDER"; exit 1; }
	@end=$$(($$(date +%s) + $(WITHIN))); \
	  timeout --signal=INT --kill-after=30 $$(($(WITHIN) / 2)) $(BIN)/python -m pytest $(TESTS) -m gpu; failed=$$?; \
	  test $$failed != 124 || echo "The tests were stopped after half of WITHIN=$(WITHIN) seconds."; \
	  $(BIN)/python -m sdft_dist.bench.gpu_check --out $(GPU_OUT) --within $$((end - $$(date +%s))) && exit $$failed

lint: setup ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean-clone-test: ## clone HEAD into an empty folder, set it up there and run its tests, as test does
	@folder=$$(mktemp -d) && git clone --quiet . $$folder/sdft-dist && $(MAKE) -C $$folder/sdft-dist test && rm -rf $$folder
