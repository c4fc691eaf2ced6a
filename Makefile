# Everything runs in .venv, which the first target sets up; needed beforehand: Python >= 3.11, a C++ compiler, make.
#   make demo        train on real images, measure every charge, draw the pictures: runs/demo (more options: ARGS="--nesterov")
#   make test        the tests, without the slow ones       make test-all    every test
#   make lint        ruff, mypy, clang-format               make bench       the benchmarks
#   make sanitize    the CPU engine's tests under ASan and UBSan
#   make test-integrations   the tests with Lightning, transformers, accelerate, TensorBoard, installed first
#   make gpu-report  build, test and measure on a GPU       make clean       remove what was built and set up
PYTHON ?= python3
ARGS ?=
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-integrations sanitize lint bench gpu-report clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# Again whenever a requirement or a C++ source changes; pip and ninja then do only what is left to do.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "noetherperf needs Python >= 3.11 and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt cmake ninja pybind11 scikit-build-core
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/noetherperf run --out runs/demo --overwrite $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Apart, for these libraries and what they need weigh more than all that `setup` installs beside torch.
test-integrations: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[integrations]'
	$(BIN)/python -m pytest tests/test_integrations.py $(ARGS)

sanitize: $(READY)
	$(BIN)/python tests/sanitized.py $(ARGS)

lint: $(READY)
	$(BIN)/pre-commit run --all-files

bench: $(READY)
	$(BIN)/python -m pytest bench -v $(ARGS)

# Sets nothing up: a machine with a GPU may have no network, and brings its own Python with torch.
gpu-report:
	@$(PYTHON) bench/gpu_report.py $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
