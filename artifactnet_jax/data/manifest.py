"""Manifests: which recordings there are, of which label, and in which part.

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

import csv
import dataclasses
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from artifactnet_jax.files import output_problem, replace_file, writing
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError, brief, printable

SUFFIXES = (".csv", ".parquet")
_CURE = 'pip install "artifactnet-jax[train]", or use csv'
LABELS = ("real", "ai")  # by label
_COLUMNS = ("path", "label", "kind", "source", "model", "group", "split", "residual", "weight")
_SPELLINGS = (("0", "0.0", "real", "human"), ("1", "1.0", "ai", "fake", "generated", "synthetic"))
_LABEL_OF = {text: label for label, texts in enumerate(_SPELLINGS) for text in texts}
T = TypeVar("T")
R = TypeVar("R")


class ManifestError(CommandError):
    """A manifest cannot be used: wrong usage. The message is one line: what, why, and the cure."""

    def __init__(self, message: str):
        super().__init__(message, USAGE)

    @classmethod
    def of(cls, name: str, what: str) -> ManifestError:
        """The error of one file, whose name it begins with."""
        return cls(printable(f"{name}: {what}"))


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


Cells = list[tuple[str, list[str]]]  # name of the row for people, cells
Records = list[tuple[str, dict[str, str]]]  # name of the row for people, cells by column


def read_records(path: str | os.PathLike[str]) -> tuple[list[str], Records]:
    """Columns and rows of a csv or parquet file as text, before anything is made of them.

    Columns of manifests come in lower case, others as they are.

    Raises:
        ManifestError: the file cannot be read, has no rows, or has a column twice.
    """
    name = os.fsdecode(path)
    _check_suffix(name)
    try:
        header, rows = (_csv if name.lower().endswith(".csv") else _parquet)(name)
    except OSError as error:
        cause = error.strerror or brief(error)
        raise ManifestError.of(name, f"cannot be read: {cause}") from error
    columns = [text.strip() for text in header]
    columns = [text.lower() if text.lower() in _COLUMNS else text for text in columns]
    if twice := [column for column, n in Counter(columns).items() if n > 1]:
        raise ManifestError.of(name, f"column {twice[0]!r} is there twice: rename one")
    if not rows:
        raise ManifestError.of(name, "it has no rows: give recordings")
    return columns, [(where, dict(zip(columns, cells, strict=True))) for where, cells in rows]


def made_of_rows(name: str, rows: Iterable[tuple[str, T]], make: Callable[[str, T], R]) -> list[R]:
    """The results of `make` for the name and the content of each row of a manifest.

    Raises:
        ManifestError: `make` raised ValueError; the message names the first row and counts the
            others.
    """
    made: list[R] = []
    bad: list[tuple[str, str]] = []
    for where, row in rows:
        try:
            made.append(make(where, row))
        except ValueError as error:
            bad.append((where, str(error)))
    if bad:
        more = f" ({len(bad) - 1} more rows are bad, the next is {bad[1][0]})" if bad[1:] else ""
        raise ManifestError.of(name, f"{bad[0][0]}: {bad[0][1]}{more}")
    return made


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
            raise ManifestError.of(name, f"no column {column!r} among {has}: {cure}")
    seen: dict[str, tuple[str, Row]] = {}

    def new_row(where: str, cells: dict[str, str]) -> Row | None:
        row = _row(cells, os.path.dirname(name))
        first, same = seen.setdefault(_absolute(row.path), (where, row))
        if first == where:
            return row
        if row != same:
            raise ValueError(f"it has the path of {first}, but not its values: keep one")
        return None

    return [row for row in made_of_rows(name, records, new_row) if row is not None]


def read_manifests(paths: Sequence[str]) -> list[Row]:
    """The rows of all manifests; ManifestError for a recording in two of them."""
    rows: dict[str, Row] = {}
    for path in paths:
        for row in read_manifest(path):
            if rows.setdefault(os.path.abspath(row.path), row) is not row:
                raise ManifestError(f"{path}: {row.path} is in another manifest too: leave one out")
    return list(rows.values())


def read_other(path: str, output: str) -> list[Row]:
    """The rows of a manifest that is not `output`, which the command writes. ManifestError."""
    if os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
        cause = "it is what the command writes"
        raise ManifestError(f"--data {path}: {cause}; give the one before it")
    return read_manifest(path)


def _csv(name: str) -> tuple[list[str], Cells]:
    with open(name, "rb") as file:
        data = file.read()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError.of(name, "it is UTF-16: save it as UTF-8")
    text = io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    records: Cells = []
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
                cure = 'put a field with a comma in quotes, "like, this"'
                raise ManifestError.of(name, f"{cause}: {cure}")
            records.append((where, cells))
    except csv.Error as error:
        cause = f"line {end + 1}: {error}"
        raise ManifestError.of(name, f"{cause}: mend it, or export it again") from error
    if header is None:
        raise ManifestError.of(name, "the file is empty: write path,label in its first line")
    return header, records


def _parquet(name: str) -> tuple[list[str], Cells]:
    arrow, parquet = pyarrow_or(_CURE)
    try:
        with open(name, "rb") as file:  # else a folder would be read as a data set
            table = parquet.read_table(file)
        columns = [[cell_text(value) for value in column.to_pylist()] for column in table.columns]
    except (arrow.ArrowException, ValueError) as error:
        cause = f"it cannot be read as parquet ({brief(error)})"
        raise ManifestError.of(name, f"{cause}: write or copy it again") from error
    cells = zip(*columns, strict=True) if columns else ()
    return table.column_names, [(f"row {i}", list(c)) for i, c in enumerate(cells, 1)]


def pyarrow_or(cure: str) -> tuple[Any, Any]:
    """Package pyarrow and its module parquet; CommandError, with the cure, where it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CommandError(f"parquet needs pyarrow: {cure}", NO_BACKEND) from error
    return pyarrow, pyarrow.parquet


def cell_text(value: Any) -> str:
    """A value of parquet or JSON as csv would say it; null and NaN are nothing."""
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
        raise ManifestError.of(name, "not the name of a manifest: end it with .csv or .parquet")


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
        raise ManifestError.of(name, problem)
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
