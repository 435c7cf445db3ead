"""Writers: rows as a table, CSV, JSON or JSON Lines, to stdout or a file; and rows kept from it."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from artifactnet_jax import results
from artifactnet_jax.files import facts_of, replace_file, writing
from artifactnet_jax.text import USAGE, CommandError

_ROW_START = f'{{"schema": "{results.SCHEMA[:-1]}'.encode()  # of any number


def rows_to_keep(
    path: str, expected: Mapping[str, Any], paths: list[str]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Whole rows of an earlier run, and those of `paths` that they are of, as files are now.

    A row is of a file that has its size and time of change under the same name or through a link,
    or else its size and sha256: it was moved, or touched. Then the row takes the name of now. Rows
    of files that have changed since, failures among `paths` and rows of streams are left out.

    `expected`: keys and values that all rows must have, as of `detectors.comparable`; thresholds
    are compared as numbers, whatever they were called. CommandError: the file is another's, or
    rows differ from what is expected.
    """
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
                known = results.filled(row, expected)
                known["until_decided"] = "skipped" in known
                what = ", ".join(k for k, v in expected.items() if known.get(k) != v)
                if what and "error" not in row:
                    cure = "give the same options, or another -o FILE"
                    raise CommandError(f"{path} has rows with other {what}: {cure}", USAGE)
                rows[row["path"]] = row
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}", USAGE) from error
    if foreign and not rows:  # it would be lost
        cause = f"{path} holds no row of {results.SCHEMA}"
        raise CommandError(f"{cause}: give another -o FILE, or leave --resume out", USAGE)
    return _matched(rows, paths)


def _matched(
    rows: dict[str, dict[str, Any]], paths: list[str]
) -> tuple[list[dict[str, Any]], set[str]]:
    named = set(paths)
    scored = [row for row in rows.values() if "error" not in row and _facts(row)["sha256"]]
    by_place = {os.path.realpath(row["path"]): row for row in scored}
    by_digest = {_facts(row)["sha256"]: row for row in scored}
    sizes = {_facts(row)["size"] for row in scored}
    kept: dict[str, dict[str, Any]] = {}
    used: set[str] = set()  # names under which rows were found that have another now
    for name in paths:
        try:
            now = os.stat(name)
        except (OSError, ValueError):  # gone: its score is still what it was
            if (row := rows.get(name)) is not None and "error" not in row and name != "-":
                kept[name] = row
            continue
        if not stat.S_ISREG(now.st_mode) or now.st_size not in sizes:
            continue
        row = by_place.get(os.path.realpath(name))
        same = row is not None and _facts(row)["size"] == now.st_size
        if not (same and row is not None and _facts(row)["modified"] == now.st_mtime_ns):
            with contextlib.suppress(OSError), open(name, "rb") as file:
                facts = facts_of(file)
                row = by_digest.get(facts["sha256"])
                row = None if row is None else row | {"file": facts}
        if row is not None:
            kept[name] = row | {"path": name}
            used.add(row["path"])
    others = [
        row
        for name, row in rows.items()
        if name not in named
        and not (name in used and not _stays(name, named))
        and ("error" in row or _facts(row)["modified"] is not None or not _facts(row)["sha256"])
        and name != "-"
    ]
    return [*others, *kept.values()], set(kept)


def _stays(name: str, named: set[str]) -> bool:
    """Whether a row keeps a name of its own beside the one of now: it is another place."""
    return os.path.lexists(name) and os.path.realpath(name) not in map(os.path.realpath, named)


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    facts = row.get("file")
    nothing = {"size": None, "modified": None, "sha256": None}
    return nothing | facts if isinstance(facts, dict) else nothing


@contextlib.contextmanager
def writer(
    form: str,
    path: str | None,
    kept: list[dict[str, Any]],
    table: tuple[str, Callable[[dict[str, Any]], str]] = (results.TABLE_HEADER, results.to_table),
    schema: int = 2,
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row in the chosen format, to stdout or to a file.

    `schema` 1 or 2 is that of the rows, and of those kept. `table` has the head of a table, and
    makes a row's lines of it.

    A JSON Lines file grows row by row, each on disk before the next is begun, so that a kill costs
    at most the row being written. Any other file appears when all is done, in place of the old one.
    A run that breaks off, by Ctrl-C or an error, leaves the old one: a file cut short would look
    complete. (--fail-fast is no breaking off: its file ends with the row of the failure.) For the
    same reason a JSON array on stdout is written at the end or not at all.
    """
    changed = results.as_schema_1 if schema == 1 else dict
    if path and form == "jsonl":
        kept = list(map(changed, kept)) if schema == 1 else kept
        with writing(path):
            replace_file(path, "".join(results.to_json(row) + "\n" for row in kept).encode())
            file = open(path, "ab")  # noqa: SIM115
        with file:

            def append(row: dict[str, Any]) -> None:
                with writing(path):
                    file.write(results.to_json(changed(row)).encode() + b"\n")
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
        row = changed(row)
        if form == "json":
            rows.append(row)
        elif form == "jsonl":
            emit(results.to_json(row) + "\n")
        else:
            emit(results.to_csv(row, schema) if form == "csv" else table[1](row))

    if form in ("csv", "table"):
        emit(results.to_csv(None, schema) if form == "csv" else table[0])
    yield write
    if form == "json":
        emit(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    if path:
        with writing(path):
            replace_file(path, "".join(parts).encode())
