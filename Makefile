# Targets for people and for CI (.ci/run). `make` alone lists them.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# Enough for what needs the standard library only.
ANY = $(if $(wildcard $(READY)),$(RUN),$(PYTHON))
PIP := $(RUN) -m pip --disable-pip-version-check -qq
PINS := pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-annotate --no-header \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host
NOTE := \# Hashed pins for CPython 3.11 and later, made by `make requirements`: not to be edited.

# A module's tests share what runs in the lab. Modules are taken in the order of tests/conftest.py.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

export PORT
unexport PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help venv test test-deep test-unit test-lab test-vm lint format reference site lab lab-vm bench demo demo-down \
	python requirements clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY) ## Make the development environment (.venv) from the pinned packages

$(READY): requirements/dev.txt pyproject.toml | python
	@echo 'venv      pinned packages into $(VENV), about 20 s' >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'venv      this Python lacks the venv module: installing python3-venv' >&2; \
		apt-get install -y -qq python3-venv >/dev/null 2>&1 || \
			{ apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; }; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

test: venv ## Linters, unit tests and lab tests, 10 to 20 minutes (lab: Linux, root)
	$(RUN) -m pytest tests $(SHARED)

test-deep: venv ## The rest of what CI runs: more faults, both users, long fuzz
	$(RUN) -m pytest tests -m deep $(SHARED)

test-unit: venv ## The tests that need neither root nor the lab
	$(RUN) -m pytest tests -m 'not lab and not deep'

test-lab: venv ## The everyday tests in the lab; LAB_ROOT=DIR boots that root tree, not ours
	$(RUN) -m pytest tests/lab

test-vm: venv ## The tests on a virtual machine with two NUMA nodes: slow, half an hour (Linux, root)
	$(RUN) -m pytest tests/lab -m vm --timeout 3600

lint: venv ## Check style, types and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: venv ## Put the code into the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

reference: venv ## Write the generated documents anew
	PYTHONPATH=tests $(RUN) -m reference

site: venv ## Build the documents as a website in build/site
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --site-dir build/site

lab: venv ## A shell in a throw-away machine with systemd and podman (Linux, root)
	@$(RUN) -m tests.lab shell

lab-vm: venv ## A shell in a fresh virtual machine with two NUMA nodes, emulated: slow (Linux, root)
	@$(RUN) -m tests.lab vm

bench: venv ## Measure start-up, planning, header reading and `up` against their yardsticks
	@$(RUN) tests/bench/bench.py

demo: python ## Serve a small model and ask it something (PORT=N: not on 8089)
	@PYTHONPATH=tests $(ANY) -m lab.demo up

demo-down: python ## Stop what `make demo` started
	@PYTHONPATH=tests $(ANY) -m lab.demo down

python:
	@test -n '$(ANY)' || { \
		echo 'error: no Python 3.11 or later: make PYTHON=/path/to/python3' >&2; exit 1; }

requirements: ## Pin the newest packages that pyproject.toml and requirements/dev.in allow
	$(PYTHON) -m venv $(VENV)/pins
	$(VENV)/pins/bin/python -m pip -qq install pip-tools
	PIP_FIND_LINKS= $(VENV)/pins/bin/$(PINS) --upgrade -o requirements/runtime.txt pyproject.toml
	PIP_FIND_LINKS= $(VENV)/pins/bin/$(PINS) --upgrade --extra docs -o requirements/dev.txt \
		-c requirements/runtime.txt pyproject.toml requirements/dev.in
	sed -i '1i $(NOTE)' requirements/runtime.txt requirements/dev.txt

clean: ## Remove what was built here (the lab's cache stays: see tests/lab/README.md)
	@test ! -e .demo/lab.json || $(MAKE) --no-print-directory demo-down
	rm -rf $(VENV) .demo .bench build dist .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
