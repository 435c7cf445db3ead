"""The first reader: libsndfile, by soundfile. WAV, FLAC, AIFF, CAF, Ogg, Opus, MP3 and others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

from artifactnet_jax.recording import AudioError, Blocks, Decoded, Flaws, Stream, block_frames

_LOSSLESS = ("PCM_", "FLOAT", "DOUBLE", "ALAC", "DPCM", "DWVW")


def decode(stream: Stream, flaws: Flaws, looked: bool = True) -> Decoded | None:
    """Decode with libsndfile; None if it cannot open the file.

    `looked`: whether the frames of MPEG audio were found to follow one another.

    MP3: mpg123 drops the encoder's delay and padding where a LAME tag states them. Where a lossy
    file cannot be read on, the rest counts as lost in `flaws`.
    """
    import soundfile

    try:
        with _quiet:
            file = soundfile.SoundFile(stream)
    except soundfile.SoundFileError as error:
        stream.refusal = error
        return None
    if file.format == "MP3" and not looked and not _free(stream):
        text = "damaged: its frames do not follow one another, as in a copy made as text"
        raise AudioError("decode", f"{text}: copy, download or export it again")
    # soundfile would seek after every read, which costs time and restarts lossy decoders.
    file.seekable = lambda: False
    exact = file.format != "MP3"  # there it is what an encoder wrote, or a guess
    frames = file.frames if exact and file.frames < 2**62 else None  # unknown: FLAC from a pipe
    lossless = file.format == "FLAC" or file.subtype.startswith(_LOSSLESS)

    def blocks() -> Blocks:
        size, done = block_frames(file.samplerate, file.channels), 0
        with file:
            while True:
                try:
                    with _quiet:
                        block = file.read(size, dtype="float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    if lossless or stream.error or not done:
                        raise stream.failure(error) from None
                    flaws.lost_s += _rest(stream, done / file.samplerate)
                    return
                if stream.error:
                    raise stream.failure(stream.error)
                if not len(block):
                    return
                done += len(block)
                yield block

    return Decoded(file.samplerate, file.channels, blocks(), frames, exact, lossless, flaws=flaws)


def _free(stream: Stream) -> bool:
    """Whether it is MPEG audio of a free bit rate, whose frames do not say their size."""
    position = stream.seek(stream.position)
    stream.seek(0)
    head = stream.read(4)
    stream.seek(position)
    return len(head) == 4 and head[0] == 255 and head[2] >> 4 == 0


def _rest(stream: Stream, seconds: float) -> float:
    """Seconds behind the position, by those before it."""
    return seconds * (stream.size - stream.position) / max(1, stream.position)


class _Quiet:
    """Context in which C's `stderr` goes nowhere: mpg123 prints there and libsndfile lets it.

    Only the C library's FILE pointer is swapped, for the milliseconds of a read: Python's
    sys.stderr and descriptor 2 stay, so no thread loses Python output. Outside glibc, where there
    is no such symbol, it does nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0  # threads inside
        self._null: int | None = None  # a FILE on /dev/null, opened at first use; 0: no such symbol
        self._pointer: ctypes.c_void_p
        self._saved: int | None = None

    def _prepare(self) -> None:
        self._null = 0
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            libc = ctypes.CDLL(None)
            self._pointer = ctypes.c_void_p.in_dll(libc, "stderr")
            libc.fopen.restype = ctypes.c_void_p
            self._null = libc.fopen(os.devnull.encode(), b"w") or 0

    def __enter__(self) -> None:
        with self._lock:
            if self._null is None:
                self._prepare()
            self._depth += 1
            if self._null and self._depth == 1:
                self._saved, self._pointer.value = self._pointer.value, self._null

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._null and self._depth == 0:
                self._pointer.value = self._saved


_quiet = _Quiet()
