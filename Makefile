# Each target makes what it needs: an environment in .venv with the package, its tests, examples and linters, all by pip.
# The install is editable: what runs from the checkout is the installed package, and edited Python needs no new install.

PYTHON ?= python3
ARGS ?=
FUZZ_SECONDS ?= 600

venv := .venv
python := $(venv)/bin/python
installed := $(venv)/installed
cpp := $(shell find csrc -type f)
# The torch that the package is built against: one download serves the build and the environment.
TORCH ?= $(shell sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)
# The peer of the benchmark; without it, where it cannot be installed, the benchmark leaves it out.
PEER := $(shell sed -n 's/^benchmark = \["\(.*\)"\]/\1/p' pyproject.toml)

.PHONY: help demo test fuzz bench lint clean

help:
	@echo "make demo    train the examples on real data, write runs/demo/index.html"
	@echo "make test    run all tests"
	@echo "make fuzz    compare random calls with plain PyTorch for ten minutes (FUZZ_SECONDS=600)"
	@echo "make bench   time the fused layers against plain PyTorch and sporco, a quarter of an hour (ARGS=--quick: minutes;"
	@echo "             ARGS=--check: against the committed results)"
	@echo "make lint    check the style of Python and C++"
	@echo "make clean   remove what was built and installed here, but not runs/"
	@echo "Options: PYTHON=python3.12 (which Python), TORCH=torch (the newest; default $(TORCH)),"
	@echo "         ARGS=\"-k lista\" (handed on to demo, test and bench)"

demo: $(installed)
	$(python) -m examples.demo $(ARGS)

test: $(installed)
	$(python) -m pytest $(ARGS)

# Every run begins elsewhere; a failure prints the seed that leads there at once.
fuzz: $(installed)
	DSC_OPS_FUZZ_SECONDS=$(FUZZ_SECONDS) DSC_OPS_FUZZ_SEED=$${DSC_OPS_FUZZ_SEED:-$$(date +%s)} \
		$(python) -m pytest tests/support/test_fuzz.py $(ARGS)

bench: $(installed) $(venv)/peer
	$(python) -m benchmarks $(ARGS)

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(venv)/bin/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(cpp))

# A new install is also the rebuild when C++ changed. CONTRIBUTING.md has the quicker way for those who change C++ often.
$(installed): $(cpp) setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "dsc_ops: $(PYTHON) was not found; name a Python with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("dsc_ops needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + \
		"; name another with make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(python) || $(PYTHON) -m venv $(venv)
	$(python) -m pip install --editable ".[test,examples,lint]" "$(TORCH)"
	@touch $@

$(venv)/peer: $(installed)
	-$(python) -m pip install "$(PEER)" && touch $@

clean:
	rm -rf $(venv) build dist *.egg-info dsc_ops/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
