# make demo: install and score the examples. make test: install and run the checks and tests.
# make test-fast: the tests for work at hand, under a minute on two cores.
# make test-base, test-lowest, test-sdist: the base install's tests on other Pythons, with the lowest
# versions that are declared, and from the source distribution.
# make gpu-check: all programs compiled for NVIDIA cards of every generation, without one.
# PYTHON chooses the interpreter of a new .venv (3.11 or newer for JAX; 3.10 runs `numpy` only).
PYTHON ?= python3
BIN := .venv/bin
ARTIFACTNET := $(BIN)/artifactnet-jax

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: install demo develop test test-fast suites test-base test-lowest test-sdist gpu-check lint documents \
	clean train-default

$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip --quiet install uv

install: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[cpu]'

demo: install
	$(ARTIFACTNET) score examples

develop: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[convert,train,live,report,ray,postgres]' --group dev
	-$(BIN)/uv pip install --quiet --python $(BIN)/python --group trt
	-$(BIN)/uv pip install --quiet --python $(BIN)/python --group page

test: develop
	$(MAKE) lint
	$(PYTEST)

test-fast: develop
	$(PYTEST) -m 'not slow'

# The official ONNX node suite, twice: in its own types, and in half precision. Four minutes of a core.
suites: develop
	$(BIN)/python tests/node_suite.py
	$(BIN)/python tests/node_suite.py --half

test-base: $(BIN)/uv
	.ci/base 3.10
	.ci/base newest

test-lowest: $(BIN)/uv
	.ci/base 3.10 lowest-direct

test-sdist: $(BIN)/uv
	rm -rf build/sdist
	$(BIN)/uv build --quiet --sdist --out-dir build/sdist .
	tar -xzf build/sdist/*.tar.gz -C build/sdist
	UV=$(abspath $(BIN)/uv) build/sdist/*/.ci/base newest

# All programs compiled for NVIDIA cards, and TensorRT's engines, without a card: docs/gpu.md. In an
# environment of its own, 6 GB, for beside its CUDA plugin jax looks for a GPU at every start.
gpu-check: $(BIN)/uv
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python build/gpu
	$(BIN)/uv pip install --quiet --python build/gpu/bin/python --editable '.[gpu_ahead,train]' --group test
	-$(BIN)/uv pip install --quiet --python build/gpu/bin/python --group trt
	JAX_PLATFORMS=cpu build/gpu/bin/python -m pytest tests/test_gpu_ahead.py tests/test_tensorrt.py

# The default weights again: clones and downloads some 20 GB into RAW/mirrors (or takes what MIRRORS has), then
# hours on two cores. CLIPS is the manifest of short clips of generators and codecs, which are not ours to pass
# on; without it the same steps run on the rest. First the network by phases of the paper, on the part `train`;
# then the texture head beside it, the head for the fine spectrum, the bank of decoders, and last the decision.
RAW ?= raw
MIRRORS ?= $(RAW)/mirrors
EDGE := $(RAW)/edge.safetensors
PHASE := --set licence=Apache-2.0 --set seconds=1.5 --set batch=16 --set watch_every=100000
SHORTS := --data $(RAW)/shorts/manifest.csv --set draws=8
train-default: $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[train]'
	$(BIN)/python scripts/default_data.py fetch $(MIRRORS)
	$(BIN)/python scripts/default_data.py cut $(MIRRORS) $(RAW)/cut
	$(BIN)/python scripts/default_data.py manifest $(RAW)/cut $(CLIPS:%=--clips %) -o $(RAW)/data.csv
	$(BIN)/python scripts/default_data.py shorts $(RAW)/data.csv $(RAW)/shorts
	$(ARTIFACTNET) residuals --data $(RAW)/shorts/manifest.csv --out $(RAW)/residuals
	$(ARTIFACTNET) train distill --data $(RAW)/residuals/manifest.csv --out $(RAW)/distill \
		$(PHASE) --set steps=800
	$(ARTIFACTNET) train cnn $(SHORTS) --init $(RAW)/distill/weights.safetensors --out $(RAW)/cnn \
		$(PHASE) --set steps=1500
	$(ARTIFACTNET) train steer $(SHORTS) --init $(RAW)/cnn/weights.safetensors --out $(RAW)/steer \
		$(PHASE) --set steps=300
	$(ARTIFACTNET) train cnn $(SHORTS) --init $(RAW)/steer/weights.safetensors --out $(RAW)/again \
		$(PHASE) --set steps=500
	$(ARTIFACTNET) texture --data $(RAW)/data.csv --init $(RAW)/again/weights.safetensors \
		--limits scripts/edge-limits.txt --least-segments 5 --left-out $(RAW)/segments.jsonl \
		-o $(EDGE) --name edge-texture --half > $(RAW)/edge-report.json
	$(BIN)/python scripts/fingerprint_bank.py features $(MIRRORS) $(RAW)/features
	$(BIN)/python scripts/fingerprint_bank.py build $(RAW)/features -o artifactnet_jax/assets/decoders.npz
	$(BIN)/python scripts/fingerprint_bank.py left-out $(RAW)/features -o $(RAW)/decoders.npz
	$(BIN)/python scripts/fine_head.py $(RAW)/features $(CLIPS) --weights $(EDGE) --left-out $(RAW)/fine.npz
	$(BIN)/python scripts/long_tracks.py $(MIRRORS) $(RAW)/long \
		--weights $(RAW)/again/weights.safetensors
	$(BIN)/python scripts/fusion.py $(RAW)/segments.jsonl $(RAW)/fine.npz $(RAW)/decoders.npz $(RAW)/long \
		--weights $(EDGE)

# The type checker reads the package as it is installed, so that it follows the folder mapping.
lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types build/lib  # setuptools would take files that are gone
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p artifactnet_jax

# What documents and the weights' header take from data and code; a test runs it with --check.
documents:
	$(BIN)/python scripts/documents.py

clean:
	rm -rf .venv build *.egg-info
