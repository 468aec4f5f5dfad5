# `make` lists what can be made.
PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-compose test-kernels test-faults lint format bench docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: Debian packages, the virtual environment, what is C
	@deploy/setup.sh

demo: setup ## crash a real nginx and see its crash files delivered
	@$(PYTHON) -m crashbus demo

# Most tests wait for real servers, or for their turn with core_pattern, so three at a time keep two
# processors busy. Two that both
# load the machine can starve each other, so what failed beside others has to pass alone.
AGAIN := --last-failed --last-failed-no-failures none --maxfail 2
APART := --ignore tests/compose --ignore tests/kernels
test: setup ## run the test suite
	@$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(APART) || \
		{ [ $$? = 1 ] && $(PYTHON) -m pytest $(APART) $(AGAIN); }

# Each remembers its own failures, for both may run at once.
COMPOSE := tests/compose --override-ini cache_dir=.pytest_cache/compose
test-compose: setup ## build the images, and crash containers beside deploy/compose.yaml; minutes
	@$(PYTHON) -m pytest $(COMPOSE) || { [ $$? = 1 ] && $(PYTHON) -m pytest $(COMPOSE) $(AGAIN); }

test-kernels: export MACHINES = yes
# TESTS="tests/recorder/test_capture.py …" for others than those that differ most.
test-kernels: setup ## the same captures on Linux 5.10, 6.1 and 6.12 in virtual machines; an hour without KVM
	@KERNEL_TESTS="$(TESTS)" $(PYTHON) -m pytest tests/kernels

# CRASHES of each fault, of up to MIB MiB; SEED repeats what one line of the table shows.
CRASHES ?= 50
MIB ?= 200
test-faults: setup ## all faults with 50 crashes each, and the table in docs/reliability.md anew; takes an hour
	@FAULT_CRASHES=$(CRASHES) FAULT_MIB=$(MIB) FAULT_SEED=$(SEED) FAULT_PATIENCE=900 \
		FAULT_RESULTS=docs/reliability.json $(PYTHON) -m pytest tests/faults --timeout=3600
	@$(PYTHON) docs/make_tables.py

lint: setup ## ruff and mypy --strict
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup ## put the code in shape
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

BENCHMARKS := signal_overhead events hold_time hold_bus backtrace throughput memory latency scaling burst
bench: setup ## measure capture and delivery, each against a peer; takes half an hour
	@for one in $(BENCHMARKS); do echo "== $$one"; $(PYTHON) -m benchmarks.$$one || exit 1; done

docs: setup ## make the tables in docs/ anew from the code
	@$(PYTHON) docs/make_tables.py

# What services and command need, and what installs them, is a part of all that is needed here.
LOCK := uv pip compile --python-version 3.11 --universal --generate-hashes --no-annotate --no-header \
	--no-emit-index-url
lock: ## choose the newest versions that fit, and write the lock files
	@$(LOCK) pyproject.toml --all-extras --upgrade -o requirements.lock
	@echo hatchling | $(LOCK) pyproject.toml - --extra all -c requirements.lock -o requirements-services.lock

clean: ## remove what was built here
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
