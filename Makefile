# Two commands do everything: make reproduce, make test. Each sets itself up first.
PROFILE ?= quick
PARAMS  ?=
PYTHON  ?= python3
PY      := .venv/bin/python
STAMP   := .venv/.installed

NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
MAP       := $(firstword $(NOTEBOOKS))
CHAPTERS  := $(filter-out $(MAP),$(NOTEBOOKS))
SOURCES   := $(shell find hinv -name "*.py")
# two notebooks at a time, one thread each, the longest first
LONG      := $(wildcard notebooks/09*.ipynb notebooks/08*.ipynb notebooks/10*.ipynb)
NBVAL      = $(PY) -m pytest -q -p no:cacheprovider --nbval-lax --nbval-cell-timeout=900
DONE      := $(NOTEBOOKS:notebooks/%=build/notebooks/%)

export PYTHONWARNINGS := ignore

.PHONY: help setup reproduce notebooks parameters test bench lab clean
.NOTPARALLEL:

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo 'PROFILE=quick|full and PARAMS="seed=1 dataset=cifar10" set the parameters of make reproduce'

setup: $(STAMP)  ## .venv with the pinned packages and hinv in editable mode

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hinv needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

reproduce: $(STAMP) parameters  ## run what changed of the notebooks, then the table of claims (build/report.html)
	@$(MAKE) --no-print-directory --keep-going notebooks || true
	@$(PY) -m hinv.companion.reproduce report

parameters: $(STAMP)
	@$(PY) -m hinv.companion.reproduce parameters profile=$(PROFILE) $(PARAMS)

notebooks: $(DONE)

build/notebooks/%.ipynb: notebooks/%.ipynb $(SOURCES) build/parameters.json
	@$(PY) -m hinv.companion.reproduce run $<

# the map quotes the numbers of all chapters
$(MAP:notebooks/%=build/notebooks/%): $(CHAPTERS:notebooks/%=build/notebooks/%)

test: $(STAMP)  ## ruff, pytest, and nbval on every notebook (results of make reproduce are left alone)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q -n 2 tests
	HINV_OUTPUT=$(CURDIR)/build/nbval OMP_NUM_THREADS=1 $(NBVAL) -n 2 --dist loadfile $(LONG) $(filter-out $(LONG),$(CHAPTERS))
	HINV_OUTPUT=$(CURDIR)/build/nbval $(NBVAL) $(MAP)

bench: $(STAMP)  ## speed and memory of the fast solver on this machine (about 6 minutes), results/bench.json
	$(PY) -m hinv.companion.bench

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(PY) -m jupyterlab --notebook-dir notebooks

clean:  ## remove what runs made (keeps data/, .venv and the figures the README shows)
	rm -rf build results/[0-9]*.json results/runs .pytest_cache .ruff_cache .hypothesis hinv/__pycache__ tests/__pycache__
	find figures -type f ! -name README.md ! -name 04_sparsity.png -delete
