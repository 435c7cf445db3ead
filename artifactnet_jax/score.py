"""The verb `score`: inputs in, rows out."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from artifactnet_jax import results
from artifactnet_jax.cli import NO_BACKEND, OK, SOME_FAILED, USAGE


def run(args: argparse.Namespace) -> int:
    """Score what the arguments name; returns the exit code."""
    from artifactnet_jax.audio import find_audio
    from artifactnet_jax.backends import BackendError
    from artifactnet_jax.detector import Detector
    from artifactnet_jax.weights import WeightsError

    if args.resume and (args.format != "jsonl" or not args.output):
        return _stop("--resume needs --format jsonl and -o FILE", USAGE)
    try:
        paths = find_audio(args.paths, args.recursive)
        detector = Detector(
            args.weights,
            args.backend,
            segments=args.segments,
            aggregate_rule=args.aggregate,
            threshold=args.threshold,
            dtype=args.dtype,
            batch_size=args.batch_size,
            jobs=args.jobs,
        )
        kept = _rows_to_keep(args.output, detector) if args.resume else []
    except BackendError as error:
        if args.debug:
            raise
        return _stop(str(error), NO_BACKEND)
    except (WeightsError, ValueError, OSError) as error:
        if args.debug:
            raise
        return _stop(str(error), USAGE)

    done = {row["path"] for row in kept}
    todo = [path for path in paths if os.fsdecode(path) not in done]
    if done and not args.quiet:
        print(f"resume: {len(done)} done, {len(todo)} to score", file=sys.stderr)
    failed = 0
    try:
        with _writer(args, kept) as write, _progress(args, len(todo)) as tick:
            for index, result in _in_order(args.format, _results(detector, todo)):
                write(result.to_dict())
                failed += isinstance(result, results.Failure)
                tick(todo[index])
                if failed and args.fail_fast:
                    break
    except OSError as error:
        if args.debug or isinstance(error, BrokenPipeError):
            raise
        where = args.output or "stdout"
        return _stop(
            f"cannot write to {where}: {error.strerror}; free space or choose another", USAGE
        )
    return SOME_FAILED if failed else OK


def _stop(message: str, code: int) -> int:
    print(f"artifactnet-jax: {message}", file=sys.stderr)
    return code


def _results(detector: Any, paths: list[Any]) -> Iterator[tuple[int, Any]]:
    """score_many over paths, "-" read from stdin."""
    with tempfile.TemporaryFile() as spool:

        def sources() -> Iterator[Any]:
            for path in paths:
                if path == "-":  # decoders seek, and a stream of hours must not sit in memory
                    while chunk := sys.stdin.buffer.read(1 << 20):
                        spool.write(chunk)
                    spool.seek(0)
                    yield spool
                else:
                    yield path

        for index, result in detector.score_many(sources()):
            if paths[index] == "-":
                import dataclasses

                result = dataclasses.replace(result, path="-")
            yield index, result


def _in_order(form: str, pairs: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Rows of a table keep the order of the inputs; JSON Lines are written as they finish."""
    if form == "jsonl":
        yield from pairs
        return
    waiting, turn = {}, 0
    for index, result in pairs:
        waiting[index] = result
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


def _rows_to_keep(path: str, detector: Any) -> list[dict[str, Any]]:
    """Whole, successful rows of an earlier run; ValueError when they are not of this detector."""
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                continue  # torn by a kill: not done
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or row.get("schema") != results.SCHEMA or "error" in row:
                continue
            same = (
                row.get("weights") == detector.weights.summary()
                and row.get("threshold") == detector.threshold
                and row.get("aggregate") == detector.rule
            )
            if not same:
                raise ValueError(
                    f"{path} holds rows of other weights, threshold or aggregation; "
                    "give another -o FILE or the same options"
                )
            rows.append(row)
    return rows


@contextlib.contextmanager
def _writer(
    args: argparse.Namespace, kept: list[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row in the chosen format, to stdout or to a file.

    A JSON Lines file grows row by row, each on disk before the next is begun, so that a kill costs
    at most the row being written. Other files appear whole at the end.
    """
    if args.output and args.format == "jsonl":
        _replace(args.output, "".join(results.to_json(row) + "\n" for row in kept))
        with open(args.output, "ab", buffering=0) as file:

            def append(row: dict[str, Any]) -> None:
                file.write((results.to_json(row) + "\n").encode())
                os.fsync(file.fileno())

            yield append
        return
    out: TextIO = io.StringIO() if args.output else sys.stdout
    rows: list[dict[str, Any]] = []
    if args.format == "table":
        out.write(results.TABLE_HEADER)
    elif args.format == "csv":
        out.write(results.to_csv(None))

    def write(row: dict[str, Any]) -> None:
        if args.format == "json":
            rows.append(row)
        elif args.format == "jsonl":
            out.write(results.to_json(row) + "\n")
        else:
            out.write(results.to_csv(row) if args.format == "csv" else results.to_table(row))
        if not args.output:
            out.flush()

    try:
        yield write
    finally:
        if args.format == "json":
            out.write(json.dumps(rows, indent=1, allow_nan=False) + "\n")
        if isinstance(out, io.StringIO):
            _replace(args.output, out.getvalue())


def _replace(path: str, text: str) -> None:
    """Write a whole file atomically."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".rows-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _progress(args: argparse.Namespace, total: int) -> Iterator[Callable[[Any], None]]:
    """A bar on stderr where it is a terminal and stdout is not showing rows there already."""
    shown = sys.stderr.isatty() and not args.quiet and (args.output or not sys.stdout.isatty())
    if not shown:
        yield lambda path: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="track", file=sys.stderr, dynamic_ncols=True) as bar:
        yield lambda path: bar.update() and None
