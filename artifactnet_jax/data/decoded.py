"""Decoded recordings on disk, and the check that the rows of a manifest can be used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, BinaryIO

import numpy as np
import soxr

from artifactnet_jax.audio import Meter, to_mono
from artifactnet_jax.config import Decision
from artifactnet_jax.data.augment import RATE, to_int16
from artifactnet_jax.data.manifest import Row
from artifactnet_jax.decode import open_audio
from artifactnet_jax.files import cache_folder, whole_file
from artifactnet_jax.recording import AudioError, Decoded, to_float
from artifactnet_jax.results import Failure
from artifactnet_jax.text import SOME_FAILED, CommandError, printable

MIN_S = 0.1  # s; shorter recordings are refused: a crop of them is all padding
# NumPy parses headers as Python, which CPython 3.11 may fail at in two threads at once.
_HEADERS = threading.Lock()
_REVISION = 1  # of what is cached: raise it whenever the same file gives something else


class AudioCache:
    """Decoded recordings on disk: int16 [n, 1 or 2] at 44.1 kHz, memory-mapped.

    Mono and stereo are kept as they are, more channels are mixed to mono; resampling is that of
    scoring. Rounding to 16 bits adds noise of -101 dBFS rms. An entry belongs to a file's path,
    size and time of change. Entries appear whole or not at all, so several processes may share the
    folder; deleting it costs time only. `folder`: None is the user's cache folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        if folder is None:
            folder = cache_folder("audio")
        self.folder = os.path.abspath(folder)
        with _storing(self.folder):
            os.makedirs(self.folder, 0o700, exist_ok=True)

    def key(self, path: str | os.PathLike[str]) -> str:
        """Key of a recording: digest of path, size and time of change. AudioError."""
        try:
            known = os.stat(path)
        except (OSError, ValueError):
            with open_audio(path):  # says what is wrong
                raise AudioError("not-found", "no such file: check the path") from None
        name = os.fsencode(os.path.abspath(path))
        facts = f"/{known.st_size}/{known.st_mtime_ns}/{RATE}/{_REVISION}".encode()
        return hashlib.blake2b(name + facts, digest_size=20).hexdigest()

    def get(self, path: str | os.PathLike[str]) -> np.ndarray:
        """int16 [n, 1 or 2], read-only; decoded the first time. AudioError, CommandError."""
        with _named(path):
            key = self.key(path)
            audio = self.entry(key)
            if audio is None:
                with _written(self._path(key)) as file:
                    _decode_into(path, file)
                audio = self.entry(key)
            assert audio is not None
            return audio

    def entry(self, key: str) -> np.ndarray | None:
        """The recording of a key, if the cache has it whole; else None."""
        audio = read_array(self._path(key))
        if audio is None or audio.dtype != np.int16 or audio.ndim != 2:
            return None
        return audio

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, f"{key}.npy")


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """An AudioError's message begins with the name of the file."""
    try:
        yield
    except AudioError as error:
        name = printable(os.fsdecode(path))
        raise AudioError(error.kind, f"{name}: {error}") from None


@contextlib.contextmanager
def _storing(folder: str) -> Iterator[None]:
    """A disk that takes no more ends the command."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free space, or name a folder on another disk with --cache"
        cause = "the disk is full" if full else str(error.strerror)
        text = f"{printable(folder)}: cannot keep decoded audio: {cause}; {cure}"
        raise CommandError(text, SOME_FAILED) from error


@contextlib.contextmanager
def _written(path: str) -> Iterator[BinaryIO]:
    """A binary file that appears as `path` once it is whole."""
    folder = os.path.dirname(path)
    with _storing(folder):
        os.makedirs(folder, 0o700, exist_ok=True)
        with whole_file(path) as file:
            yield file


def read_array(path: str) -> np.ndarray | None:
    """A memory-mapped .npy, None if it is missing or damaged."""
    try:
        with _HEADERS:
            array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array


def write_array(path: str, array: np.ndarray) -> None:
    """An .npy file, whole or not at all; CommandError where the disk takes no more."""
    with _written(path) as file:
        np.save(file, array)


def read_arrays(path: str) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz by name, None if it is missing or damaged."""
    try:
        with _HEADERS, open(path, "rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file, whole or not at all; CommandError where the disk takes no more."""
    with _written(path) as file:
        values: dict[str, Any] = dict(arrays)
        np.savez(file, **values)


def _decode_into(path: str | os.PathLike[str], file: Any) -> None:
    """Decode a recording blockwise into an open .npy file."""
    with open_audio(path) as decoded:
        channels = 2 if decoded.channels == 2 else 1

        def header(n: int) -> None:  # of the same size for every n
            file.seek(0)
            shape = {"descr": "<i2", "fortran_order": False, "shape": (n, channels)}
            np.lib.format.write_array_header_1_0(file, shape)

        header(0)
        n = 0
        for block in _resampled(decoded, channels):
            file.write(to_int16(block).tobytes())
            n += len(block)
        if n == 0:
            raise AudioError("no-audio", "the audio has no samples: export it again")
        header(n)


def _resampled(decoded: Decoded, channels: int) -> Generator[np.ndarray, None, None]:
    """float32 blocks [m, channels] at 44.1 kHz, not clipped yet; AudioError as in scoring."""
    meter = Meter()
    meter.begin(decoded)
    stream = None
    if decoded.rate != RATE:
        stream = soxr.ResampleStream(decoded.rate, RATE, channels, "float32", "HQ")
    for block in meter.watch(decoded.blocks):
        if block.shape[1] != 2 or channels != 2:  # a broadcast may change its channels midway
            block = np.repeat(to_mono(block)[:, None], channels, axis=1)
        if stream is not None:
            block = stream.resample_chunk(np.clip(block, -1e6, 1e6))
        yield block
    if stream is not None:
        yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True)
    meter.end(decoded)


def prepare(
    rows: Sequence[Row],
    cache: AudioCache,
    *,
    max_bad: float,
    jobs: int,
    tell: Callable[[Row | Failure], None] = lambda result: None,
    residual: bool = False,
) -> tuple[list[Row], list[Failure]]:
    """Decode every row into the cache, `jobs` at a time; returns the good rows and the failures.

    Bad are recordings that cannot be read, last under 0.1 s or are silent throughout and, with
    `residual`, rows whose residual is missing, no float16 or float32 vector, or of another length.
    `tell` is called with every row done or its Failure, in the order of completion. CommandError:
    more than the fraction `max_bad` is bad, which ends it as soon as it is certain; or a full disk.
    """
    results: list[Row | Failure | None] = [None] * len(rows)
    failures: list[Failure] = []
    with ThreadPoolExecutor(jobs, "artifactnet-prepare") as pool:
        try:
            tasks = {pool.submit(_check, row, cache, residual): k for k, row in enumerate(rows)}
            for task in as_completed(tasks):
                result = results[tasks[task]] = task.result()
                tell(result)
                if isinstance(result, Failure):
                    failures.append(result)
                    if len(failures) > max_bad * len(rows):
                        raise CommandError(_too_many(failures, len(rows), max_bad), SOME_FAILED)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    good = [result for result in results if isinstance(result, Row)]
    return good, [result for result in results if isinstance(result, Failure)]


def _too_many(failures: list[Failure], rows: int, max_bad: float) -> str:
    first = "; ".join(failure.message for failure in failures[:3])
    share = f"more than the fraction {max_bad:g} of the {rows} rows cannot be used"
    return f"{share}: mend them or take them out of the manifest ({first})"


def _check(row: Row, cache: AudioCache, residual: bool) -> Row | Failure:
    try:
        audio = cache.get(row.path)
        with _named(row.path):
            if len(audio) < MIN_S * RATE:
                text = f"lasts {len(audio) / RATE:.3f} s, under {MIN_S:g} s: leave it out"
                raise AudioError("short", text)
            if not _audible(audio):
                raise AudioError("silent", "silent throughout: leave it out")
            if residual:
                _check_residual(row, len(audio))
    except AudioError as error:
        return Failure(row.path, error.kind, str(error))
    return row


def _audible(audio: np.ndarray) -> bool:
    """Whether the mix to mono, which may cancel out, ever exceeds the level of silence."""
    for start in range(0, len(audio), RATE):
        if np.abs(to_mono(to_float(audio[start : start + RATE]))).max() > Decision.silence_peak:
            return True
    return False


def _check_residual(row: Row, length: int) -> None:
    cure = "run artifactnet-jax residuals on this manifest, and train on the one it writes"
    if not row.residual:
        raise AudioError("residual", f"has no residual: {cure}")
    found = read_array(row.residual)
    name = printable(row.residual)
    if found is None:
        raise AudioError("residual", f"its residual {name} is missing or damaged: {cure}")
    if found.dtype not in (np.float16, np.float32) or found.shape != (length,):
        what = f"{found.dtype} {list(found.shape)}, not float [{length}]"
        raise AudioError("residual", f"its residual {name} is {what}: {cure}")
