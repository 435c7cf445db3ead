"""The native route: a traced graph as a config and its tensors, where all of it is recognised."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.backends.numpy import NumpyBackend
from artifactnet_jax.convert import recognise
from artifactnet_jax.convert.contract import Contract, sample_rate
from artifactnet_jax.convert.match import match_cnn, match_unet
from artifactnet_jax.convert.networks import Network, extract
from artifactnet_jax.convert.original import tensors_of
from artifactnet_jax.convert.recognise_level import find_levelled_spectrum
from artifactnet_jax.convert.template import array_digest
from artifactnet_jax.convert.trace import Trace, Unmapped, decimal, probe, probe_audio
from artifactnet_jax.filterbank import hann
from artifactnet_jax.layers import INPUT, Layer, layer
from artifactnet_jax.passes import folded
from artifactnet_jax.results import aggregate
from artifactnet_jax.text import brief
from artifactnet_jax.weights import Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Native:
    """A graph that was recognised from end to end."""

    config: cfg.Config
    tensors: dict[str, np.ndarray]
    found: dict[str, Any]  # for the provenance: names of the stages, where the tensors came from


def recognised(contract: Contract, trace: Trace) -> Native:
    """Config and tensors of a traced graph. Raises Unmapped, saying what was not recognised."""
    audio = probe_audio(trace.segments, contract.samples)
    verdict, scores = _aggregation(contract, trace, audio)
    logit, two_class = _logit(trace, scores)
    spectra = find_levelled_spectrum(trace, audio, contract.shaped)
    residuals = recognise.find_residuals(trace, spectra, contract.output)
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
    verdict: cfg.Decision,
    scores: str,
    logit: str,
    two_class: int | None,
) -> Native:
    start, spectrum = residual.plane.tensor, residual.spectrum
    below = trace.after(start)
    medians = recognise.find_medians(trace, residual.plane)
    parts = recognise.find_parts(trace, residual.plane, medians)
    arrays = {"residual": residual.plane.array, "H": parts["H"].array, "P": parts["P"].array}
    mel = recognise.find_mel(trace, arrays, below)
    clamp = recognise.find_clamp(trace, mel, below)
    views = recognise.clamped(mel.views, clamp["top_db"], clamp["joint"])
    channels = recognise.find_channels(trace, views, start, contract.output)
    given = not np.allclose(spectrum.window, hann(len(spectrum.window)), atol=1e-6)
    front_end = cfg.FrontEnd(
        sample_rate=sample_rate(trace.graph),
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
    tensors = {"front_end.mel": mel.matrix}
    if given:
        tensors["front_end.window"] = spectrum.window.astype(np.float32)
    size = residual.plane.array.shape[1:]
    unet = _mask_network(trace, residual)
    shape = (len(channels.names), front_end.n_mels, front_end.n_frames)
    cnn = extract(trace, {channels.tensor: channels.roles}, shape, logit, None, two_class=two_class)
    cnn = _with_affine(cnn, channels)
    bound = mask_bound(unet)
    if bound is None:
        raise Unmapped("the mask has no bound that its layers guarantee")
    sources: list[dict[str, str]] = []
    unet_part = _part("unet", unet, match_unet(unet, *size), bound, tensors, sources)
    cnn_part = _part("cnn", cnn, match_cnn(cnn, shape[0]), None, tensors, sources)
    config = cfg.Config(
        preset="converted", front_end=front_end, unet=unet_part, cnn=cnn_part, verdict=verdict
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
    return Native(config, tensors, {"initialisers": sources, "fixed": fixed, "stages": stages})


def _mask_network(trace: Trace, residual: recognise.Residual) -> Network:
    """The layers from magnitude to mask."""
    size = residual.plane.array.shape[1:]
    starts = {plane.tensor: plane.roles for plane in residual.spectrum.planes if plane.roles}
    unet = extract(trace, starts, (1, *size), residual.mask, residual.mask_plane.roles)
    if residual.factor != 1:
        attributes = {"value": residual.factor, "reverse": False}
        last = layer("mask.factor", "mul", [unet.layers[-1].name], attributes)
        unet = dataclasses.replace(unet, layers=(*unet.layers, last))
    return unet


def _part(
    part: str,
    network: Network,
    matched: Any,
    bound: float | None,
    tensors: dict[str, np.ndarray],
    sources: list[dict[str, str]],
) -> Any:
    """The config of a network, as a preset where it was matched; its tensors and their sources."""
    rename = {} if matched is None else matched.names
    for tensor, (name, transform) in network.sources.items():
        full = rename.get(tensor, f"{part}.{tensor}")
        sources.append({"name": name, "tensor": full, "transform": transform})
    if matched is None:
        tensors |= {f"{part}.{name}": array for name, array in network.tensors.items()}
        return cfg.Imported(network.layers, bound)
    tensors |= matched.tensors
    return matched.config


def mask_bound(network: Network) -> float | None:
    """The upper bound that the last layers put on the mask, whatever their input."""
    by_name = {x.name: x for x in network.layers}
    chain: list[Layer] = []
    name = network.layers[-1].name
    while name in by_name:
        chain.append(by_name[name])
        if chain[-1].op in _BOUNDED or chain[-1].op == "clip":
            break
        if len(chain[-1].inputs) != 1:
            return None
        name = chain[-1].inputs[0]
    low, high = -math.inf, math.inf
    for current in reversed(chain):
        bounds = _bounds(current, network, low, high)
        if bounds is None:
            return None
        low, high = bounds
    return high if math.isfinite(high) and low >= -1e-6 else None


_BOUNDED = {"sigmoid": (0.0, 1.0), "hard_sigmoid": (0.0, 1.0), "softmax": (0.0, 1.0)}
_BOUNDED |= {"tanh": (-1.0, 1.0)}


def _bounds(
    current: Layer, network: Network, low: float, high: float
) -> tuple[float, float] | None:
    """Bounds of a layer's output, from those of its input; None where they are not known."""
    op, attrs = current.op, current.attrs
    if op in _BOUNDED:
        return _BOUNDED[op]
    if op == "clip":
        least = low if attrs["low"] is None else max(low, attrs["low"])
        return least, high if attrs["high"] is None else min(high, attrs["high"])
    if op in ("slice", "pad", "transpose_hw", "resize", "depth_to_space"):
        return low, high
    number = attrs.get("value")
    if number is None:
        array = network.tensors.get(f"{current.name}.value")
        number = None if array is None or array.size != 1 else float(array.reshape(()))
    if op not in ("mul", "div", "add", "sub") or number is None:
        return None
    if attrs.get("reverse"):
        return (number - high, number - low) if op == "sub" else None
    if op in ("mul", "div"):
        ends = (low * number, high * number) if op == "mul" else (low / number, high / number)
        return min(ends), max(ends)
    shift = number if op == "add" else -number
    return low + shift, high + shift


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
    while True:
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
    made = "is the input" if node is None else f"is made by {node.op} node {node.name!r}"
    raise Unmapped(f"its score is no sigmoid of a logit, nor one of two classes: {name!r} {made}")


def _aggregation(contract: Contract, trace: Trace, audio: np.ndarray) -> tuple[cfg.Decision, str]:
    """The verdict's rules, and the tensor of the segments' scores."""
    if not contract.song:
        return cfg.Decision(), contract.output
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
                verdict = cfg.Decision(aggregate=rule, segments="first60", rms_eps=eps)
                return verdict, name
    raise Unmapped("its song score is no RMS-weighted mean, mean or median of segment scores")


def difference(native: Native, contract: Contract, trace: Trace) -> float:
    """Largest difference of the segments' scores between what was recognised and the graph."""
    audio = probe_audio(trace.segments, contract.samples)
    expected = trace.values[native.found["stages"]["segment_scores"]]
    try:
        return _apart(native, audio, expected)
    except (ValueError, ArithmeticError) as error:
        raise Unmapped(f"what was recognised does not run: {brief(error)}") from error


def _apart(native: Native, audio: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of finite scores of audio [n, samples] from those expected."""
    weights = Weights("", native.config, native.tensors, "", "", {})
    apart = np.abs(NumpyBackend(weights).song(audio).astype(np.float64) - expected.reshape(-1))
    finite = apart[np.isfinite(expected.reshape(-1))]
    return float(finite.max(initial=0.0))


def quiet_difference(native: Native, contract: Contract, trace: Trace) -> float:
    """The same on quiet and sparse audio, where a network on logarithms is most sensitive.

    A difference there is as often onnxruntime's error as ours: `verify --exact` tells.
    """
    name, n = native.found["stages"]["segment_scores"], trace.segments
    found = probe(contract.samples)
    quiet = [found[key] for key in ("music at -60 dB", "clicks in silence", "sine of 1 kHz")]
    worst = 0.0
    for start in range(0, len(quiet), n):
        audio = np.stack((quiet[start : start + n] * n)[:n])
        feed = {contract.input: contract.shaped(audio)}
        worst = max(worst, _apart(native, audio, tensors_of(trace.graph, feed, [name])[name]))
    return worst
