# Everything runs in .venv, which every target sets up first. Needs Python >= 3.11, a C++ compiler and make.
#   make demo        train on real images, measure every charge, draw pictures into runs/demo (options: ARGS="--nesterov")
#   make test        run the tests, except slow ones        make test-all    run every test
#   make lint        run ruff, mypy, clang-format           make bench       run the benchmarks
#   make sanitize    run the CPU engine's tests under ASan and UBSan
#   make test-integrations   install Lightning, transformers, accelerate and TensorBoard, and run their tests
#   make docs        build the documentation site into build/site, and check it
#   make bench-page  keep the last benchmarks' results and put them into docs/performance.md and README.md
#   make gpu-report  build, test and measure on a GPU       make clean       remove .venv and everything that was built
PYTHON ?= python3
ARGS ?=
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-integrations sanitize lint docs bench bench-page gpu-report clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# Runs again whenever a requirement or a C++ source changes; pip and ninja then do only what has changed.
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

# Not part of `setup`: these libraries are larger than everything that it installs beside torch.
test-integrations: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[integrations]'
	$(BIN)/python -m pytest tests/test_integrations.py $(ARGS)

sanitize: $(READY)
	$(BIN)/python tests/sanitized.py $(ARGS)

lint: $(READY)
	$(BIN)/pre-commit run --all-files

# Warnings are errors. It needs no network once its libraries are installed.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	$(BIN)/typer noetherperf.cli utils docs --name noetherperf --title "Command line" --output docs/reference/command-line.md
	$(BIN)/python -m pytest tests/test_site.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest bench -v $(ARGS)

bench-page: $(READY)
	$(BIN)/python -m bench.report runs/bench/$(or $(BENCH),quick).json

# Needs no `setup`: a machine with a GPU may have no network, and has its own Python with torch.
gpu-report:
	@$(PYTHON) bench/gpu_report.py $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
