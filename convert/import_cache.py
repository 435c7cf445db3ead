"""ONNX models as weights: converted once, then taken from a cache by the digest of the file."""

from __future__ import annotations

import contextlib
import os
import sys

from artifactnet_jax.convert.export_cache import kept
from artifactnet_jax.convert.graph import read_graph
from artifactnet_jax.files import cache_folder
from artifactnet_jax.weights import (
    ForeignGraph,
    Weights,
    WeightsError,
    load_weights,
    write_weights,
)

REVISION = 2  # of the converter: raise it whenever the same file converts to something else


def load_onnx(path: str | os.PathLike[str]) -> Weights | ForeignGraph:
    """Weights of an ONNX model; the first time they are converted, which takes a while.

    What was found and the model's licence are then said once on stderr. Raises WeightsError.
    """
    try:
        graph = read_graph(path)
        cached = cache_folder("converted") / f"{graph.sha256[:40]}-{REVISION}.safetensors"
        if cached.is_file():
            with contextlib.suppress(WeightsError):  # a damaged entry is made anew
                return load_weights(cached)
        # Only now: it starts jax, which a cached model does not need.
        from artifactnet_jax.convert.importer import import_model
    except ImportError as error:
        cure = "pip install 'artifactnet-jax[convert]', or convert it elsewhere to a weights file"
        raise WeightsError(
            f"{os.fspath(path)}: an ONNX model needs {error.name}: {cure}"
        ) from error
    print(f"artifactnet-jax: converting {os.fspath(path)} (once)", file=sys.stderr)
    weights = import_model(path)
    route = weights.provenance["route"]
    print(f"artifactnet-jax: route {route}; licence: {weights.licence}", file=sys.stderr)
    kept(cached, lambda: write_weights(weights, cached))
    return weights
