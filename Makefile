# Every command of the project. `make setup` is idempotent and the others call it.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo test lint clean
setup: $(VENV)/.stamp

# torch first, and from PyTorch's CPU index where there is neither a GPU nor a CPU build at hand:
# the default wheel would pull gigabytes of CUDA packages.
$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 \
	  || $(BIN)/python -m pip install --dry-run --no-deps --ignore-installed "torch~=2.13.0" 2>/dev/null | grep -q "+cpu"; \
	then $(BIN)/python -m pip install --quiet "torch~=2.13.0"; \
	else $(BIN)/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu "torch~=2.13.0"; fi
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf build runs
