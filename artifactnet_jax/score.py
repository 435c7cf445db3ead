"""The verb `score`: inputs in, rows out."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from artifactnet_jax import results
from artifactnet_jax.console.detectors import comparable, detector_options, open_detector
from artifactnet_jax.console.inputs import find_inputs, sources
from artifactnet_jax.console.progress import progress
from artifactnet_jax.console.writers import rows_to_keep, writer
from artifactnet_jax.detector import Detector
from artifactnet_jax.files import check_output
from artifactnet_jax.results import Failure
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError

Result = results.Verdict | Failure
STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")  # names of it


def run(args: argparse.Namespace) -> int:
    """Score what the arguments name; returns the exit code. CommandError: it cannot go on."""
    if args.debug:
        logging.basicConfig()
        logging.getLogger("artifactnet_jax").setLevel(logging.DEBUG)
    _check_schema(args)
    paths = find_inputs(args)
    output = _output(args, paths)
    detector = open_detector(args.weights, args.backend, **detector_options(args))
    kept: list[dict[str, Any]] = []
    done: set[str] = set()
    if args.resume and output:
        kept, done = rows_to_keep(output, comparable(detector), paths)
    todo = [path for path in paths if path not in done]
    if args.resume and not args.quiet:
        print(f"resume: {len(paths) - len(todo)} done, {len(todo)} to score", file=sys.stderr)
    failed = 0
    with (
        writer(args.format, output, kept, schema=args.schema) as write,
        progress(args.quiet, output, len(todo)) as tell,
        contextlib.closing(_results(detector, todo)) as finished,
    ):
        for _, result in finished if args.format == "jsonl" else _in_order(finished):
            write(result.to_dict())
            tell(result)
            failed += isinstance(result, Failure)
            if failed and args.fail_fast:
                break
    return SOME_FAILED if failed else OK


def _check_schema(args: argparse.Namespace) -> None:
    """CommandError where rows of the older schema make no sense."""
    if args.schema == 1 and args.format == "table":
        cure = "give --format jsonl, json or csv, or leave it out"
        raise CommandError(f"--schema 1 is for rows that programs read: {cure}", USAGE)
    if args.schema == 1 and args.prior is not None:
        raise CommandError("rows of --schema 1 do not tell the --prior: leave one out", USAGE)


def _output(args: argparse.Namespace, paths: list[str]) -> str | None:
    """The file that rows go to, None for stdout; found wanting now rather than after hours."""
    named = None if args.output in STDOUT else args.output
    if args.resume and (args.format != "jsonl" or named is None):
        raise CommandError("--resume needs --format jsonl and -o FILE", USAGE)
    if named is None:
        return None
    path: str = os.path.realpath(named)  # a link stays, and what it names is replaced
    check_output(path, f"-o {named}")
    if os.path.abspath(named) in map(os.path.abspath, paths):
        raise CommandError(f"-o {named}: it is one of the inputs: name another file", USAGE)
    return path


def _results(detector: Detector, paths: list[str]) -> Generator[tuple[int, Result], None, None]:
    """score_many over paths, "-" being standard input."""
    with sources(paths) as found:
        yield from detector.score_many(found)


def _in_order(pairs: Iterable[tuple[int, Result]]) -> Iterator[tuple[int, Result]]:
    """The same by index, for formats that are read from top to bottom."""
    waiting, turn = {}, 0
    for index, result in pairs:
        waiting[index] = result
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1
