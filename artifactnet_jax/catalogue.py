"""Catalogues: which recordings there are, by path or URI, and the folder that their rows go to."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from artifactnet_jax.decision import WITNESSES
from artifactnet_jax.files import SUFFIXES, find_audio, replace_file, writing
from artifactnet_jax.results import filled
from artifactnet_jax.text import USAGE, CommandError, brief

FLUSH_ROWS, FLUSH_S = 4096, 60.0  # a file is written at the latest then: what a kill may cost
RUN = "_run.json"  # what the rows of a folder have in common; readers of Parquet skip the name


def list_entries(paths: Iterable[str], recursive: bool = False) -> dict[str, str]:
    """Recordings by path, with the SHA-256 of their bytes in hexadecimal where it is known, or "".

    A path is a file, a folder, `@list.txt` or a Parquet manifest: a table with a column `path`, and
    perhaps `sha256`. All but the list may be URIs of pyarrow.fs or fsspec (s3://, gs://, file://).
    Local paths come back absolute; those in a manifest are relative to its folder.

    Raises CommandError.
    """
    found: dict[str, str] = {}
    for path in paths:
        if path.lower().endswith(".parquet"):
            found |= _manifest(path)
        elif "://" in path:
            found |= dict.fromkeys(_remote(path, recursive), "")
        elif path == "-":
            raise CommandError("--engine ray reads no standard input: name files", USAGE)
        else:
            try:
                local = find_audio([path], recursive)
            except ValueError as error:
                raise CommandError(str(error), USAGE) from error
            # A list may name what is in an object store.
            found |= {p if "://" in p else os.path.abspath(p): "" for p in local}
    return found


def _manifest(path: str) -> dict[str, str]:
    import pyarrow.parquet as pq

    filesystem, inner = filesystem_of(path)
    folder = path.rpartition("/")[0] if "://" in path else os.path.dirname(os.path.abspath(path))
    try:
        columns = pq.read_schema(inner, filesystem=filesystem).names
        if "path" not in columns:
            raise CommandError(f"{path}: it has no column `path`: name it so", USAGE)
        wanted = ["path", *(["sha256"] if "sha256" in columns else [])]
        table = pq.read_table(inner, columns=wanted, filesystem=filesystem)
    except (OSError, ValueError) as error:
        cure = "give a Parquet file with a column `path`"
        raise CommandError(f"{path}: cannot be read ({brief(error)}): {cure}", USAGE) from error
    names = table["path"].to_pylist()
    digests = table["sha256"].to_pylist() if len(wanted) > 1 else [None] * len(names)
    found: dict[str, str] = {}
    for name, digest in zip(names, digests, strict=True):
        if name and "://" in name:
            found[name] = (digest or "").lower()
        elif name:
            joined = f"{folder}/{name}" if "://" in folder else os.path.join(folder, name)
            found[joined] = (digest or "").lower()
    return found


def _remote(uri: str, recursive: bool) -> list[str]:
    """The file that a URI names, or the audio files of a folder, sorted; what is missing stays."""
    from pyarrow import fs

    filesystem, inner = filesystem_of(uri)
    try:
        if filesystem.get_file_info(inner).type != fs.FileType.Directory:
            return [uri]
        inside = filesystem.get_file_info(fs.FileSelector(inner, recursive=recursive))
    except OSError as error:
        cure = "check the address, and the access to it"
        raise CommandError(f"{uri}: cannot be listed ({brief(error)}): {cure}", USAGE) from error
    base = uri.rstrip("/")
    return [
        base + info.path[len(inner.rstrip("/")) :]
        for info in sorted(inside, key=lambda info: info.path)
        if info.is_file
        and not info.base_name.startswith(".")
        and os.path.splitext(info.path)[1].lower() in SUFFIXES
    ]


def filesystem_of(path: str) -> tuple[Any, str]:
    """File system of pyarrow for a path or URI, and the path in it; CommandError for neither.

    What follows the host or bucket is the name as it is: no escapes, no options.
    """
    from pyarrow import fs

    found = re.match(r"([A-Za-z0-9+.-]+://[^/]*)/*(.*)", path, re.DOTALL)
    if found is None:
        return fs.LocalFileSystem(), os.path.abspath(path)
    try:
        filesystem, root = _store(found[1])
    except (OSError, ValueError, ImportError) as error:
        cure = "check the address; some schemes need a package of their own"
        raise CommandError(f"{path}: {brief(error)}: {cure}", USAGE) from error
    return filesystem, f"{root.rstrip('/')}/{found[2]}".rstrip("/") or "/"


@functools.lru_cache(maxsize=16)  # asks for a bucket's region
def _store(uri: str) -> tuple[Any, str]:
    """File system of pyarrow for a scheme and host or bucket, and the path of that in it."""
    import pyarrow
    from pyarrow import fs

    try:
        filesystem, root = fs.FileSystem.from_uri(f"{uri}/")
    except pyarrow.ArrowInvalid:  # no scheme of its own: one of fsspec's
        from fsspec.core import url_to_fs

        found, root = url_to_fs(uri)
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(found))
    return filesystem, str(root)


def schema() -> Any:
    """Schema of the Parquet files: the score schema and `sha256`.

    `verdict` is in the name of the folder, "error" for a failure; `plan` is text.
    """
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    score = {"z": number, "p": number}
    decoder = {
        **{"name": text, **score, "speed": number, "band_hz": pa.list_(number)},
        "windows": pa.list_(pa.struct({"start_s": number, "end_s": number, **score}.items())),
        **{"rivals": pa.list_(text), "sentence": text},
    }
    named = {
        **{"schema": text, "path": text, "sha256": text, "score": number, "threshold": number},
        **{"operating_point": text, "margin": number, "band": pa.list_(number), "reason": text},
        **{"prior": number, "evidence": pa.struct([(key, number) for key in WITNESSES])},
        "spans": pa.list_(pa.struct({"start_s": number, "end_s": number, "score": number}.items())),
        **{"ai_share": number, "n_segments": pa.int32()},
        "segments": pa.list_(pa.struct({"start_s": number, "score": number}.items())),
        **{"duration_s": number, "sample_rate": pa.int32(), "channels": pa.int32()},
        "weights": pa.struct([(key, text) for key in ("name", "sha256", "preset")]),
        **{"backend": text, "dtype": text, "aggregate": text, "plan": text},
        **{"warnings": pa.list_(text), "skipped": pa.int32(), "lost_s": number, "track": text},
        **{"decoder": pa.struct(decoder.items()), "decoder_reason": text},
        "bank": pa.struct([("sha256", text), ("decoders", pa.int32())]),
        **{"fine": pa.struct([("logit", number)]), "fine_reason": text},
        "notices": pa.list_(text),
        "timings": pa.struct([("decode_s", number), ("compute_s", number)]),
        "error": pa.struct([("kind", text), ("message", text)]),
    }
    return pa.schema(named.items())


class Folder:
    """Rows in `verdict=WORD/*.parquet` under a folder, local or by URI; a failure's is "error"."""

    def __init__(self, where: str):
        self._where = where
        self._filesystem, self._inner = filesystem_of(where)
        self._rows: list[dict[str, Any]] = []
        self._since = 0.0
        self._files = 0
        self._name = f"{time.time_ns():x}"

    def begin(self, common: Mapping[str, Any], resume: bool) -> None:
        """Check that rows with `common` may go there, and note it; CommandError if not."""
        from pyarrow import fs

        mark = f"{self._inner}/{RUN}"
        try:
            self._filesystem.create_dir(self._inner, recursive=True)
            inside = self._filesystem.get_file_info(fs.FileSelector(self._inner))
            old = None
            if any(info.base_name == RUN for info in inside):
                with self._filesystem.open_input_stream(mark) as file:
                    old = json.loads(file.read())
        except (OSError, ValueError) as error:
            raise CommandError(f"-o {self._where}: {brief(error)}: name a folder", USAGE) from error
        if inside and not (resume and old):
            what = "holds results: --resume goes on with them" if old else "is not empty"
            raise CommandError(f"-o {self._where}: it {what}, or name another folder", USAGE)
        old = old and filled(old, common)
        if old and (what := ", ".join(k for k in common if old.get(k) != common[k])):
            cure = "give the same options, or another -o DIR"
            raise CommandError(f"{self._where} has rows with other {what}: {cure}", USAGE)
        self._put(RUN, json.dumps(common, indent=1).encode())

    def known(self) -> set[tuple[str, str]]:
        """(sha256, path) of the rows with a verdict."""
        import pyarrow.compute as pc

        table = self._dataset().to_table(
            columns=["sha256", "path"], filter=pc.field("verdict") != "error"
        )
        return set(zip(table["sha256"].to_pylist(), table["path"].to_pylist(), strict=True))

    def drop_failures(self, paths: Iterable[str]) -> None:
        """Forget the failures of these paths, which are tried again."""
        import pyarrow.compute as pc

        failed = pc.field("verdict") == "error"
        again = set(map(utf8, paths))
        old = [part.path for part in self._dataset().get_fragments(filter=failed)]
        rows = self._dataset().to_table(filter=failed).to_pylist()
        self._rows += [row for row in rows if row["path"] not in again]
        self.flush()
        for path in old:
            self._filesystem.delete_file(path)

    def copies(self, renamed: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Rows of files scored before, under the paths that they have now."""
        import pyarrow.compute as pc

        if not renamed:
            return
        left = dict(renamed)
        wanted = pc.field("sha256").isin(list(left)) & (pc.field("verdict") != "error")
        for batch in self._dataset().to_batches(filter=wanted):
            for row in batch.to_pylist():
                for path in left.pop(row["sha256"], ()):
                    yield {**row, "path": path}

    def add(self, row: dict[str, Any]) -> None:
        """Take a row; it is on disk when enough have come, or after FLUSH_S, or at `flush`."""
        if not self._rows:
            self._since = time.monotonic()
        self._rows.append(row)
        if len(self._rows) >= FLUSH_ROWS or time.monotonic() - self._since >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what has come, each file whole or not at all; CommandError where that fails."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = defaultdict(list)
        for row in self._rows:
            changed = {"path": utf8(row["path"])}
            if "plan" in row:
                changed["plan"] = str(row["plan"])
            parts["error" if row.get("error") else row["verdict"]].append({**row, **changed})
        for verdict, rows in parts.items():
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, schema()), sink)
            name = f"verdict={verdict}/{self._name}-{self._files:06}.parquet"
            self._put(name, sink.getvalue().to_pybytes())
        self._files += 1
        self._rows.clear()

    def _put(self, name: str, data: bytes) -> None:
        from pyarrow import fs

        path = f"{self._inner}/{name}"
        with writing(self._where):
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            if isinstance(self._filesystem, fs.LocalFileSystem):
                replace_file(path, data)
            else:  # an object appears when it is complete
                with self._filesystem.open_output_stream(path) as file:
                    file.write(data)

    def _dataset(self) -> Any:
        import pyarrow as pa
        from pyarrow import dataset

        parts = pa.schema([("verdict", pa.string())])
        return dataset.dataset(
            self._inner,
            schema=pa.schema([*schema(), *parts]),
            format="parquet",
            filesystem=self._filesystem,
            partitioning=dataset.partitioning(parts, flavor="hive"),
        )


def utf8(path: str) -> str:
    """A path as Parquet can hold it: bytes that are no UTF-8 are escaped, as JSON escapes them."""
    return path.encode("utf-8", "backslashreplace").decode()
