# make reproduce   the whole arrow with RECIPE (tiny unless told), from raw images to a published pipeline
# make smoke       the same in under three minutes, with a model too small to be good
# make test        the tests
# Each makes the environment it needs in .venv.

PYTHON ?= python3
RECIPE ?= tiny
SOURCE ?=
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: reproduce smoke test env clean

reproduce: $(STAMP)
	$(VENV)/bin/pyflyte run workflows/reproduce.py reproduce --recipe $(RECIPE) $(if $(SOURCE),--source "$(SOURCE)")

smoke:
	$(MAKE) reproduce RECIPE=smoke

test: $(STAMP)
	$(VENV)/bin/python -m pytest $(ARGS)

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .nucleus
