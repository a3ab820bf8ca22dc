# make demo   environment, demo model and data, training, held-out answers before and after
# make test   environment, lint, types and the whole test suite
# make test-fast  the tests that use no model, run or process (2 minutes)
# make check  lint and types alone
# make test-faults  the fault tests alone, with their table; FAULTS=long for the full counts
# make test-distributed  runs of several processes alone, on gloo; FAULTS=long for 60 faults of each kind
# make test-architectures  every family of the architecture table alone; ARCHITECTURES=long for all of it
# All compute on the CPU, as the numbers in the README do; CUDA_VISIBLE_DEVICES=0 at the end of a line takes a GPU.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export CUDA_VISIBLE_DEVICES :=
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-fast check test-faults test-distributed test-architectures test-oldest env clean

demo: $(VENV)/.ready
	$(BIN)/python scripts/demo_model.py --output .demo/SmolLM2-135M-Instruct
	$(BIN)/python scripts/demo_data.py --output .demo/addresses
	$(BIN)/qlora-train configs/demo.yaml
	$(BIN)/qlora-train eval runs/demo --shots 3 --max-new-tokens 128

# Tests run in a process for each core, four at most; `python -m pytest FILE` runs some of them in one.
test: check
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m fast --numprocesses logical --maxprocesses 4 --dist worksteal

# Faults on purpose: kills, full disks, damage, signals. FAULTS=long tries the full counts (an hour or more).
FAULTS ?= short
test-faults: $(VENV)/.ready
	QLORA_FAULTS=$(FAULTS) $(BIN)/python -m pytest tests/faults

# Several processes on one machine: gradients, resume in other numbers, faults of a rank.
test-distributed: $(VENV)/.ready
	QLORA_FAULTS=$(FAULTS) $(BIN)/python -m pytest tests/parallel tests/faults/test_rank_faults.py tests/data/test_rank_shares.py

# Every family of the architecture table, with its table; ARCHITECTURES=long tries every family in every way.
ARCHITECTURES ?= short
test-architectures: $(VENV)/.ready
	QLORA_ARCHITECTURES=$(ARCHITECTURES) $(BIN)/python -m pytest tests/architectures

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(VENV)/.ready

# The lock pins every package; torch comes first, so that no other package chooses a build of it.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The low end of every version range except torch.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	.venv-oldest/bin/python -m pytest

clean:
	rm -rf $(VENV) .venv-oldest .demo runs .pytest_cache .mypy_cache .ruff_cache
