# `make` lists what can be made.
PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: Debian packages, the virtual environment, the pipe helper
	@deploy/setup.sh

demo: setup ## crash a real nginx and see its crash files delivered
	@$(PYTHON) -m crashbus demo

# Most tests wait for real servers: two at a time take little more than half as long. Two that both
# load the machine can starve each other, so what failed beside others has to pass alone.
test: setup ## run the test suite
	@$(PYTHON) -m pytest -n 2 --dist loadfile || \
		{ [ $$? = 1 ] && $(PYTHON) -m pytest --last-failed --last-failed-no-failures none --maxfail 2; }

lint: setup ## ruff and mypy --strict
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup ## put the code in shape
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

bench: setup ## measure what a signal costs, and how long a crash is held; takes 10 minutes
	@$(PYTHON) -m benchmarks.signal_overhead
	@$(PYTHON) -m benchmarks.hold_time

docs: setup ## make the tables in docs/ anew from the code
	@$(PYTHON) docs/make_tables.py

lock: ## choose the newest versions that fit, and write the lock file
	@uv pip compile pyproject.toml --all-extras --python-version 3.11 --universal \
		--generate-hashes --no-annotate --no-header --no-emit-index-url --upgrade -o requirements.lock

clean: ## remove what was built here
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
