"""From an ONNX file to `Weights`: native where every part is recognised, else the graph itself."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.backends.numpy import NumpyBackend
from artifactnet_jax.convert import recognise
from artifactnet_jax.convert.graph import ConvertError, Graph, graph_to_dict, read_graph
from artifactnet_jax.convert.match import match_cnn, match_unet
from artifactnet_jax.convert.networks import Network, Trace, Unmapped, decimal, extract
from artifactnet_jax.convert.operators import evaluate, x64
from artifactnet_jax.convert.original import tensors_of
from artifactnet_jax.convert.template import array_digest
from artifactnet_jax.filterbank import hann
from artifactnet_jax.layers import INPUT, layer
from artifactnet_jax.passes import folded
from artifactnet_jax.results import aggregate, brief
from artifactnet_jax.weights import Weights, weights_digest

_log = logging.getLogger(__name__)

# Of a score. The published rule for two implementations; float32 alone can make half of it on the
# probe, whose near-silence a network on log spectra enlarges.
PARITY = 1e-3
SEGMENT_SAMPLES = cfg.FrontEnd().segment_samples  # where a graph leaves the number open
PROBE_SEGMENTS = 3
UNKNOWN_LICENCE = (
    "not stated in the file: ask its authors (those of the released ArtifactNet are CC BY-NC 4.0)"
)


@dataclasses.dataclass(frozen=True)
class Contract:
    """How a graph is called."""

    input: str
    dtype: str
    axes: tuple[str, ...]  # "n" segments, "samples", "1"
    samples: int
    segments: int | None  # number that every call must have; None: any
    output: str
    song: bool  # one score for all segments together, not one for each

    def shaped(self, audio: np.ndarray) -> np.ndarray:
        """Audio [n, samples] in the shape and dtype of the graph's input."""
        sizes = {"n": len(audio), "samples": self.samples, "1": 1}
        return audio.reshape([sizes[axis] for axis in self.axes]).astype(self.dtype)


def import_model(
    path: str | os.PathLike[str], *, licence: str | None = None, output: str | None = None
) -> Weights:
    """Weights of an ONNX model of audio [segments, samples] -> P(AI), by segment or by song.

    `licence` overrides what the file's metadata says; `output` names the score where a graph has
    several outputs that could be one. `provenance["route"]` is "native" or "graph", and
    `provenance["reason"]` says why it is not native. Raises ConvertError, one line.
    """
    where = os.fspath(path)
    graph = read_graph(path)
    try:
        contract, trace = examine(graph, output)
        native, reason = _native(contract, trace)
        if _mixes(graph, contract, trace, native):
            contract, trace = examine(graph, output, several=False)
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
    }
    stated = {key.lower(): value for key, value in graph.metadata.items()}
    licence = licence or stated.get("licence") or stated.get("license") or UNKNOWN_LICENCE
    name = os.path.splitext(os.path.basename(where))[0]
    if native is None:
        return _graph_weights(name, graph, contract, licence, provenance)
    digest = weights_digest(native.config, native.tensors)
    provenance |= native.found
    return Weights(name, native.config, native.tensors, digest, licence, provenance)


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
        difference = _difference(native, contract, trace)
        if not difference <= PARITY:
            raise Unmapped(f"what was recognised scores a probe by {difference:.1e} differently")
    except Unmapped as error:
        return None, str(error)
    except Exception as error:  # a graph unlike any other must not stop the route that takes all
        _log.debug("recogniser", exc_info=True)
        return None, f"the recogniser failed ({brief(error)}): please report it"
    native.found["probe_difference"] = difference
    return native, ""


def _graph_weights(
    name: str,
    graph: Graph,
    contract: Contract,
    licence: str,
    provenance: Mapping[str, Any],
) -> Weights:
    """The graph itself as weights, to be run as it stands."""
    data, tensors = graph_to_dict(graph)
    verdict = cfg.Verdict(segments="first60") if contract.song else cfg.Verdict()
    rate = _sample_rate(graph)
    front_end = cfg.FrontEnd(sample_rate=rate, segment_samples=contract.samples)
    config = cfg.Config(preset="graph", front_end=front_end, verdict=verdict)
    digest = weights_digest(config, tensors, data)
    initialisers = [
        {"name": constant, "tensor": f"constants.{constant}", "transform": "same"}
        for constant, array in graph.constants.items()
        if array.dtype.kind == "f"
    ]
    provenance = {**provenance, "initialisers": initialisers}
    return Weights(name, config, tensors, digest, licence, provenance, data)


def _sample_rate(graph: Graph) -> int:
    """Hz, from the metadata; a graph itself does not tell, and ArtifactNet's is 44,100."""
    stated = graph.metadata.get("sample_rate", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else cfg.FrontEnd().sample_rate


# --- how the graph is called ---------------------------------------------------------------------


def examine(
    graph: Graph, output: str | None = None, *, several: bool = True
) -> tuple[Contract, Trace]:
    """Find out how the graph is called, and run it once on the probe. Raises ConvertError.

    With `several` False a graph that takes any number of segments is given one at a time.
    """
    if len(graph.inputs) != 1:
        names = ", ".join(value.name for value in graph.inputs)
        raise ConvertError(
            f"it has {len(graph.inputs)} inputs ({names}); a detector has one: audio"
        )
    given = graph.inputs[0]
    shape = " x ".join("?" if size is None else str(size) for size in given.shape)
    if not given.dtype.startswith("float"):
        raise ConvertError(f"its input {given.name} is {given.dtype}, not floating-point audio")
    long = [k for k, size in enumerate(given.shape) if isinstance(size, int) and size >= 4096]
    open_ = [k for k, size in enumerate(given.shape) if not isinstance(size, int) or size < 0]
    rank = len(given.shape)
    if not long and open_ and rank <= 3 and open_[-1] == rank - 1:
        long = [rank - 1]  # the number of samples is left open
    if len(long) != 1 or not 1 <= rank <= 3:
        raise ConvertError(f"its input {given.name} is {shape}, not audio [segments, samples]")
    size = given.shape[long[0]]
    samples = size if isinstance(size, int) and size > 0 else SEGMENT_SAMPLES
    axes = ["1"] * rank
    axes[long[0]] = "samples"
    others = [k for k in range(rank) if k != long[0]]
    large = [k for k in others if k in open_ or given.shape[k] != 1]
    if len(large) > 1 and not set(large) <= set(open_):
        raise ConvertError(f"its input {given.name} is {shape}, not audio [segments, samples]")
    for k in (large or others)[:1]:
        axes[k] = "n"
    segments: int | None = 1
    if large:
        count = given.shape[large[0]]
        segments = None if large[0] in open_ or not isinstance(count, int) else count
    contract = Contract(given.name, given.dtype, tuple(axes), samples, segments, "", False)
    trials = [segments] if segments is not None else [PROBE_SEGMENTS, 1][not several :]
    for attempt, n in enumerate(trials):
        try:
            trace = run_probe(graph, contract, n)
        except ConvertError:
            if attempt + 1 == len(trials):
                raise
            continue
        found, song = _score_output(graph, trace, output)
        if segments is None and n == 1:
            segments = 1
        elif n == 1:
            song = False
        return dataclasses.replace(contract, segments=segments, output=found, song=song), trace
    raise ConvertError("it neither scores each segment nor gives one score for all of them")


def run_probe(graph: Graph, contract: Contract, n: int) -> Trace:
    """Run the graph on `n` segments of the probe and keep what the recogniser reads."""
    audio = recognise.probe_audio(n, contract.samples)
    feed = contract.shaped(audio)
    static: dict[str, np.ndarray] = dict(graph.constants)
    shapes: dict[str, tuple[int, ...]] = {name: x.shape for name, x in static.items()}
    limit = 8 * audio.size
    small = [contract.input]
    shapes[contract.input] = feed.shape

    def observe(name: str, value: Any) -> None:
        shapes[name] = tuple(value.shape)
        if isinstance(value, np.ndarray):
            static[name] = value
        elif value.size <= limit:
            small.append(name)

    with x64():  # shapes and static values, without computing anything
        jax.eval_shape(lambda x: evaluate(graph, {contract.input: x}, observe=observe), feed)
    values = tensors_of(graph, {contract.input: feed}, small)
    run = tuple(node for node in graph.nodes if any(out in shapes for out in node.outputs))
    return Trace(dataclasses.replace(graph, nodes=run), n, static, shapes, values)


def _score_output(graph: Graph, trace: Trace, wanted: str | None) -> tuple[str, bool]:
    """Name of the output that is a score, and whether it is one for all segments."""
    names = [value.name for value in graph.outputs]
    if wanted is not None and wanted not in names:
        raise ConvertError(f"it has no output {wanted!r}: it has {', '.join(names)}")
    n = trace.segments
    problems, found = [], []
    for name in names if wanted is None else [wanted]:
        if name in trace.static:
            problems.append(f"{name} does not depend on the audio")
            continue
        values = trace.values.get(name)
        size = math.prod(trace.shapes[name])
        if values is None or size not in (1, n):
            problems.append(f"{name} has {size / n:g} values for each segment, not one score")
        elif not np.all(np.isfinite(values)):
            problems.append(f"{name} is not finite on ordinary audio")
        elif values.min() < -1e-6 or values.max() > 1 + 1e-6:
            number = values.reshape(-1)[np.argmax(np.abs(values))]
            problems.append(f"{name} is {number:.3g} on a probe: not a probability")
        else:
            found.append((name, size == 1 and n > 1))
    if not found:
        raise ConvertError(f"its output is not a score: {'; '.join(problems)}")
    if len(found) > 1:
        several = ", ".join(name for name, _ in found)
        raise ConvertError(
            f"outputs {several} could each be the score: choose one with --score-output"
        )
    return found[0]


def _is_song(graph: Graph, contract: Contract, trace: Trace) -> bool:
    """Whether one score for all segments does not depend on their order."""
    audio = recognise.probe_audio(trace.segments, contract.samples)[::-1]
    feed = {contract.input: contract.shaped(audio)}
    got = tensors_of(graph, feed, [contract.output])[contract.output]
    return bool(np.max(np.abs(got - trace.values[contract.output])) < PARITY)


def _independent(graph: Graph, contract: Contract, trace: Trace) -> bool:
    """Whether the scores of several segments are those of each alone, by the first of them."""
    audio = recognise.probe_audio(trace.segments, contract.samples)[:1]
    feed = {contract.input: contract.shaped(audio)}
    try:
        alone = tensors_of(graph, feed, [contract.output])[contract.output]
    except ConvertError:  # it wants several
        return True
    together = trace.values[contract.output].reshape(-1)
    return bool(np.max(np.abs(alone.reshape(-1)[:1] - together[:1])) < PARITY)


# --- the native route ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Native:
    """A graph that was recognised from end to end."""

    config: cfg.Config
    tensors: dict[str, np.ndarray]
    found: dict[str, Any]  # for the provenance: names of the stages, where the tensors came from


def recognised(contract: Contract, trace: Trace) -> Native:
    """Config and tensors of a traced graph. Raises Unmapped, saying what was not recognised."""
    audio = recognise.probe_audio(trace.segments, contract.samples)
    verdict, scores = _aggregation(contract, trace, audio)
    logit, two_class = _logit(trace, scores)
    residuals = recognise.find_residuals(
        trace, recognise.find_spectrum(trace, audio), contract.output
    )
    failure = Unmapped("")
    for residual in residuals:
        try:
            return _from_residual(contract, trace, residual, verdict, scores, logit, two_class)
        except Unmapped as error:
            failure = error
    raise failure


def _from_residual(
    contract: Contract,
    trace: Trace,
    residual: recognise.Residual,
    verdict: cfg.Verdict,
    scores: str,
    logit: str,
    two_class: int | None,
) -> Native:
    start = residual.plane.tensor
    below = recognise.after(trace, start)
    medians = recognise.find_medians(trace, residual.plane)
    parts = recognise.find_parts(trace, residual.plane, medians)
    arrays = {"residual": residual.plane.array, "H": parts["H"].array, "P": parts["P"].array}
    mel = recognise.find_mel(trace, arrays, below)
    clamp = recognise.find_clamp(trace, mel, below)
    views = recognise.clamped(mel.views, clamp["top_db"], clamp["joint"])
    channels = recognise.find_channels(trace, views, start, contract.output)
    spectrum = residual.spectrum
    given = not np.allclose(spectrum.window, hann(len(spectrum.window)), atol=1e-6)
    front_end = cfg.FrontEnd(
        sample_rate=_sample_rate(trace.graph),
        segment_samples=contract.samples,
        window="given" if given else "hann",
        mel_scale="given",
        channels=channels.names,
        **spectrum.values,
        **{key: medians[key] for key in ("hpss_width", "percussive_width", "hpss_edge")},
        **{key: parts[key] for key in ("hpss_power", "hpss_eps")},
        **mel.values,
        **clamp,
    )
    f, t = residual.plane.array.shape[1:]
    starts = {plane.tensor: plane.roles for plane in spectrum.planes if plane.roles}
    unet = extract(trace, starts, (1, f, t), residual.mask, residual.mask_plane.roles)
    if residual.factor != 1:
        attributes = {"value": residual.factor, "reverse": False}
        last = layer("mask.factor", "mul", [unet.layers[-1].name], attributes)
        unet = dataclasses.replace(unet, layers=(*unet.layers, last))
    shape = (len(channels.names), front_end.n_mels, front_end.n_frames)
    cnn = extract(trace, {channels.tensor: channels.roles}, shape, logit, None, two_class=two_class)
    cnn = _with_affine(cnn, channels)
    bound = mask_bound(unet)
    if bound is None:
        raise Unmapped("the mask has no bound that its layers guarantee")
    parts_of: dict[str, Any] = {"unet": match_unet(unet, f, t), "cnn": match_cnn(cnn, shape[0])}
    tensors = {"front_end.mel": mel.matrix}
    if given:
        tensors["front_end.window"] = spectrum.window.astype(np.float32)
    sources = []
    for part, network in (("unet", unet), ("cnn", cnn)):
        matched = parts_of[part]
        if matched is None:
            imported = cfg.Imported(network.layers, bound if part == "unet" else None)
            parts_of[part] = imported
            tensors |= {f"{part}.{name}": array for name, array in network.tensors.items()}
        else:
            parts_of[part] = matched.config
            tensors |= matched.tensors
        rename = {} if matched is None else matched.names
        for tensor, (name, transform) in network.sources.items():
            full = rename.get(tensor, f"{part}.{tensor}")
            sources.append({"name": name, "tensor": full, "transform": transform})
    config = cfg.Config(
        preset="converted",
        front_end=front_end,
        unet=parts_of["unet"],
        cnn=parts_of["cnn"],
        verdict=verdict,
    )
    stages = {
        "magnitude": spectrum.planes[0].tensor,
        **({"mask": residual.mask} if residual.factor == 1 else {}),
        "residual": start,
        **{key: parts[key].tensor for key in "HP" if parts[key].roles is not None},
        "channels": channels.tensor,
        "logit": logit,
        "segment_scores": scores,
    }
    # What has no initialiser of its own cannot be written back: `export` must know if it changed.
    kept = {entry["tensor"] for entry in sources}
    fixed = {
        name: array_digest(array)
        for name, array in folded(config, tensors)[1].items()
        if name not in kept
    }
    found = {"initialisers": sources, "fixed": fixed, "stages": stages}
    return Native(config, tensors, found)


def mask_bound(network: Network) -> float | None:
    """The upper bound that the last layers put on the mask, whatever their input."""
    last = {x.name: x for x in network.layers}
    low, high = -math.inf, math.inf
    chain = []
    name = network.layers[-1].name
    while name in last:
        current = last[name]
        chain.append(current)
        if current.op in ("sigmoid", "tanh", "hard_sigmoid", "clip", "softmax"):
            break
        if len(current.inputs) != 1:
            return None
        name = current.inputs[0]
    for current in reversed(chain):
        attrs = current.attrs
        if current.op in ("sigmoid", "hard_sigmoid", "softmax"):
            low, high = 0.0, 1.0
        elif current.op == "tanh":
            low, high = -1.0, 1.0
        elif current.op == "clip":
            if attrs["low"] is not None:
                low = max(low, attrs["low"])
            if attrs["high"] is not None:
                high = min(high, attrs["high"])
        elif current.op in ("mul", "div", "add", "sub"):
            number = attrs.get("value")
            if number is None:
                array = network.tensors.get(f"{current.name}.value")
                if array is None or array.size != 1:
                    return None
                number = float(array.reshape(()))
            if attrs.get("reverse"):
                if current.op != "sub":
                    return None
                low, high = number - high, number - low
            elif current.op == "mul":
                low, high = sorted((low * number, high * number))
            elif current.op == "div":
                low, high = sorted((low / number, high / number))
            else:
                shift = number if current.op == "add" else -number
                low, high = low + shift, high + shift
        elif current.op not in ("slice", "pad", "transpose_hw", "resize", "depth_to_space"):
            return None
    return high if math.isfinite(high) and low >= -1e-6 else None


def _with_affine(network: Network, channels: recognise.Channels) -> Network:
    """The classifier with the scale and offset of its channels as its first layers."""
    if np.all(channels.scale == 1) and np.all(channels.offset == 0):
        return network
    first = []
    tensors = dict(network.tensors)
    name = INPUT
    for op, array in (("mul", channels.scale), ("add", channels.offset)):
        own = f"channels.{op}"
        value = array.reshape(-1, 1, 1).astype(np.float32)
        first.append(layer(own, op, [name], {"reverse": False}, {"value": value.shape}))
        tensors[f"{own}.value"] = value
        name = own
    rest = [
        dataclasses.replace(x, inputs=tuple(name if i == INPUT else i for i in x.inputs))
        for x in network.layers
    ]
    return Network((*first, *rest), tensors, network.sources)


_MOVES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Clip")


def _logit(trace: Trace, scores: str) -> tuple[str, int | None]:
    """The tensor that the score is the sigmoid of; with a class number, the softmax of."""
    name = scores
    chosen: int | None = None
    for _ in range(12):
        node = trace.producer.get(name)
        if node is None:
            break
        if node.op == "Sigmoid":
            return node.inputs[0], None
        if node.op == "Softmax" and chosen is not None:
            if trace.shapes[node.inputs[0]][-1] != 2:
                raise Unmapped("its score is one of several classes, not of two")
            return node.inputs[0], chosen
        if node.op == "Gather" and trace.static[node.inputs[1]].size == 1:
            chosen = int(trace.static[node.inputs[1]].reshape(())) % 2
        elif node.op in ("Slice", "Split"):
            axis = trace.values[name]
            whole = trace.values[node.inputs[0]]
            columns = [
                k
                for k in range(whole.shape[-1])
                if np.array_equal(whole[..., k].reshape(-1), axis.reshape(-1))
            ]
            if len(columns) != 1:
                break
            chosen = columns[0]
        elif node.op not in _MOVES:
            break
        name = node.inputs[0]
    raise Unmapped("its score is no sigmoid of a logit, nor one of two classes")


def _aggregation(contract: Contract, trace: Trace, audio: np.ndarray) -> tuple[cfg.Verdict, str]:
    """The verdict's rules, and the tensor of the segments' scores."""
    if not contract.song:
        return cfg.Verdict(), contract.output
    total = float(trace.values[contract.output].reshape(()))
    used = trace.before(contract.output)
    eps = 0.0
    for node in trace.graph.nodes:
        if node.op == "Add" and node.outputs[0] in used:
            for a, b in (node.inputs, node.inputs[::-1]):
                made = trace.producer.get(a)
                while made is not None and made.op in ("Cast", "Identity"):
                    made = trace.producer.get(made.inputs[0])
                number = trace.static.get(b)
                if made is not None and made.op == "ReduceSum" and number is not None:
                    eps = decimal(number) if number.size == 1 else 0.0
    rms = np.sqrt(np.mean(audio.astype(np.float64) ** 2, axis=1))
    for name in sorted(used, key=lambda tensor: -trace.order.get(tensor, -1)):
        values = trace.values.get(name)
        last = trace.producer.get(name)
        if values is None or values.size != len(audio) or last is None or last.op != "Sigmoid":
            continue
        for rule in ("rms", "median", "mean"):
            got = aggregate(values.reshape(-1).tolist(), rms.tolist(), rule, eps)
            if abs(got - total) < 1e-6:
                verdict = cfg.Verdict(aggregate=rule, segments="first60", rms_eps=eps)
                return verdict, name
    raise Unmapped("its song score is no RMS-weighted mean, mean or median of segment scores")


def _difference(native: Native, contract: Contract, trace: Trace) -> float:
    """Largest difference of the segments' scores between what was recognised and the graph."""
    audio = recognise.probe_audio(trace.segments, contract.samples)
    weights = Weights("", native.config, native.tensors, "", "", {})
    try:
        got = NumpyBackend(weights).song(audio)
    except (ValueError, ArithmeticError) as error:
        raise Unmapped(f"what was recognised does not run: {brief(error)}") from error
    expected = trace.values[native.found["stages"]["segment_scores"]].reshape(-1)
    return float(np.max(np.abs(got.astype(np.float64) - expected)))
