"""The second reader: FFmpeg, by PyAV, an optional extra. It reads what libsndfile does not.

AAC and M4A, ALAC, WMA, Matroska, AC-3 and others. No file can make it open another file or the
network.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Generator
from typing import Any

import numpy as np

from artifactnet_jax.files import FORMATS
from artifactnet_jax.recording import (
    AtRate,
    AudioError,
    Blocks,
    Decoded,
    Flaws,
    Stream,
    block_frames,
    detail,
    to_float,
)

_GAP_S = 0.03  # s; times of containers are rounded
_FEW = 2**10  # bytes that may belong to no packet
_RAW = {"ac3", "eac3", "dts", "mlp", "truehd"}  # nothing but packets: what is not in one is lost
_JUMP_S = 10.0  # s; more in a broadcast is another programme, not a hole
# Containers whose header states how long a track is; others are estimates.
_STATING = {"mov", "mp4", "tta", "ape", "wv", "tak", "mpc", "mpc8", "dsf", "iff", "w64", "caf"}
_STATING |= {"aiff", "au", "wav", "flac", "xwma", "avi", "asf"}


def decode(stream: Stream, flaws: Flaws) -> Decoded:
    """Decode with FFmpeg what libsndfile could not open.

    FFmpeg drops the encoder's delay where the container states it; some padding may remain. What
    is damaged is left out, and counted in `flaws` by the times that the container gives.

    Raises:
        AudioError: it cannot be opened, or the extra is missing.
    """
    container, track, which = _open(stream, flaws)
    codec = track.codec_context.codec
    lossless = codec.lossless and (not codec.lossy or codec.name == "wavpack")
    frames = _frames(stream, container, track, flaws)
    first = next(frames, None)  # the container's own word on rate and channels may be wrong
    if first is None:
        if flaws.lost_s:
            text = "damaged, none of it can be decoded: copy, download or export it again"
            raise AudioError("decode", text)
        raise AudioError("no-audio", "the audio has no samples: export it again")
    rate, channels = first.sample_rate, first.layout.nb_channels

    def blocks() -> Blocks:
        at_rate = AtRate(rate)
        now, pending = rate, [_from_frame(first)]
        with contextlib.closing(frames):
            for frame in frames:
                pcm = _from_frame(frame)
                # Broadcasts change their channels midway: the mean over them absorbs it.
                changed = frame.sample_rate != now or pcm.shape[1] != pending[0].shape[1]
                full = sum(map(len, pending)) >= block_frames(now, pcm.shape[1])
                if changed or full:
                    yield from at_rate(np.concatenate(pending), now)
                    pending.clear()
                now = frame.sample_rate
                pending.append(pcm)
        yield from at_rate(np.concatenate(pending), now)
        yield from at_rate.end()

    declared = _declared(container, track)
    frames_declared = None if declared is None else int(declared * rate)
    return Decoded(
        rate,
        channels,
        blocks(),
        frames_declared,
        exact=False,
        lossless=lossless,
        track=which,
        flaws=flaws,
    )


def _declared(container: Any, track: Any) -> float | None:
    """Seconds that the header states for a track; None where it does not."""
    names = set(container.format.name.split(","))
    alone = len(container.streams) == 1
    if names & _STATING and track.duration and track.time_base:
        return float(track.duration * track.time_base)
    if "matroska" in names and (text := track.metadata.get("DURATION")):
        with contextlib.suppress(ValueError):
            hours, minutes, seconds = text.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if names & {"matroska", "asf", "flv"} and alone and container.duration:
        return float(container.duration / 1e6)
    return None


def _open(stream: Stream, flaws: Flaws) -> tuple[Any, Any, str | None]:
    """PyAV's container of a stream, its audio track, and which of several that is."""
    reason = detail(stream.refusal)
    try:
        import av
    except ImportError:
        text = "libsndfile cannot read it; AAC, M4A, WMA, Matroska and others need PyAV"
        cure = 'pip install "artifactnet-jax[av]"'
        raise AudioError("missing-extra", f"{text}: {cure} ({reason})") from None
    boxes = Boxes(stream)
    if boxes.broken:
        flaws.missing_s = math.inf
    if boxes.cut:
        text = "its index (moov) is missing: the recording or the download broke off"
        cure = "download it again; a recording can be repaired with its recorder, or untrunc"
        raise AudioError("truncated", f"{text}: {cure}")
    # PyAV prints nothing of FFmpeg's log unless it is told to. No protocol: a file cannot refer to
    # another file or to the network.
    options = {"protocol_whitelist": "none", "format_whitelist": ",".join(FORMATS)}
    stream.seek(0)
    try:
        container = av.open(stream, "r", container_options=options, metadata_errors="replace")
    except Exception as error:  # a dozen classes, others from damaged metadata
        if stream.error or getattr(stream.refusal, "code", 1) != 1:  # 1: format not recognised
            raise stream.failure(stream.refusal or error) from None
        text = f"not audio in a known format ({reason}): check what it is, or convert it"
        raise AudioError("unsupported", text) from None
    tracks = container.streams.audio
    try:
        if not tracks:
            raise AudioError("no-audio", "the file holds no audio track: name another file")
        readable = [t for t in tracks if t.index not in boxes.encrypted and not _locked(t)]
        if not readable:
            text = "the track is encrypted (DRM): only a copy without it can be scored"
            raise AudioError("encrypted", text)
        known = [t for t in readable if t.codec_context is not None]
        if not known:
            text = "FFmpeg has no decoder for its audio: convert it to WAV or FLAC"
            raise AudioError("unsupported", text)
    except AudioError:
        container.close()
        raise
    track = max(known, key=lambda each: _worth(container, each))
    count = len(tracks)
    which = f"{list(tracks).index(track) + 1} of {count}" if count > 1 else None
    return container, track, which


def _locked(track: Any) -> bool:
    """Whether a track says that it is encrypted, as in Matroska, or Audible's."""
    tag = getattr(track.codec_context, "codec_tag", "") if track.codec_context else ""
    return tag in ("enca", "drms", "aavd") or "enc_key_id" in track.metadata


def _worth(container: Any, track: Any) -> tuple[float, ...]:
    """What makes the track of several: the default one, else the fullest, else the first."""
    import av

    flags = av.stream.Disposition
    aside = flags.comment | flags.hearing_impaired | flags.visual_impaired
    return (
        bool(track.disposition & flags.default),
        not track.disposition & aside,
        round(_declared(container, track) or 0.0),
        track.codec_context.channels,
        track.bit_rate or 0,
        -track.index,
    )


def _frames(stream: Stream, container: Any, track: Any, flaws: Flaws) -> Generator[Any, None, None]:
    """FFmpeg's frames of a track that hold samples; their end closes the container."""
    import av

    clock = _Clock("mpegts" in container.format.name or "mpeg" in container.format.name, flaws)
    taken, heard = 0, 0.0  # bytes, s
    with container:
        track.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        packets = container.demux(track)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                if stream.error:
                    raise stream.failure(error) from None
                flaws.missing_s = float("inf")  # the container itself breaks off
                packet = None
            except Exception as error:
                raise stream.failure(error) from None
            if stream.error:
                raise stream.failure(stream.error)
            if packet is None:
                rest = stream.size - taken
                if container.format.name in _RAW and rest > _FEW and not flaws.lost_s:
                    flaws.lost_s += heard * rest / max(1, taken)
                return
            taken += packet.size
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                if isinstance(error, (av.error.MemoryError, MemoryError)):
                    raise
                clock.failed(packet)
                continue
            for frame in frames:
                if frame.samples:
                    clock.heard(frame)
                    heard += frame.samples / frame.sample_rate
                    yield frame


class _Clock:
    """Counts what is lost: failed packets, and gaps between the times of frames."""

    def __init__(self, jumps: bool, flaws: Flaws):
        self._jumps, self._flaws = jumps, flaws
        self._next: float | None = None  # s
        self._tick = 0.0  # s
        self._bad = 0.0  # s of packets that failed since the last frame
        self._drift = 0.0

    def failed(self, packet: Any) -> None:
        """A packet cannot be decoded."""
        seconds = float(packet.duration * packet.time_base) if packet.duration else 0.0
        seconds = seconds or 0.02
        self._bad += seconds
        self._flaws.lost_s += seconds

    def heard(self, frame: Any) -> None:
        """A frame has come."""
        pts = frame.pts
        self._tick = self._tick or float(frame.time_base or 0)
        if pts is None or not self._tick:
            self._next = None
            return
        time = pts * self._tick
        if self._next is not None:
            self._drift += time - self._next
            if self._drift < -_GAP_S or (self._jumps and self._drift > _JUMP_S):
                self._drift = 0.0
            elif self._drift > _GAP_S:
                self._flaws.lost_s += max(0.0, self._drift - self._bad)
                self._drift = 0.0
        self._bad = 0.0
        self._next = time + frame.samples / frame.sample_rate


class Boxes:
    """What the boxes of an MP4 or QuickTime file say that FFmpeg does not."""

    _INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
    _LOCKED = (b"enca", b"drms", b"aavd", b"drmi")

    def __init__(self, stream: Stream):
        self.cut = False  # it has no index
        self.broken = False  # it is in fragments, and what stands behind some is none
        self.encrypted: set[int] = set()  # numbers of the tracks
        self._track = -1
        head = self._at(stream, 0, 12)
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return
        names, end = self._walk(stream, 0, stream.size)
        self.broken = b"moof" in names and end + 8 <= stream.size
        self.cut = b"moov" not in names and b"moof" not in names and b"mdat" in names

    def _at(self, stream: Stream, at: int, size: int) -> bytes:
        stream.seek(at)
        return stream.read(size)

    def _walk(self, stream: Stream, at: int, end: int) -> tuple[list[bytes], int]:
        """Names of the boxes in [at, end), and where the last of them ends."""
        names: list[bytes] = []
        while at + 8 <= end and len(names) < 100_000:
            head = self._at(stream, at, 16)
            size, name = struct.unpack(">I4s", head[:8])
            inner = 8
            if size == 1 and len(head) == 16:
                size, inner = struct.unpack(">Q", head[8:])[0], 16
            elif size == 0:
                size = end - at
            if name == bytes(4):  # padding
                return names, end
            if size < inner or not name.isalnum():
                break
            names.append(name)
            if name == b"trak":
                self._track += 1
            if name in self._INSIDE:
                self._walk(stream, at + inner, min(end, at + size))
            elif name == b"stsd" and self._at(stream, at + inner + 12, 4) in self._LOCKED:
                self.encrypted.add(self._track)
            at += size
        return names, at


def _from_frame(frame: Any) -> np.ndarray:
    """An FFmpeg audio frame, planar or packed, -> float32 [frames, channels]."""
    pcm = frame.to_ndarray()
    planar = frame.format.is_planar
    return to_float(pcm.T if planar else pcm.reshape(-1, frame.layout.nb_channels))
