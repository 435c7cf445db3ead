"""What has changed between two sets of weights: tracks of each source, before and after."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from artifactnet_jax.config import REGRESSION, Decision
from artifactnet_jax.data.manifest import LABELS, Row
from artifactnet_jax.evaluation import auc
from artifactnet_jax.text import printable

LIMITS = REGRESSION  # rise of the FPR, fall of the TPR that is worse

Scores = Mapping[str, float]  # by path; what is silent or cannot be read has none


@dataclasses.dataclass(frozen=True)
class Change:
    """Tracks of one source and label, before and after; `judged`: held to the limit of `worse`."""

    of: str  # "hard" or "keep"
    source: str
    label: str
    tracks: int
    called_ai: tuple[int, int]  # false positives of real tracks, detections of AI ones
    mean_score: tuple[float, float]
    judged: bool
    worse: bool


def evaluate(
    of: str,
    rows: Iterable[Row],
    before: Scores,
    after: Scores,
    thresholds: tuple[float, float],
    limited: bool = True,
) -> list[Change]:
    """Each source of a label, then its small sources together, then all of them.

    thresholds: before and after.
    A source is small, and held to no limit by itself, if a single track would exceed the limit. All
    tracks of a label are held to the limit, however few they are. limited: False holds none to it.
    """
    sources: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.path in before and row.path in after:
            sources[row.label, row.source].append((before[row.path], after[row.path]))

    def change(source: str, label: int, scores: list[tuple[float, float]], enough: bool) -> Change:
        was, now = (sum(pair[k] >= thresholds[k] for pair in scores) for k in (0, 1))
        loss = (was - now if label else now - was) / len(scores)
        means = [round(float(np.mean([pair[k] for pair in scores])), 6) for k in (0, 1)]
        return Change(
            of,
            source,
            LABELS[label],
            len(scores),
            (was, now),
            (means[0], means[1]),
            limited and enough,
            limited and enough and loss > LIMITS[label],
        )

    changes = []
    for label, limit in enumerate(LIMITS):
        own = {name: scores for (other, name), scores in sources.items() if other == label}
        small = [pair for scores in own.values() if len(scores) * limit < 1 for pair in scores]
        everything = [pair for scores in own.values() for pair in scores]
        for name, scores in sorted(own.items()):
            changes.append(change(name, label, scores, len(scores) * limit >= 1))
        if limited and 0 < len(small) < len(everything):
            changes.append(change("(small sources)", label, small, len(small) * limit >= 1))
        if len(own) > 1 or (limited and small):
            changes.append(change("(all)", label, everything, True))
    return changes


def shares_at_points(
    rows: Iterable[Row], before: Scores, after: Scores, rules: tuple[Decision, Decision]
) -> dict[str, Any]:
    """Share of these real tracks that is called AI at each operating point, before and after."""
    paths = [row.path for row in rows if row.path in before and row.path in after]
    found = {}
    for name, _ in rules[0].operating_points if paths else ():
        limits = [dict(rule.operating_points)[name] for rule in rules]
        pairs = zip((before, after), limits, strict=True)
        found[name] = [
            round(sum(scores[path] >= limit for path in paths) / len(paths), 4)
            for scores, limit in pairs
        ]
    return found


def area(rows: Iterable[Row], scores: Scores) -> float | None:
    """AUC of these rows; None without both labels."""
    pairs = [(row.label, scores[row.path]) for row in rows if row.path in scores]
    value = auc(*map(np.array, zip(*pairs, strict=True))) if pairs else None
    return None if value is None else round(value, 6)


def table(changes: Sequence[Change]) -> list[str]:
    """Lines for people: a heading, and one for each change."""
    width = max([len("source"), *(len(printable(change.source)) for change in changes)])
    lines = [f"set   {'source':<{width}}  label  tracks  called AI    mean score"]
    for change in changes:
        called = "{:>3} -> {:<3}".format(*change.called_ai)
        mean = "{:.3f} -> {:.3f}".format(*change.mean_score)
        head = f"{change.of:<4}  {printable(change.source):<{width}}  {change.label:<5}"
        note = "  worse" if change.worse else ""
        lines.append(f"{head}  {change.tracks:>6}  {called}  {mean}{note}")
    return lines
