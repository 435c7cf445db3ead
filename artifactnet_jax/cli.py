"""The command `artifactnet-jax`. Heavy imports happen inside the verbs, so that --help is instant.

stdout is data, stderr is progress. Exit codes: 0 all done, 1 some inputs failed or the run broke
off (as on a full disk), 2 usage, 3 backend not available, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable

from artifactnet_jax import __version__
from artifactnet_jax.commands import bench, convert, fingerprint, score, serve, train
from artifactnet_jax.files import writing
from artifactnet_jax.text import NO_BACKEND, SOME_FAILED, CommandError, brief, printable


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb, in the order in which --help lists them."""
    parser = argparse.ArgumentParser(
        prog="artifactnet-jax",
        description="Detect AI-generated music by the residue that neural codecs leave.",
    )
    parser.add_argument("--version", action="version", version=f"artifactnet-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        *(score.score, convert.convert, convert.export, convert.verify, convert.build),
        *(score.live, score.report, fingerprint.fingerprint),
        *(train.split, train.train, train.mine, train.finetune),
        *(train.residuals, train.rvq, train.texture, bench.bench, score.doctor),
        *(serve.serve, serve.token),
    ):
        add(verbs)
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
        code = _function(args)(args)
        with writing("stdout"):
            sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, getattr(args, "debug", False))


def _function(args: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """The function behind a verb. CommandError: packages of an extra are missing."""
    by_ray = args.verb == "score" and args.engine == "ray"
    module, _, name = ("artifactnet_jax.ray_engine:run" if by_ray else args.runs).partition(":")
    try:
        function: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(module), name
        )
        # What the module itself imports only once its arguments are known to be right.
        for other in ("artifactnet_jax.serve.app", "uvicorn") if args.verb == "serve" else ():
            importlib.import_module(other)
    except ModuleNotFoundError as error:
        if not args.extra:
            raise
        cause = f"{args.called} needs a package that is missing ({error.name})"
        cure = f'pip install "artifactnet-jax[{args.extra}]"'
        raise CommandError(f"{cause}: {cure}", NO_BACKEND) from error
    return function


def _failed(error: BaseException, debug: bool) -> int:
    """Say in one line what ended the command; returns the exit code."""
    try:
        with writing("stdout"):
            sys.stdout.flush()
    except (BrokenPipeError, CommandError) as full:
        if not isinstance(error, (CommandError, BrokenPipeError)):  # a print that did not fit
            error = full
        # Python would try again at exit, and print a traceback.
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
