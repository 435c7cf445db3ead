"""The command `artifactnet-jax`. Heavy imports happen inside the verbs, so that --help is instant.

stdout is data, stderr is progress. Exit codes: 0 all done, 1 some inputs failed or the run broke
off, 2 usage (or rows that cannot be written), 3 backend not available, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback

from artifactnet_jax import __version__
from artifactnet_jax.results import SOME_FAILED, CommandError, brief, printable


def _segments(text: str) -> int | str:
    return text if text in ("all", "first60") else _count(text, "'all', 'first60' or a count")


def _positive(text: str) -> int:
    return _count(text, "a whole number")


def _count(text: str, expected: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected} above 0")
    return count


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    parser = argparse.ArgumentParser(
        prog="artifactnet-jax",
        description="Detect AI-generated music by the residue that neural codecs leave.",
    )
    parser.add_argument("--version", action="version", version=f"artifactnet-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    score = verbs.add_parser(
        "score",
        help="score tracks",
        description="Score tracks: one row per input, AI or real, with each segment's score.",
        epilog="Exit codes: 0 all scored, 1 some inputs failed (each a row with its error), "
        "2 usage, 3 backend not available, 130 interrupted.",
    )
    score.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="file, folder, @list.txt (one path per line), or - for a WAV or FLAC stream on stdin",
    )
    score.add_argument("-r", "--recursive", action="store_true", help="descend into subfolders")
    score.add_argument(
        "--weights", metavar="W", help="weights file or ONNX model (default: embedded weights)"
    )
    score.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "xla", "numpy"),
        help="auto takes xla where that is faster, else numpy",
    )
    score.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the convolutions; the front end is always float32",
    )
    score.add_argument(
        "--segments",
        type=_segments,
        metavar="all|first60|N",
        help="all 4 s segments, those of the first 60 s, or N evenly spaced ones (default: what "
        "the weights say, else all)",
    )
    score.add_argument(
        "--aggregate",
        choices=("median", "rms", "mean"),
        help="from segments to a song (default: what the weights say, else median)",
    )
    score.add_argument(
        "--threshold", type=_fraction, metavar="T", help="AI at or above (default: the weights')"
    )
    score.add_argument("--batch-size", type=_positive, metavar="B", help="segments per call")
    score.add_argument("--jobs", type=_positive, metavar="N", help="decoding threads")
    score.add_argument("--format", default="table", choices=("table", "jsonl", "json", "csv"))
    score.add_argument(
        "-o", "--output", metavar="FILE", help="write rows here, not to stdout (- is stdout)"
    )
    score.add_argument(
        "--resume",
        action="store_true",
        help="with --format jsonl -o FILE: keep its whole rows, score what is missing or failed",
    )
    score.add_argument("--fail-fast", action="store_true", help="stop at the first failed input")
    score.add_argument(
        "-q", "--quiet", action="store_true", help="nothing on stderr unless the command fails"
    )
    score.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    convert = verbs.add_parser(
        "convert",
        help="turn an ONNX model into a weights file",
        description="Recognise an ONNX model of audio to score, print what was found, and write it "
        "as weights: native where every part is recognised, else as the graph itself.",
        epilog="Exit codes: 0 written, 2 the model cannot be used, 3 a package is missing.",
    )
    convert.add_argument("model", metavar="MODEL.onnx", help="external data beside it is read too")
    convert.add_argument(
        "-o", "--output", metavar="W.safetensors", help="default: MODEL.safetensors, here"
    )
    convert.add_argument(
        "--route",
        default="auto",
        choices=("auto", "native"),
        help="native: fail rather than fall back to running the graph",
    )
    convert.add_argument(
        "--score-output", metavar="NAME", help="which output is the score, where several could be"
    )
    convert.add_argument(
        "--licence", metavar="TEXT", help="the model's licence, where its metadata do not state it"
    )
    convert.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    export = verbs.add_parser(
        "export",
        help="write weights as an ONNX model",
        description="Write weights as an ONNX model: our own lean graph, or with --template the "
        "original file with its weights replaced.",
        epilog="Exit codes: 0 written, 2 usage, 3 a package is missing.",
    )
    export.add_argument("weights", metavar="W", help="weights file, or an ONNX model")
    export.add_argument("-o", "--output", metavar="M.onnx", required=True)
    export.add_argument(
        "--form",
        choices=("segment", "song"),
        help="a score for each segment, or one for all (default: as the source)",
    )
    export.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        help="of the convolutions (default: fp32); the front end is always float32",
    )
    export.add_argument(
        "--template",
        metavar="ORIGINAL.onnx",
        help="the model that the weights came from: only its initialisers change",
    )
    export.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    verify = verbs.add_parser(
        "verify",
        help="compare an ONNX model in onnxruntime with every backend here",
        description="Run an ONNX model in onnxruntime and what it converts to in every backend, "
        "and compare them stage by stage and track by track.",
        epilog="Exit codes: 0 equal, 1 beyond the tolerance or tracks that cannot be read, "
        "2 usage, 3 onnxruntime or a backend not available, 130 interrupted.",
    )
    verify.add_argument("model", metavar="MODEL.onnx", help="the original")
    verify.add_argument(
        "weights", nargs="?", metavar="W", help="weights to compare (default: MODEL converted)"
    )
    verify.add_argument(
        "--audio",
        nargs="+",
        metavar="PATH",
        help="tracks, folders or @list.txt (default: eight synthetic segments)",
    )
    verify.add_argument(
        "--backends",
        metavar="LIST",
        help="of numpy,xla,xla-bfloat16,onnx,onnx-fp16 (default: all that run here; onnx is the "
        "exported graph; half precision is reported beside)",
    )
    verify.add_argument(
        "--tolerance",
        type=_fraction,
        default=1e-4,
        metavar="D",
        help="on the difference of a track's score (default: 1e-4)",
    )
    verify.add_argument("--json", action="store_true", help="the report as one JSON object")
    verify.add_argument("--debug", action="store_true", help="show tracebacks on stderr")

    doctor = verbs.add_parser(
        "doctor", help="show versions, devices and backends, and what to install"
    )
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    # Closed by the caller. Without a stderr print() would write to stdout, among the data.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a C locale must not stop a name from printing
        sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        if args.verb == "doctor":
            from artifactnet_jax.doctor import run
        elif args.verb == "verify":
            from artifactnet_jax.convert.verify import run
        elif args.verb == "convert":
            from artifactnet_jax.convert.command import convert as run
        elif args.verb == "export":
            from artifactnet_jax.convert.command import export as run
        else:
            from artifactnet_jax.score import run
        code = run(args)
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, getattr(args, "debug", False))


def _failed(error: BaseException, debug: bool) -> int:
    """Say in one line what ended the command; returns the exit code."""
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at exit, and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone: nothing to tell
        return SOME_FAILED
    if debug:
        traceback.print_exception(error)
    if isinstance(error, CommandError):
        text, code = str(error), error.code
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted", 128 + signal.SIGINT
    else:
        text, code = f"{brief(error)}; --debug shows where", SOME_FAILED
    print(f"artifactnet-jax: {printable(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
