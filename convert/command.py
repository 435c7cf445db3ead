"""The verbs `convert` and `export`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Literal

from artifactnet_jax.results import NO_BACKEND, OK, USAGE, CommandError

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
    _writable(args.output)
    try:
        from artifactnet_jax.convert.export import export as write

        weights = open_weights(args.weights)
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
    print(f"licence of the weights: {weights.licence}", file=sys.stderr)
    print(f"wrote {args.output} ({os.path.getsize(args.output):,} bytes)", file=sys.stderr)
    return OK


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
