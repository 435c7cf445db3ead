"""The verbs `convert` and `export`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from artifactnet_jax.files import check_output, writing
from artifactnet_jax.text import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError

if TYPE_CHECKING:
    from artifactnet_jax.weights import Model

# Of --precision int8
SEGMENTS = 7  # evenly spaced ones of a track, the public runner's number
MOST = 32  # segments that the ranges are taken from


def convert(args: argparse.Namespace) -> int:
    """ONNX model -> weights file; the table of what was found goes to stdout."""
    from artifactnet_jax.weights import WeightsError, write_weights

    output = args.output or os.path.splitext(os.path.basename(args.model))[0] + ".safetensors"
    check_output(output, f"-o {output}")
    try:
        from artifactnet_jax.convert.describe import describe
        from artifactnet_jax.convert.graph import ConvertError
        from artifactnet_jax.convert.importer import import_model
    except ImportError as error:
        raise CommandError(needs(error), NO_BACKEND) from error
    try:
        weights = import_model(
            args.model, licence=args.licence, output=args.score_output, logit=args.logit
        )
        if args.route == "native" and weights.provenance["route"] != "native":
            raise ConvertError(f"{args.model}: not native: {weights.provenance['reason']}")
        with writing(output):
            write_weights(weights, output)
    except ImportError as error:
        raise CommandError(needs(error), NO_BACKEND) from error
    except WeightsError as error:
        raise CommandError(str(error), USAGE) from error
    for what, found in describe(weights):
        print(f"{what:<12} {found}")
    print(f"wrote {output} ({os.path.getsize(output):,} bytes)", file=sys.stderr)
    return OK


def export(args: argparse.Namespace) -> int:
    """Weights file -> ONNX model."""
    from artifactnet_jax.models import open_model
    from artifactnet_jax.weights import WeightsError

    if args.template and (args.form or args.precision):
        raise CommandError("--template keeps its own form: leave --form and --precision out", USAGE)
    if args.precision == "int8" and (args.form == "song" or not args.calibrate):
        cure = "use --form segment, and name music to take ranges from with --calibrate"
        raise CommandError(f"--precision int8: {cure}", USAGE)
    if args.calibrate and args.precision != "int8":
        raise CommandError("--calibrate is for --precision int8: leave it out", USAGE)
    check_output(args.output, f"-o {args.output}")
    try:
        from artifactnet_jax.convert.export import export as write

        weights = open_model(args.weights)
        with writing(args.output):
            if args.precision == "int8":
                return _export_int8(weights, args)
            write(
                weights,
                args.output,
                form=args.form or ("segment" if args.template else _own_form(weights)),
                precision=args.precision or "fp32",
                template=args.template,
            )
    except ImportError as error:
        raise CommandError(needs(error), NO_BACKEND) from error
    except (WeightsError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    _wrote(weights, args.output)
    return OK


def _export_int8(weights: Model, args: argparse.Namespace) -> int:
    """Weights file -> int8 ONNX model; what that costs goes to stdout. Raises as its parts do."""
    from artifactnet_jax.files import find_audio

    change = _quantise(weights, args.output, find_audio(args.calibrate, recursive=False))
    for message in change.failures:
        print(f"artifactnet-jax: {message}", file=sys.stderr)
    print(
        f"int8 against fp32, {change.tracks} tracks that gave no ranges: {change.flips} verdicts "
        f"flip, scores move by {change.median:.4f} in the median, {change.largest:.4f} at most"
    )
    _wrote(weights, args.output)
    return SOME_FAILED if change.failures else OK


class Quantised(NamedTuple):
    """How the int8 graph compares with the float one, on tracks that gave no ranges."""

    tracks: int
    flips: int  # of verdicts
    median: float  # of the differences of a track's score
    largest: float
    failures: list[str]  # messages of tracks that could not be read


def _quantise(weights: Model, path: str | os.PathLike[str], tracks: Sequence[str]) -> Quantised:
    """Write the int8 graph of weights, atomically; how its scores differ from float32.

    Every second track gives ranges, the others are scored by both graphs in onnxruntime. Raises
    ValueError: fewer than two tracks that can be read; what `build_onnx` raises. OSError where the
    file cannot be written.
    """
    from artifactnet_jax.convert.export import build_onnx
    from artifactnet_jax.convert.quantise import quantise
    from artifactnet_jax.files import replace_file
    from artifactnet_jax.results import Failure

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


def _segments(weights: Model, tracks: Sequence[str], failures: list[str]) -> list[np.ndarray]:
    """Up to `MOST` segments float32 [N], evenly spaced over the tracks that can be read."""
    from artifactnet_jax.audio import SegmentReader
    from artifactnet_jax.recording import AudioError

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
    from artifactnet_jax.detector import Detector

    detector = Detector(graph, "onnxruntime", segments=SEGMENTS, banks=())
    return [result for _, result in sorted(detector.score_many(tracks), key=lambda pair: pair[0])]


def _wrote(weights: Model, path: str) -> None:
    print(f"licence of the weights: {weights.licence}", file=sys.stderr)
    print(f"wrote {path} ({os.path.getsize(path):,} bytes)", file=sys.stderr)


def _own_form(weights: Model) -> Literal["segment", "song"]:
    return "song" if weights.provenance.get("form") == "song" else "segment"


def needs(error: ImportError) -> str:
    """One line saying which package is missing and what brings it."""
    return f"this needs {error.name or error}: pip install 'artifactnet-jax[convert]'"
