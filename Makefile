# make            what there is
# make quickstart everything, from nothing
# ARGS="..." is passed on: `make quickstart ARGS="seed=2"`, `make test ARGS="tests/config -x"`

# the CPU suite on a GPU cluster's Python and megatron-core: `make test STACK=py312`
STACK ?= py311
ifeq ($(STACK),py311)
PYTHON ?= python3.11
VENV := .venv
LOCK := requirements/cpu.lock
else ifeq ($(STACK),py312)
PYTHON ?= python3.12
VENV := .venv-py312
LOCK := requirements/cpu-py312.lock
else
$(error STACK=$(STACK) is neither py311 nor py312)
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_INDEX := https://download.pytorch.org/whl/cpu
CONFIG ?= configs/quickstart.yaml
ARGS ?=
# two at a time, see tests/conftest.py
JOBS ?= -n 2 --no-loadscope-reorder

# the CPU stack stays on the CPU where there is a GPU, too, which PyPI's torch would find
quickstart test test-all test-slurm soak check bench bench-verl: export CUDA_VISIBLE_DEVICES :=

# several ranks share a small machine's cores; more threads each would only queue
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-all test-slurm soak gpu-check check format bench bench-verl

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv (.venv-py312) and install the pinned CPU stack; again only when the lock or pyproject.toml changed

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install it or say PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(LOCK) pyproject.toml | $(BIN)/python
	@echo "installing $$(grep -c '^[^#]*==' $(LOCK)) packages into $(VENV): some minutes and 3 GB (py312: 6 GB) the first time"
	@$(BIN)/python -m pip install -qq --no-deps -r $(LOCK) || { \
	  echo "trying again with PyTorch's own index, which has the CPU builds of torch: $(TORCH_INDEX)"; \
	  PIP_EXTRA_INDEX_URL="$$PIP_EXTRA_INDEX_URL $(TORCH_INDEX)" $(BIN)/python -m pip install -qq --no-deps -r $(LOCK); } || { \
	  echo "If torch was not found: see 'Install elsewhere' in README.md"; \
	  exit 1; }
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup ## mine, train, evaluate and export the embedded model on small Countdown
	$(BIN)/python -m recipes.train $(CONFIG) $(ARGS)
	$(BIN)/python -m recipes.evaluate $(CONFIG) $(ARGS)
	$(BIN)/python -m recipes.export $(CONFIG) $(ARGS)

test: setup ## all tests of a CPU machine but the slow ones
	$(BIN)/python -m pytest $(JOBS) -m "not slow and not gpu and not te and not slurm" $(ARGS)

test-all: setup ## all tests of a CPU machine
	$(BIN)/python -m pytest $(JOBS) -m "not gpu and not te and not slurm" $(ARGS)

# one job at a time: each takes all cores; ARGS="-m 'slurm and not slow'" leaves the quick ones
test-slurm: setup ## jobs on a virtual Slurm cluster; needs root and Debian's slurm-wlm and munge
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

soak: setup ## end a small run by kill -9 and SIGUSR1, 200 times in all, and count the harm; it goes on where it was stopped
	$(BIN)/python -m recipes.drill configs/soak.yaml $(ARGS)

gpu-check: ## measure kernels, update, rollout, refit and training on this host's GPU, with the Python that is active
	python3 -m benchmarks.gpu_check $(ARGS)

check: setup ## format, lint, types, floors, then `make test`: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py
	$(MAKE) --no-print-directory test

format: setup ## rewrite code and docs/config.md as `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m nemo_r3.config > docs/config.md

# Python's own files aside, a peer's environment holds what its lock adds; torch, transformers and vLLM are .venv's
PACKAGES = import sysconfig; print(sysconfig.get_path('purelib'))

$(VENV)-%/.installed: requirements/%.lock $(STAMP)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "$(PACKAGES)" > "$$($(@D)/bin/python -c "$(PACKAGES)")/project.pth"
	@$(@D)/bin/python -m pip install -qq --no-deps -r $<
	@touch $@

# alone on the machine: what else runs there is in the numbers
bench bench-verl: export OMP_NUM_THREADS := 2
bench: setup $(VENV)-trl/.installed ## the update by layout, and a whole step against TRL's GRPOTrainer: benchmarks/results/
	$(BIN)/python -W ignore -m benchmarks.update $(ARGS)
	$(BIN)/python -m benchmarks.step_vs_trl $(ARGS)

bench-verl: setup $(VENV)-verl/.installed ## the update against verl's FSDP workers: benchmarks/results/
	$(BIN)/python -m benchmarks.update_vs_verl $(ARGS)
