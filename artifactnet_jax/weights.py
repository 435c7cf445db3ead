"""Weights files: one safetensors file whose header says what the tensors are.

The header holds the config, the preset's name, where the tensors come from, their licence and a
digest over config and tensors. Loading is strict: a missing, extra, misshapen, non-finite or
altered tensor is an error that names it, because a detector with half its weights still prints
numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.files import replace_file
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.layers import FOLDED_VARIANCE
from artifactnet_jax.presets import parameter_shapes

FORMAT = "artifactnet-jax/weights/1"
DEFAULT = "edge.safetensors"


class WeightsError(Exception):
    """A weights file cannot be used; the message names the file, the cause and the cure."""


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by name, float32, with the config they belong to and their provenance."""

    name: str
    config: cfg.Config
    tensors: Mapping[str, np.ndarray]
    sha256: str  # digest over config and tensors as stored
    licence: str
    provenance: Mapping[str, Any]
    graph: Mapping[str, Any] | None = None  # a foreign graph that is run as it is, node by node
    # An exported ONNX file or an engine, which TensorRT reads; then there are no tensors.
    file: str | None = None

    def summary(self) -> dict[str, str]:
        """The three fields that identify weights in a result row."""
        return {"name": self.name, "sha256": self.sha256, "preset": self.config.preset}


def parameter_counts(config: cfg.Config) -> dict[str, int]:
    """Trained parameters: {"unet", "cnn", "total"}, and "texture" where there is that head.

    Batch statistics, what the front end is given, and the texture head's mean and spread are none.
    """
    counts = {"unet": 0, "cnn": 0} | ({} if config.texture is None else {"texture": 0})
    for name, shape in parameter_shapes(config).items():
        part = name.split(".")[0]
        if part in counts and not name.endswith((".mean", ".var", ".spread")):
            counts[part] += int(np.prod(shape))
    return {**counts, "total": sum(counts.values())}


def random_tensors(config: cfg.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of the right shapes: for tests and benchmarks, never for verdicts."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        if name == "front_end.window":
            values = hann(*shape)
        elif name == "front_end.mel":
            values = mel_filterbank(dataclasses.replace(config.front_end, mel_scale="slaney"))
        elif name.endswith((".scale", ".var", ".value", ".spread")):
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(".kernel"):
            values = rng.standard_normal(shape) * np.sqrt(1.5 / np.prod(shape[:-1]))
        else:
            values = rng.standard_normal(shape) * 0.1
        tensors[name] = values.astype(np.float32)
    return tensors


def weights_digest(
    config: cfg.Config,
    tensors: Mapping[str, np.ndarray],
    graph: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256 over config, graph and tensors, hexadecimal: `Weights.sha256`."""
    return _digest(_json(config.to_dict()), tensors, _json(graph) if graph is not None else "")


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def _digest(config_json: str, tensors: Mapping[str, np.ndarray], graph_json: str = "") -> str:
    sha = hashlib.sha256((config_json + graph_json).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        sha.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        sha.update(tensor.tobytes())
    return sha.hexdigest()


def _check(
    where: str,
    config: cfg.Config,
    tensors: Mapping[str, np.ndarray],
    graph: Mapping[str, Any] | None,
) -> None:
    if graph is not None:  # its constants are whatever they are; the digest guards them
        return
    expected = parameter_shapes(config)
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        what = ", ".join([f"missing {n}" for n in missing] + [f"unexpected {n}" for n in extra])
        raise WeightsError(f"{where}: not the tensors of preset {config.preset!r}: {what}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise WeightsError(f"{where}: tensor {name} has shape {tensor.shape}, not {shape}")
        if tensor.dtype not in (np.float16, np.float32):
            raise WeightsError(f"{where}: tensor {name} is {tensor.dtype}, not float16 or float32")
        if not np.isfinite(tensor).all():
            raise WeightsError(f"{where}: tensor {name} has non-finite values")


def save_weights(
    path: str | os.PathLike[str],
    config: cfg.Config,
    tensors: Mapping[str, np.ndarray],
    *,
    name: str,
    licence: str,
    provenance: Mapping[str, Any],
    graph: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Write a weights file atomically; `dtype` float16 halves it. WeightsError on bad tensors.

    The variance of a folded norm stays float32: float16 rounds it to 1, which marks nothing.
    With `graph` the tensors are its constants, and keep their dtypes.
    """
    from safetensors.numpy import save

    def stored_dtype(name: str, tensor: np.ndarray) -> Any:
        if graph is not None:
            return None
        folded = name.endswith(".var") and (tensor == np.float32(FOLDED_VARIANCE)).all()
        return np.float32 if folded else dtype

    with np.errstate(over="ignore"):  # an overflow to inf is reported by name below
        stored = {k: np.asarray(v, stored_dtype(k, v), order="C") for k, v in tensors.items()}
    _check(os.fspath(path), config, stored, graph)
    config_json = _json(config.to_dict())
    graph_json = _json(graph) if graph is not None else ""
    header = {
        "format": FORMAT,
        "name": name,
        "preset": config.preset,
        "config": config_json,
        "licence": licence,
        "provenance": json.dumps(provenance, sort_keys=True),
        "sha256": _digest(config_json, stored, graph_json),
    }
    if graph is not None:
        header["graph"] = graph_json
    replace_file(path, save(stored, metadata=header))


def write_weights(weights: Weights, path: str | os.PathLike[str]) -> None:
    """Write weights as they are to a file: see `save_weights`."""
    save_weights(
        path,
        weights.config,
        weights.tensors,
        name=weights.name,
        licence=weights.licence,
        provenance=weights.provenance,
        graph=weights.graph,
    )


def default_path() -> Path:
    """Where the weights that come with the package lie."""
    return Path(str(resources.files("artifactnet_jax") / "assets" / DEFAULT))


def load_weights(path: str | os.PathLike[str] | None = None) -> Weights:
    """Read and check a weights file; None reads the weights that come with the package.

    Raises WeightsError when the file is absent, not a weights file, or any tensor is missing,
    unexpected, misshapen, non-finite or not what the digest was made of.
    """
    from safetensors import SafetensorError, safe_open

    where = os.fspath(default_path() if path is None else path)
    if not os.path.isfile(where):
        raise WeightsError(f"{where}: no such weights file; leave --weights out for the default")
    try:
        with safe_open(where, framework="np") as file:
            header = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{where}: not a readable safetensors file ({reason})") from error
    if header.get("format") != FORMAT:
        raise WeightsError(f"{where}: its header is not {FORMAT!r}: not weights of artifactnet-jax")
    try:
        config = cfg.Config.from_dict(json.loads(header["config"]))
        provenance = json.loads(header["provenance"])
        name, licence, sha256 = header["name"], header["licence"], header["sha256"]
        graph_json = header.get("graph", "")
        graph = json.loads(graph_json) if graph_json else None
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{where}: damaged header ({error!r})") from error
    _check(where, config, stored, graph)
    if _digest(header["config"], stored, graph_json) != sha256:
        raise WeightsError(f"{where}: tensors do not match the digest in the header")
    if graph is None:
        stored = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    return Weights(name, config, stored, sha256, licence, provenance, graph)
