"""The lean graph in int8: its convolutions quantised by onnxruntime, over a user's own music.

Static quantisation needs the range of every activation, so tracks are run once through the float
graph. Half of the tracks give the ranges, and the other half say what it costs: the verdicts that
flip and how far scores move. What pays is the processor's to say: with int8 dot products (AVX-512
VNNI and what came after it) `v94` runs 2.5 times as fast as in float32 (docs/speed.md).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from artifactnet_jax.audio import AudioError, SegmentReader
from artifactnet_jax.convert.export import build_onnx
from artifactnet_jax.detector import Detector
from artifactnet_jax.files import replace_file
from artifactnet_jax.results import Failure
from artifactnet_jax.weights import Weights

if TYPE_CHECKING:
    from onnx import ModelProto

SEGMENTS = 7  # evenly spaced ones of a track, the public runner's number
MOST = 32  # segments that the ranges are taken from


class Quantised(NamedTuple):
    """How the int8 graph compares with the float one, on tracks that gave no ranges."""

    tracks: int
    flips: int  # of verdicts
    median: float  # of the differences of a track's score
    largest: float
    failures: list[str]  # messages of tracks that could not be read


def export_int8(weights: Weights, path: str | os.PathLike[str], tracks: Sequence[str]) -> Quantised:
    """Write the int8 graph of weights, atomically, and say how its scores differ from float32.

    Every second track gives ranges, the others are scored by both graphs in onnxruntime. Raises
    ValueError: fewer than two tracks that can be read; what `build_onnx` raises. OSError where the
    file cannot be written.
    """
    model = build_onnx(weights)
    failures: list[str] = []
    segments = _segments(weights, tracks[::2], failures)
    if not segments or len(tracks) < 2:
        cause = "half of the tracks give the ranges of int8, the others say what it costs"
        raise ValueError(f"{failures[0] if failures else cause}: name two or more that can be read")
    with tempfile.TemporaryDirectory(prefix="artifactnet-jax-") as folder:
        small, single = (os.path.join(folder, name) for name in ("int8.onnx", "fp32.onnx"))
        replace_file(single, model.SerializeToString())
        quantised = quantise(model, segments).SerializeToString()
        replace_file(small, quantised)
        before, after = (_scores(graph, tracks[1::2]) for graph in (single, small))
    failures += [result.message for result in before if isinstance(result, Failure)]
    pairs = [pair for pair in zip(before, after, strict=True) if not isinstance(pair[0], Failure)]
    both = [(a, b) for a, b in pairs if a.score is not None and b.score is not None]
    if not both:
        cause = failures[-1] if failures else "no score of the tracks that gave no ranges"
        raise ValueError(f"{cause}: nothing is left to compare int8 and float32 on")
    apart = np.abs([a.score - b.score for a, b in both])
    flips = sum(a.verdict != b.verdict for a, b in both)
    replace_file(path, quantised)
    return Quantised(len(both), flips, float(np.median(apart)), float(apart.max()), failures)


def quantise(model: ModelProto, segments: Iterable[np.ndarray]) -> ModelProto:
    """The lean graph with its convolutions in int8, for audio like these float32 [N] segments.

    Weights by channel, in 7 bits: products of 8 and 8 bits overflow the sums of processors without
    int8 dot products. Activations in 8 bits, each over the range that it had. See `kept_float`.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    given = model.graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._rest = iter(segments)

        def get_next(self) -> dict[str, np.ndarray] | None:
            segment = next(self._rest, None)
            return None if segment is None else {given: segment[None]}

    with tempfile.TemporaryDirectory(prefix="artifactnet-jax-") as folder:
        single, path = (os.path.join(folder, name) for name in ("fp32.onnx", "int8.onnx"))
        onnx.save(model, single)  # a model in memory it would change
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # advice to optimise first, which undoes nothing here
        try:
            quantize_static(
                single,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=kept_float(model),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(level)
        done = onnx.load(path)
    notes = {note.key: note.value for note in model.metadata_props}
    onnx.helper.set_model_props(done, {**notes, "precision": "int8"})
    done.doc_string = model.doc_string.replace("fp32", "int8")
    return done


def kept_float(model: ModelProto) -> list[str]:
    """Names of the convolutions that stay float32, which are also the cheapest.

    Those that read a magnitude or the channels, before which there was no convolution: 8 bits do
    not hold their range. And the last one before the mask, whose sigmoid magnifies errors.
    """
    raw, kept, last = {model.graph.input[0].name}, [], ""
    for node in model.graph.node:
        if node.op_type == "Conv":
            if raw & set(node.input):
                kept.append(node.name)
            elif node.name.startswith("unet/"):
                last = node.name
        elif raw & set(node.input):
            raw |= set(node.output)
    return [*kept, last] if last else kept


def _segments(weights: Weights, tracks: Sequence[str], failures: list[str]) -> list[np.ndarray]:
    """Up to `MOST` segments float32 [N], evenly spaced over the tracks that can be read."""
    config, found = weights.config, []
    for track in tracks:
        try:
            reader = SegmentReader(track, config.front_end, config.verdict, SEGMENTS)
            found += [segment.samples for segment in reader if segment.rms > 0]
        except AudioError as error:
            failures.append(str(error))
    return found[:: -(-len(found) // MOST)] if found else []


def _scores(graph: str, tracks: Sequence[str]) -> list[Any]:
    """Verdicts of tracks by a graph in onnxruntime; a Failure where a track cannot be scored."""
    detector = Detector(graph, "onnxruntime", segments=SEGMENTS)
    return [result for _, result in sorted(detector.score_many(tracks), key=lambda pair: pair[0])]
