"""The verb `score`: inputs in, rows out."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from artifactnet_jax import results
from artifactnet_jax.files import TemporaryCopy, replace_file, writing
from artifactnet_jax.results import (
    NO_BACKEND,
    OK,
    SOME_FAILED,
    USAGE,
    CommandError,
    Failure,
    brief,
)

if TYPE_CHECKING:
    from artifactnet_jax.detector import Detector
    from artifactnet_jax.weights import Model

Result = results.Verdict | Failure


def run(args: argparse.Namespace) -> int:
    """Score what the arguments name; returns the exit code. CommandError: it cannot go on."""
    if args.debug:
        logging.basicConfig()
        logging.getLogger("artifactnet_jax").setLevel(logging.DEBUG)
    paths, output, detector = _prepare(args)
    kept = rows_to_keep(output, detector, paths) if args.resume and output else []
    done = {row["path"] for row in kept}
    todo = [path for path in paths if path not in done]
    if args.resume and not args.quiet:
        print(f"resume: {len(paths) - len(todo)} done, {len(todo)} to score", file=sys.stderr)
    failed = 0
    with (
        writer(args.format, output, kept) as write,
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


def _prepare(args: argparse.Namespace) -> tuple[list[str], str | None, Detector]:
    """Inputs, output file and detector; CommandError when any of them cannot be had."""
    paths = find_inputs(args)
    output = _output(args, paths)
    return paths, output, open_detector(args.weights, args.backend, **detector_options(args))


def find_inputs(args: argparse.Namespace) -> list[str]:
    """The recordings that a command line names; CommandError for a list that cannot be read."""
    from artifactnet_jax.files import find_audio

    try:
        return find_audio(args.paths, args.recursive)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error


def detector_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `Detector`, besides weights and backend, as the verb `score` has them."""
    return {
        "segments": args.segments,
        "aggregate_rule": args.aggregate,
        "threshold": args.threshold,
        "margin": args.margin,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "jobs": args.jobs,
        "until_decided": args.until_decided,
    }


def open_detector(weights: str | Model | None, backend: str, **options: Any) -> Detector:
    """The Detector that arguments ask for; CommandError when it cannot be had."""
    from artifactnet_jax.backends import BackendError
    from artifactnet_jax.detector import Detector
    from artifactnet_jax.weights import WeightsError

    try:
        return Detector(weights, backend, **options)
    except BackendError as error:
        raise CommandError(str(error), NO_BACKEND) from error
    except (WeightsError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    except Exception as error:  # a broken installation or driver, of which jax says what it likes
        cure = "see artifactnet-jax doctor, or use --backend numpy"
        message = f"backend {backend!r} does not start: {brief(error)}; {cure}"
        raise CommandError(message, NO_BACKEND) from error


def _output(args: argparse.Namespace, paths: list[str]) -> str | None:
    """The file that rows go to, None for stdout; found wanting now rather than after hours."""
    named = None if args.output == "-" else args.output
    if args.resume and (args.format != "jsonl" or named is None):
        raise CommandError("--resume needs --format jsonl and -o FILE", USAGE)
    if named is None:
        return None
    path = os.path.realpath(named)  # a link stays, and what it names is replaced
    problem = output_problem(path)
    if not problem and os.path.abspath(named) in map(os.path.abspath, paths):
        problem = "it is one of the inputs: name another file"
    if problem:
        raise CommandError(f"-o {named}: {problem}", USAGE)
    return path


def output_problem(path: str) -> str:
    """Why a file cannot be written there, and the cure; empty when it can."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return "its folder does not exist: create it first"
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a regular file: name a file"
    if not all(os.access(p, os.W_OK) for p in (folder, path) if os.path.exists(p)):
        return "no permission to write there: name another file"
    return ""


def _results(detector: Detector, paths: list[str]) -> Generator[tuple[int, Result], None, None]:
    """score_many over paths, "-" being standard input.

    That is copied before anything is scored: Ctrl-C could not reach a decoding thread that reads.
    """
    with contextlib.ExitStack() as stack:
        sources: list[Any] = list(paths)
        if "-" in paths:
            try:
                spool = stack.enter_context(TemporaryCopy("-"))
                if sys.stdin is not None:  # else closed, the same as empty
                    shutil.copyfileobj(sys.stdin.buffer, spool)
                spool.flush()
            except OSError as error:
                cause = f"standard input cannot be copied to a temporary file: {error.strerror}"
                cure = "is the disk full? TMPDIR moves it"
                raise CommandError(f"{cause}; {cure}", SOME_FAILED) from error
            sources[paths.index("-")] = spool
        yield from detector.score_many(sources)


def _in_order(pairs: Iterable[tuple[int, Result]]) -> Iterator[tuple[int, Result]]:
    """The same by index, for formats that are read from top to bottom."""
    waiting, turn = {}, 0
    for index, result in pairs:
        waiting[index] = result
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


def comparable(detector: Detector) -> dict[str, Any]:
    """What rows must have in common to be compared with each other: keys and values of a row."""
    return {
        "weights": detector.weights.summary(),
        "threshold": detector.threshold,
        "margin": detector.margin,
        "aggregate": detector.rule,
        "plan": detector.segments,
        "dtype": detector.backend.dtype,
        "until_decided": detector.until_decided,
    }


_ROW_START = f'{{"schema": "{results.SCHEMA}"'.encode()


def rows_to_keep(path: str, detector: Detector, paths: list[str]) -> list[dict[str, Any]]:
    """Whole rows of an earlier run, except failures among `paths`, which are tried again.

    CommandError when the file is another's, or its rows are not comparable with this detector's.
    Thresholds are compared as numbers, whatever they were called.
    """
    expected = comparable(detector)
    retried = set(paths)
    rows: dict[str, dict[str, Any]] = {}
    foreign = False
    try:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            for line in file:
                # Without its line end a row was torn by a kill: not done.
                row = results.from_json(line) if line.endswith(b"\n") else None
                if row is None:
                    foreign |= not _ROW_START.startswith(line[: len(_ROW_START)])
                    continue
                known = {"margin": 0.0} | (row or {})  # rows are older than the key
                known["until_decided"] = "skipped" in known
                what = ", ".join(k for k, v in expected.items() if known.get(k) != v)
                if what and row is not None and "error" not in row:
                    cure = "give the same options, or another -o FILE"
                    raise CommandError(f"{path} has rows with other {what}: {cure}", USAGE)
                if row["path"] != "-":  # what stdin held then is not what it holds now
                    rows[row["path"]] = row
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}", USAGE) from error
    if foreign and not rows:  # it would be lost
        cause = f"{path} holds no row of {results.SCHEMA}"
        raise CommandError(f"{cause}: give another -o FILE, or leave --resume out", USAGE)
    return [row for row in rows.values() if "error" not in row or row["path"] not in retried]


@contextlib.contextmanager
def writer(
    form: str, path: str | None, kept: list[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row in the chosen format, to stdout or to a file.

    A JSON Lines file grows row by row, each on disk before the next is begun, so that a kill costs
    at most the row being written. Any other file appears when all is done, in place of the old one.
    A run that breaks off, by Ctrl-C or an error, leaves the old one: a file cut short would look
    complete. (--fail-fast is no breaking off: its file ends with the row of the failure.) For the
    same reason a JSON array on stdout is written at the end or not at all.
    """
    if path and form == "jsonl":
        with writing(path):
            replace_file(path, "".join(results.to_json(row) + "\n" for row in kept).encode())
            file = open(path, "ab")  # noqa: SIM115
        with file:

            def append(row: dict[str, Any]) -> None:
                with writing(path):
                    file.write(results.to_json(row).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())

            yield append
        return

    parts: list[str] = []  # of a file
    rows: list[dict[str, Any]] = []  # of a JSON array

    def emit(text: str) -> None:
        if path:
            parts.append(text)
            return
        with writing("stdout"):
            sys.stdout.write(text)
            sys.stdout.flush()

    def write(row: dict[str, Any]) -> None:
        if form == "json":
            rows.append(row)
        elif form == "jsonl":
            emit(results.to_json(row) + "\n")
        else:
            emit(results.to_csv(row) if form == "csv" else results.to_table(row))

    if form in ("csv", "table"):
        emit(results.to_csv(None) if form == "csv" else results.TABLE_HEADER)
    yield write
    if form == "json":
        emit(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if path:
        with writing(path):
            replace_file(path, "".join(parts).encode())


@contextlib.contextmanager
def progress(quiet: bool, output: str | None, total: int) -> Iterator[Callable[[object], None]]:
    """A function that tells stderr of a result: a line for a `Failure`, a bar on a terminal.

    Where stdout shows the rows on the terminal already, neither is needed.
    """
    shown = not quiet and (output is not None or not sys.stdout.isatty())
    bar: Any = None
    if shown and sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=total, unit="track", file=sys.stderr, dynamic_ncols=True)

    def tell(result: object) -> None:
        if shown and isinstance(result, Failure):
            (print if bar is None else bar.write)(result.message, file=sys.stderr)
        if bar is not None:
            bar.update()

    with contextlib.nullcontext() if bar is None else bar:
        yield tell
