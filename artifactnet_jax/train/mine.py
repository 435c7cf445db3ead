"""The verb `mine`: which tracks of known label does the detector get most wrong?"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from artifactnet_jax.console.detectors import comparable, open_detector
from artifactnet_jax.console.progress import progress
from artifactnet_jax.console.writers import rows_to_keep, writer
from artifactnet_jax.data.manifest import (
    LABELS,
    ManifestError,
    Row,
    check_output,
    is_manifest,
    read_manifest,
    write_manifest,
)
from artifactnet_jax.decision import threshold_of
from artifactnet_jax.detector import Detector
from artifactnet_jax.files import find_audio
from artifactnet_jax.results import Failure
from artifactnet_jax.text import OK, SOME_FAILED, USAGE, CommandError, printable

MINED = ("hard-negative", "missed")  # column `mined` of a wrong track, by label


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row and what the detector says of it.

    `wrongness` is score - threshold of a real track, threshold - score of an AI one: above 0 where
    the verdict is wrong, and the more so the larger. `segment_score` is that of the worst segment,
    None where a whole-song graph shows none.
    """

    row: Row
    score: float
    wrong: bool
    wrongness: float
    segment_score: float | None
    segment_start_s: float | None


def run(args: argparse.Namespace) -> int:
    """Score, rank and write what the arguments name; returns the exit code."""
    check_output(args.output)
    rows = rows_of(args.paths, args.label, args.recursive)
    detector = open_detector(args.weights, args.backend, jobs=args.jobs, banks=())
    try:
        threshold = threshold_of(detector.weights, args.threshold)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    verdicts = score_rows(rows, detector, f"{args.output}.scores.jsonl", args.quiet)
    ranked = rank(rows, verdicts, threshold)
    failed = sum("error" in verdict for verdict in verdicts)
    if failed == len(rows):
        raise CommandError(f"none of the {failed} tracks could be scored", SOME_FAILED)
    written = [mined(one, place) for place, one in enumerate(ranked, 1)]
    wrong = sum(one.wrong for one in ranked)
    written = written[:wrong] if args.wrong_only else written
    written = written[: args.top] if args.top else written
    write_manifest(args.output, written)
    _table(ranked)
    if not args.quiet:
        said = f"{wrong} of {len(ranked)} tracks are wrong at {threshold:g}"
        if silent := len(rows) - failed - len(ranked):
            said += f"; {silent} silent, left out"
        print(f"{said}; {len(written)} written to {printable(args.output)}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(rows)} tracks could not be scored", file=sys.stderr)
    return SOME_FAILED if failed else OK


def rows_of(paths: Sequence[str], label: str | None, recursive: bool) -> list[Row]:
    """The rows of one manifest (of one label, if that is given), or rows for files and folders.

    Those have the label given, real by default, and as source the name of the folder that was
    named, or that a named file lies in. ManifestError: the arguments make no sense together.
    """
    if len(paths) == 1 and is_manifest(paths[0]):
        rows = read_manifest(paths[0])
        rows = [row for row in rows if label in (None, LABELS[row.label])]
        if not rows:
            raise ManifestError.of(paths[0], f"no track is {label}: leave --label out")
        return rows
    if manifests := [path for path in paths if is_manifest(path)]:
        cure = "give a manifest alone, or none"
        cause = f"{manifests[0]} is a manifest, and not all there is"
        raise ManifestError(printable(f"{cause}: {cure}"))
    if "-" in paths:
        raise ManifestError("standard input has no name to write into a manifest: give files")
    found: dict[str, Row] = {}
    kind = label or LABELS[0]
    for argument in paths:
        try:
            named = find_audio([argument], recursive)
        except ValueError as error:  # a list of files that cannot be read
            raise ManifestError(str(error)) from error
        for path in named:
            folder = argument if os.path.isdir(argument) else os.path.dirname(path)
            source = os.path.basename(os.path.abspath(folder)) or kind
            row = Row(path, LABELS.index(kind), kind, source, "", f"{source}/{path}", "")
            found.setdefault(os.path.abspath(path), row)
    return list(found.values())


def score_rows(
    rows: Sequence[Row], detector: Detector, output: str, quiet: bool
) -> list[dict[str, Any]]:
    """Verdict or failure of each row, in order, as JSON rows of `results`.

    `output` is a JSON Lines file that grows with every track: what it has from earlier, of the
    recording as it is now, is not scored again. Failures are told on stderr, and are tried
    again another time.
    """
    output = os.path.realpath(output)
    paths = [os.path.abspath(row.path) for row in rows]
    kept, known = rows_to_keep(output, comparable(detector), paths)
    done = {row["path"]: row for row in kept if row["path"] in known}
    todo = [path for path in paths if path not in done]
    if len(todo) < len(paths) and not quiet:
        print(f"resume: {len(paths) - len(todo)} done, {len(todo)} to score", file=sys.stderr)
    with (
        writer("jsonl", output, kept) as write,
        progress(quiet, output, len(todo)) as tell,
        contextlib.closing(detector.score_many(todo)) as results,
    ):
        for index, result in results:
            done[todo[index]] = result.to_dict()
            write(done[todo[index]])
            tell(result)
            if quiet and isinstance(result, Failure):
                print(result.message, file=sys.stderr)
    return [done[path] for path in paths]


def rank(rows: Iterable[Row], verdicts: Iterable[dict[str, Any]], threshold: float) -> list[Scored]:
    """The rows with a score, the most wrong first; equals by their worst segment."""
    scored = []
    for row, verdict in zip(rows, verdicts, strict=True):
        value = verdict.get("score")
        if value is None:  # silent, or failed
            continue
        sign = -1 if row.label else 1
        worst = max(verdict["segments"], key=lambda s: sign * s["score"], default=None)
        scored.append(
            Scored(
                row,
                value,
                (value >= threshold) != bool(row.label),
                sign * (value - threshold),
                None if worst is None else worst["score"],
                None if worst is None else worst["start_s"],
            )
        )

    def order(one: Scored) -> tuple[bool, float, float, str]:
        sign = -1 if one.row.label else 1
        segment = one.score if one.segment_score is None else one.segment_score
        return not one.wrong, -one.wrongness, -sign * (segment - threshold), one.row.path

    return sorted(scored, key=order)


def mined(one: Scored, place: int) -> Row:
    """The row with columns score, segment_score, segment_start_s, wrong, rank and mined."""

    def text(value: float | None) -> str:
        return "" if value is None else repr(round(value, 6))

    new = {
        "score": text(one.score),
        "segment_score": text(one.segment_score),
        "segment_start_s": text(one.segment_start_s),
        "wrong": str(int(one.wrong)),
        "rank": str(place),
        "mined": MINED[one.row.label] if one.wrong else "",
    }
    return dataclasses.replace(one.row, extra=tuple((dict(one.row.extra) | new).items()))


def _table(ranked: Iterable[Scored]) -> None:
    """Counts of each source and label on stdout, in the order of their worst track."""
    sources: dict[tuple[str, int], list[Scored]] = defaultdict(list)
    for one in ranked:
        sources[one.row.source, one.row.label].append(one)
    width = max([len("source"), *(len(printable(name)) for name, _ in sources)])
    print(f"{'source':<{width}}  label  tracks  wrong  worst")
    for (name, label), members in sources.items():
        wrong = sum(one.wrong for one in members)
        head = f"{printable(name):<{width}}  {LABELS[label]:<5}  {len(members):>6}"
        print(f"{head}  {wrong:>5}  {members[0].score:>5.3f}")
