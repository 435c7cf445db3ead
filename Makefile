# make demo: install and score the examples. make test: install and run the checks and tests.
# PYTHON chooses the interpreter of a new .venv (3.11 or newer for JAX; 3.10 runs `numpy` only).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint clean train-default

$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip --quiet install uv

install: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[cpu]'

demo: install
	$(BIN)/artifactnet-jax score examples

test: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[convert,train,live,report,ray,postgres]' --group dev
	-$(BIN)/uv pip install --quiet --python $(BIN)/python --group trt
	-$(BIN)/uv pip install --quiet --python $(BIN)/python --group page
	$(MAKE) lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The default weights again: downloads 3.6 GB, then about half an hour on two cores. CLIPS is the manifest of
# short clips of generators and codecs, which are not ours to pass on: see scripts/default_data.py.
RAW ?= raw
CLIPS ?= $(error name the manifest of the clips: make train-default CLIPS=.../manifest.csv)
train-default: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[train]'
	$(BIN)/python scripts/default_data.py fetch $(RAW)
	$(BIN)/python scripts/default_data.py manifest $(RAW) --clips $(CLIPS) -o $(RAW)/data.csv
	$(BIN)/python scripts/default_data.py excerpts $(RAW)/data.csv $(RAW)/excerpts
	$(BIN)/artifactnet-jax rvq --data $(RAW)/excerpts/manifest.csv --out $(RAW)/rvq \
		--models 1 --steps 900
	$(BIN)/artifactnet-jax texture --data $(RAW)/data.csv --also $(RAW)/rvq/manifest.csv \
		-o $(RAW)/edge.safetensors --name edge-texture --half > $(RAW)/edge-report.json

# The type checker reads the package as it is installed, so that it follows the folder mapping.
lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p artifactnet_jax

clean:
	rm -rf .venv build *.egg-info
