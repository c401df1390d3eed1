# `make demo` and `make test` do all the set-up themselves: a .venv, the install, the run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two processes of one thread each: with more, OpenMP's threads wait for each other.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
# The interpreter's tests need the variable before triton is imported, hence a process of their own.
RUN_INTERPRETER := TRITON_INTERPRET=1 FASTUNET_BACKEND=triton $(RUN_TESTS) -m

.PHONY: demo test test-all test-gpu test-gpu-memcheck lint static static-releases perf-table dist dist-check clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastunet needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# A stamp holds what was installed: it is older than what it depends on exactly when an install is due.
$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt tests/compiler/requirements.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[dev,bench]'
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/dropin -r tests/compiler/requirements.txt
	touch $@ $(VENV)/train.stamp

demo: $(VENV)/train.stamp
	$(BIN)/fastunet demo --overwrite

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(RUN_TESTS) -m 'not slow and not gpu and not interpreter'
	$(RUN_INTERPRETER) 'interpreter and not slow'

test-all: lint
	$(RUN_TESTS) -m 'not gpu and not interpreter'
	$(RUN_INTERPRETER) interpreter

# One process: the tests of memory take all there is.
test-gpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m gpu

# Without torch's caching of memory, an access past the end of a tensor is one past the end of its allocation.
test-gpu-memcheck: $(VENV)/dev.stamp
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	  $(BIN)/python -m pytest -q -m gpu -k 'test_parity or test_statistics_of_a_convolution' \
	  tests/kernels/test_kernels_conv3x3.py tests/kernels/test_kernels_norm.py

static: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks static

# With the releases of Triton that torch 2.10 to 2.15 bring: each in a folder that is searched before .venv's packages.
static-releases: $(VENV)/dev.stamp
	for release in 3.6 3.7 3.8 3.9; do \
	  $(PIP) install -q --no-deps --upgrade --target $(VENV)/triton-$$release "triton==$$release.*" && \
	  PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$release $(BIN)/python -m benchmarks static --quick || exit 1; \
	done

# The README's figures of speed, from the files in benchmarks/results.
perf-table: $(VENV)/dev.stamp
	$(BIN)/python docs/generate.py

# A wheel, and the source distribution that it is built from.
dist: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/build
	$(VENV)/build/bin/python -m pip --disable-pip-version-check install -q 'build>=1.2'
	rm -rf dist
	$(VENV)/build/bin/python -m build

# Each installed into an empty environment, and used from an empty folder, where there is no repository.
dist-check: dist
	for file in $(CURDIR)/dist/*.whl $(CURDIR)/dist/*.tar.gz; do \
	  rm -rf $(VENV)/check && $(BIN)/python -m venv $(VENV)/check && mkdir $(VENV)/check/empty && \
	  $(VENV)/check/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt "$$file[train]" && \
	  cp examples/own_unet_with_amp.py examples/shapes.py $(VENV)/check/empty && cd $(VENV)/check/empty && \
	  ../bin/fastunet doctor && ../bin/fastunet demo --steps 5 && ../bin/python own_unet_with_amp.py && \
	  cd $(CURDIR) || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
