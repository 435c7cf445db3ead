"""Weights as ONNX models: exported once, then taken from a cache. And such a file, opened again.

The cache goes by the digest of the weights that were exported.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from artifactnet_jax import fine_head
from artifactnet_jax.config import Config
from artifactnet_jax.convert.export import Form, build_onnx
from artifactnet_jax.convert.protobuf import fields
from artifactnet_jax.files import cache_folder, replace_file
from artifactnet_jax.weights import Engine, Weights, WeightsError, weights_digest

EXPORT_REVISION = 1  # of `export`: raise it whenever the same weights export to something else

_CONFIG = "artifactnet_jax.config"  # key of the notes
_METADATA = 14  # field of ModelProto


def kept(path: Path, write: Callable[[], None]) -> bool:
    """Whether `write` could put its file into the cache; stderr says why not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        print(f"artifactnet-jax: not cached: {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def exported(weights: Weights, anew: bool = False, form: Form = "segment") -> str | bytes:
    """The lean graph of weights: a file in the cache, or its bytes where there is no cache.

    Needs `onnx` only where the file is not there yet, or is to be made anew. Raises ImportError,
    ValueError (see `export.build_onnx`).
    """
    digest = weights_digest(weights.config, weights.tensors)
    part = "" if form == "segment" else f"-{form}"
    part += "" if weights.fine is None else f"-{weights.fine.sha256[:12]}"
    path = cache_folder("exported") / f"{digest[:40]}{part}-{EXPORT_REVISION}.onnx"
    if path.is_file() and not anew:
        return os.fspath(path)
    model = build_onnx(weights, form=form).SerializeToString()
    return os.fspath(path) if kept(path, lambda: replace_file(path, model)) else model


def read_exported(path: str | os.PathLike[str], *, only: str = "") -> Engine | None:
    """The engine that a graph of `export` is; None: another file, or not of the precision `only`.

    Only the graph's own notes are read, with neither `onnx` nor onnxruntime. Raises WeightsError
    for a graph of that kind that cannot be scored with.
    """
    try:
        notes = metadata(Path(path).read_bytes())
    except OSError as error:
        raise WeightsError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    precision = notes.get("precision", "")
    if _CONFIG not in notes or only not in ("", precision):
        return None
    if notes.get("form") != "segment":
        cure = "export the weights with --form segment"
        raise WeightsError(f"{os.fspath(path)}: a graph of whole songs: {cure}")
    try:
        config = Config.from_dict(json.loads(notes[_CONFIG]))
        fine = fine_head.noted(notes)
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{os.fspath(path)}: damaged notes ({error!r})") from error
    name, licence, sha256 = (notes.get(k, "") for k in ("weights", "licence", "weights_sha256"))
    return Engine(name, config, sha256, licence, {"precision": precision}, os.fspath(path), fine)


def noted_config(path: str | os.PathLike[str]) -> Config | None:
    """The config that `export` wrote into a graph; None: there is none that can be read."""
    try:
        return Config.from_dict(json.loads(metadata(Path(path).read_bytes())[_CONFIG]))
    except (OSError, TypeError, KeyError, ValueError):
        return None


def metadata(data: bytes) -> dict[str, str]:
    """`metadata_props` of an ONNX file; nothing of what is not one, or is cut off."""
    notes = {}
    with contextlib.suppress(ValueError):
        for field in fields(data):
            if field.number == _METADATA and field.sized:
                pair = {part.number: part.payload for part in fields(field.payload) if part.sized}
                key, value = (bytes(pair.get(n, b"")).decode(errors="replace") for n in (1, 2))
                notes[key] = value
    return notes
