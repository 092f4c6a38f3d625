# make reproduce   the whole recipe (RECIPE=tiny unless set), from raw images to a published pipeline
# make smoke       the same in about 100 seconds, with a model too small to be good
# make draw PROMPT="a red circle"   one image from the newest published pipeline
# make test        all tests; make test-fast: those without training
# make gpu-check   on a machine with a GPU: does it work, how fast is it (benchmarks/first_card.py; results in first_card/)
# make test-gpu    the tests that need a GPU; both take PYTHON as it is, where packages are missing too
# make lint        ruff and mypy; make format repairs what ruff can
# make images      images of all roles, by docker, podman or buildah; REGISTRY=... pushes them, VARIANT=cuda for GPUs
# make preflight   what a run of RECIPE on SHAPE needs of the cluster in config/flyte.yaml
# make register    the workflows, by the digests of make images, at this commit, for SHAPE
# make lock        resolves constraints.txt again
# Each makes the environment it needs in .venv.

PYTHON ?= python3
RECIPE ?= tiny
SOURCE ?=
SHAPE ?= 1x1
VARIANT ?= cpu
REGISTRY ?=
CONFIG ?= config/flyte.yaml
VENV := .venv
STAMP := $(VENV)/.installed
# The project's environment where there is one, else Python as it is: a borrowed GPU machine has a PyTorch of its own.
GPU_PYTHON = $(if $(wildcard $(STAMP)),$(VENV)/bin/python,$(PYTHON))

.PHONY: reproduce smoke draw test test-fast test-gpu gpu-check lint format lock images register preflight env clean

reproduce: $(STAMP)
	$(VENV)/bin/pyflyte run workflows/reproduce.py reproduce --recipe $(RECIPE) $(if $(SOURCE),--source "$(SOURCE)")

smoke:
	$(MAKE) reproduce RECIPE=smoke

# PROMPT and SEED reach Python through the environment: quotes in a prompt are then no part of a shell command.
draw: export NUCLEUS_PROMPT = $(PROMPT)
draw: $(STAMP)
	@$(VENV)/bin/python -m tasks.draw "$$NUCLEUS_PROMPT" --seed $(or $(SEED),0)

# A worker for each of two cores, each with one thread; files stay together, since they share fixtures.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow" tests/unit $(ARGS)

gpu-check:
	$(GPU_PYTHON) benchmarks/first_card.py $(ARGS)

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# CUDA packages of torch are left out: constraints.txt serves CPU and CUDA builds alike.
lock: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --python-version 3.11 --quiet --no-header --no-annotate \
		--no-emit-package setuptools --output-file constraints.new
	grep -vE '^(nvidia-|cuda-)' constraints.new > constraints.txt
	rm constraints.new

images: $(STAMP)
	$(VENV)/bin/python -m containers.build --variant $(VARIANT) $(if $(REGISTRY),--registry "$(REGISTRY)") $(ARGS)

register: $(STAMP)
	$(VENV)/bin/python -m tools.register --config "$(CONFIG)" --shape $(SHAPE) $(ARGS)

preflight: $(STAMP)
	$(VENV)/bin/python -m tasks.preflight --config "$(CONFIG)" --recipe $(RECIPE) --shape $(SHAPE) $(ARGS)

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .nucleus
