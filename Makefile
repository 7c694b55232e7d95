# make setup | demo | test | lint | bench
SHELL := /bin/bash
VENV := .venv
PYTHON ?= python3

.PHONY: setup
setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml scripts/bootstrap
	PYTHON=$(PYTHON) scripts/bootstrap $(VENV)
	@touch $@
