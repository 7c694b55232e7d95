# The two commands: make demo (the main job on a real image), make test (the whole suite).
SHELL := /bin/bash
VENV := .venv
PYTHON ?= python3
OUT ?= out/demo

.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make demo    build a real Docker image into guests and boot them (OUT=$(OUT))'
	@echo 'make test    the test suite, boots included'
	@echo 'make test-slow  what takes minutes each'
	@echo 'make lint    style and types'
	@echo 'make bench   measure osbuilder beside what it replaces'
	@echo 'make kernel  only the guest kernel, into the cache'
	@echo 'make setup   install what is missing (Debian packages when root, and $(VENV))'

.PHONY: setup
setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml scripts/bootstrap
	PYTHON=$(PYTHON) scripts/bootstrap $(VENV)
	@touch $@

.PHONY: demo
demo: setup
	scripts/demo $(OUT)

.PHONY: test
test: setup kernel
	$(VENV)/bin/pytest -n 2 --dist loadgroup -m 'not slow'

.PHONY: test-slow
test-slow: setup kernel
	$(VENV)/bin/pytest -n 2 --dist loadgroup -m slow

.PHONY: lint
lint: setup
	scripts/check

.PHONY: bench
bench: setup kernel
	$(VENV)/bin/python -m bench

.PHONY: kernel
kernel: setup
	$(VENV)/bin/osbuilder kernel build

.PHONY: clean
clean:
	rm -rf out build dist
