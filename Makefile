# One word does one thing, on a machine with python3 (3.11 or later), pip, make and git. `make help` lists the words.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check \
          --prefer-binary --constraint requirements.lock
PROTOS := $(wildcard protos/vtlab/v1/*.proto)
TESTS  ?= tests
PYTEST_OPTIONS ?= -n auto --dist worksteal

# Three processes start for every laboratory: without kept byte code each compiles the tree again, for a second in all.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo matrix mutations lifecycle test fuzz check lint format protos check-protos bench kernel linux lock wheels up clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---------------------------------------------------------------------------------------------------------- set-up
# Two stamps: users of the laboratory do not wait for the developers' tools.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vtlab needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Set PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import venv' || { echo "Python's venv module is missing (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null || { echo "pip is missing (Debian: apt install python3-pip)" >&2; exit 1; }
	@echo 'setting up $(VENV)'
	@$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/runtime.stamp: pyproject.toml requirements.lock | $(BIN)/python
	@$(PIP) --editable .
	@touch $@

$(VENV)/developer.stamp: pyproject.toml requirements.lock | $(BIN)/python
	@echo "installing vtlab and the developers' tools"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/runtime.stamp

setup: $(VENV)/developer.stamp  ## .venv with everything

# ------------------------------------------------------------------------------------------------------------- use

demo: $(VENV)/runtime.stamp  ## attacks on a real guest, unprotected and then protected by VTL1
	@$(BIN)/vtlab demo

up: $(VENV)/runtime.stamp  ## the three processes, until Ctrl-C
	@$(BIN)/vtlab up

bench: $(VENV)/developer.stamp  ## figures as ratios of one run; BENCH='--json FILE' also writes them
	@$(BIN)/python -m tests.bench $(BENCH)

matrix: $(VENV)/runtime.stamp  ## attacks × transitions × designs; MATRIX='--jobs 2 --html FILE' and more
	@$(BIN)/vtlab matrix $(MATRIX)

mutations: $(VENV)/runtime.stamp  ## which attacks need which rule of the policy
	@$(BIN)/vtlab matrix --mutate '*'

lifecycle: $(VENV)/runtime.stamp  ## the sequence diagrams in docs/lifecycle.md, from runs
	@$(BIN)/vtlab matrix --diagrams docs/lifecycle.md

# ----------------------------------------------------------------------------------------------------------- tests

test: $(VENV)/developer.stamp  ## all tests, in parallel and in random order
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS) $(TESTS)

fuzz: $(VENV)/developer.stamp  ## hostile input of every kind; FUZZ='--count 1000000 --seed 2' for more
	@for target in $$($(BIN)/python -m tests.fuzz --list); do $(BIN)/python -m tests.fuzz $$target $(FUZZ) || exit 1; done

check: lint check-protos  ## what must hold before a change goes in

lint: $(VENV)/developer.stamp  ## ruff, mypy, import-linter, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	cd protos && ../$(BIN)/buf lint .

format: $(VENV)/developer.stamp  ## import order and layout
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	cd protos && ../$(BIN)/buf format --write .

# ------------------------------------------------------------------------------------------------------- generated

# $(1): folder for the output. A _pb2_grpc file is kept only where a service stands in the .proto.
generate = mkdir -p $(1) && cd protos && export PATH="$(CURDIR)/$(BIN):$$PATH" && python -m grpc_tools.protoc -I . --python_out=$(1) \
  --mypy_out=$(1) $(PROTOS:protos/%=%) && python -m grpc_tools.protoc -I . --grpc_python_out=$(1) --mypy_grpc_out=$(1) \
  $$(grep -l '^service ' $(PROTOS:protos/%=%))

protos: $(VENV)/developer.stamp  ## Python code of the contract, beside the .proto files
	rm -f protos/vtlab/v1/*_pb2*.py protos/vtlab/v1/*_pb2*.pyi
	$(call generate,$(CURDIR)/protos)

check-protos: $(VENV)/developer.stamp
	@rm -rf build/protos
	@$(call generate,$(CURDIR)/build/protos)
	@for file in $$(cd build/protos && find . -type f); do cmp "build/protos/$$file" "protos/$$file" || exit 1; done \
	  || { echo "the generated code is not that of the .proto files: run 'make protos'" >&2; exit 1; }
	@for file in protos/vtlab/v1/*_pb2*; do test -e "build/$$file" \
	  || { echo "$$file belongs to no .proto file: run 'make protos'" >&2; exit 1; }; done
	@echo 'generated code: up to date'

kernel: $(VENV)/developer.stamp  ## rebuild the guest kernels (needs gcc and binutils)
	$(BIN)/python -m vtl0_guest.kernels.selfguard.build
	$(BIN)/python -m vtl0_guest.kernels.chaos.build
	$(BIN)/python -m vtl0_guest.kernels.conformance.build

linux: $(VENV)/developer.stamp  ## Debian's kernel and BusyBox for the tests with Linux (apt; into build/linux or VTLAB_LINUX)
	@$(BIN)/python -m tests.integration.linux.images

lock:  ## requirements.lock from the floors in pyproject.toml, in a fresh environment
	rm -rf build/lock && $(PYTHON) -m venv --without-pip build/lock
	$(PYTHON) -m pip --python build/lock/bin/python install --quiet --prefer-binary --editable '.[dev]' setuptools
	@{ echo '# Every package that `make setup` installs. Written by `make lock`.'; \
	  $(PYTHON) -m pip --python build/lock/bin/python freeze --all --exclude vtlab --exclude pip; } > requirements.lock
	rm -rf build/lock

wheels: $(BIN)/python  ## what the container image installs, for a build without a network
	rm -rf wheels
	$(PYTHON) -m pip wheel --quiet --wheel-dir wheels --prefer-binary --constraint requirements.lock . setuptools
	rm -f wheels/vtlab-*.whl

clean:  ## everything that can be made again
	rm -rf $(VENV) build dist wheels *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
