# make demo | test | bench | readme-numbers | inspect | lint | sanitize    each sets up .venv first when it is missing or stale
#   PYTHON=python3.12                    the interpreter to build .venv with
#   TORCH_INDEX=<url>                    where to take torch from, such as PyTorch's CPU index (no CUDA packages)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stellar_fast_installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.h)

# Pins the build requirements too: pip reads -c for the environment alone, these for its build environments.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: help demo test bench readme-numbers inspect lint sanitize clean
help:
	@sed -n 's/^# *//p;/^$$/q' Makefile | head -3

demo: $(STAMP)
	$(BIN)/stellar-fast demo --out demo_out

test: lint
	$(BIN)/python -m stellar_fast.native
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

readme-numbers: $(STAMP)
	$(BIN)/python benchmarks/readme.py

inspect: $(STAMP)
	$(BIN)/stellar-fast inspect --all

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ under GCC's sanitizers. Inlining and fused products as at -O3, to whose roundings tests compare. Not asked: leaks, since Python
# and torch keep what they have to the end, and one test that measures the memory of the process, freed blocks of which are held back.
# Memory that there is not comes back as NULL, as without them: tests ask for it.
SANITIZED := build/sanitized
SANITIZE_FLAGS := -O1 -fexpensive-optimizations -finline-functions -finline-small-functions \
	-g -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(STAMP)
	CXX=$(CXX) $(BIN)/python -m pip install --no-deps --upgrade --target $(SANITIZED) . -C build-dir=$(SANITIZED)_cmake \
		-C install.strip=false -C cmake.define.STELLAR_FAST_CUDA=OFF -C "cmake.define.CMAKE_CXX_FLAGS_RELEASE=$(SANITIZE_FLAGS)"
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n auto --dist worksteal -p tests.sanitized --capture=sys tests/ops tests/data \
		--deselect tests/ops/test_token_attention.py::test_a_long_sequence_leaves_no_scratch_behind

clean:
	rm -rf build dist demo_out .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is missing, or older than the Python 3.11 that constraints.txt needs; try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "make: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
ifdef TORCH_INDEX
	$(BIN)/python -m pip install -c constraints.txt --index-url $(TORCH_INDEX) torch
endif
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
