"""Writers: rows as a table, CSV, JSON or JSON Lines, to stdout or a file; and rows kept from it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from artifactnet_jax import results
from artifactnet_jax.files import replace_file, writing
from artifactnet_jax.text import USAGE, CommandError

_ROW_START = f'{{"schema": "{results.SCHEMA}"'.encode()


def rows_to_keep(path: str, expected: Mapping[str, Any], paths: list[str]) -> list[dict[str, Any]]:
    """Whole rows of an earlier run, except failures among `paths`, which are tried again.

    `expected`: keys and values that all rows must have, as of `detectors.comparable`; thresholds
    are compared as numbers, whatever they were called. CommandError: the file is another's, or
    rows differ from what is expected.
    """
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
                known.setdefault("bank", expected.get("bank"))  # rows that say nothing of one
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
    form: str,
    path: str | None,
    kept: list[dict[str, Any]],
    table: tuple[str, Callable[[dict[str, Any]], str]] = (results.TABLE_HEADER, results.to_table),
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row in the chosen format, to stdout or to a file.

    `table` has the head of a table, and makes a row's lines of it.

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
            emit(results.to_csv(row) if form == "csv" else table[1](row))

    if form in ("csv", "table"):
        emit(results.to_csv(None) if form == "csv" else table[0])
    yield write
    if form == "json":
        emit(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if path:
        with writing(path):
            replace_file(path, "".join(parts).encode())
