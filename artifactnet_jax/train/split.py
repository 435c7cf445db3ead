"""The verb `split`: a manifest divided into parts that share nothing."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from artifactnet_jax.data.manifest import (
    LABELS,
    ManifestError,
    Row,
    check_output,
    read_manifest,
    write_manifest,
)
from artifactnet_jax.data.splits import assign_splits
from artifactnet_jax.text import OK, printable

FAR = 0.5  # of a part's share: a part that misses its share by more is warned of


def run(args: argparse.Namespace) -> int:
    """The verb `split`; returns the exit code."""
    check_output(args.output)
    rows = read_manifest(args.manifest)
    parts = _parts(args.parts)
    put = [_pair(text) for text in args.put]
    try:
        rows = assign_splits(rows, args.by, parts, put, args.seed)
    except ManifestError as error:
        raise ManifestError.of(args.manifest, str(error)) from error
    write_manifest(args.output, rows)
    _report(rows, parts)
    return OK


def _parts(text: str) -> dict[str, float]:
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, equals, share = (piece.strip() for piece in item.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not name or not equals or name in parts or not 0 <= value <= 1:
            cure = "give NAME=SHARE,NAME=SHARE, each name once, shares that sum to 1"
            raise ManifestError(printable(f"--parts {text}: {item!r} makes no sense: {cure}"))
        parts[name] = value
    return parts


def _pair(text: str) -> tuple[str, str]:
    value, _, part = text.rpartition("=")  # a value may hold a "="
    if not value or not part:
        raise ManifestError(printable(f"--put {text}: give VALUE=PART"))
    return value, part


def _report(rows: Sequence[Row], parts: Mapping[str, float]) -> None:
    """The table on stdout; on stderr what is far from what was asked for."""
    width = max(map(len, ["part", *parts]))
    print(f"{'part':<{width}}  label  sources  groups  tracks  share")
    total = Counter(row.label for row in rows)
    for part, wanted in parts.items():
        for label in sorted(total):
            there = [row for row in rows if (row.split, row.label) == (part, label)]
            sources, groups = {row.source for row in there}, {row.group for row in there}
            share = len(there) / total[label]
            head = f"{printable(part):<{width}}  {LABELS[label]:<5}  {len(sources):>7}"
            print(f"{head}  {len(groups):>6}  {len(there):>6}  {share:>5.3f}")
            if wanted and abs(share / wanted - 1) > FAR:
                cause = f"{part} has {share:.1%} of the {LABELS[label]} tracks, not {wanted:.1%}"
                cure = "what is kept together leaves no better"
                print(printable(f"warning: {cause}: {cure}"), file=sys.stderr)
