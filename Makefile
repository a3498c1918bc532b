# The two commands of the README, and what they share. Everything goes into .venv; nothing outside the checkout changes
# but the user cache, where the embedded model and data are kept.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-output

.PHONY: guards setup demo test lint types check bench clean validate

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "tiltmeter needs Python 3.10 to 3.13, this is " + sys.version.split()[0] + "; set PYTHON=python3.x")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/tiltmeter demo -o $(OUT)

# hours on a CPU; goes on where it was stopped. PLAN=benchmarks/plans/quick.yaml NAME=validation-quick takes minutes.
PLAN ?= benchmarks/plans/real.yaml
NAME ?= validation
validate: setup
	$(BIN)/tiltmeter validate $(PLAN) -o $(NAME)-output
	$(BIN)/python benchmarks/validation.py $(NAME)-output $(NAME)

test: setup
	$(BIN)/tiltmeter demo --fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

bench: setup
	$(BIN)/python benchmarks/performance.py

# All guards on demo:tiny, minutes; the serious ones on the aligned model, about fourteen hours of one core. Finished runs
# are kept, so it can be interrupted.
guards: setup
	$(BIN)/python benchmarks/guards.py
	$(BIN)/tiltmeter validate benchmarks/plans/guards.yaml -o validation-guards-output
	$(BIN)/python benchmarks/validation.py validation-guards-output validation-guards
	$(BIN)/tiltmeter validate benchmarks/plans/refusals.yaml -o validation-refusals-output
	$(BIN)/python benchmarks/validation.py validation-refusals-output validation-refusals
	$(BIN)/tiltmeter validate benchmarks/plans/refusals-rivals.yaml -o validation-refusals-output
	$(BIN)/python benchmarks/validation.py validation-refusals-output validation-refusals-rivals
	$(BIN)/tiltmeter validate benchmarks/plans/refusals-full.yaml -o validation-refusals-full-output
	$(BIN)/python benchmarks/validation.py validation-refusals-full-output validation-refusals-full
	$(BIN)/python benchmarks/guards.py --table

clean:
	rm -rf $(VENV) .venv-* dist build $(OUT)
