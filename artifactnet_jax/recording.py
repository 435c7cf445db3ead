"""What reading a recording gives: blocks of samples, what is wrong with it, or an error.

And what the decoders see of a file: some of its bytes, glued together.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

import numpy as np

from artifactnet_jax.packets import Piece
from artifactnet_jax.text import printable

MAX_CHANNELS = 64
RATES = (1_000, 768_000)  # Hz; a header outside is damaged or lying
SHORT_S = 0.1  # s; a recording may fall this much short of its declared length
_BLOCK_VALUES = 2**18  # samples over all channels in a decoded block, and at most one second


class AudioError(Exception):
    """A recording that cannot be scored. The message is one line: which, why, and the cure.

    `kind` is for machines: not-found, broken-link, permission, is-directory, read, empty, no-audio,
    unsupported, decode, truncated, encrypted, non-finite, sample-rate, channels or missing-extra.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


Blocks = Generator[np.ndarray, None, None]  # float32 [frames, channels], none of them empty


@dataclasses.dataclass
class Flaws:
    """What is wrong with a recording, complete once its blocks have been read."""

    lost_s: float = 0.0  # s within it that are damaged, and left out
    missing_s: float = (
        0.0  # s that it promises beyond its end; infinite: cut off, nobody knows where
    )
    gain: float = 1.0  # what its samples were multiplied by


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A recording that is being decoded."""

    rate: int  # Hz
    channels: int  # of the first block; others may have more or fewer
    blocks: Blocks
    frames: int | None = None  # declared length, if the format declares one
    exact: bool = True  # whether that length can be relied upon
    lossless: bool = True
    notices: tuple[str, ...] = ()  # what the file says of itself, as of `tags.notices`
    track: str | None = None  # which of several audio tracks, such as "2 of 3"
    flaws: Flaws = dataclasses.field(default_factory=Flaws)


class Stream:
    """A part of a binary file as the decoders see it. No exception may cross their C code.

    It has neither name nor descriptor, so nothing can be opened relative to it.
    """

    def __init__(self, file: BinaryIO, pieces: tuple[Piece, ...]):
        self._file = file
        self._pieces: list[tuple[int, int, int, bytes]] = []  # start, end, in the file, literal
        at = 0
        for piece in pieces:
            size = len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            where, text = (0, piece) if isinstance(piece, bytes) else (piece[0], b"")
            self._pieces.append((at, at + size, where, text))
            at += size
        self.size = at
        self.position = 0
        self._k = 0  # piece of the position
        self._seek = True  # the file's own position is not known
        self.error: Exception | None = None  # of the file itself
        self.refusal: Exception | None = None  # of libsndfile, to open it
        self.at_end = False  # the last read came to the end

    def read(self, size: int = -1) -> bytes:
        """The next bytes, fewer at the end; an error is kept, and ends the file."""
        size = self.size - self.position if size is None or size < 0 else size
        data = self._some(size)
        while len(data) < size and self.position < self.size and not self.error:
            more = self._some(size - len(data))
            if not more:
                break
            data += more
        self.at_end = len(data) < size
        return data

    def readinto(self, buffer: Any) -> int:
        """The same into a buffer; how many bytes it has now."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _some(self, size: int) -> bytes:
        """Bytes of one piece."""
        while self._k < len(self._pieces) and self._pieces[self._k][1] <= self.position:
            self._k, self._seek = self._k + 1, True
        if self._k == len(self._pieces):
            return b""
        start, end, where, text = self._pieces[self._k]
        offset = self.position - start
        size = min(size, end - self.position)
        if text:
            data = text[offset : offset + size]
        else:
            try:
                if self._seek:
                    self._file.seek(where + offset)
                    self._seek = False
                data = self._file.read(size)
            except (OSError, ValueError) as error:
                self.error, data = error, b""
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go somewhere; -1 where a damaged header points outside the file."""
        base = {0: 0, 1: self.position, 2: self.size}.get(whence, 0)
        if not 0 <= base + offset < 2**63:
            return -1
        if base + offset != self.position:
            self.position, self._k, self._seek = base + offset, 0, True
        return self.position

    def tell(self) -> int:
        """The position."""
        return self.position

    def failure(self, error: Exception) -> AudioError:
        """What a decoder raised midway, as an AudioError."""
        if self.error:
            return AudioError("read", f"reading failed ({detail(self.error)}): check the disk")
        why = f"({detail(error)}): copy, download or export it again"
        if self.at_end:
            return AudioError("truncated", f"cut off, or damaged near its end {why}")
        return AudioError("decode", f"damaged, cannot be decoded {why}")


class AtRate:
    """Blocks of any rate -> blocks of one: a recording may change midway."""

    def __init__(self, rate: int):
        self._rate = rate
        self._now: tuple[int, int] | None = None  # rate, channels
        self._stream: Any = None

    def __call__(self, block: np.ndarray, rate: int) -> Iterator[np.ndarray]:
        """The next block, float32 [frames, channels] at `rate`."""
        if self._now != (rate, block.shape[1]):
            yield from self.end()
            self._now = rate, block.shape[1]
            if rate != self._rate:
                import soxr

                self._stream = soxr.ResampleStream(rate, self._rate, block.shape[1], "float32")
        if self._stream is not None:
            block = self._stream.resample_chunk(np.clip(block, -1e6, 1e6)).reshape(
                -1, block.shape[1]
            )
        if len(block):
            yield block

    def end(self) -> Iterator[np.ndarray]:
        """What the resampler still holds."""
        if self._stream is not None and self._now is not None:
            channels = self._now[1]
            shape = (0,) if channels == 1 else (0, channels)
            rest = self._stream.resample_chunk(np.zeros(shape, np.float32), last=True)
            self._stream = None
            if len(rest):
                yield rest.reshape(-1, channels)


def block_frames(rate: int, channels: int) -> int:
    """Frames per block: one second, less where a header claims much."""
    return max(1, min(rate, _BLOCK_VALUES // channels))


def to_float(pcm: np.ndarray) -> np.ndarray:
    """Integer PCM or float of any width -> float32, full scale 1, as libsndfile scales."""
    if pcm.dtype.kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite: non-finite
            return pcm.astype(np.float32)
    if pcm.dtype == np.uint8:
        return (pcm.astype(np.float32) - 128) / np.float32(128)
    return pcm.astype(np.float32) / np.float32(2.0 ** (8 * pcm.dtype.itemsize - 1))


def detail(error: Exception | None) -> str:
    """A decoder's own words in one line."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return printable(text).strip().rstrip(".") or type(error).__name__


_TEXT_MODE = "a file opened in text mode: open it as a binary one, with 'rb'"


def size_of(file: BinaryIO) -> int:
    """Bytes of a seekable binary file, which is set to its beginning.

    Raises:
        AudioError: kind "unsupported": it is none; "empty".
    """
    if isinstance(file, io.TextIOBase):
        raise AudioError("unsupported", _TEXT_MODE)
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        text = isinstance(file.read(0), str)
    except (OSError, ValueError, AttributeError, TypeError):
        cause = "not a seekable binary file: read it into io.BytesIO first"
        raise AudioError("unsupported", cause) from None
    if text:
        raise AudioError("unsupported", _TEXT_MODE)
    if size == 0:
        raise AudioError("empty", "the file has 0 bytes: copy or download it again")
    return int(size)
