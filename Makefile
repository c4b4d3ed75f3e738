# Every target creates what it needs: a virtual environment with pinned versions, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?=
BENCH ?=
OUT ?= build/bench
PEERS := $(VENV)/.peers-installed
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(abspath $(BIN)/python),$(PYTHON))
GPU ?=
GPU_XDIST = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo yes)
NO_GPU = $(shell $(GPU_PYTHON) bench/no_gpu.py)

.DEFAULT_GOAL := help
.PHONY: help venv demo test sanitize lint bench gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED)  ## create .venv with the pinned versions

# The stamp comes last: an interrupted installation is done again, a finished one is not.
$(INSTALLED): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The pinned versions need Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing the pinned versions into $(VENV): a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--no-build-isolation --no-deps --editable .
	@touch $@

demo: $(INSTALLED)  ## run a real video through X3D-M twice and compare (DEMO="--network c3d")
	$(BIN)/python -m fastconv demo $(DEMO)

# Several processes, whose waiting threads sleep: spinning, they would take each other's time. What
# compiles for GPUs has threads of its own. Triton's kernels then run once more, by its interpreter.
SHARED := OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --dist loadfile
INTERPRETED := tests/test_depthwise.py tests/test_grouped.py tests/test_winograd.py tests/test_hfa.py \
	tests/test_continual.py $(filter-out %_compile.py %_gpu.py,$(wildcard tests/test_triton_*.py))

test: $(INSTALLED)  ## run the tests (TESTS="tests/test_video.py -x")
ifdef TESTS
	$(BIN)/pytest $(TESTS)
else
	$(SHARED) --ignore=tests/test_triton_compile.py
	$(BIN)/pytest tests/test_triton_compile.py
	TRITON_INTERPRET=1 FASTCONV_TEST_BACKENDS=triton $(SHARED) $(INTERPRETED)
endif

# Memory and undefined behaviour first, then data races: the thread sanitizer does not see into
# OpenMP's library, so that build has threads of its own. Python itself is not instrumented.
SANITIZED := tests/test_winograd.py tests/test_depthwise.py tests/test_grouped.py tests/test_hfa.py \
	tests/test_continual.py tests/test_elementwise.py tests/test_gradients.py
sanitize: $(INSTALLED)  ## the C kernels' tests under the address, undefined behaviour and thread sanitizers
	bash tests/sanitize.sh $(BIN)/python address,undefined $(SANITIZED)
	bash tests/sanitize.sh $(BIN)/python thread $(SANITIZED)

# The type checker wants the tree as it is installed: reference/ as fastconv/reference.
lint: $(INSTALLED)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .typecheck && mkdir -p .typecheck/fastconv
	@ln -s $(CURDIR)/fastconv/* $(CURDIR)/reference $(CURDIR)/triton_kernels $(CURDIR)/bench .typecheck/fastconv/
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p fastconv

bench: $(PEERS)  ## time us against what people run today (BENCH="layers --filter depthwise")
	$(BIN)/python -m fastconv bench $(if $(BENCH),$(BENCH),all --budget 0.3 --limit 830 --json $(OUT)/ --plot $(OUT))

$(PEERS): $(INSTALLED) requirements-bench.txt
	@echo "Installing the peers into $(VENV): a few minutes, once."
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		-r requirements-dev.txt -r requirements-bench.txt
	@touch $@

# For a machine without a network: its own Python brings PyTorch, the package goes beside it.
# Its tests are those of the families on Triton's kernels, by several processes where xdist is.
GPU_TESTS := tests/test_depthwise.py tests/test_grouped.py tests/test_winograd.py tests/test_hfa.py \
	tests/test_continual.py tests/test_torch_gradients.py $(filter-out tests/test_triton_compile.py,$(wildcard tests/test_triton_*.py))
gpu:  ## check and time everything on this machine's GPU (OUT=folder for the rows)
	$(if $(NO_GPU),$(error no GPU here: $(NO_GPU)))
	rm -rf build/gpu-site build/lib && mkdir -p $(OUT)
	$(GPU_PYTHON) -m pip install --disable-pip-version-check --quiet --no-index --no-deps \
		--no-build-isolation --target build/gpu-site .
	wrong=0; PYTHONPATH=build/gpu-site FASTCONV_TEST_BACKENDS=triton $(GPU_PYTHON) -P -m pytest -q \
		$(if $(GPU_XDIST),-n 12) -p no:cacheprovider -p no:benchmark $(GPU_TESTS) || wrong=1; \
	cd build/gpu-site && $(GPU_PYTHON) -m fastconv bench gpu --out $(abspath $(OUT)) $(GPU) && exit $$wrong

clean:  ## remove everything that was created, .venv too
	rm -rf $(VENV) .typecheck .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find fastconv reference triton_kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
