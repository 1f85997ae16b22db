# Two commands from a fresh clone: `make demo` and `make test`. The machine needs Linux, Python 3.11 or
# newer, a C++17 compiler and make; everything else is installed into .venv, at the versions of
# constraints.txt. A second run finds its work done and starts at once.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install -qq --constraint constraints.txt
NATIVE := CMakeLists.txt libportattn.map $(shell find portattn/plan/csrc backends/cpu/csrc export/csrc -type f 2>/dev/null)
say = @printf '\n== %s\n' $(1)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test format bench wheelhouse clean

help:
	@echo 'make demo        set everything up and run portattn on a real model and a real text'
	@echo 'make test        set everything up and run every check that CI runs'
	@echo 'make bench       measure this machine; results go to benchmarks/results/'
	@echo 'make wheelhouse  the wheels that a GPU machine without a network needs, in .whl/'
	@echo 'make format      format Python, C++ and CUDA files'
	@echo 'make clean       remove .venv, build folders and caches'

setup: $(VENV)/.built

demo: setup
	$(call say,'running the demo; pictures go to demo_output/')
	$(BIN)/portattn demo

test: setup
	$(call say,'running every check')
	./check

bench: setup
	$(call say,'measuring this machine; results go to benchmarks/results/')
	for name in planning cpu_forward cpu_backward call_overhead onnx_attention; do \
	  $(BIN)/python -m benchmarks.$$name || exit 1; done

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	git ls-files -co --exclude-standard '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs ls 2>/dev/null | \
	  xargs $(BIN)/clang-format -i

wheelhouse: setup
	$(call say,'collecting wheels for Python 3.12 on Linux x86-64 in .whl/')
	$(BIN)/python tools/wheelhouse.py

clean:
	rm -rf $(VENV) build dist .whl demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'portattn needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3 ...'; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo 'portattn needs a C++17 compiler: install g++ or clang++, or name one in CXX'; exit 1; }
	$(call say,'making the virtual environment .venv')
	$(PYTHON) -m venv $(VENV)

# torch first and by name, so that no other package's wish decides which build of it comes.
$(VENV)/.required: pyproject.toml constraints.txt | $(BIN)/python
	$(call say,'installing torch 2.13.0 (a few minutes on a new machine)')
	$(INSTALL) torch==2.13.0
	$(call say,'installing what builds portattn and what its extras need')
	$(INSTALL) scikit-build-core cmake ninja
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.built: $(NATIVE) $(VENV)/.required
	$(call say,'building libportattn')
	$(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@
