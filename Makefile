# make demo   train, evaluate and use a small model on real images
# make test   run the tests
# make lint   check style and types
# Each builds what it needs: the environment in .venv and the compiled kernels. `make clean` removes all of it.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py $(wildcard vrwkv/ops/*.h vrwkv/ops/*.cuh vrwkv/ops/*/*.cpp vrwkv/ops/*/*.h vrwkv/ops/*/*.cu)

.PHONY: build test lint format clean

build: .venv/installed vrwkv/_C.abi3.so

.venv/installed: requirements-dev.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

vrwkv/_C.abi3.so: .venv/installed $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

test: build
	$(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter-out setup.py,$(SOURCES))
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter-out setup.py,$(SOURCES))

clean:
	rm -rf .venv build *.egg-info output data vrwkv/*.abi3.so
