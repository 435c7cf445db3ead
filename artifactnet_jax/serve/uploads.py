"""Uploads: from a multipart body to files on disk, as it comes.

Files have random names under one root with a quota; a client's name is text in a row, never a path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from artifactnet_jax.serve.store import File, new_id
from artifactnet_jax.text import printable

NAME_CHARS = 500  # of a client's name that are kept
SPARE_BYTES = 64 * 2**20  # kept free on the disk, for the database


class DiskFull(Exception):
    """The quota or the disk is used up; the message says which."""


def lock(path: Path, wait: bool = False) -> Any:
    """An open file that holds a lock until it is closed or the process ends; BlockingIOError."""
    file = open(path, "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


class Disk:
    """The folder of audio files, for the one process that writes there.

    `used` is what they hold in bytes, those being written included; at most `quota`.
    """

    def __init__(self, root: Path, quota: int):
        self.folder, self._incoming = root / "files", root / "incoming"
        for folder in (self.folder, self._incoming):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.quota, self.used = quota, 0
        self._lock = threading.Lock()

    def sweep(self, needed: set[str]) -> None:
        """Remove what a kill left over; count the rest."""
        for entry in os.scandir(self._incoming):
            os.unlink(entry.path)
        self.used = 0
        for entry in os.scandir(self.folder):
            if entry.name in needed:
                self.used += entry.stat().st_size
            else:
                os.unlink(entry.path)

    def sync(self) -> None:
        """Make the names of kept files last through a power cut."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with full():
                os.fsync(folder)
        finally:
            os.close(folder)

    def reserve(self, size: int) -> None:
        """Count bytes that are about to be written; DiskFull if there is no room for them."""
        free = shutil.disk_usage(self.folder).free
        with self._lock:
            if self.used + size > self.quota:
                raise DiskFull("the service's quota is used up: try again when files are scored")
            if free - size < SPARE_BYTES:
                raise DiskFull("the service's disk is full: tell who runs it")
            self.used += size

    def release(self, size: int) -> None:
        """Count bytes that are gone."""
        with self._lock:
            self.used -= size

    def remove(self, ids: Iterable[str]) -> None:
        """Remove files, those that are there."""
        for path in (self.folder / name for name in ids):
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                self.release(size)


class Incoming:
    """One file on its way to the disk. `keep` or `discard` ends it; DiskFull."""

    def __init__(self, disk: Disk):
        self._disk, self._id = disk, new_id()
        self._path = disk._incoming / self._id
        self._digest, self.bytes = hashlib.sha256(), 0
        with full():
            self._file: BinaryIO = open(self._path, "xb")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Add bytes to the file. DiskFull."""
        self._disk.reserve(len(data))
        self.bytes += len(data)
        with full():
            self._file.write(data)
        self._digest.update(data)

    def keep(self, name: str) -> File:
        """Put the file in its place; `Disk.sync` then makes its name last."""
        with full():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, self._disk.folder / self._id)
        return File(self._id, name, self.bytes, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove the file, kept or not."""
        with contextlib.suppress(OSError):  # what is in its buffer does not fit either
            self._file.close()
        for path in (self._path, self._disk.folder / self._id):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._disk.release(self.bytes)


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Turns what a disk says that takes no more into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise DiskFull(
            f"the service cannot store it ({error.strerror}): tell who runs it"
        ) from None


class BadUpload(Exception):
    """A body that is refused; `status` is that of HTTP."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


class Multipart:
    """The files of a multipart/form-data body, each on disk as soon as it has been read.

    `feed` it, then `finish`; or `discard`, after which nothing is left. BadUpload, DiskFull.
    `most` files of `most_bytes` each are taken.
    """

    def __init__(self, content_type: str, disk: Disk, most: int, most_bytes: int):
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadUpload(415, "media-type", "send files as multipart/form-data with a boundary")
        self._disk, self._most, self._most_bytes = disk, most, most_bytes
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""
        self._open: tuple[Incoming, str] | None = None
        self._incoming: list[Incoming] = []
        self._ended = False
        self.files: list[File] = []
        callbacks: Any = {
            "on_part_begin": self._headers.clear,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_part,
            "on_part_data": self._on_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        with _parsing():
            self._parser = MultipartParser(options[b"boundary"], callbacks)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. BadUpload, DiskFull."""
        with _parsing():
            self._parser.write(data)

    def finish(self) -> str:
        """Make the files last; returns a digest of their names and contents."""
        if not self._ended:
            raise BadUpload(400, "multipart", "the body ends before its last boundary: send again")
        if not self.files:
            raise BadUpload(422, "no-file", "the body holds no file: add a part with a filename")
        self._disk.sync()
        contents = [(file.name, file.sha256) for file in self.files]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def keep(self) -> None:
        """Leave the files to the database: `discard` removes nothing any more."""
        self._incoming.clear()

    def discard(self) -> None:
        """Remove the files that `keep` has not left to the database."""
        for incoming in self._incoming:
            incoming.discard()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"filename")
        if name is None:
            text = "a part has no filename: send files only"
            raise BadUpload(422, "no-file", text)
        if len(self.files) == self._most:
            raise BadUpload(413, "too-many", f"over {self._most} files: send fewer, or in batches")
        incoming = Incoming(self._disk)
        self._incoming.append(incoming)
        text = printable(name.decode("utf-8", "replace"))[:NAME_CHARS]
        self._open = incoming, text or "unnamed"

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        assert self._open is not None
        incoming, name = self._open
        if incoming.bytes + end - start > self._most_bytes:
            limit = f"{self._most_bytes / 2**20:g} MB, which is the limit here"
            raise BadUpload(413, "too-large", f"{name}: larger than {limit}: encode or cut it")
        incoming.write(data[start:end])

    def _on_part_end(self) -> None:
        assert self._open is not None
        incoming, name = self._open
        self.files.append(incoming.keep(name))
        self._open = None

    def _on_end(self) -> None:
        self._ended = True


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        text = f"the body is not multipart/form-data ({printable(str(error))[:200]})"
        raise BadUpload(400, "multipart", text) from None
