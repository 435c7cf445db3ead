"""Manifests: which recordings there are, of which label, and in which part. And the verb `split`.

A manifest is a csv (UTF-8) or parquet file with a row for each recording. Its columns, in any order
and case; all but the first two may be absent, or empty in a row:

    path      file, relative to the manifest's folder, or absolute
    label     1, ai, fake, generated or synthetic; 0, real or human (re-synthesised music is 1)
    kind      what it is: ai, codec-recon, real, ... (default: ai or real, by label)
    source    site, collection or generator run (default: kind)
    model     generator (default: unknown)
    group     lineage: an original and what was made of it share one (default: the row itself)
    split     train, validation, test, calibration, ... (default: none)
    residual  .npy with the teacher's residual, its path written as in `path` (default: none)
    weight    sampling weight within the source, above 0 (default: 1)

Other columns are kept as they are.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from artifactnet_jax.files import output_problem, replace_file, writing
from artifactnet_jax.text import NO_BACKEND, OK, USAGE, CommandError, brief, printable

SUFFIXES = (".csv", ".parquet")
_CURE = 'pip install "artifactnet-jax[train]", or use csv'
LABELS = ("real", "ai")  # by label
_COLUMNS = ("path", "label", "kind", "source", "model", "group", "split", "residual", "weight")
_SPELLINGS = (("0", "0.0", "real", "human"), ("1", "1.0", "ai", "fake", "generated", "synthetic"))
_LABEL_OF = {text: label for label, texts in enumerate(_SPELLINGS) for text in texts}
FAR = 0.5  # of a part's share: a part that misses its share by more is warned of
_TRIES = 32  # divisions that are tried, the best one is taken
_PLACINGS = 100_000  # ... but no more units placed than this, all tries together
_NAMED = 3  # offenders that an error names


class ManifestError(Exception):
    """A manifest cannot be used; the message is one line: what, why, and the cure."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One recording. `path` and `residual` are absolute, or relative to the current folder."""

    path: str
    label: int  # 1 AI or re-synthesised, 0 real
    kind: str
    source: str
    model: str  # "" unknown
    group: str
    split: str  # "" none
    residual: str = ""  # "" none
    weight: float = 1.0
    extra: tuple[tuple[str, str], ...] = ()  # other columns and what they say, "" nothing


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a manifest, by its suffix."""
    return os.fsdecode(path).lower().endswith(SUFFIXES)


# --- reading ---------------------------------------------------------------------------------


Records = list[tuple[str, list[str]]]  # name of the row for people, cells


def read_records(path: str | os.PathLike[str]) -> tuple[list[str], Records]:
    """Columns and rows of a csv or parquet file as text, before anything is made of them.

    Columns of manifests come in lower case, others as they are. Raises ManifestError: the file
    cannot be read, has no rows, or has a column twice.
    """
    name = os.fsdecode(path)
    _check_suffix(name)
    try:
        header, records = (_csv if name.lower().endswith(".csv") else _parquet)(name)
    except OSError as error:
        cause = error.strerror or brief(error)
        raise _error(name, f"cannot be read: {cause}") from error
    columns = [text.strip() for text in header]
    columns = [text.lower() if text.lower() in _COLUMNS else text for text in columns]
    if twice := [column for column, n in Counter(columns).items() if n > 1]:
        raise _error(name, f"column {twice[0]!r} is there twice: rename one")
    if not records:
        raise _error(name, "it has no rows: give recordings")
    return columns, records


def label_of(text: str) -> int:
    """1 for ai, 0 for real, as a manifest may spell them; ValueError for anything else."""
    label = _LABEL_OF.get(text.strip().lower())
    if label is None:
        shown = printable(repr(text.strip()))
        raise ValueError(f"label {shown} is neither 1 (ai, fake) nor 0 (real): correct it")
    return label


def read_manifest(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a csv or parquet file, in order.

    File names that are not UTF-8 come back in Python's surrogate form, which `open` understands.
    A row that is given twice in the same words counts once. Raises ManifestError: the file cannot
    be read, lacks a column, has no rows, or has rows that make no sense or contradict another of
    their path (named by line, in parquet by their number from 1).
    """
    name = os.fsdecode(path)
    columns, records = read_records(name)
    for column in ("path", "label"):
        if column not in columns:
            has = ", ".join(map(repr, columns[:12]))
            cure = "add it; in csv to the first line, with commas between"
            raise _error(name, f"no column {column!r} among {has}: {cure}")
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, tuple[str, Row]] = {}
    for where, cells in records:
        try:
            row = _row(dict(zip(columns, cells, strict=True)), os.path.dirname(name))
            first, same = seen.setdefault(_absolute(row.path), (where, row))
            if first == where:
                rows.append(row)
            elif row != same:
                raise ValueError(f"it has the path of {first}, but not its values: keep one")
        except ValueError as error:
            bad.append((where, str(error)))
    if bad:
        more = f" ({len(bad) - 1} more rows are bad, the next is {bad[1][0]})" if bad[1:] else ""
        raise _error(name, f"{bad[0][0]}: {bad[0][1]}{more}")
    return rows


def read_manifests(paths: Sequence[str]) -> list[Row]:
    """The rows of all manifests; ManifestError for a recording in two of them."""
    rows: dict[str, Row] = {}
    for path in paths:
        for row in read_manifest(path):
            if rows.setdefault(os.path.abspath(row.path), row) is not row:
                raise ManifestError(f"{path}: {row.path} is in another manifest too: leave one out")
    return list(rows.values())


def _csv(name: str) -> tuple[list[str], Records]:
    with open(name, "rb") as file:
        data = file.read()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _error(name, "it is UTF-16: save it as UTF-8")
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    records: Records = []
    end = 0
    try:
        for cells in reader:
            where, end = f"line {end + 1}", reader.line_num
            if not any(cells):
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                cause = f"{where} has {len(cells)} fields, the first line {len(header)}"
                raise _error(name, f'{cause}: put a field with a comma in quotes, "like, this"')
            records.append((where, cells))
    except csv.Error as error:
        raise _error(name, f"line {end + 1}: {error}: mend it, or export it again") from error
    if header is None:
        raise _error(name, "the file is empty: write path,label in its first line")
    return header, records


def _parquet(name: str) -> tuple[list[str], Records]:
    arrow, parquet = pyarrow_or(_CURE)
    try:
        with open(name, "rb") as file:  # else a folder would be read as a data set
            table = parquet.read_table(file)
        columns = [[_text(value) for value in column.to_pylist()] for column in table.columns]
    except (arrow.ArrowException, ValueError) as error:
        cause = f"it cannot be read as parquet ({brief(error)})"
        raise _error(name, f"{cause}: write or copy it again") from error
    cells = zip(*columns, strict=True) if columns else ()
    return table.column_names, [(f"row {i}", list(c)) for i, c in enumerate(cells, 1)]


def pyarrow_or(cure: str) -> tuple[Any, Any]:
    """pyarrow and its parquet module; CommandError, with the cure, where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CommandError(f"parquet needs pyarrow: {cure}", NO_BACKEND) from error
    return pyarrow, pyarrow.parquet


def _text(value: Any) -> str:
    """A parquet value as csv would say it; null and NaN are nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _row(cells: dict[str, str], folder: str) -> Row:
    """The row that cells by column make; ValueError says what is wrong with them."""
    known = {column: cells.pop(column, "") for column in _COLUMNS}
    path, residual = known["path"], known["residual"]  # a blank may be part of a file name
    if not path.strip() or "\0" in path + residual:
        raise ValueError("its path is empty or not one: give the file")
    known = {column: text.strip() for column, text in known.items()}
    label = label_of(known["label"])
    try:
        weight = float(known["weight"] or 1)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        text = printable(repr(known["weight"]))
        raise ValueError(f"weight {text} is not a number above 0: correct it, or drop the row")
    kind = known["kind"] or LABELS[label]
    source = known["source"] or kind
    return Row(
        path=os.path.join(folder, path),
        label=label,
        kind=kind,
        source=source,
        model=known["model"],
        group=known["group"] or f"{source}/{path}",
        split=known["split"],
        residual=os.path.join(folder, residual) if residual.strip() else "",
        weight=weight,
        extra=tuple(cells.items()),
    )


def _check_suffix(name: str) -> None:
    if not is_manifest(name):
        raise _error(name, "not the name of a manifest: end it with .csv or .parquet")


def _error(name: str, what: str) -> ManifestError:
    return ManifestError(printable(f"{name}: {what}"))


def _absolute(path: str) -> str:
    """One spelling of a path. Links stay, save where a ".." makes the way through them matter."""
    folder, name = os.path.split(path)
    if ".." in folder.split(os.sep):
        folder = os.path.realpath(folder)
    return os.path.abspath(os.path.join(folder, name))


# --- writing ---------------------------------------------------------------------------------


def check_output(path: str | os.PathLike[str]) -> None:
    """ManifestError when a manifest cannot be written there: before the work, not after."""
    name = os.fsdecode(path)
    _check_suffix(name)
    if problem := output_problem(name):
        raise _error(name, problem)
    if name.lower().endswith(".parquet"):
        pyarrow_or(_CURE)


def write_manifest(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write rows as csv or parquet, atomically.

    Paths at or below the manifest's folder are written relative to it, others absolute, so that
    the folder can be moved as a whole. The columns `residual` and `weight` appear where any row has
    one. Raises ManifestError as of `check_output`; CommandError: the disk takes no more.
    """
    name = os.fsdecode(path)
    check_output(name)
    folder = _absolute(os.path.dirname(name) or os.curdir)
    optional = {"residual": any(row.residual for row in rows)}
    optional["weight"] = any(row.weight != 1 for row in rows)
    table: dict[str, list[str]] = {}
    for column in _COLUMNS:
        if not optional.get(column, True):
            continue
        values = [getattr(row, column) for row in rows]
        if column in ("path", "residual"):
            table[column] = [_relative(value, folder) if value else "" for value in values]
        else:
            table[column] = [str(value) for value in values]
    extras = [dict(row.extra) for row in rows]
    for column in dict.fromkeys(column for extra in extras for column in extra):
        table[column] = [extra.get(column, "") for extra in extras]
    data = (_to_csv if name.lower().endswith(".csv") else _to_parquet)(table)
    with writing(name):
        replace_file(os.path.realpath(name), data)  # a link stays, what it names is replaced


def _relative(path: str, folder: str) -> str:
    path = _absolute(path)
    inside = os.path.relpath(path, folder)
    return path if inside.split(os.sep)[0] == os.pardir else inside


def _to_csv(table: Mapping[str, Sequence[str]]) -> bytes:
    out = io.StringIO()
    # Python before 3.13 leaves a lone carriage return unquoted, and then cannot read it.
    odd = any("\r" in text for column in table.values() for text in column)
    writer = csv.writer(
        out, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL
    )
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return out.getvalue().encode("utf-8", "surrogateescape")


def _to_parquet(table: Mapping[str, Sequence[str]]) -> bytes:
    arrow, parquet = pyarrow_or(_CURE)
    columns = {name: arrow.array(*_typed(values, arrow)) for name, values in table.items()}
    out = io.BytesIO()
    parquet.write_table(arrow.table(columns), out)
    return out.getvalue()


def _typed(values: Sequence[str], arrow: Any) -> tuple[list[Any], Any]:
    """A column as numbers where that loses nothing, else as text; bytes where not UTF-8."""
    filled = [text for text in values if text]
    for number, kind in ((int, arrow.int64()), (float, arrow.float64())):
        try:
            # Exact only: "007", "1e3" and what no int64 holds stay text.
            if filled and all(str(number(t)) == t and abs(float(t)) < 2**63 for t in filled):
                return [number(text) if text else None for text in values], kind
        except ValueError:
            continue
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return [text.encode("utf-8", "surrogateescape") for text in values], arrow.binary()
    return list(values), arrow.string()


# --- parts -----------------------------------------------------------------------------------

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
    """The same rows with `split` set, what belongs together in one part.

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
    """All that is joined to `start`, nearest first, each with what it was reached from."""
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
        """What a part costs more, having `filled` tracks of each label, when others join them."""
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


# --- the verb --------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """The verb `split`; returns the exit code."""
    try:
        check_output(args.output)
        rows = read_manifest(args.manifest)
        parts = _parts(args.parts)
        put = [_pair(text) for text in args.put]
        try:
            rows = assign_splits(rows, args.by, parts, put, args.seed)
        except ManifestError as error:
            raise _error(args.manifest, str(error)) from error
        write_manifest(args.output, rows)
    except ManifestError as error:
        raise CommandError(str(error), USAGE) from error
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
