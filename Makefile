# The two commands: make demo (the main job on a real image), make test.
SHELL := /bin/bash
VENV := .venv
PYTHON ?= python3
OUT ?= out/demo

OSBUILDER := $(VENV)/bin/osbuilder

# Tests start hundreds of commands: each would compile all its modules again.
unexport PYTHONDONTWRITEBYTECODE

# AGAIN=1: only what failed in the run before, one test at a time.
PYTEST := $(VENV)/bin/pytest $(if $(AGAIN),--last-failed --last-failed-no-failures none,-n 2 --dist loadgroup --durations 20)
# A run that broke (exit code 2 and more) has not tried all: nothing of it is to be tried again.
ONLY_FAILED := || { code=$$?; [ $$code = 1 ] || rm -f .pytest_cache/v/cache/lastfailed; exit $$code; }

.DEFAULT_GOAL := help

# kernel, image, initrd, smoke, publish: of any IMAGE, with what stands in an osbuild.toml if there is one.
include docs/ci/guest.mk
kernel $(OUT)/manifest.json: | setup

.PHONY: help
help:
	@echo 'make demo    build a real Docker image into guests and boot them (OUT=$(OUT))'
	@echo 'make test    the test suite, boots included'
	@echo 'make test-slow  what takes ten seconds or more each'
	@echo 'make test-long  more of that: what does not fit into the hour that CI has'
	@echo 'make lint    style and types'
	@echo 'make bench   measure osbuilder beside what it replaces'
	@echo 'make test-kernels  every kernel compiled, and the same bytes again: up to an hour'
	@echo 'make image initrd smoke IMAGE=oci:DIR OUT=out/mine    guests of any image; publish REGISTRY=HOST/NAME:TAG'
	@echo 'make kernel  only the guest kernel, into the cache; make kernels: those for tests of aarch64 and of features, too'
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
	$(PYTEST) -m 'not slow and not long and not compiles' $(ONLY_FAILED)

.PHONY: test-slow
test-slow: setup kernel
	$(PYTEST) -m 'slow and not long and not compiles' $(ONLY_FAILED)

.PHONY: test-long
test-long: setup kernel
	$(PYTEST) -m 'long and not compiles' $(ONLY_FAILED)

.PHONY: lint
lint: setup
	scripts/check

.PHONY: bench
bench: setup kernel
	$(VENV)/bin/python -m bench

# The tests skip what needs one of these and is not there.
.PHONY: kernels
kernels: kernel
	$(VENV)/bin/osbuilder kernel build --arch aarch64
	$(VENV)/bin/osbuilder kernel build --with xfs
	$(VENV)/bin/osbuilder kernel build $(foreach file,$(wildcard kernel-configs/feature/*.conf),--with $(basename $(notdir $(file))))

.PHONY: test-kernels
test-kernels: kernels
	$(VENV)/bin/pytest -m compiles

.PHONY: clean
clean:
	rm -rf out build dist
