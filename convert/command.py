"""The verbs `convert` and `export`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Literal

from artifactnet_jax.results import NO_BACKEND, OK, SOME_FAILED, USAGE, CommandError

if TYPE_CHECKING:
    from artifactnet_jax.weights import Weights


def convert(args: argparse.Namespace) -> int:
    """ONNX model -> weights file; the table of what was found goes to stdout."""
    from artifactnet_jax.weights import WeightsError, write_weights

    output = args.output or os.path.splitext(os.path.basename(args.model))[0] + ".safetensors"
    _writable(output)
    try:
        from artifactnet_jax.convert.describe import describe
        from artifactnet_jax.convert.graph import ConvertError
        from artifactnet_jax.convert.importer import import_model
    except ImportError as error:
        raise CommandError(needs(error), NO_BACKEND) from error
    try:
        weights = import_model(args.model, licence=args.licence, output=args.score_output)
        if args.route == "native" and weights.provenance["route"] != "native":
            raise ConvertError(f"{args.model}: not native: {weights.provenance['reason']}")
        write_weights(weights, output)
    except ImportError as error:
        raise CommandError(needs(error), NO_BACKEND) from error
    except WeightsError as error:
        raise CommandError(str(error), USAGE) from error
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror}", USAGE) from error
    for what, found in describe(weights):
        print(f"{what:<12} {found}")
    print(f"wrote {output} ({os.path.getsize(output):,} bytes)", file=sys.stderr)
    return OK


def export(args: argparse.Namespace) -> int:
    """Weights file -> ONNX model."""
    from artifactnet_jax.detector import open_weights
    from artifactnet_jax.weights import WeightsError

    if args.template and (args.form or args.precision):
        raise CommandError("--template keeps its own form: leave --form and --precision out", USAGE)
    if args.precision == "int8" and (args.form == "song" or not args.calibrate):
        cure = "use --form segment, and name music to take ranges from with --calibrate"
        raise CommandError(f"--precision int8: {cure}", USAGE)
    if args.calibrate and args.precision != "int8":
        raise CommandError("--calibrate is for --precision int8: leave it out", USAGE)
    _writable(args.output)
    try:
        from artifactnet_jax.convert.export import export as write

        weights = open_weights(args.weights)
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
    except OSError as error:
        raise CommandError(f"{args.output}: {error.strerror}", USAGE) from error
    _wrote(weights, args.output)
    return OK


def _export_int8(weights: Weights, args: argparse.Namespace) -> int:
    """Weights file -> int8 ONNX model; what that costs goes to stdout. Raises as its parts do."""
    from artifactnet_jax.convert.quantise import export_int8
    from artifactnet_jax.files import find_audio

    done = export_int8(weights, args.output, find_audio(args.calibrate, recursive=False))
    for message in done.failures:
        print(f"artifactnet-jax: {message}", file=sys.stderr)
    print(
        f"int8 against fp32, {done.tracks} tracks that gave no ranges: {done.flips} verdicts flip, "
        f"scores move by {done.median:.4f} in the median, {done.largest:.4f} at most"
    )
    _wrote(weights, args.output)
    return SOME_FAILED if done.failures else OK


def _wrote(weights: Weights, path: str) -> None:
    print(f"licence of the weights: {weights.licence}", file=sys.stderr)
    print(f"wrote {path} ({os.path.getsize(path):,} bytes)", file=sys.stderr)


def _own_form(weights: Weights) -> Literal["segment", "song"]:
    return "song" if weights.provenance.get("form") == "song" else "segment"


def needs(error: ImportError) -> str:
    """One line saying which package is missing and what brings it."""
    return f"this needs {error.name or error}: pip install 'artifactnet-jax[convert]'"


def _writable(path: str) -> None:
    """CommandError when a file cannot be written there: before the work, not after."""
    folder = os.path.dirname(os.path.abspath(path))
    problem = ""
    if not os.path.isdir(folder):
        problem = "its folder does not exist: create it first"
    elif os.path.isdir(path):
        problem = "a folder: name a file"
    elif not os.access(folder, os.W_OK):
        problem = "no permission to write there: name another file"
    if problem:
        raise CommandError(f"-o {path}: {problem}", USAGE)
