# Two commands do everything: make reproduce, make test. Each sets itself up first.
PROFILE ?= quick
PARAMS  ?=
JOBS    ?= 2
PYTHON  ?= python3
PY      := .venv/bin/python
STAMP   := .venv/.installed

NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb))
MAP       := $(firstword $(NOTEBOOKS))
CHAPTERS  := $(filter-out $(MAP),$(NOTEBOOKS))
SOURCES   := $(shell find hinv -name "*.py")
# JOBS notebooks at a time, one thread each, the longest first
LONG      := $(wildcard notebooks/09*.ipynb notebooks/12*.ipynb notebooks/07*.ipynb notebooks/08*.ipynb notebooks/10*.ipynb)
ORDERED   := $(LONG) $(filter-out $(LONG),$(CHAPTERS))
NBVAL      = OMP_NUM_THREADS=1 HINV_OUTPUT=$(CURDIR)/build/nbval $(PY) -m pytest -q -p no:cacheprovider --nbval-lax --nbval-cell-timeout=900
DONE      := $(patsubst notebooks/%,build/notebooks/%,$(ORDERED) $(MAP))

export PYTHONWARNINGS := ignore
# training runs are found by their key, by notebooks and tests alike
export HINV_RUNS ?= $(CURDIR)/results/runs

.PHONY: help setup reproduce notebooks parameters test test-browser check bench fuzz cuda distributed wheel lab explore demo front book clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo 'JOBS=N notebooks at a time (2); PROFILE=quick|full and PARAMS="seed=1 dataset=cifar10" set the parameters of make reproduce'

setup: $(STAMP)  ## .venv with the pinned packages and hinv in editable mode

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hinv needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

reproduce: $(STAMP) parameters  ## run what changed of the notebooks, then the table of claims (build/report.html)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs $(JOBS) --keep-going notebooks || true
	@$(PY) -m hinv.companion.reproduce report

parameters: $(STAMP)
	@$(PY) -m hinv.companion.reproduce parameters profile=$(PROFILE) $(PARAMS)

notebooks: $(DONE)

build/notebooks/%.ipynb: notebooks/%.ipynb $(SOURCES) build/parameters.json
	@$(PY) -m hinv.companion.reproduce run $<

# the map quotes the numbers of all chapters
$(MAP:notebooks/%=build/notebooks/%): $(CHAPTERS:notebooks/%=build/notebooks/%)

check: $(STAMP)  ## for daily work: ruff, types, and the tests of the library (no notebooks)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m ty check
	$(PY) -m pytest -q -n $(JOBS) tests

test: check  ## make check, and nbval on every notebook (results of make reproduce are left alone)
	$(NBVAL) -n $(JOBS) --dist loadfile $(ORDERED)
	$(NBVAL) $(MAP)

test-browser: $(STAMP)  ## what a reader sees, in a real browser (Debian's chromium; screenshots in build/browser/)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/browser

bench: $(STAMP)  ## speed and memory of the fast solver on this machine (about ten minutes), results/bench.json
	$(PY) -m hinv.companion.bench

SECONDS ?= 600
SEED    ?= 0

fuzz: $(STAMP)  ## random networks and calls against dense matrices (SECONDS=600, SEED=0), results/fuzz.json
	$(PY) tests/fuzz.py --seconds $(SECONDS) --seed $(SEED) --jobs $(JOBS)

# tests of what has no device of its own to care for (training, notebooks, peers) run on the CPU alone
ON_CUDA := symmetric stages factor hessian spectrum optim modes paper blocks chain posterior laplace poles jets closure

cuda: $(STAMP)  ## the tests of the mathematics and the figures of speed on this machine's GPU, results/gpu.json
	HINV_DEVICE=cuda $(PY) -m pytest -q -n $(JOBS) $(ON_CUDA:%=tests/test_%.py)
	$(PY) -m hinv.companion.bench --device cuda

distributed: $(STAMP)  ## two processes on this machine: products, factorizations and Gauss-Newton steps as those of one
	$(PY) -m pytest -q tests/test_distributed.py

wheel: $(STAMP)  ## wheel and sdist in dist/, tried in an empty environment outside the source tree
	rm -rf dist build/wheel
	$(PY) -m build --quiet --outdir dist .
	$(PY) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && wheel/bin/python $(CURDIR)/tests/smoke.py

book: $(STAMP)  ## pages, notebooks, interface and measured tables as a book: build/book/html/index.html
	@OMP_NUM_THREADS=1 $(PY) -m hinv.companion.book

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(PY) -m jupyterlab --notebook-dir notebooks

PORT ?= 8866

explore: $(STAMP)  ## notebook 13 as a page without code, http://127.0.0.1:8866 (PORT=8866), on this machine alone
	@echo "Open http://127.0.0.1:$(PORT) in a browser (it takes some twenty seconds to appear). Control-C ends it."
	@HINV_OUTPUT=$(CURDIR)/build/explore JUPYTER_PATH=$(CURDIR)/docs/jupyter $(PY) -m voila notebooks/13_explorer.ipynb \
		--template=offline --no-browser --Voila.ip=127.0.0.1 --port=$(PORT) --Voila.port_retries=0 --Voila.log_level=ERROR

demo: $(STAMP)  ## ten seconds: five lines of hinv, three numbers, figures/demo.png
	@OMP_NUM_THREADS=1 $(PY) -m hinv.companion.demo

front: $(STAMP)  ## docs/elimination.svg and docs/social.png, from a real network's numbers
	OMP_NUM_THREADS=1 $(PY) -m hinv.companion.front

clean:  ## remove what runs made (keeps data/, .venv and the figures the README shows)
	rm -rf build dist results/[0-9]*.json results/runs .pytest_cache .ruff_cache .hypothesis *.egg-info
	find hinv tests -name __pycache__ -prune -exec rm -rf {} +
	find figures -type f ! -name README.md ! -name 04_sparsity.png -delete
