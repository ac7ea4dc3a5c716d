# Needs python3 (3.11 or newer, with venv and headers), make, a C++20 compiler and a package index
# for pip. `make` lists the targets. Everything goes into $(VENV), nothing is installed elsewhere.
#
#   make test                             on a fresh machine: environment, build, tests
#   make test PYTEST_ARGS="-k merge -x"   some of them
#   make demo TORCH="torch==2.12.*"       with another torch, any requirement that pip understands
#   make demo PYTHON=python3.12 VENV=.venv312
#
# The operators are compiled against the torch that is then installed; setup.py lists the variables
# that steer this (IMMUNIZE_EXT_CUDA, TORCH_CUDA_ARCH_LIST).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
CUDA_ARGS ?=
SANITIZER_TOOLS ?= memcheck racecheck initcheck synccheck
DEMO_ARGS ?=
MUTANTS ?=
NIGHTLY ?=
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
# Stamps live in the environment: removing it makes all of them be done again.
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_NO_INPUT := 1
# A Makefile user wants the compiled operators, so a failure to compile them is an error here.
export IMMUNIZE_EXT_BUILD ?= 1

# What the compiled part is made of, and all files of a language.
NATIVE := setup.py pyproject.toml immunize_ext/_version.py \
  $(sort $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*))
PYTHON_SOURCES := immunize_ext python_tests benchmarks csrc docs setup.py .ci
CPP_SOURCES := $(sort $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu*'))

.PHONY: help build test test-fallback mutants nightly simt ptx cuda gpu sanitizer lint format docs \
  demo bench doctor sdist wheel site clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

build: $(STAMPS)/build $(STAMPS)/help  ## environment and compiled operators

test: $(STAMPS)/build $(STAMPS)/test  ## all tests, on $(JOBS) processes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-fallback: $(STAMPS)/build $(STAMPS)/test  ## operator tests without the compiled part
	IMMUNIZE_EXT_DISABLE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" \
	  -W ignore::immunize_ext.errors.FallbackWarning $(PYTEST_ARGS)

mutants: $(STAMPS)/build $(STAMPS)/test  ## do the tests notice planted faults? (hours; resumes)
	$(BIN)/python .ci/mutants.py $(MUTANTS)

nightly: $(STAMPS)/build $(STAMPS)/test  ## sanitizers, fuzz, kill and resume, bit flips (hours)
	PYTHONPATH=.ci $(BIN)/python -W ignore -m nightly $(NIGHTLY)

lint: $(STAMPS)/build $(STAMPS)/test $(STAMPS)/lint  ## style, types, import direction
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/lint  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CPP_SOURCES)

docs: $(STAMPS)/build $(STAMPS)/test  ## run the examples of docstrings, README and docs/ alone
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q \
	  python_tests/test_docstring_examples.py python_tests/test_documentation.py

simt: $(STAMPS)/build $(STAMPS)/test  ## CUDA kernels on the CPU, under the SIMT executor
	$(BIN)/python csrc/simt/build.py
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal python_tests/simt $(PYTEST_ARGS)

# The PTX that nvcc makes of the kernels, under the executor: most tests of the kernels, and a count
# of what it costs.
ptx: $(STAMPS)/build $(STAMPS)/test  ## nvcc's code for the CUDA kernels on the CPU (needs nvcc)
	$(BIN)/python csrc/simt/ptx/build.py
	IMMUNIZE_EXT_SIMT=ptx $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" \
	  --ignore-glob "*/test_simt_executor.py" --ignore-glob "*/test_ptx.py" $(PYTEST_ARGS) \
	  python_tests/simt
	$(BIN)/python csrc/simt/ptx/costs.py $(filter --check,$(CUDA_ARGS))

cuda: ptx  ## compile and link the CUDA part (environment of its own, .venv-cuda)
	$(BIN)/python .ci/cuda_build.py $(CUDA_ARGS)

# For a machine with a GPU, in the Python environment that is active there: torch for its CUDA
# release is installed already, and is what the operators are compiled against.
GPU_PYTHON ?= python3
gpu:  ## build against the torch at hand, test and measure on the GPU (GPU_PYTHON, a CUDA torch)
	$(GPU_PYTHON) .ci/gpu.py run

sanitizer:  ## a reduced GPU suite under compute-sanitizer, $(SANITIZER_TOOLS)
	$(GPU_PYTHON) .ci/gpu.py sanitizer $(SANITIZER_TOOLS)

demo: $(STAMPS)/build $(STAMPS)/demo  ## immunize, attack and report on real digits: both jobs
	$(BIN)/immunize demo --force $(DEMO_ARGS)

bench: $(STAMPS)/build $(STAMPS)/test  ## every benchmark; the results go to benchmarks/results
	$(BIN)/python -m benchmarks.run --out benchmarks/results $(BENCH_ARGS)

doctor: $(STAMPS)/build  ## what is installed, what is wrong and how to fix it
	$(BIN)/immunize doctor

sdist: $(STAMPS)/build $(STAMPS)/lint  ## source package in dist/
	$(BIN)/python -m build --sdist --no-isolation

# docs/packaging.md says what a wheel is good for.
WHEEL_ARGS ?=
wheel: $(STAMPS)/build $(STAMPS)/help $(STAMPS)/lint  ## wheel in dist/, checked and tried
	$(BIN)/python .ci/wheel.py $(WHEEL_ARGS)

site: $(STAMPS)/docs  ## documentation site in build/site; any broken link is an error
	$(BIN)/python .ci/documentation.py --out build/site

clean:  ## remove what was built, keep the environment
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -f immunize_ext/_C*.so immunize_ext/_build_info.json immunize_ext/_help.json
	rm -f $(STAMPS)/build $(STAMPS)/help
	find immunize_ext python_tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well
	rm -rf $(VENV)

# --- the environment, in steps that each run once -------------------------------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) must be Python 3.11 or newer, got $$($(PYTHON) --version 2>&1);" \
	    "use make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make virtual environments;" \
	    "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	  { echo "make: the headers of $(PYTHON) (Python.h) are missing;" \
	    "on Debian and Ubuntu: apt-get install python3-dev" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
	  { echo "make: no C++ compiler $${CXX:-c++}; on Debian and Ubuntu: apt-get install g++;" \
	    "to go without: pip install . gives the slower pure-Python package" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# One stamp for each value of TORCH, so that another value installs that torch and compiles anew.
TORCH_STAMP := $(STAMPS)/torch-$(shell printf %s '$(TORCH)' | cksum | cut -d ' ' -f 1)
$(TORCH_STAMP): | $(STAMPS)/venv
	$(PIP) install --quiet "setuptools>=77" wheel ninja numpy $(TORCH)
	rm -f $(STAMPS)/torch-*
	touch $@

# The Python part is installed as a link to this folder, in the form that editors follow too; the operators are then compiled in place,
# where ninja compiles again only what changed.
$(STAMPS)/package: $(TORCH_STAMP) setup.py pyproject.toml immunize_ext/_version.py
	IMMUNIZE_EXT_BUILD=0 $(PIP) install --quiet --no-build-isolation --editable . $(TORCH) \
	  --config-settings editable_mode=compat
	touch $@

$(STAMPS)/build: $(STAMPS)/package $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -c 'from immunize_ext import _load; _load.require_compiled("make"); \
	  print("immunize_ext:", _load.status().reason)'
	touch $@

# What --help shows, ahead of the first time: the flags of every method that can be imported here.
$(STAMPS)/help: $(wildcard immunize_ext/*.py immunize_ext/*/*.py immunize_ext/*/*/*.py) | \
  $(STAMPS)/build
	$(BIN)/python -c 'from immunize_ext import cli; cli.keep_help()'
	touch $@

# The extras of the package that is installed above. torch is named again so that no dependency
# brings another one.
$(STAMPS)/demo: $(STAMPS)/package
	$(PIP) install --quiet "immunize_ext[data,diffusion,report]" $(TORCH)
	touch $@

$(STAMPS)/test: $(STAMPS)/package
	$(PIP) install --quiet "immunize_ext[data,diffusion,report,test]" $(TORCH)
	touch $@

$(STAMPS)/docs: $(STAMPS)/package
	$(PIP) install --quiet "immunize_ext[docs]" $(TORCH)
	touch $@

$(STAMPS)/lint: $(STAMPS)/package
	$(PIP) install --quiet "immunize_ext[dev]" $(TORCH)
	touch $@
