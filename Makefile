# make test: everything that a change must pass. make demo: the main job. Both set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := test

BIN := .venv/bin
# Tools of the environment first, so that a step finds the same cmake and ninja as the installation.
export PATH := $(CURDIR)/$(BIN):$(PATH)
PYTEST := $(BIN)/python -m pytest
ASAN := build/asan
CXX ?= c++

.PHONY: setup build style quality test test-slow emu asan demo reproduce wheel wheel-check sdist docs site architectures bench \
  gpu gpu-dry-run

setup:  ## .venv with torch, dependencies and the package; TORCH=... and PYTHON=... override
	@tools/setup.sh

build: setup  ## compile what changed
	@$(BIN)/cmake --build build/cmake | tail -n 1

style: setup  ## formatting and lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

quality: style  ## style and types
	$(BIN)/mypy

test: build quality  ## style, types, the suite (which builds the site too) without its slow part, a small part under sanitizers
	PYMEND_REQUIRE_KERNELS=1 OMP_NUM_THREADS=1 $(PYTEST) -n 2 -m "not slow"
	@$(MAKE) --no-print-directory asan

test-slow: build
	PYMEND_REQUIRE_KERNELS=1 $(PYTEST) -m slow

emu: build  ## the CUDA kernels' own sources on fibers
	$(PYTEST) tests/test_emulation.py tests/ops -k "emu or emulation"

asan: setup  ## CPU ops and emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/cmake -S . -B $(ASAN) -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DPYMEND_CUDA=off \
	  -DPYMEND_SANITIZE=address,undefined -DPYMEND_OUTPUT=$(CURDIR)/$(ASAN)/out \
	  -DPYMEND_EMU_OUTPUT=$(CURDIR)/$(ASAN)/out | grep pymend
	@$(BIN)/cmake --build $(ASAN) | tail -n 1
	PYMEND_NATIVES=$(ASAN)/out ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(PYTEST) tests/test_emulation.py tests/ops -q -k "test_forward and (cpu or emu) or emulation and (64 or caught)"

demo: build  ## train an editor on the built-in facts and edit a model with it
	$(BIN)/pymend demo

reproduce: build  ## every table of the paper, reduced, on small models made here: into runs/reproduce/mini-quick
	$(BIN)/pymend reproduce all --quick --jobs 2

wheel: setup  ## dist/*.whl, for every Python from 3.10 on and the glibc of this machine; torch's libraries stay outside
	@rm -rf build/lib* build/bdist* build/wheel dist  # setuptools would pack what an earlier build left there
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	$(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl

sdist: setup  ## dist/*.tar.gz
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m build --sdist

wheel-check: wheel  ## the one wheel under torch 2.11, 2.13 and 2.14 (CUDA builds: GBs); CHECK="torch==..." chooses
	@tools/check_wheel.sh $(CHECK)

docs: setup  ## the tables of measurements in README and docs, from the raw rows; then the site, into build/docs
	$(BIN)/python benchmarks/report.py
	@$(MAKE) --no-print-directory site

site: setup  ## build/docs/index.html from docs and docstrings; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs

architectures: build  ## docs/architectures.md: every architecture of transformers, tried; 15 minutes on a core, goes on where it stopped
	$(BIN)/python tests/sweep.py

bench: build
	$(PYTEST) benchmarks

gpu:  ## OUT=folder: everything about one GPU in 9 minutes; needs its own torch, no set-up
	PYTHONPATH=benchmarks python3 -m gpu.run $(if $(OUT),"$(OUT)",$(error name a folder: make gpu OUT=folder))

gpu-dry-run: build  ## the same stages on a CPU at tiny sizes, into build/gpu-dry-run; measures nothing
	PYTHONPATH=benchmarks python3 -m gpu.run --dry-run "$(or $(OUT),build/gpu-dry-run)"
