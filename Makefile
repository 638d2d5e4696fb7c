# Two commands matter: `make quickstart` and `make test`. Each sets up .venv by itself.
#   PYTHON=python3.11        the interpreter that .venv is made from; python3.12 has the same locked releases
#   TORCH_INDEX_URL=...      an index of PyTorch's CPU wheels, where pip would otherwise take the CUDA build
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --quiet --disable-pip-version-check --no-deps --ignore-requires-python $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.PHONY: setup quickstart gsm8k test test-all test-core-versions test-programs gates clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt pyproject.toml
	@echo "Installing the locked environment into $(VENV) (3.5 GB, about two minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_FLAGS) -r requirements/cpu.txt
	@$(BIN)/pip install $(PIP_FLAGS) --no-build-isolation --editable .
	@touch $@

quickstart: setup
	@launch/quickstart.sh

gsm8k: setup
	@launch/gsm8k.sh

gates: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Files go to two workers in turn, the long ones first; every process computes with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

test: gates test-programs
	$(PYTEST) -m "not slow"

# PART=2/6: the second of six parts of about equal length.
test-all: gates test-programs
	$(PYTEST) $(if $(PART),--part $(PART))

# Slurm and Chromium: without them tests are skipped.
test-programs:
	@tools/install_test_programs.sh

test-core-versions: setup
	@tools/test_core_versions.sh

clean:
	rm -rf $(VENV) .cores runs
