"""From a recording to 4 s segments: decode, mix down, resample, clip, cut, measure.

Everything streams: peak memory does not depend on the length of the recording. soundfile
(libsndfile) reads WAV, FLAC, AIFF, Ogg, Opus and MP3; what it cannot open goes to PyAV (AAC and
M4A, ALAC, WMA, Matroska, ...), an optional extra. Both read through one Python file object, so any
file name works and no file can make a decoder open another file or the network.

Resampling is soxr "HQ" (20 bit, librosa's default), whose streaming output does not depend on the
size of the chunks it is fed; a recording already at the detector's rate passes bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import re
import stat
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any, BinaryIO, Literal

import numpy as np

from artifactnet_jax.config import FrontEnd, Verdict
from artifactnet_jax.results import printable

_SUFFIXES = (
    ".wav .wave .w64 .rf64 .flac .aif .aiff .aifc .au .snd .caf .ogg .oga .opus .mp2 .mp3 .m4a "
    ".m4b .mp4 .aac .ac3 .3gp .wma .ape .wv .tta .mka .webm"
)
SUFFIXES = frozenset(_SUFFIXES.split())  # what a folder is searched for; a named file may be any
BAND_LIMIT_HZ = 16_000.0  # "band-limited" below this cut-off
BAND_FLOOR = 1e-9  # the cut-off is the highest bin within 90 dB of the strongest
FULL_SCALE = 0.9999  # just below 32767 / 32768
CLIPPED = 1e-3  # "clipped" above this share of samples
MAX_CHANNELS = 64
RATES = (1_000, 768_000)  # Hz; a header outside is damaged or lying
SHORT_S = 0.1  # s; a recording may fall this much short of its declared length
_BLOCK_VALUES = 2**18  # samples over all channels in a decoded block, and at most one second

# FFmpeg demuxers worth having. Playlists (hls, concat), devices and generators are not.
_DEMUXERS = (
    "3gp,aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,iff,loas,matroska,mov,mp3,mp4,"
    "mpc,mpc8,mpeg,mpegts,ogg,oma,qoa,rm,tak,tta,voc,w64,wav,webm,wsd,wv,xwma"
)

Array = tuple[np.ndarray, int]  # samples [n] or [n, channels], sample rate in Hz
Source = str | bytes | os.PathLike[Any] | BinaryIO | Array
Segments = int | Literal["all", "first60"]


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


@dataclasses.dataclass(frozen=True)
class Segment:
    """Four seconds of mono audio at the detector's rate, with its level."""

    start_s: float  # seconds from the start of the recording
    samples: np.ndarray  # float32 [segment_samples] in [-1, 1], zero-padded at the end if short
    peak: float  # largest absolute sample
    rms: float  # root mean square in float32, padding included (the raw-song graph's weight)


@dataclasses.dataclass(frozen=True)
class AudioReport:
    """What was read. `warnings` holds codes, in this order, from what was actually decoded:

    "resampled" (the source has another rate), "short" (under one segment), "silent" (every segment
    at or below `Verdict.silence_peak`) or "silent-segments" (some of them), "clipped" (over 0.1 %
    of the samples lie at full scale with two more right before them), "band-limited" (cut-off under
    16 kHz) and "truncated" (a lossy file ends before its declared length).
    """

    duration_s: float  # of the source; see SegmentReader for "first60"
    sample_rate: int  # Hz, of the source
    channels: int  # of the source
    bandwidth_hz: float  # highest frequency within 90 dB of the strongest; 0 for digital silence
    warnings: tuple[str, ...]


class SegmentReader:
    """Iterates over the `Segment`s of one recording, in time order; `report` follows.

    `source` is a path, a seekable binary file object, or (samples, sample_rate) with samples [n] or
    [n, channels], float in [-1, 1] or integer PCM. `name` replaces the source in error messages.
    `segments` is the plan:

    - "all": consecutive segments. A tail under `verdict.min_tail_s` is dropped, a longer one
      zero-padded, and a recording shorter than a segment is one padded segment.
    - "first60": the same on the first `verdict.first_s` seconds. The duration comes from the header
      if that is exact (PCM, FLAC, Ogg), else the rest is decoded to count it.
    - N: evenly spaced starts from 0 to the last full segment, which overlap if they must. The
      source is decoded twice, once to count. One segment or less gives one padded segment.

    Iterating raises AudioError, possibly after some segments: discard those then. Each iteration
    reads the source anew. ValueError or TypeError: the arguments are not as described.
    """

    def __init__(
        self,
        source: Source,
        front_end: FrontEnd,
        verdict: Verdict,
        segments: Segments = "all",
        name: str | None = None,
    ):
        if isinstance(segments, bool) or not (
            (isinstance(segments, int) and segments >= 1) or segments in ("all", "first60")
        ):
            raise ValueError(f"segments is {segments!r}: use 'all', 'first60' or a number from 1")
        if isinstance(source, tuple):
            _check_array(*source)
        self._source, self._fe, self._verdict, self._plan = source, front_end, verdict, segments
        if name is None and isinstance(source, (str, bytes, os.PathLike)):
            name = os.fsdecode(source)
        elif name is None:
            name = getattr(source, "name", None)
        self._name = printable(name) if isinstance(name, str) else "<audio>"
        self._report: AudioReport | None = None

    @property
    def report(self) -> AudioReport:
        """Facts about the recording; RuntimeError before an iteration has reached its end."""
        if self._report is None:
            raise RuntimeError("the report is ready once every segment has been read")
        return self._report

    def __iter__(self) -> Iterator[Segment]:
        self._report = None
        try:
            yield from self._segments()
        except AudioError as error:
            raise AudioError(error.kind, f"{self._name}: {error}") from None

    def _segments(self) -> Iterator[Segment]:
        rate, size = self._fe.sample_rate, self._fe.segment_samples
        limit = round(self._verdict.first_s * rate) if self._plan == "first60" else None
        starts: Iterator[int] = itertools.count(0, size)
        if isinstance(self._plan, int):
            n = sum(map(len, self._decode(_Meter(), None)))
            evenly = np.linspace(0, n - size, self._plan).astype(np.int64)  # the runner's rule
            starts = iter(evenly.tolist() if n > size else [0])
        meter = _Meter()
        min_tail = round(self._verdict.min_tail_s * rate)
        for start, piece in _cut(self._decode(meter, limit), starts, size, min_tail):
            samples = np.zeros(size, np.float32)
            samples[: len(piece)] = piece
            peak = float(np.abs(samples).max())
            meter.segment(piece, peak <= self._verdict.silence_peak)
            rms = float(np.sqrt(np.mean(np.square(samples))))
            yield Segment(start / rate, samples, peak, rms)
        self._report = meter.report(rate, size)

    def _decode(self, meter: _Meter, limit: int | None) -> Iterator[np.ndarray]:
        """Mono float32 blocks at the detector's rate, `limit` samples at most; fills `meter`."""
        rate = self._fe.sample_rate
        with _open(self._source) as decoded:
            meter.rate, meter.channels = decoded.rate, decoded.channels
            for block in _resampled(meter.watch(decoded.blocks), decoded.rate, rate):
                block = np.clip(block, -1, 1)[: None if limit is None else limit - meter.out]
                meter.out += len(block)
                yield block
                if meter.out == limit:
                    if decoded.exact and decoded.frames is not None:
                        meter.frames = decoded.frames
                    else:
                        meter.frames += sum(map(len, decoded.blocks))
                    return
            if meter.frames == 0:
                raise AudioError("no-audio", "the audio has no samples: export it again")
            missing = (decoded.frames or 0) - meter.frames
            meter.truncated = missing > SHORT_S * meter.rate
            if meter.truncated and decoded.exact:
                text = f"{missing / meter.rate:.1f} s of the declared length cannot be decoded"
                raise AudioError("truncated", f"{text}: copy, download or export it again")


class _Meter:
    """Running figures of one pass: everything an AudioReport needs, in constant memory."""

    N_FFT = 2048
    FRAMES = 8  # spectra per segment

    def __init__(self) -> None:
        self.rate = self.channels = self.frames = 0  # of the source
        self.out = 0  # samples at the detector's rate
        self.truncated = False
        self._values = self._clipped = self._segments = self._silent = 0
        self._tail = np.zeros((0, 0), bool)  # last two rows: a run at full scale may span blocks
        self._power = np.zeros(self.N_FFT // 2 + 1)
        self._window = np.hanning(self.N_FFT + 1)[:-1].astype(np.float32)

    def watch(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass float32 blocks [frames, channels] through, counting; AudioError if not finite."""

        def bad(block: np.ndarray) -> int:
            return block.size - int(np.count_nonzero(np.isfinite(block)))

        for block in blocks:
            if count := bad(block):
                count += sum(map(bad, blocks))
                cure = "export it again from the program that made it"
                raise AudioError("non-finite", f"{count} samples are NaN or infinite: {cure}")
            full = np.abs(block) >= FULL_SCALE
            if full.shape[1] == self._tail.shape[1]:
                full = np.concatenate([self._tail, full])
            self._clipped += int(np.count_nonzero(full[2:] & full[1:-1] & full[:-2]))
            self._tail = full[-2:]
            self._values += block.size
            self.frames += len(block)
            yield block

    def segment(self, samples: np.ndarray, silent: bool) -> None:
        """Count a segment and add a few frames of its samples (unpadded) to the mean spectrum."""
        self._segments += 1
        self._silent += silent
        if len(samples) < self.N_FFT:
            samples = np.pad(samples, (0, self.N_FFT - len(samples)))
        starts = np.linspace(0, len(samples) - self.N_FFT, self.FRAMES).astype(np.int64)
        frames = samples[starts[:, None] + np.arange(self.N_FFT)] * self._window
        self._power += np.square(np.abs(np.fft.rfft(frames))).sum(axis=0, dtype=np.float64)

    def report(self, rate: int, size: int) -> AudioReport:
        self._power[:2] = 0  # an offset is not content
        heard = np.flatnonzero(self._power > BAND_FLOOR * self._power.max())
        bandwidth = float(heard[-1]) * rate / self.N_FFT if len(heard) else 0.0
        codes = {
            "resampled": self.rate != rate,
            "short": self.out < size,
            "silent": self._silent == self._segments,
            "silent-segments": 0 < self._silent < self._segments,
            "clipped": self._clipped > CLIPPED * self._values,
            "band-limited": 0 < bandwidth < BAND_LIMIT_HZ,
            "truncated": self.truncated,
        }
        warnings = tuple(code for code, present in codes.items() if present)
        seconds = self.frames / self.rate
        return AudioReport(seconds, self.rate, self.channels, bandwidth, warnings)


# --- From blocks to segments ----------------------------------------------------------------------


def _resampled(blocks: Iterator[np.ndarray], rate: int, target: int) -> Iterator[np.ndarray]:
    """float32 blocks [frames, channels] at `rate` -> mono float32 blocks at `target`."""
    stream = None
    if rate != target:
        import soxr

        stream = soxr.ResampleStream(rate, target, 1, "float32", "HQ")
    for block in blocks:
        mono = _mono(block)
        if stream is not None:  # the filter overflows near the largest float32; music is not there
            mono = stream.resample_chunk(np.clip(mono, -1e6, 1e6))
        yield mono
    if stream is not None:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _mono(block: np.ndarray) -> np.ndarray:
    """Mean over channels, summed in float64 and channel order so that it is exact and repeats."""
    if block.shape[1] == 1:
        return np.ascontiguousarray(block[:, 0])
    total = block[:, 0].astype(np.float64)
    for channel in range(1, block.shape[1]):
        total += block[:, channel]
    return (total / block.shape[1]).astype(np.float32)


def _cut(
    blocks: Iterator[np.ndarray], starts: Iterator[int], size: int, min_tail: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, samples) for each start, ascending; the last piece may be shorter than `size`."""
    buffer, offset = np.zeros(0, np.float32), 0  # buffer[0] is the sample at `offset`
    start: int | None = next(starts)
    uncut = True
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while start is not None and start + size <= offset + len(buffer):
            yield start, buffer[start - offset : start - offset + size]
            start, uncut = next(starts, None), False
        # Without another start the blocks are read on all the same: the report covers them.
        drop = len(buffer) if start is None else min(start - offset, len(buffer))
        buffer, offset = buffer[drop:], offset + drop
    if start == offset and len(buffer) and (uncut or len(buffer) >= min_tail):
        yield start, buffer


# --- Decoders -------------------------------------------------------------------------------------


Blocks = Generator[np.ndarray, None, None]  # float32 [frames, channels], none of them empty


@dataclasses.dataclass(frozen=True)
class _Decoded:
    rate: int  # Hz
    channels: int
    blocks: Blocks
    frames: int | None = None  # declared length, if the format declares one
    exact: bool = True  # whether that length can be relied upon


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
def _open(source: Source) -> Iterator[_Decoded]:
    """Start decoding a source; the end of the context closes everything."""
    stream = None
    with contextlib.ExitStack() as stack:
        if isinstance(source, tuple):
            decoded = _decode_array(*source)
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
            stream = _Stream(source)
            decoded = _decode_soundfile(stream) or _decode_pyav(stream)
        for kind, value, low, high in (
            ("sample-rate", decoded.rate, *RATES),
            ("channels", decoded.channels, 1, MAX_CHANNELS),
        ):
            if not low <= value <= high:
                cure = "damaged header?" if stream else "is it [channels, n]? transpose it"
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
        if _audio_in(os.fsdecode(path), recursive=False):
            raise AudioError("is-directory", "a folder, not a file: name the files in it")
        deeper = _audio_in(os.fsdecode(path), recursive=True)
        cure = "pass -r to search its subfolders too" if deeper else "name a file or another folder"
        raise AudioError("no-audio", f"the folder holds no audio file: {cure}")
    if not stat.S_ISREG(mode):
        text = "not a regular file: pipe it to standard input, or save it first"
        raise AudioError("unsupported", text)


def _check_array(samples: np.ndarray, rate: int) -> None:
    """TypeError or ValueError unless the arguments are samples [n] or [n, channels] and a rate."""
    kind = getattr(samples, "dtype", np.dtype(object))
    if not (kind.kind == "f" or kind in (np.uint8, np.int16, np.int32)):
        raise TypeError(f"samples are {kind}: use float, int16, int32 or uint8")
    if samples.ndim not in (1, 2):
        raise ValueError(f"samples have shape {samples.shape}: use [n] or [n, channels]")
    if isinstance(rate, bool) or int(rate) != rate:
        raise TypeError(f"sample rate is {rate!r}: use a whole number of Hz")


def _decode_array(samples: np.ndarray, rate: int) -> _Decoded:
    """Samples [n] or [n, channels] in memory, in blocks."""
    samples = samples[:, None] if samples.ndim == 1 else samples
    size = _block_frames(rate, samples.shape[1])
    blocks = (_to_float(samples[i : i + size]) for i in range(0, len(samples), size))
    return _Decoded(int(rate), samples.shape[1], blocks, len(samples))


def _block_frames(rate: int, channels: int) -> int:
    """Frames per block: one second, less where a header claims much."""
    return max(1, min(rate, _BLOCK_VALUES // channels))


def _to_float(pcm: np.ndarray) -> np.ndarray:
    """Integer PCM or float of any width -> float32, full scale 1, as libsndfile scales."""
    if pcm.dtype.kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite: non-finite
            return pcm.astype(np.float32)
    if pcm.dtype == np.uint8:
        return (pcm.astype(np.float32) - 128) / np.float32(128)
    return pcm.astype(np.float32) / np.float32(2.0 ** (8 * pcm.dtype.itemsize - 1))


def _decode_soundfile(stream: _Stream) -> _Decoded | None:
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

    return _Decoded(file.samplerate, file.channels, blocks(), frames, file.format != "MP3")


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


def _decode_pyav(stream: _Stream) -> _Decoded:
    """Decode with FFmpeg what libsndfile could not open.

    FFmpeg drops the encoder's delay where the container states it; some padding may remain.
    """
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
    track = container.streams.audio[0]

    def decode() -> Generator[Any, None, None]:
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

    frames = decode()
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
    return _Decoded(rate, channels, blocks(), declared, exact=False)


def _from_frame(frame: Any) -> np.ndarray:
    """An FFmpeg audio frame, planar or packed, -> float32 [frames, channels]."""
    pcm = frame.to_ndarray()
    planar = frame.format.is_planar
    return _to_float(pcm.T if planar else pcm.reshape(-1, frame.layout.nb_channels))


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
        self._pointer: ctypes.c_void_p | None = None
        self._null: int | None = None
        self._saved: int | None = None
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            libc = ctypes.CDLL(None)
            pointer = ctypes.c_void_p.in_dll(libc, "stderr")
            libc.fopen.restype = ctypes.c_void_p
            self._null = libc.fopen(os.devnull.encode(), b"w")
            self._pointer = pointer if self._null else None

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._pointer is not None and self._depth == 1:
                self._saved, self._pointer.value = self._pointer.value, self._null

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._pointer is not None and self._depth == 0:
                self._pointer.value = self._saved


_quiet = _Quiet()


# --- Names ----------------------------------------------------------------------------------------


def find_audio(paths: Iterable[str | bytes | os.PathLike[Any]], recursive: bool) -> list[str]:
    """Expand the arguments of a command line to recordings, in order, each path once.

    A file is taken whatever its suffix, and so is a path that does not exist: reading it gives the
    error. A folder gives its files with a suffix in `SUFFIXES`, sorted, and with `recursive` those
    of its subfolders; hidden names and links to folders are skipped; without any such file, the
    folder itself is the entry. `@list.txt` gives the paths in that UTF-8 file, one per line, blank
    lines and lines that start with # skipped, relative to the current folder. "-" stays.

    Names that are not UTF-8 come back in Python's surrogate form, which `open` understands.
    ValueError: a list file cannot be read.
    """
    found: dict[str, None] = {}
    for path in map(os.fsdecode, paths):
        for entry in _listed(path[1:]) if path.startswith("@") else [path]:
            if entry != "-" and os.path.isdir(entry):
                found.update(dict.fromkeys(_audio_in(entry, recursive) or [entry]))
            else:
                found[entry] = None
    return list(found)


def _listed(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.rstrip("\n") for line in file]
    except OSError as error:
        raise ValueError(f"list file {printable(path)}: {error.strerror}") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _audio_in(folder: str, recursive: bool) -> list[str]:
    """Audio files in a folder, sorted, and subfolders that cannot be listed (to fail later)."""
    found: list[str] = []
    walk = os.walk(folder, onerror=lambda error: found.append(os.fsdecode(error.filename)))
    for root, folders, files in walk:
        folders[:] = sorted(f for f in folders if recursive and not f.startswith("."))
        found += [
            os.path.join(root, file)
            for file in sorted(files)
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES
        ]
    return found
