# Each target makes what it needs: an environment in .venv with the package, its tests, examples and linters, all by pip.
# The install is editable: what runs from the checkout is the installed package, and edited Python needs no new install.

PYTHON ?= python3
ARGS ?=
# Files of tests are shared out to two processes, which most machines can hold.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
# Where make bench measures: cpu or cuda.
DEVICE ?= cpu
FUZZ_SECONDS ?= 600
# Python compiles the modules that it imports; pip would compile all there are, for minutes. Where Python is told not to keep
# what it compiled, as in many containers, each process would do it again: 4 seconds for torch, 17 for the examples.
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

venv := .venv
python := $(venv)/bin/python
installed := $(venv)/installed
cpp := $(shell find csrc -type f)
# The torch that the package is built against: one download serves the build and the environment.
TORCH ?= $(shell sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)

# The torch versions of the matrix, and a wheel to take in place of a new one.
TORCHES ?= 2.10.0 2.13.0 2.14.1
WHEEL ?=
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
# What reads compiled CUDA kernels; these packages exist for Linux only.
CUDA_TOOLS := $(shell sed -n 's/^cuda-check = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')

.PHONY: help demo test test-cuda-sim test-gpu cuda-check fuzz bench lint docs wheel audit matrix matrix-python \
	clean

help:
	@echo "make demo    train the examples on real data, write runs/demo/index.html"
	@echo "make test    run all tests"
	@echo "make test-cuda-sim"
	@echo "             only the tests of the CUDA kernels, whose source runs on the CPU: no GPU is needed"
	@echo "make cuda-check"
	@echo "             hold the compiled CUDA kernels against their budget; needs no GPU (ARGS=--update: a new budget)"
	@echo "make test-gpu"
	@echo "             on a machine with a GPU: run the tests there, write tests/results/GPU.json to commit"
	@echo "make fuzz    compare random calls with plain PyTorch for ten minutes (FUZZ_SECONDS=600)"
	@echo "make bench   time the fused layers against plain PyTorch and sporco, 15 to 45 minutes (ARGS=--quick: few;"
	@echo "             ARGS=--check: against the committed results; DEVICE=cuda: on a GPU; ARGS=--roofline: predictions for GPUs)"
	@echo "make lint    check the style of Python and C++"
	@echo "make docs    build the documentation: build/docs/html/index.html"
	@echo "make wheel   make the sdist and the manylinux wheel in dist"
	@echo "make audit   make the wheel and look into it: its libraries, symbols and tag (WHEEL=file: into this one)"
	@echo "make matrix  run the tests with one wheel under each torch (TORCHES=\"$(TORCHES)\", WHEEL=file, KEEP=1: keep the"
	@echo "             environments); an hour"
	@echo "make matrix-python  build and try the package with each Python from 3.10 on that is found here"
	@echo "make clean   remove what was built and installed here, but not runs/"
	@echo "Options: PYTHON=python3.12 (which Python), TORCH=torch (the newest; default $(TORCH)),"
	@echo "         ARGS=\"-k lista\" (handed on to demo, test, bench, wheel and matrix),"
	@echo "         PARALLEL= (the tests in one process; default: files shared out to two)"

demo: $(installed)
	$(python) -m examples.demo $(ARGS)

test: $(installed)
	$(python) -m pytest $(PARALLEL) $(ARGS)

test-cuda-sim: $(installed)
	$(python) -m pytest $(wildcard tests/test_cuda_*.py) $(ARGS)

cuda-check: $(installed) $(venv)/cuda-tools
	PYTHONPATH=tests $(python) -m cuda_static $(ARGS)

test-gpu: $(installed)
	$(python) -m pytest tests/test_gpu.py --device cuda $(ARGS)

# Every run begins elsewhere; a failure prints the seed that leads there at once.
fuzz: $(installed)
	DSC_OPS_FUZZ_SECONDS=$(FUZZ_SECONDS) DSC_OPS_FUZZ_SEED=$${DSC_OPS_FUZZ_SEED:-$$(date +%s)} \
		$(python) -m pytest tests/support/test_fuzz.py $(ARGS)

bench: $(installed)
	$(python) -m benchmarks --device $(DEVICE) $(ARGS)

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(venv)/bin/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(cpp)) $(wildcard tests/cuda_sim/*.h tests/cuda_sim/*.cpp)

docs: $(installed) $(venv)/docs
	$(python) -m sphinx -b html -W --keep-going -q -d build/docs/doctrees docs build/docs/html
	@echo "The site: build/docs/html/index.html"

wheel: $(installed) $(venv)/wheel
	$(python) -m tests.shipping.wheel $(ARGS)

audit: $(if $(WHEEL),$(installed),wheel)
	$(python) -m tests.shipping.audit $(or $(WHEEL),dist/*.whl)

matrix: $(installed) $(venv)/wheel
	$(python) -m tests.shipping.matrix --torch $(TORCHES) $(if $(KEEP),--keep) $(if $(WHEEL),--wheel $(WHEEL)) $(PARALLEL) $(ARGS)

matrix-python: $(installed)
	$(python) -m tests.shipping.pythons $(ARGS)

# What single targets need besides, from the extra of that name.
$(venv)/docs $(venv)/wheel: $(installed)
	$(python) -m pip install $(call extra,$(notdir $@))
	@touch $@

# A new install is also the rebuild when C++ changed. CONTRIBUTING.md has the quicker way for those who change C++ often.
$(installed): $(cpp) setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "dsc_ops: $(PYTHON) was not found; name a Python with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("dsc_ops needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + \
		"; name another with make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	test -x $(python) || $(PYTHON) -m venv $(venv)
	$(python) -m pip install --editable ".[test,examples,dropin,lint]" "$(TORCH)"
	@touch $@

$(venv)/cuda-tools: $(installed)
	$(python) -m pip install $(CUDA_TOOLS) && touch $@

clean:
	rm -rf $(venv) build dist *.egg-info dsc_ops/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
