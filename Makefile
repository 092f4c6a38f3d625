# make reproduce   runs a recipe (RECIPE=tiny by default), from raw images to a published pipeline
# make smoke       runs the same steps in under 2 minutes, with a model too small to give good images
# make draw PROMPT="a red circle"   draws one image with the newest published pipeline
# make test        runs all tests; make test-fast: the unit tests that take about a second or less
# make gpu-check   checks and measures a machine with a GPU (benchmarks/first_card.py; results in first_card/)
# make test-gpu    runs the tests that need a GPU. Without .venv, both use PYTHON and do not install packages
# make lint        runs ruff and mypy; make format applies ruff's fixes
# make images      builds the images of all roles with docker, podman or buildah; REGISTRY=... pushes them, VARIANT=cuda for GPUs
# make preflight   checks that the cluster in config/flyte.yaml can run RECIPE on SHAPE
# make register    registers the workflows at this commit for SHAPE, with the digests of make images
# make lock        resolves constraints.txt again, with the pinned versions where possible; ARGS=--upgrade takes the newest
# Except for gpu-check and test-gpu, each target creates the environment .venv if necessary.

PYTHON ?= python3
RECIPE ?= tiny
SOURCE ?=
SHAPE ?= 1x1
VARIANT ?= cpu
REGISTRY ?=
CONFIG ?= config/flyte.yaml
VENV := .venv
STAMP := $(VENV)/.installed
# .venv if it exists, else PYTHON: a GPU machine may come with its own build of PyTorch.
GPU_PYTHON = $(if $(wildcard $(STAMP)),$(VENV)/bin/python,$(PYTHON))

.PHONY: reproduce smoke draw test test-long test-fast test-gpu gpu-check lint format lock images register preflight env clean

reproduce: $(STAMP)
	$(VENV)/bin/pyflyte run workflows/reproduce.py reproduce --recipe $(RECIPE) $(if $(SOURCE),--source "$(SOURCE)")

smoke:
	$(MAKE) reproduce RECIPE=smoke

# PROMPT reaches Python through the environment, so that quotes in it cannot change the shell command.
draw: export NUCLEUS_PROMPT = $(PROMPT)
draw: $(STAMP)
	@$(VENV)/bin/python -m tasks.draw "$$NUCLEUS_PROMPT" --seed $(or $(SEED),0)

# A worker for each of two cores, each with one thread. pytest keeps the tests that it rewrites, whatever the environment says:
# a third of the time in which each worker collects them.
WORKERS ?= 2
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS)
# Files stay together, since they share fixtures; test-fast has none that take long, and its workers end together.
BY_FILE := --dist loadfile

test: $(STAMP)
	$(PYTEST) $(BY_FILE) $(ARGS)

test-long: $(STAMP)
	$(PYTEST) $(BY_FILE) -m long $(ARGS)

test-fast: $(STAMP)
	$(PYTEST) --dist worksteal -m "not slow and not long" tests/unit $(ARGS)

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

# Keeps the versions of constraints.txt where pyproject.toml allows them; ARGS=--upgrade takes the newest, and
# ARGS="--upgrade-package NAME" one. Leaves out torch's CUDA packages, so that constraints.txt serves CPU and CUDA builds.
lock: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet uv
	cp constraints.txt constraints.new
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --extra spark --python-version 3.11 --quiet --no-header --no-annotate \
		--output-file constraints.new $(ARGS)
	{ grep '^#' constraints.txt; { grep -vE '^(#|nvidia-|cuda-)' constraints.new; grep -v '^#' no-deps.txt; } | LC_ALL=C sort; } \
		> constraints.locked
	mv constraints.locked constraints.txt
	rm constraints.new

images: $(STAMP)
	$(VENV)/bin/python -m containers.build --variant $(VARIANT) $(if $(REGISTRY),--registry "$(REGISTRY)") $(ARGS)

register: $(STAMP)
	$(VENV)/bin/python -m tools.register --config "$(CONFIG)" --shape $(SHAPE) $(ARGS)

preflight: $(STAMP)
	$(VENV)/bin/python -m tasks.preflight --config "$(CONFIG)" --recipe $(RECIPE) --shape $(SHAPE) $(ARGS)

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt no-deps.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps --requirement no-deps.txt
	touch $@

clean:
	rm -rf $(VENV) .nucleus
