# make demo: install and score the examples. make test: install and run the checks and tests.
# PYTHON chooses the interpreter of a new .venv (3.11 or newer for JAX; 3.10 runs `numpy` only).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint clean

$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip --quiet install uv

install: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[cpu]'

demo: install
	$(BIN)/artifactnet-jax score examples

test: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[convert,train]' --group dev
	$(MAKE) lint
	$(BIN)/python -m pytest

# The type checker reads the package as it is installed, so that it follows the folder mapping.
lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p artifactnet_jax

clean:
	rm -rf .venv build *.egg-info
