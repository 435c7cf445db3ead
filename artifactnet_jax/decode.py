"""Decoders: any recording -> blocks of float32 [frames, channels], in constant memory.

soundfile (libsndfile) reads WAV, FLAC, AIFF, Ogg, Opus and MP3; what it cannot open goes to PyAV
(AAC and M4A, ALAC, WMA, Matroska, ...), an optional extra. Both read through one Python file
object, so any file name works and no file can make a decoder open another file or the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

import numpy as np

from artifactnet_jax.files import audio_in
from artifactnet_jax.tags import notices
from artifactnet_jax.text import printable

MAX_CHANNELS = 64
RATES = (1_000, 768_000)  # Hz; a header outside is damaged or lying
_BLOCK_VALUES = 2**18  # samples over all channels in a decoded block, and at most one second

# FFmpeg demuxers worth having. Playlists (hls, concat), devices and generators are not.
_DEMUXERS = (
    "3gp,aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,iff,loas,matroska,mov,mp3,mp4,"
    "mpc,mpc8,mpeg,mpegts,ogg,oma,qoa,rm,tak,tta,voc,w64,wav,webm,wsd,wv,xwma"
)

Array = tuple[np.ndarray, int]  # samples [n] or [n, channels], sample rate in Hz


class AudioError(Exception):
    """A recording that cannot be scored. The message is one line: which, why, and the cure.

    `kind` is for machines: not-found, broken-link, permission, is-directory, read, empty, no-audio,
    unsupported, decode, truncated, non-finite, sample-rate, channels or missing-extra.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


Blocks = Generator[np.ndarray, None, None]  # float32 [frames, channels], none of them empty


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A recording that is being decoded."""

    rate: int  # Hz
    channels: int
    blocks: Blocks
    frames: int | None = None  # declared length, if the format declares one
    exact: bool = True  # whether that length can be relied upon
    notices: tuple[str, ...] = ()  # what the file says of itself, as of `tags.notices`


Opener = Callable[[], contextlib.AbstractContextManager[Decoded]]  # decodes by itself; AudioError
Source = str | bytes | os.PathLike[Any] | BinaryIO | Array | Opener


class _Stream:
    """A binary file as the decoders see it. No exception may cross their C code: it is kept.

    It has neither name nor descriptor, so nothing can be opened relative to it.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: Exception | None = None  # of the file itself
        self.refusal: Exception | None = None  # of libsndfile, to open it
        self.at_end = False  # the last read came to the end of the file

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (OSError, ValueError) as error:
            self.error, data = error, b""
        self.at_end = len(data) < size
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):  # a damaged header points outside the file
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def failure(self, error: Exception) -> AudioError:
        """What a decoder raised midway, as an AudioError."""
        if self.error:
            return AudioError("read", f"reading failed ({_detail(self.error)}): check the disk")
        why = f"({_detail(error)}): copy, download or export it again"
        if self.at_end:
            return AudioError("truncated", f"cut off, or damaged near its end {why}")
        return AudioError("decode", f"damaged, cannot be decoded {why}")


@contextlib.contextmanager
def open_audio(source: Source) -> Iterator[Decoded]:
    """Start decoding a source; the end of the context closes everything.

    A source that is called gives the context itself, with decoded audio.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, tuple):
            decoded = _decode_array(*source)
        elif callable(source):
            decoded = stack.enter_context(source())
        else:
            if isinstance(source, (str, bytes, os.PathLike)):
                _check_path(source)
                try:
                    source = stack.enter_context(open(source, "rb"))
                except PermissionError:
                    text = "no permission to read it: change its mode or owner"
                    raise AudioError("permission", text) from None
                except OSError as error:
                    raise AudioError("read", f"cannot be opened: {_detail(error)}") from None
            try:
                size = source.seek(0, os.SEEK_END)
                source.seek(0)
            except (OSError, ValueError, AttributeError):
                text = "not a seekable binary file: read it into io.BytesIO first"
                raise AudioError("unsupported", text) from None
            if size == 0:
                raise AudioError("empty", "the file has 0 bytes: copy or download it again")
            said, stream = notices(source), _Stream(source)
            decoded = _decode_soundfile(stream) or _decode_pyav(stream)
            decoded = dataclasses.replace(decoded, notices=said)
        for kind, value, low, high in (
            ("sample-rate", decoded.rate, *RATES),
            ("channels", decoded.channels, 1, MAX_CHANNELS),
        ):
            if not low <= value <= high:
                array = isinstance(source, tuple)
                cure = "is it [channels, n]? transpose it" if array else "damaged header?"
                text = f"{kind} {value} is outside {low} to {high}: {cure}"
                raise AudioError(kind, text)
        stack.callback(decoded.blocks.close)
        yield decoded


def _check_path(path: str | bytes | os.PathLike[Any]) -> None:
    """AudioError unless `path` is a regular file; nothing is opened (a pipe would block)."""
    try:
        mode = os.stat(path).st_mode
    except PermissionError:
        text = "no permission to enter its folder: change its mode or owner"
        raise AudioError("permission", text) from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        try:
            target = os.readlink(os.fsdecode(path))
        except (OSError, ValueError):
            raise AudioError("not-found", "no such file: check the path") from None
        text = f"a symbolic link to {printable(target)}, which does not exist: restore that"
        raise AudioError("broken-link", text) from None
    if stat.S_ISDIR(mode):
        if audio_in(os.fsdecode(path), recursive=False):
            raise AudioError("is-directory", "a folder, not a file: name the files in it")
        deeper = audio_in(os.fsdecode(path), recursive=True)
        cure = "pass -r to search its subfolders too" if deeper else "name a file or another folder"
        raise AudioError("no-audio", f"the folder holds no audio file: {cure}")
    if not stat.S_ISREG(mode):
        text = "not a regular file: pipe it to standard input, or save it first"
        raise AudioError("unsupported", text)


def check_array(samples: np.ndarray, rate: int) -> None:
    """TypeError or ValueError unless the arguments are samples [n] or [n, channels] and a rate."""
    kind = getattr(samples, "dtype", np.dtype(object))
    if not (kind.kind == "f" or kind in (np.uint8, np.int16, np.int32)):
        raise TypeError(f"samples are {kind}: use float, int16, int32 or uint8")
    if samples.ndim not in (1, 2):
        raise ValueError(f"samples have shape {samples.shape}: use [n] or [n, channels]")
    if isinstance(rate, bool) or int(rate) != rate:
        raise TypeError(f"sample rate is {rate!r}: use a whole number of Hz")


def _decode_array(samples: np.ndarray, rate: int) -> Decoded:
    """Samples [n] or [n, channels] in memory, in blocks."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    size = _block_frames(rate, samples.shape[1])
    blocks = (to_float(samples[i : i + size]) for i in range(0, len(samples), size))
    return Decoded(int(rate), samples.shape[1], blocks, len(samples))


def _block_frames(rate: int, channels: int) -> int:
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


def _decode_soundfile(stream: _Stream) -> Decoded | None:
    """Decode with libsndfile; None if it cannot open the file.

    MP3: mpg123 drops the encoder's delay and padding where a LAME tag states them.
    """
    import soundfile

    try:
        with _quiet:
            file = soundfile.SoundFile(stream)
    except soundfile.SoundFileError as error:
        stream.refusal = error
        return None
    # soundfile would seek after every read, which costs time and restarts lossy decoders.
    file.seekable = lambda: False
    frames: int | None = file.frames if file.frames < 2**62 else None  # unknown: FLAC from a pipe
    # libsndfile reads what is there of a truncated WAV or AIFF, and only its log tells.
    sizes = re.search(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", file.extra_info, re.M)
    if file.format == "MP3":
        # Without a Xing tag the length is a guess; with one it is what the encoder wrote, which
        # cutting tools do not update: hence not exact, and never an error.
        frames = file.frames if _has_xing_tag(stream) else None
    elif sizes and frames:
        declared, present = map(int, sizes.groups())
        if declared < 2**31 - 2**16 and present:  # about 2 or 4 GiB: written to a pipe, unknown
            frames = frames * declared // present

    def blocks() -> Blocks:
        size = _block_frames(file.samplerate, file.channels)
        with file:
            while True:
                try:
                    with _quiet:
                        block = file.read(size, dtype="float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    raise stream.failure(error) from None
                if stream.error:
                    raise stream.failure(stream.error)
                if not len(block):
                    return
                yield block

    return Decoded(file.samplerate, file.channels, blocks(), frames, file.format != "MP3")


def _has_xing_tag(stream: _Stream) -> bool:
    """Whether the first MP3 frame is an encoder's Xing or Info tag; keeps the position."""
    position = stream.tell()
    stream.seek(0)
    head = stream.read(10)
    if head[:3] == b"ID3" and len(head) == 10:  # its size is four groups of seven bits
        stream.seek(10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:])))
    head = stream.read(256)
    stream.seek(position)
    return b"Xing" in head or b"Info" in head


def _decode_pyav(stream: _Stream) -> Decoded:
    """Decode with FFmpeg what libsndfile could not open.

    FFmpeg drops the encoder's delay where the container states it; some padding may remain.
    """
    container, track = _open_container(stream)
    frames = _frames(stream, container, track)
    first = next(frames, None)  # the container's own word on rate and channels may be wrong
    if first is None:
        raise AudioError("no-audio", "the audio has no samples: export it again")
    rate, channels = first.sample_rate, first.layout.nb_channels

    def blocks() -> Blocks:
        size, pending = _block_frames(rate, channels), [_from_frame(first)]
        with contextlib.closing(frames):
            for frame in frames:
                if frame.sample_rate != rate:
                    text = f"the rate changes from {rate} to {frame.sample_rate} Hz midway"
                    raise AudioError("decode", f"{text}: convert it to WAV or FLAC")
                pcm = _from_frame(frame)
                # Broadcasts change their channels midway: the mean over them absorbs it.
                changed = pcm.shape[1] != pending[0].shape[1]
                if changed or sum(map(len, pending)) >= size:
                    yield np.concatenate(pending)
                    pending.clear()
                pending.append(pcm)
        yield np.concatenate(pending)

    declared = None
    if "mp4" in container.format.name and track.duration and track.time_base:
        declared = int(track.duration * track.time_base * rate)
    return Decoded(rate, channels, blocks(), declared, exact=False)


def _open_container(stream: _Stream) -> tuple[Any, Any]:
    """PyAV's container of a stream, and its first audio track."""
    reason = _detail(stream.refusal)
    try:
        import av
    except ImportError:
        text = "libsndfile cannot read it; AAC, M4A, WMA, Matroska and others need PyAV"
        cure = 'pip install "artifactnet-jax[av]"'
        raise AudioError("missing-extra", f"{text}: {cure} ({reason})") from None
    # PyAV prints nothing of FFmpeg's log unless it is told to. No protocol: a file cannot refer to
    # another file or to the network.
    options = {"protocol_whitelist": "none", "format_whitelist": _DEMUXERS}
    stream.seek(0)
    try:
        container = av.open(stream, "r", container_options=options, metadata_errors="replace")
    except Exception as error:  # a dozen classes, others from damaged metadata
        if stream.error or getattr(stream.refusal, "code", 1) != 1:  # 1: format not recognised
            raise stream.failure(stream.refusal or error) from None
        text = f"not audio in a known format ({reason}): check what it is, or convert it"
        raise AudioError("unsupported", text) from None
    if not container.streams.audio:
        container.close()
        raise AudioError("no-audio", "the file holds no audio track: name another file")
    return container, container.streams.audio[0]


def _frames(stream: _Stream, container: Any, track: Any) -> Generator[Any, None, None]:
    """FFmpeg's frames of a track that hold samples; their end closes the container."""
    with container:
        frames = container.decode(track)
        while True:
            try:
                frame = next(frames, None)
            except Exception as error:
                raise stream.failure(error) from None
            if frame is None:
                return
            if frame.samples:
                yield frame


def _from_frame(frame: Any) -> np.ndarray:
    """An FFmpeg audio frame, planar or packed, -> float32 [frames, channels]."""
    pcm = frame.to_ndarray()
    planar = frame.format.is_planar
    return to_float(pcm.T if planar else pcm.reshape(-1, frame.layout.nb_channels))


def _detail(error: Exception | None) -> str:
    """A decoder's own words in one line."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return printable(text).strip().rstrip(".") or type(error).__name__


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
