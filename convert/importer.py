"""From an ONNX file to `Weights` where every part is recognised, else a `ForeignGraph`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax import fine_head
from artifactnet_jax.convert.contract import Contract, examine, sample_rate
from artifactnet_jax.convert.graph import ConvertError, Graph, graph_to_dict, read_graph
from artifactnet_jax.convert.native import Native, difference, quiet_difference, recognised
from artifactnet_jax.convert.original import tensors_of
from artifactnet_jax.convert.trace import Trace, Unmapped, probe_audio
from artifactnet_jax.text import brief
from artifactnet_jax.weights import ForeignGraph, Weights, weights_digest

_log = logging.getLogger(__name__)

# Of a score. The published rule for two implementations; float32 alone can make half of it on the
# probe, whose near-silence a network on log spectra enlarges.
PARITY = 1e-3
UNKNOWN_LICENCE = (
    "not stated in the file: ask its authors (those of the released ArtifactNet are CC BY-NC 4.0)"
)


def import_model(
    path: str | os.PathLike[str],
    *,
    licence: str | None = None,
    output: str | None = None,
    logit: bool = False,
) -> Weights | ForeignGraph:
    """Weights of an ONNX model of audio [segments, samples] -> P(AI), by segment or by song.

    `licence` overrides what the file's metadata says; `output` names the score where a graph has
    several outputs that could be one, or NAME:COLUMN of one with several columns; with `logit` it
    is not yet a probability. `provenance["route"]` is "native" or "graph", and
    `provenance["reason"]` says why it is not native. Raises ConvertError, one line.
    """
    where = os.fspath(path)
    graph = read_graph(path)
    try:
        fine = fine_head.noted(graph.metadata)
    except ValueError as error:
        raise ConvertError(f"{where}: metadata {fine_head.NOTE}: {error}") from error
    graph.metadata = {k: v for k, v in graph.metadata.items() if k != fine_head.NOTE}
    try:
        given = graph
        graph, contract, trace = examine(given, output, logit=logit)
        native, reason = _native(contract, trace)
        if _mixes(graph, contract, trace, native):
            graph, contract, trace = examine(given, output, logit=logit, several=False)
            native, reason = _native(contract, trace)
    except ConvertError as error:
        raise ConvertError(f"{where}: {error}") from error
    provenance: dict[str, Any] = {
        "source": os.path.basename(where),
        "source_sha256": graph.sha256,
        "producer": graph.producer,
        "opset": graph.opset,
        "metadata": dict(graph.metadata),
        "form": "song" if contract.song else "segment",
        "contract": dataclasses.asdict(contract),
        "route": "graph" if native is None else "native",
        "reason": reason,
        "half": trace.half,
    }
    stated = {key.lower(): value for key, value in graph.metadata.items()}
    licence = licence or stated.get("licence") or stated.get("license") or UNKNOWN_LICENCE
    name = os.path.splitext(os.path.basename(where))[0]
    if native is None:
        found = _graph_weights(name, graph, contract, licence, provenance)
        return dataclasses.replace(found, fine=fine)
    digest = weights_digest(native.config, native.tensors)
    provenance |= native.found
    return Weights(name, native.config, native.tensors, digest, licence, provenance, fine=fine)


def _mixes(graph: Graph, contract: Contract, trace: Trace, native: Native | None) -> bool:
    """Whether a graph that scores segments, not songs, lets those of one call run into each other.

    It must then be given one at a time, and normalises each by itself.
    """
    if contract.segments is not None:
        return False
    if contract.song:  # one score for several segments, but not by any rule for songs
        return native is None and not _is_song(graph, contract, trace)
    if native is not None:
        return native.config.front_end.joint.startswith("song")
    return not _independent(graph, contract, trace)


def _native(contract: Contract, trace: Trace) -> tuple[Native | None, str]:
    """What was recognised, if it scores the probe as the graph does; else why it was not."""
    try:
        native = recognised(contract, trace)
        apart = difference(native, contract, trace)
        if not apart <= PARITY:
            raise Unmapped(f"what was recognised scores a probe by {apart:.1e} differently")
    except Unmapped as error:
        hidden = "it computes in float16, whose rounding hides what a tensor is: "
        return None, f"{hidden if trace.half else ''}{error}"
    except Exception as error:  # a graph unlike any other must not stop the route that takes all
        _log.debug("recogniser", exc_info=True)
        return None, f"the recogniser failed ({brief(error)}): please report it"
    native.found["probe_difference"] = apart
    native.found["quiet_difference"] = quiet_difference(native, contract, trace)
    return native, ""


def _graph_weights(
    name: str,
    graph: Graph,
    contract: Contract,
    licence: str,
    provenance: Mapping[str, Any],
) -> ForeignGraph:
    """The graph itself as weights, to be run as it stands."""
    data, tensors = graph_to_dict(graph)
    verdict = cfg.Decision(segments="first60") if contract.song else cfg.Decision()
    rate = sample_rate(graph)
    front_end = cfg.FrontEnd(sample_rate=rate, segment_samples=contract.samples)
    config = cfg.Config(preset="graph", front_end=front_end, verdict=verdict)
    digest = weights_digest(config, tensors, data)
    initialisers = [
        {"name": constant, "tensor": f"constants.{constant}", "transform": "same"}
        for constant, array in graph.constants.items()
        if array.dtype.kind == "f"
    ]
    provenance = {**provenance, "initialisers": initialisers}
    return ForeignGraph(name, config, tensors, digest, licence, provenance, data)


def _is_song(graph: Graph, contract: Contract, trace: Trace) -> bool:
    """Whether one score for all segments does not depend on their order."""
    audio = probe_audio(trace.segments, contract.samples)[::-1]
    feed = {contract.input: contract.shaped(audio)}
    got = tensors_of(graph, feed, [contract.output])[contract.output]
    return bool(np.max(np.abs(got - trace.values[contract.output])) < PARITY)


def _independent(graph: Graph, contract: Contract, trace: Trace) -> bool:
    """Whether the scores of several segments are those of each alone, by the first of them."""
    audio = probe_audio(trace.segments, contract.samples)[:1]
    feed = {contract.input: contract.shaped(audio)}
    try:
        alone = tensors_of(graph, feed, [contract.output])[contract.output]
    except ConvertError:  # it wants several
        return True
    together = trace.values[contract.output].reshape(-1)
    return bool(np.max(np.abs(alone.reshape(-1)[:1] - together[:1])) < PARITY)
