"""Weights files: one safetensors file whose header says what the tensors are.

The header holds the config, the preset's name, where the tensors come from, their licence and a
digest over config and tensors. Loading is strict: a missing, extra, misshapen, non-finite or
altered tensor is an error that names it, because a detector with half its weights still prints
numbers.

A file may hold a head for the fine spectrum beside it (`fine_head`): tensors "fine.NAME", and in
the header under "fine" their own digest and provenance. It is no part of the model: the model's
digest is the same with and without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, overload

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax import fine_head
from artifactnet_jax.files import replace_file
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.layers import FOLDED_VARIANCE
from artifactnet_jax.presets import parameter_shapes

FORMAT = "artifactnet-jax/weights/1"
DEFAULT = "edge.safetensors"
FINE = "fine."  # tensors of the head for the fine spectrum begin so
ENGINE_SUFFIX = ".engine"  # of a file that holds a TensorRT engine


class WeightsError(Exception):
    """A weights file cannot be used; the message names the file, the cause and the cure."""


class Model:
    """What scores audio, as `models.open_model` finds it: one of the three types below."""

    name: str
    config: cfg.Config
    sha256: str  # digest over config and tensors as stored
    licence: str
    provenance: Mapping[str, Any]
    fine: fine_head.FineHead | None  # beside the model

    def summary(self) -> dict[str, str]:
        """The three fields that identify a model in a result row."""
        return {"name": self.name, "sha256": self.sha256, "preset": self.config.preset}

    @property
    def whole_song(self) -> bool:
        """Whether the segments of a song are scored together."""
        return self.config.front_end.joint.startswith("song")


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(Model):
    """What a weights file holds: a model with its tensors by name."""

    name: str
    config: cfg.Config
    tensors: Mapping[str, np.ndarray]
    sha256: str
    licence: str
    provenance: Mapping[str, Any]
    fine: fine_head.FineHead | None = dataclasses.field(default=None, kw_only=True)


class Weights(Stored):
    """A network that is known layer by layer; its tensors are float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignGraph(Stored):
    """An ONNX graph that was not recognised in every part: it runs as it is, node by node.

    `tensors` are its constants, in their own dtypes. A graph of whole songs gives one score of its
    own for all segments.
    """

    graph: Mapping[str, Any]  # see `convert.graph.graph_to_dict`

    @property
    def whole_song(self) -> bool:
        """Whether the segments of a song are scored together."""
        return self.provenance.get("form") == "song"


@dataclasses.dataclass(frozen=True, eq=False)
class Engine(Model):
    """A file that a library runs as it is: a graph that `export` wrote, or a TensorRT engine.

    `sha256`, `licence` and `provenance` are those of the weights that it was made of.
    """

    name: str
    config: cfg.Config
    sha256: str
    licence: str
    provenance: Mapping[str, Any]
    file: str
    fine: fine_head.FineHead | None = None

    @property
    def compiled(self) -> bool:
        """Whether it is a TensorRT engine."""
        return self.file.endswith(ENGINE_SUFFIX)

    @property
    def precision(self) -> str:
        """Precision of an exported graph: "fp32", "fp16" or "int8"."""
        return str(self.provenance.get("precision"))


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
    fine: fine_head.FineHead | None = None,
) -> None:
    """Write a weights file atomically; `dtype` float16 halves it. WeightsError on bad tensors.

    The variance of a folded norm stays float32: float16 rounds it to 1, which marks nothing.
    With `graph` the tensors are its constants, and keep their dtypes. `fine` goes beside them.
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
    if fine is not None:
        header["fine"] = _json({"sha256": fine.sha256, "provenance": dict(fine.provenance)})
        beside = fine_head.stored(fine.tensors)
        stored |= {f"{FINE}{leaf}": tensor for leaf, tensor in beside.items()}
    replace_file(path, save(stored, metadata=header))


def write_weights(weights: Stored, path: str | os.PathLike[str]) -> None:
    """Write weights as they are to a file: see `save_weights`."""
    save_weights(
        path,
        weights.config,
        weights.tensors,
        name=weights.name,
        licence=weights.licence,
        provenance=weights.provenance,
        graph=weights.graph if isinstance(weights, ForeignGraph) else None,
        fine=weights.fine,
    )


def default_path() -> Path:
    """Where the weights that come with the package lie."""
    return Path(str(resources.files("artifactnet_jax") / "assets" / DEFAULT))


@overload
def load_weights(path: None = None) -> Weights: ...


@overload
def load_weights(path: str | os.PathLike[str]) -> Weights | ForeignGraph: ...


def load_weights(path: str | os.PathLike[str] | None = None) -> Weights | ForeignGraph:
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
        config = cfg.Config.from_dict(_table(header, "config"))
        provenance = _table(header, "provenance")
        name, licence, sha256 = header["name"], header["licence"], header["sha256"]
        graph_json = header.get("graph", "")
        graph = _table(header, "graph") if graph_json else None
        fine = _beside(header, stored) if "fine" in header else None
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{where}: damaged header ({error!r})") from error
    _check(where, config, stored, graph)
    if _digest(header["config"], stored, graph_json) != sha256:
        raise WeightsError(f"{where}: tensors do not match the digest in the header")
    if graph is not None:
        return ForeignGraph(name, config, stored, sha256, licence, provenance, graph, fine=fine)
    single = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    return Weights(name, config, single, sha256, licence, provenance, fine=fine)


def _beside(header: Mapping[str, str], stored: dict[str, np.ndarray]) -> fine_head.FineHead:
    """The head for the fine spectrum, whose tensors are taken out of `stored`. ValueError."""
    facts = _table(header, "fine")
    names = [name for name in stored if name.startswith(FINE)]
    tensors = {name.removeprefix(FINE): stored.pop(name) for name in names}
    try:
        return fine_head.read(tensors, facts["provenance"], facts["sha256"])
    except ValueError as error:
        raise ValueError(f"fine: {error}") from error


def _table(header: Mapping[str, str], key: str) -> dict[str, Any]:
    """The table that a header holds as JSON. KeyError or ValueError naming the key: it does not."""
    try:
        table = json.loads(header[key])
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    cfg.require(key, table, dict)
    return dict(table)
