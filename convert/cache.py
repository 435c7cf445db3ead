"""ONNX models as weights: converted once, then taken from a cache by the digest of the file."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from artifactnet_jax.weights import Weights, WeightsError, load_weights, write_weights

REVISION = 1  # of the converter: raise it whenever the same file converts to something else


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/artifactnet-jax, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "artifactnet-jax" / "converted"


def load_onnx(path: str | os.PathLike[str]) -> Weights:
    """Weights of an ONNX model; the first time they are converted, which takes a while.

    What was found and the model's licence are then said once on stderr. Raises WeightsError.
    """
    try:
        from artifactnet_jax.convert.graph import read_graph
        from artifactnet_jax.convert.importer import import_model
    except ImportError as error:
        cure = "pip install 'artifactnet-jax[convert]', or convert it elsewhere to a weights file"
        raise WeightsError(
            f"{os.fspath(path)}: an ONNX model needs {error.name}: {cure}"
        ) from error
    graph = read_graph(path)
    cached = cache_folder() / f"{graph.sha256[:40]}-{REVISION}.safetensors"
    if cached.is_file():
        with contextlib.suppress(WeightsError):  # a damaged entry is made anew
            return load_weights(cached)
    print(f"artifactnet-jax: converting {os.fspath(path)} (once)", file=sys.stderr)
    weights = import_model(path)
    route = weights.provenance["route"]
    print(f"artifactnet-jax: route {route}; licence: {weights.licence}", file=sys.stderr)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_weights(weights, cached)
    except OSError as error:
        print(f"artifactnet-jax: not cached: {cached}: {error.strerror}", file=sys.stderr)
    return weights
