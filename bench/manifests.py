"""Manifests of a benchmark: which tracks there are, and where the audio of each is.

Four forms are read, and several manifests make one benchmark:

- csv and parquet with the columns of `artifactnet_jax.data.manifest`;
- json: a list of objects with the same keys, or one of the public runner's manifests, as it is: v1
  ("bench"), v1.1 and v2 ("tracks"), v1.2 ("bench" with a schema), legacy ("train" and "test");
- parquet shards with the audio in them: a file, or a folder of such files, with a column of bytes
  (`audio_bytes`, or `audio` with a field `bytes`), as the public data set has them;
- the public data set's csv of real tracks (`real_tracks_v1.1.csv`).

Beside those columns a manifest may have `id` (default: the path), `cohort` (what a table by group
goes by; default: the paper's group of a public source, else `kind`), `lineage` (default: `group`),
`bench_origin`, `development` (1: a detector was made with it) and the SHA-256 of the audio
(`audio_sha256`). A row whose audio is not where it says
is looked for in given folders: by that digest, or, where a manifest has none, by file name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from artifactnet_jax.data.manifest import (
    LABELS,
    ManifestError,
    cell_text,
    label_of,
    made_of_rows,
    pyarrow_or,
    read_records,
)
from artifactnet_jax.files import audio_in
from artifactnet_jax.recording import AudioError
from artifactnet_jax.text import brief, printable

REAL = "real hardneg"  # endings of public real sources
_COHORTS = {"sonics": "SONICS", "mom": "MoM", "aime": "AIME", "suno": "CDN", "udio": "CDN"}
_SIZES = ("audio_bytes", "bytes")  # of the file, where the value is a number
_CURE = 'pip install "artifactnet-jax[bench]"'
_AUDIO = ("audio_bytes", "audio")  # columns of shards
# What a track takes from a row, and the keys that have it: the first that is there and filled.
_KEYS = {
    "id": ("id", "track_id", "path"),
    "source": ("source", "kind"),
    "generator": ("generator", "model"),
    "lineage": ("lineage", "lineage_id", "dependence_cluster", "recording_group", "group"),
    "group": ("cohort", "partition"),
    "split": ("split", "protocol_split", "bench_origin"),
    "origin": ("bench_origin",),
    "path": ("runtime_path", "path"),
    "sha256": ("audio_sha256", "sha256"),
}
_KNOWN = {key for keys in _KEYS.values() for key in keys} | {*_SIZES, *_AUDIO, "kind", "label"}
_KNOWN |= {"development", "youtube_id", "v1_1_status", "residual", "weight", "format"}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Audio inside a parquet file: row `row` of a column of bytes."""

    path: str
    column: str
    row: int


@dataclasses.dataclass(frozen=True)
class Track:
    """One recording of a benchmark."""

    id: str
    label: int  # 1 AI or re-synthesised, 0 real
    source: str  # generator run, collection or site: the benchmark's subset
    generator: str  # "" unknown
    group: str  # what sources are summed up by
    lineage: str  # the recording that it was made of: what a bootstrap draws
    split: str  # "" none
    origin: str  # bench_origin: "test", "train" or ""
    audio: str | Shard  # "" where it has none: then `problem` says why
    sha256: str = ""  # of the file, "" unknown
    problem: str = ""
    development: bool = False  # a detector or threshold was made with it: reports say so

    def to_dict(self) -> dict[str, Any]:
        """The fields that metrics and reports use: all but the place of the audio."""
        keys = ("id", "label", "source", "generator", "group", "lineage", "split", "development")
        return {key: getattr(self, key) for key in keys}


# --- reading ---------------------------------------------------------------------------------


def read(paths: Sequence[str], folders: Sequence[str] = ()) -> tuple[list[Track], list[str]]:
    """The tracks of all manifests, each with its audio, and notes for people.

    `folders` are searched, with their subfolders, for audio that is not where its row says; a track
    without any is there all the same, with its `problem`. ManifestError: a manifest cannot be read
    or has no rows, a row makes no sense, an id is there twice, or no track has audio.
    """
    tracks: list[Track] = []
    notes: list[str] = []
    index = _Index(folders)
    for path in paths:
        rows = _rows(path)
        if not rows:
            raise ManifestError.of(path, "it has no rows: give tracks")
        foreign = sorted({key for _, row in rows for key in row.cells} - _KNOWN)
        if foreign and not path.lower().endswith(".json"):
            notes.append(printable(f"{path}: columns not used: {', '.join(foreign)}"))
        index.wanted(row for _, row in rows)
        tracks += made_of_rows(path, rows, lambda where, row: _track(row, index))
    if twice := [name for name, n in Counter(track.id for track in tracks).items() if n > 1]:
        named = ", ".join(map(repr, twice[:3]))
        cause = f"{len(twice)} ids are there twice, such as {named}"
        raise ManifestError(printable(f"{cause}: give every track an id of its own"))
    if all(track.problem for track in tracks):
        cause = f"none of the {len(tracks)} tracks has its audio ({tracks[0].problem})"
        raise ManifestError(f"{cause}: give the folders that hold it as --audio")
    return tracks, notes


def select(
    tracks: Sequence[Track], splits: Sequence[str] = (), origin: str = "", each: int = 0
) -> list[Track]:
    """The tracks to score, in their order.

    splits: these parts; where none is given, test and calibration if there is a part "test", else
    all but "train". origin: only this `bench_origin`. each: so many of a source at most, chosen as
    the public runner does, by SHA-256 of "42:id", so that neither order nor scores matter.
    ManifestError: nothing is left, or only one class.
    """
    parts = {track.split for track in tracks}
    if splits:
        if unknown := sorted(set(splits) - parts):
            there = ", ".join(sorted(part or "(none)" for part in parts))
            cause = printable(f"no track is in the part {unknown[0]!r}")
            raise ManifestError(f"{cause}: there are {printable(there)}")
        chosen = set(splits)
    else:
        chosen = {"test", "calibration"} if "test" in parts else parts - {"train"}
    kept = [t for t in tracks if t.split in chosen and (not origin or t.origin == origin)]
    if each:
        ranks: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for track in kept:
            rank = hashlib.sha256(f"42:{track.id}".encode("utf-8", "surrogateescape")).hexdigest()
            ranks[track.split, track.source].append((rank, track.id))
        first = {name for group in ranks.values() for _, name in sorted(group)[:each]}
        kept = [track for track in kept if track.id in first]
    if not kept:
        raise ManifestError("no track is left to score: give other --split or --origin")
    if len(labels := {track.label for track in kept}) == 1:
        there, lacking = LABELS[labels.pop()], LABELS[1 - kept[0].label]
        cause = f"all {len(kept)} tracks to score are {there}"
        raise ManifestError(f"{cause}: a benchmark needs {lacking} ones beside them")
    return kept


@dataclasses.dataclass(frozen=True)
class _Row:
    cells: Mapping[str, str]
    folder: str  # that paths are relative to
    shard: Shard | None = None


_Rows = list[tuple[str, _Row]]  # with the name of the row for people


def _rows(path: str) -> _Rows:
    """The rows of one manifest, of whatever form."""
    if os.path.isdir(path):
        shards = sorted(n for n in os.listdir(path) if n.lower().endswith(".parquet"))
        if not shards:
            raise ManifestError.of(path, "the folder has no .parquet files: name a manifest")
        return [row for name in shards for row in _rows(os.path.join(path, name))]
    folder = os.path.dirname(path)
    if path.lower().endswith(".json"):
        return [(where, _Row(cells, folder)) for where, cells in _json(path)]
    if path.lower().endswith(".parquet") and (rows := _shard(path)) is not None:
        return rows
    return [(where, _Row(cells, folder)) for where, cells in read_records(path)[1]]


def _json(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
    except OSError as error:
        raise ManifestError.of(path, f"cannot be read: {error.strerror or brief(error)}") from error
    except ValueError as error:
        raise ManifestError.of(path, f"it is not JSON ({error}): export it again") from error
    lists = {"": data} if isinstance(data, list) else {}
    if isinstance(data, dict):
        lists = {k: data[k] for k in ("bench", "tracks", "train", "test") if k in data}
    if not lists or not all(isinstance(rows, list) for rows in lists.values()):
        cure = 'give a list of tracks, or {"bench": [...]} or {"tracks": [...]}'
        raise ManifestError.of(path, f"it holds no list of tracks: {cure}")
    for name, rows in lists.items():
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ManifestError.of(path, f"{name or 'track'} {number} is no object: correct it")
            cells = _cells_of(row)
            if name in ("train", "test"):
                cells = {"bench_origin": name} | cells
            yield f"{name or 'track'} {number}", cells


def _cells_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Cells as text; what is nested is nothing."""
    return {k: "" if isinstance(v, (dict, list)) else cell_text(v) for k, v in row.items()}


def _shard(path: str) -> _Rows | None:
    """The rows of a parquet file with audio in it; None where it has none."""
    arrow, parquet = pyarrow_or(_CURE)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = next((c for c in _AUDIO if c in schema.names), "")
            kind = schema.field(column).type if column else None
            if kind is not None and arrow.types.is_struct(kind):
                column, kind = f"{column}.bytes", kind.field("bytes").type
            if kind is None or not (
                arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
            ):
                return None
            others = [name for name in schema.names if name != column.split(".")[0]]
            table = file.read(columns=others)
    except OSError as error:  # pyarrow raises it for what is cut off, too
        cause = f"the shard cannot be read ({brief(error)})"
        raise ManifestError.of(path, f"{cause}: copy it again") from error
    except (arrow.ArrowException, KeyError) as error:
        cause = f"the shard is damaged ({brief(error)})"
        raise ManifestError.of(path, f"{cause}: copy it again") from error
    folder = os.path.dirname(path)
    return [
        (f"row {number + 1}", _Row(_cells_of(row), folder, Shard(path, column, number)))
        for number, row in enumerate(table.to_pylist())
    ]


def _track(row: _Row, index: _Index) -> Track:
    cells = row.cells
    have = {
        name: next((cells[key].strip() for key in keys if cells.get(key, "").strip()), "")
        for name, keys in _KEYS.items()
    }
    if not have["id"]:
        raise ValueError("it has neither id, track_id nor path: give one")
    source = have["source"]
    if cells.get("label", "").strip():
        label = label_of(cells["label"])
    elif have["generator"] and have["generator"].lower() != "real":
        label = 1  # the public shards hold AI tracks, and say of which generator
    elif source.endswith(tuple(REAL.split())) or have["generator"] or "youtube_id" in cells:
        label = 0
    else:
        raise ValueError("it has no label, and no generator that would tell: give 1 (ai) or 0")
    if status := cells.get("v1_1_status"):  # of the public csv of real tracks
        have["origin"] = "test" if status == "test_ok" else "train"
        have["split"] = have["split"] or have["origin"]
    audio: str | Shard = row.shard or ""
    problem = ""
    if not audio:
        names = [have["path"], have["id"], cells.get("track_id", ""), cells.get("youtube_id", "")]
        audio, problem = index.find(row.folder, have["sha256"], [n for n in names if n])
    return Track(
        id=have["id"],
        label=label,
        source=source or LABELS[label],
        generator=have["generator"],
        group=have["group"] or public_cohort(source) or cells.get("kind", "") or LABELS[label],
        lineage=have["lineage"] or have["id"],
        split=have["split"],
        origin=have["origin"],
        audio=audio,
        sha256=have["sha256"],
        problem=problem,
        development=cells.get("development", "").strip().lower() in ("1", "true", "yes"),
    )


def public_cohort(source: str) -> str:
    """The paper's group (Tables VIII and IX) of a public source, "" for any other."""
    if source.endswith("_hardneg"):
        return "hard negatives"
    name, mark, rest = source.partition("_")
    if name not in _COHORTS or not mark:
        return ""
    return _COHORTS[name] + (" real" if "real" in rest else "")


# --- audio -----------------------------------------------------------------------------------


class _Index:
    """Audio files of folders by digest and by name; made when the first row needs it."""

    def __init__(self, folders: Sequence[str]) -> None:
        for folder in folders:
            if not os.path.isdir(folder):
                raise ManifestError(printable(f"--audio {folder}: no such folder"))
        self._folders = folders
        self._files: list[str] | None = None
        self._named: dict[str, list[str]] = defaultdict(list)  # by name and by stem
        self._digests: dict[str, str] | None = None
        self._sizes: set[int] | None = set()  # of the files wanted; None: one has no size

    def wanted(self, rows: Iterable[_Row]) -> None:
        """Note the sizes of what will be asked for: no other file need be digested."""
        for row in rows:
            if any(row.cells.get(key) for key in _KEYS["sha256"]) and self._sizes is not None:
                sizes = [row.cells[k] for k in _SIZES if row.cells.get(k, "").isdigit()]
                self._sizes = self._sizes | {int(sizes[0])} if sizes else None
        self._digests = None

    def find(self, folder: str, sha256: str, names: Sequence[str]) -> tuple[str, str]:
        """(path, "") of the audio, or ("", why there is none)."""
        for name in names[:1]:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path, ""
        if not self._folders:
            return "", f"no such file: {printable(names[0])}"
        if self._files is None:
            self._files = [f for each in self._folders for f in audio_in(each, recursive=True)]
            for path in self._files:
                base = os.path.basename(path)
                for name in {base, os.path.splitext(base)[0]}:
                    self._named[name].append(path)
        if sha256:
            if self._digests is None:
                self._digests = dict(self._digested())
            path = self._digests.get(sha256.lower(), "")
            return path, "" if path else f"no file in --audio has the SHA-256 {sha256}"
        for name in names:
            found = self._named.get(os.path.basename(name), [])
            if len(found) == 1:
                return found[0], ""
            if found:
                return "", f"{len(found)} files in --audio are called {printable(name)}"
        return "", f"no file in --audio is called {printable(names[0])}"

    def _digested(self) -> Iterator[tuple[str, str]]:
        for path in self._files or ():
            with contextlib.suppress(OSError):
                if self._sizes is None or os.path.getsize(path) in self._sizes:
                    with open(path, "rb") as file:
                        yield hashlib.file_digest(file, "sha256").hexdigest(), path


class AudioReader:
    """Opens the audio of tracks, one track after another.

    Shards are read a few rows at a time, in order: tracks should be asked for as they lie in them.
    """

    def __init__(self) -> None:
        self._place: tuple[str, str] | None = None
        self._next = 0
        self._cells: Iterator[Any] = iter(())

    def open(self, track: Track) -> str | BinaryIO:
        """A path, or the file in memory. AudioError: the track has no audio, or its shard fails."""
        if track.problem:
            raise AudioError("not-found", f"{track.id}: {track.problem}")
        if isinstance(track.audio, str):
            return track.audio
        shard = track.audio
        if self._place != (shard.path, shard.column) or self._next > shard.row:
            self._place, self._next = (shard.path, shard.column), 0
            self._cells = _cells(shard)
        arrow, _ = pyarrow_or(_CURE)
        try:
            while self._next <= shard.row:
                data = next(self._cells)
                self._next += 1
        except StopIteration:
            raise AudioError("shard", f"{track.id}: {shard.path} ends before its row") from None
        except (arrow.ArrowException, OSError, ValueError) as error:
            self._place = None
            cause = f"the shard {printable(shard.path)} is damaged ({brief(error)})"
            raise AudioError("shard", f"{track.id}: {cause}: copy it again") from error
        if not data:
            raise AudioError("empty", f"{track.id}: its cell in {printable(shard.path)} is empty")
        return io.BytesIO(data)


def _cells(shard: Shard) -> Iterator[bytes | None]:
    """The audio of every row; a row group is not in memory as a whole."""
    _, parquet = pyarrow_or(_CURE)
    with parquet.ParquetFile(shard.path, memory_map=True, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=1, columns=[shard.column]):
            for value in batch.column(0).to_pylist():
                yield value.get("bytes") if isinstance(value, dict) else value
