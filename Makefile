# make demo | make test: from a fresh clone, with python3 (>= 3.10), g++ and make.  Each makes .venv, installs the pinned
# requirements there and builds; only the installation needs the network.
#
#   make test TORCH="torch==2.12.0"                        another torch
#   make test TORCH="torch==2.13.0 --index-url <URL>"      from another index, for instance the one with CPU-only wheels
#   make test PYTHON=python3.12                            another Python, when .venv does not exist yet
#   make test STRICT=OFF                                   compilers' warnings are no errors

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

bin := .venv/bin
cxx := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
build_inputs := $(shell find csrc -type f) $(wildcard cmake/*) CMakeLists.txt pyproject.toml

# The operator tables run through the CUDA kernels in sanitize, and only there; these are the other tests of operators.
simt_tests := $(addprefix tests/test_,autograd.py compile.py nn.py stage.py bad_input.py)

.PHONY: all demo test bench lint format sanitize clean FORCE
all: .venv/installed

demo: .venv/installed
	$(bin)/layerwise-ext demo

test: STRICT ?= ON
test: .venv/requirements
	$(MAKE) -j2 STRICT=$(STRICT) lint .venv/installed
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(WORKERS) --dist worksteal
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(WORKERS) --backend=simt $(simt_tests)
	WORKERS=$(WORKERS) $(MAKE) sanitize

bench: .venv/installed
	$(bin)/python benchmarks/bench_stage.py

lint: .venv/requirements
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cxx)

format: .venv/requirements
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cxx)

sanitize: .venv/installed
	tests/sanitize.sh $(bin)/python

clean:
	rm -rf build

# The Python side is used from python/ as it stands (an editable installation), so only C++ changes need a build.
.venv/installed: .venv/requirements $(build_inputs)
	$(bin)/python -m pip install --no-build-isolation --no-deps --no-index --editable . \
	  --config-settings=cmake.define.LAYERWISE_STRICT=$(or $(STRICT),OFF)
	@touch $@

.venv/requirements: requirements.txt .venv/torch
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: PYTHON=python3.x")'
	test -x $(bin)/python || $(PYTHON) -m venv .venv
	$(bin)/python -m pip install $(TORCH) -r requirements.txt
	@touch $@

# Changes when TORCH does.
.venv/torch: FORCE
	@mkdir -p .venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
