"""Parts of a manifest: rows that belong together in one of them, and the check that they are."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from artifactnet_jax.data.manifest import LABELS, ManifestError, Row
from artifactnet_jax.text import printable

_TRIES = 32  # divisions that are tried, the best one is taken
_PLACINGS = 100_000  # ... but no more units placed than this, all tries together
_NAMED = 3  # offenders that an error names

Node = tuple[str, str]  # column, value: what holds rows together


def _node(row: Row, by: str) -> Node:
    """What keeps a row with others, besides its group; by source where the model is unknown."""
    column = "source" if by == "model" and not row.model else by
    return column, getattr(row, column)


def check_rows(rows: Sequence[Row], *, by: str = "source", one_class: bool = False) -> None:
    """Raise ManifestError when the column `split` would make a result untrue.

    That is: a group in two parts; a source in two parts (by "source"), or a model (by "model"; by
    "group" neither); only one class to train on, unless `one_class` allows it. Rows without a part
    are in none, unless no row has one: then all are there to be trained on.
    """
    for column in dict.fromkeys(("group", by)):
        parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row.split and getattr(row, column):
                parts[getattr(row, column)][row.split].append(row.path)
        leaks = [(value, found) for value, found in parts.items() if len(found) > 1]
        if leaks:
            named = "; ".join(
                f"{column} {value!r} is in "
                + " and ".join(f"{part} ({len(p)}, e.g. {p[0]})" for part, p in found.items())
                for value, found in leaks[:_NAMED]
            )
            more = f"; and {len(leaks) - _NAMED} more" if len(leaks) > _NAMED else ""
            cure = "divide the manifest with artifactnet-jax split"
            raise ManifestError(printable(f"the split leaks: {named}{more}: {cure}"))
    divided = any(row.split for row in rows)
    train = [row for row in rows if row.split == "train" or not divided]
    if not train:
        parts_there = ", ".join(sorted({row.split for row in rows}))
        cause = f"no row is in the part 'train', but in {parts_there}"
        raise ManifestError(printable(f"{cause}: divide the manifest with artifactnet-jax split"))
    if not one_class and len(labels := {row.label for row in train}) == 1:
        there, lacking = LABELS[labels.pop()], LABELS[1 - train[0].label]
        cause = f"all {len(train)} tracks to train on are {there}"
        cure = " (artifactnet-jax rvq makes AI-like ones of real music)" if lacking == "ai" else ""
        raise ManifestError(f"{cause}: add {lacking} ones{cure}")


def assign_splits(
    rows: Sequence[Row],
    by: str,
    parts: Mapping[str, float],
    put: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> list[Row]:
    """The rows with `split` set. Rows that belong together are in one part.

    Rows stay together that share a group or the value of the column `by` ("source", "model" or
    "group"; without a model a row goes by its source), and so do rows that are joined by others.
    Of every label each part gets its share of the tracks, as nearly as such units allow: the best
    of some divisions drawn with `seed`. `put` has pairs (value of `by`, part) that are fixed; a *
    at a value's end matches any ending. A part of share 0 gets only what is put there. The order
    of the rows does not matter.

    Raises ManifestError: shares that do not sum to 1, a part or a value that does not exist, units
    put in two parts, a part that would be left without a label.
    """
    if any(not 0 <= share <= 1 for share in parts.values()) or abs(sum(parts.values()) - 1) > 1e-6:
        total = f"{sum(parts.values()):g}"
        raise ManifestError(f"the shares of the parts sum to {total}: make them sum to 1")
    links: dict[Node, dict[Node, None]] = defaultdict(dict)
    for row in rows:
        node, group = _node(row, by), ("group", row.group)
        links[node][group] = links[group][node] = None
    wanted = _fixed(links, by, parts, put)
    names = list(parts)
    unit_of: dict[Node, int] = {}
    fixed: list[int] = []
    for node in sorted(links):
        if node in unit_of:
            continue
        together = _reach(node, links)
        ends = [member for member in together if member in wanted]
        for end in ends[1:]:
            if wanted[end] != wanted[ends[0]]:
                raise ManifestError(printable(_conflict(ends[0], end, links, wanted)))
        unit_of |= dict.fromkeys(together, len(fixed))
        fixed.append(names.index(wanted[ends[0]]) if ends else -1)
    units = [unit_of["group", row.group] for row in rows]
    sizes = np.zeros((len(fixed), len(LABELS)), np.int64)
    np.add.at(sizes, (units, [row.label for row in rows]), 1)
    shares = list(parts.values())
    chosen = _divide(sizes, shares, np.array(fixed), np.random.default_rng(seed))
    _check_division(sizes, chosen, names, shares, by)
    return [
        dataclasses.replace(row, split=names[chosen[unit]])
        for row, unit in zip(rows, units, strict=True)
    ]


def _fixed(
    links: Iterable[Node], by: str, parts: Mapping[str, float], put: Sequence[tuple[str, str]]
) -> dict[Node, str]:
    """The part that a node is put in; ManifestError for a part or value that does not exist."""
    values = [node for node in links if node[0] == by or (by == "model" and node[0] == "source")]
    wanted: dict[Node, str] = {}
    for value, part in put:
        text = printable(f"--put {value}={part}")
        if part not in parts:
            raise ManifestError(f"{text}: there is no part {part!r}: use one of {', '.join(parts)}")
        start = value.removesuffix("*")
        hits = [n for n in values if n[1] == value or (start != value and n[1].startswith(start))]
        if not hits:
            raise ManifestError(f"{text}: no {by} of that name: see the manifest's column {by!r}")
        for node in hits:
            if wanted.setdefault(node, part) != part:
                cause = printable(f"{node[0]} {node[1]!r} is put in {wanted[node]} too")
                raise ManifestError(f"{text}: {cause}: leave one out")
    return wanted


def _reach(start: Node, links: Mapping[Node, Iterable[Node]]) -> dict[Node, Node | None]:
    """All nodes joined to `start`, nearest first, each with the node before it."""
    found: dict[Node, Node | None] = {start: None}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for other in links[node]:
            if other not in found:
                found[other] = node
                queue.append(other)
    return found


def _conflict(
    one: Node, other: Node, links: Mapping[Node, Iterable[Node]], wanted: Mapping[Node, str]
) -> str:
    """What to say of two nodes that belong together and are put apart."""
    came = _reach(one, links)
    chain, link = [], came[other]
    while link is not None and link != one:
        chain.append(f"{link[0]} {link[1]!r}")
        link = came[link]
    ends = [f"--put {node[1]}={wanted[node]}" for node in (one, other)]
    cause = f"{ends[0]} and {ends[1]}: they belong together, joined by {', '.join(chain[::-1])}"
    return f"{cause}: put them in one part, or correct the groups"


def _divide(
    sizes: np.ndarray, shares: Sequence[float], fixed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The part of each unit, int [units].

    sizes: tracks, int [units, labels]. fixed: part, or -1, int [units]. What is minimised is the
    sum over parts and labels of (share - wanted)^2 / wanted; an empty part costs more than any such
    miss. Each try places the units one by one where that costs least, large ones first more or
    less, and then moves single units while that helps.
    """
    sizes = sizes[:, sizes.any(axis=0)]
    totals, counts = sizes.sum(axis=0).tolist(), sizes.tolist()
    weights = (sizes / totals).max(axis=1)
    parts = [part for part, share in enumerate(shares) if share > 0]
    empty_costs = 2 * len(totals) / min(shares[part] for part in parts)

    def growth(filled: list[int], more: list[int], share: float, empty_costs: float) -> float:
        """Rise of a part's cost when `more` tracks of each label join its `filled` ones."""
        costs = 0.0
        for n, m, total in zip(filled, more, totals, strict=True):
            costs += m * (m + 2 * (n - share * total)) / (share * total**2)
            costs -= empty_costs * (m > 0 and n == 0)
        return costs

    free = np.flatnonzero(fixed < 0)
    base = [sizes[fixed == part].sum(axis=0).tolist() for part in range(len(shares))]
    best, least = fixed.tolist(), math.inf
    for _ in range(max(1, min(_TRIES, _PLACINGS // max(1, len(free))))):
        order = free[np.argsort(-weights[free] * rng.random(len(free)))].tolist()
        chosen, filled = fixed.tolist(), [list(part) for part in base]
        moved = True
        while moved:
            moved = False
            for unit in order:
                more, old = counts[unit], chosen[unit]
                if old >= 0:
                    filled[old] = [n - m for n, m in zip(filled[old], more, strict=True)]
                # The first large units would go to the small parts if those' being empty counted.
                empty = empty_costs if old >= 0 else 0.0
                costs = {p: growth(filled[p], more, shares[p], empty) for p in parts}
                new = min(costs, key=costs.__getitem__)
                if old >= 0 and costs[new] > costs[old] - 1e-12:  # else equals go round
                    new = old
                filled[new] = [n + m for n, m in zip(filled[new], more, strict=True)]
                moved |= new != old
                chosen[unit] = new
        none = [0] * len(totals)
        cost = sum(growth(none, filled[part], shares[part], empty_costs) for part in parts)
        if cost < least - 1e-12:
            best, least = chosen, cost
    return np.array(best)


def _check_division(
    sizes: np.ndarray, chosen: np.ndarray, names: Sequence[str], shares: Sequence[float], by: str
) -> None:
    """ManifestError when a part that wants a share of a label has none of it."""
    for label, tracks in enumerate(sizes.T):
        filled = np.bincount(chosen, tracks, minlength=len(names))
        lacking = [n for n, s, f in zip(names, shares, filled, strict=True) if s > 0 and f == 0]
        if tracks.any() and lacking:
            units = f"{np.count_nonzero(tracks)} unit(s) by {by} and group"
            cause = f"{LABELS[label]} tracks make {units}: nothing is left for {lacking[0]}"
            cure = "name fewer parts, put fewer, divide --by group, or fill the column source"
            raise ManifestError(f"{cause}: {cure}")
