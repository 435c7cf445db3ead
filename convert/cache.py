"""ONNX models as weights, and weights as ONNX models: made once, then taken from a cache.

The cache goes by digests: of the file that was converted, of the weights that were exported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from artifactnet_jax.config import Config
from artifactnet_jax.files import cache_folder, replace_file
from artifactnet_jax.weights import (
    Weights,
    WeightsError,
    load_weights,
    weights_digest,
    write_weights,
)

REVISION = 1  # of the converter: raise it whenever the same file converts to something else
EXPORT_REVISION = 1  # of `export`, likewise


def load_onnx(path: str | os.PathLike[str]) -> Weights:
    """Weights of an ONNX model; the first time they are converted, which takes a while.

    What was found and the model's licence are then said once on stderr. Raises WeightsError.
    """
    from artifactnet_jax.convert.graph import read_graph

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
    _kept(cached, lambda: write_weights(weights, cached))
    return weights


def _kept(path: Path, write: Callable[[], None]) -> bool:
    """Whether `write` could put its file into the cache; stderr says why not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        print(f"artifactnet-jax: not cached: {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def exported(
    weights: Weights, anew: bool = False, form: Literal["segment", "network"] = "segment"
) -> str | bytes:
    """The lean graph of weights: a file in the cache, or its bytes where there is no cache.

    Needs `onnx` only where the file is not there yet, or is to be made anew. Raises ImportError,
    ValueError (see `export.build_onnx`).
    """
    digest = weights_digest(weights.config, weights.tensors)
    part = "" if form == "segment" else f"-{form}"
    path = cache_folder("exported") / f"{digest[:40]}{part}-{EXPORT_REVISION}.onnx"
    if path.is_file() and not anew:
        return os.fspath(path)
    from artifactnet_jax.convert.export import build_onnx

    model = build_onnx(weights, form=form).SerializeToString()
    return os.fspath(path) if _kept(path, lambda: replace_file(path, model)) else model


def as_exported(path: str | os.PathLike[str], backend: str) -> Weights | None:
    """Weights that stand for a graph that `export` wrote, without tensors.

    None for other files, and for a backend that does not run such graphs, which converts them; but
    an int8 one cannot be converted. Only the graph's own notes are read, with neither `onnx` nor
    onnxruntime. Raises WeightsError for a graph of that kind that cannot be scored with.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise WeightsError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    notes = metadata(data)
    runs = backend.startswith(("onnxruntime", "tensorrt")) or notes.get("precision") == "int8"
    if "artifactnet_jax.config" not in notes or not runs:
        return None
    if notes.get("form") != "segment":
        cure = "export the weights with --form segment"
        raise WeightsError(f"{os.fspath(path)}: a graph of whole songs: {cure}")
    try:
        config = Config.from_dict(json.loads(notes["artifactnet_jax.config"]))
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{os.fspath(path)}: damaged notes ({error!r})") from error
    name, licence, precision = (notes.get(k, "") for k in ("weights", "licence", "precision"))
    sha256, known = notes.get("weights_sha256", ""), {"precision": precision}
    return Weights(name, config, {}, sha256, licence, known, file=os.fspath(path))


def metadata(data: bytes) -> dict[str, str]:
    """`metadata_props` of an ONNX file; nothing of what is not one, or is cut off."""
    notes = {}
    for number, value in _fields(data):
        if number == 14 and isinstance(value, bytes):  # ModelProto.metadata_props
            pair = {n: v.decode(errors="replace") for n, v in _fields(value) if v is not None}
            notes[pair.get(1, "")] = pair.get(2, "")
    return notes


def _fields(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Fields of a protobuf message: number, and the bytes of those that have a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    with contextlib.suppress(IndexError):
        while at < len(data):
            key = varint()
            if key & 7 == 2:
                size = varint()
                yield key >> 3, data[at : at + size]
                at += size
            elif key & 7 == 0:
                varint()
                yield key >> 3, None
            elif key & 7 in (1, 5):
                at += 8 if key & 7 == 1 else 4
                yield key >> 3, None
            else:
                return
