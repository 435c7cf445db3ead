"""From a recording to 4 s segments: decode, mix down, resample, clip, cut, measure.

Everything streams: peak memory does not depend on the length of the recording. Resampling is soxr
"HQ" (20 bit, librosa's default), whose streaming output does not depend on the size of the chunks
it is fed; a recording already at the detector's rate passes bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from artifactnet_jax.arrays import LOUD, checked, count_of
from artifactnet_jax.config import Decision, FrontEnd
from artifactnet_jax.decode import Source, open_audio
from artifactnet_jax.fingerprint import RATE, Accumulator
from artifactnet_jax.recording import SHORT_S, AudioError, Decoded
from artifactnet_jax.text import printable

BAND_LIMIT_HZ = 16_000.0  # "band-limited" below this cut-off
BAND_FLOOR = 1e-9  # the cut-off is the highest bin within 90 dB of the strongest
FULL_SCALE = 0.9999  # just below 32767 / 32768
MANY = 64  # evenly spaced segments; further ones only as far apart as `Decision.least_hop_s`
CLIPPED = 1e-3  # "clipped" above this share of samples
CANCELLED = 0.01  # "phase" where the mix has less than this share of the difference's energy

Segments = int | Literal["all", "first60"]


def check_plan(segments: Any) -> Segments:
    """A plan of segments, a count as an int: see `SegmentReader`. ValueError if it is none."""
    if isinstance(segments, str) and segments in ("all", "first60"):
        return segments  # type: ignore[return-value]
    count = count_of(segments)
    if count < 1:
        raise ValueError(f"segments {segments!r} is not 'all', 'first60' or a count above 0")
    return count


@dataclasses.dataclass(frozen=True)
class Segment:
    """Four seconds of mono audio at the detector's rate, with its level."""

    start_s: float  # seconds from the start of the recording
    samples: np.ndarray  # float32 [segment_samples] in [-1, 1], zero-padded at the end if short
    peak: float  # largest absolute sample
    rms: float  # root mean square before the gain, padding included (the raw-song graph's weight)
    gain: float = 1.0  # what the samples were multiplied by: see "scaled"


@dataclasses.dataclass(frozen=True)
class AudioReport:
    """What was read.

    `warnings` holds codes, in this order, from what was actually decoded:

    "resampled" (the source has another rate), "short" (under one segment), "silent" (every segment
    at or below `Decision.silence_peak`) or "silent-segments" (some of them), "clipped" (over 0.1 %
    of the samples lie at full scale with two more right before them, or a lossless source goes
    beyond it), "band-limited" (cut-off under 16 kHz), "truncated" (a lossy file ends before its
    declared length, or without its end), "damaged" (`lost_s` of a lossy file cannot be decoded, or
    are not there), "phase" (the channels cancel: in some segments their difference was taken
    instead of their mean) and "scaled" (segments that go beyond twice full scale were multiplied
    by a power of two).
    """

    duration_s: float  # of the source; see SegmentReader for "first60"
    sample_rate: int  # Hz, of the source
    channels: int  # of the source
    bandwidth_hz: float  # highest frequency within 90 dB of the strongest; 0 for digital silence
    warnings: tuple[str, ...]
    notices: tuple[str, ...] = ()  # what the file says of itself, as of `tags.notices`
    lost_s: float = 0.0  # damaged, and left out
    track: str | None = None  # which of several audio tracks, such as "2 of 3"


class SegmentReader:
    """Iterates over the `Segment`s of one recording, in time order; `report` follows.

    `source` is a path, a seekable binary file object, or (samples, sample_rate) with samples [n] or
    [n, channels], float in [-1, 1] or integer PCM. `name` replaces the source in error messages.
    `segments` is the plan:

    - "all": consecutive segments. A tail under `verdict.min_tail_s` is dropped, a longer one
      zero-padded, and a recording shorter than a segment is one padded segment. With
      `verdict.least_segments` above 1 a recording too short for so many consecutive segments has
      evenly spaced, overlapping ones from its start to its end instead: so many, or as many as lie
      `verdict.least_hop_s` apart.
    - "first60": the same on the first `verdict.first_s` seconds. The duration comes from the header
      if that is exact (PCM, FLAC, Ogg), else the rest is decoded to count it.
    - N: evenly spaced starts from 0 to the last full segment, which overlap if they must. Beyond
      64 there are no more than lie `verdict.least_hop_s` apart. The source is decoded twice, once
      to count. One segment or less gives one padded segment.

    Iterating raises AudioError, possibly after some segments: discard those then. Each iteration
    reads the source anew. ValueError or TypeError: the arguments are not as described.

    With `counted` `most` is from the first segment on how many there will be at most. Where no
    header can be relied upon for that, the source is decoded once more, to count.

    With `fingerprint` the fine spectrum of what is read is taken too: `spectrum`, once every
    segment has been read. None where the detector's rate is not that of fingerprints.
    """

    def __init__(
        self,
        source: Source,
        front_end: FrontEnd,
        verdict: Decision,
        segments: Segments = "all",
        name: str | None = None,
        counted: bool = False,
        fingerprint: bool = False,
    ):
        segments = check_plan(segments)
        if isinstance(source, tuple):
            source = checked(*source)
        self._source, self._fe, self._verdict, self._plan = source, front_end, verdict, segments
        if name is None and isinstance(source, (str, bytes, os.PathLike)):
            name = os.fsdecode(source)
        elif name is None:
            name = getattr(source, "name", None)
        self._name = printable(name) if isinstance(name, str) else "<audio>"
        self._report: AudioReport | None = None
        self._counted = counted
        self.most: int | None = None
        self._fingerprint = fingerprint and front_end.sample_rate == RATE
        self.spectrum: Accumulator | None = None

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
            n = sum(block.shape[1] for block in self._decode(Meter(), None))
            starts = _evenly(n - size, self._most(n - size)) if n > size else iter([0])
        if self._counted:
            self.most = self._plan if isinstance(self._plan, int) else self._at_most(limit)
        meter = Meter()
        min_tail = round(self._verdict.min_tail_s * rate)
        self.spectrum = Accumulator() if self._fingerprint else None
        blocks = self._decode(meter, limit, self.spectrum)
        least = self._verdict.least_segments
        if self._plan == "all" and least > 1:
            first, n = [], 0
            for block in blocks:
                first.append(block)
                n += block.shape[1]
                if n >= least * size:
                    break
            if size < n < least * size:
                count = min(least, 1 + int((n - size) / (self._verdict.least_hop_s * rate)))
                starts = _evenly(n - size, count)
            blocks = itertools.chain(first, blocks)
        for start, piece in _cut(blocks, starts, size, min_tail):
            piece, gain = meter.levelled(piece)
            samples = np.zeros(size, np.float32)
            samples[: len(piece)] = piece
            peak = float(np.abs(samples).max())
            meter.segment(piece, peak <= self._verdict.silence_peak)
            rms = float(np.sqrt(np.mean(np.square(samples)))) / gain
            yield Segment(start / rate, samples, peak, rms, gain)
        self._report = meter.report(rate, size)

    def _most(self, last: int) -> int:
        """How many evenly spaced starts from 0 to `last` a plan of a count has."""
        assert isinstance(self._plan, int)
        hop = round(self._verdict.least_hop_s * self._fe.sample_rate)
        return min(self._plan, max(MANY, 1 + last // max(1, hop)))

    def _at_most(self, limit: int | None) -> int:
        """A bound on the number of consecutive segments, the padded tail included."""
        rate, size = self._fe.sample_rate, self._fe.segment_samples
        with open_audio(self._source) as decoded:
            known = decoded.frames if decoded.exact else None
            n = -(-(known or 0) * rate // decoded.rate)
            n += decoded.rate != rate  # a resampler rounds
        if known is None:
            n = sum(block.shape[1] for block in self._decode(Meter(), None))
        n = n if limit is None else min(n, limit)
        least = self._verdict.least_segments if self._plan == "all" else 1
        return max(-(-n // size), least if n < least * size else 1)

    def _decode(
        self, meter: Meter, limit: int | None, spectrum: Accumulator | None = None
    ) -> Iterator[np.ndarray]:
        """float32 blocks [1 or 2, n] at the detector's rate, n `limit` at most.

        The rows are those of `resampled`, not clipped. Fills `meter`, and `spectrum` if there is
        one.
        """
        rate = self._fe.sample_rate
        with open_audio(self._source) as decoded:
            meter.begin(decoded)
            for block in meter.mixed(decoded, rate):
                block = block[:, : None if limit is None else limit - meter.out]
                meter.out += block.shape[1]
                if spectrum is not None:
                    spectrum.add(np.clip(block[0], -1, 1))
                yield block
                if meter.out == limit:
                    if decoded.exact and decoded.frames is not None:
                        meter.frames = decoded.frames
                    else:
                        meter.frames += sum(map(len, decoded.blocks))
                    break
            meter.end(decoded)


def _evenly(last: int, count: int) -> Iterator[int]:
    """`count` starts from 0 to `last`, by the public runner's rule."""
    return iter(np.linspace(0, last, count).astype(np.int64).tolist())


def read_mono(source: Source, rate: int, name: str) -> np.ndarray:
    """A whole recording as mono float32 [n] in [-1, 1] at `rate` Hz, as `SegmentReader` has it.

    AudioError, whose message begins with `name`.
    """
    return Meter().levelled(np.concatenate(list(_mixed(source, rate, name)), axis=1))[0]


def read_spectrum(source: Source, name: str) -> Accumulator:
    """The fine spectra of a whole recording, in constant memory.

    AudioError, whose message begins with `name`.
    """
    spectrum = Accumulator()
    for block in _mixed(source, RATE, name):
        spectrum.add(np.clip(block[0], -1, 1))
    return spectrum


def _mixed(source: Source, rate: int, name: str) -> Iterator[np.ndarray]:
    """Blocks as of `Meter.mixed`."""
    meter = Meter()
    try:
        with open_audio(source) as decoded:
            meter.begin(decoded)
            yield from meter.mixed(decoded, rate)
            meter.end(decoded)
    except AudioError as error:
        raise AudioError(error.kind, f"{printable(name)}: {error}") from None


class Meter:
    """Running figures of one pass: everything an AudioReport needs, in constant memory."""

    N_FFT = 2048
    FRAMES = 8  # spectra per segment

    def __init__(self) -> None:
        self.rate = self.channels = self.frames = 0  # of the source
        self.out = 0  # samples at the detector's rate
        self.truncated = False
        self.notices: tuple[str, ...] = ()
        self.lost_s = 0.0
        self.track: str | None = None
        self._phase = self._scaled = self._over = False
        self._lossless = False
        self._values = self._clipped = self._segments = self._silent = 0
        self._tail = np.zeros((0, 0), bool)  # last two rows: a run at full scale may span blocks
        self._power = np.zeros(self.N_FFT // 2 + 1)
        self._window = np.hanning(self.N_FFT + 1)[:-1].astype(np.float32)

    def begin(self, decoded: Decoded) -> None:
        """Note what the source says of itself."""
        self.rate, self.channels, self.track = decoded.rate, decoded.channels, decoded.track
        self.notices = decoded.notices
        self._lossless = decoded.lossless
        self._scaled = decoded.flaws.gain != 1

    def mixed(self, decoded: Decoded, rate: int) -> Iterator[np.ndarray]:
        """float32 blocks [1 or 2, n] at `rate`, counted: see `resampled`."""
        sides = 1 if decoded.channels == 1 else 2
        return resampled(self.watch(decoded.blocks), decoded.rate, rate, sides)

    def levelled(self, piece: np.ndarray) -> tuple[np.ndarray, float]:
        """Mono float32 [n] in [-1, 1] of the rows of `resampled`, and the gain it took.

        Where the channels cancel, their mean holds only what a codec left of each: then their
        difference is taken. What goes beyond twice full scale is brought within it by a power of
        two; what goes a little beyond is clipped, as players do.
        """
        mono = piece[0]
        if len(piece) == 2 and _cancel(piece, CANCELLED):
            self._phase, mono = True, piece[1]
        peak = float(np.abs(mono).max(initial=0.0))
        gain = 1.0 if peak <= LOUD else 2.0 ** -math.ceil(math.log2(peak))
        self._scaled |= gain != 1
        return np.clip(mono * np.float32(gain), -1, 1), gain

    def watch(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass float32 blocks [frames, channels] through, counting; AudioError if not finite."""

        def bad(block: np.ndarray) -> int:
            return block.size - int(np.count_nonzero(np.isfinite(block)))

        for block in blocks:
            if count := bad(block):
                count += sum(map(bad, blocks))
                cure = "export it again from the program that made it"
                raise AudioError("non-finite", f"{count} samples are NaN or infinite: {cure}")
            magnitude = np.abs(block)
            full = magnitude >= FULL_SCALE
            if self._lossless and not self._over and full.any():
                self._over = bool(magnitude.max() > 1)
            if full.shape[1] == self._tail.shape[1]:
                full = np.concatenate([self._tail, full])
            self._clipped += int(np.count_nonzero(full[2:] & full[1:-1] & full[:-2]))
            self._tail = full[-2:]
            self._values += block.size
            self.frames += len(block)
            yield block

    def end(self, decoded: Decoded) -> None:
        """Hold what was read against what was declared; AudioError: nothing, damaged or cut off."""
        if self.frames == 0:
            raise AudioError("no-audio", "the audio has no samples: export it again")
        flaws, cure = decoded.flaws, "copy, download or export it again"
        self.lost_s = flaws.lost_s
        self.truncated = flaws.missing_s > SHORT_S
        heard = self.frames / decoded.rate
        if self.truncated and decoded.lossless:
            known = math.isfinite(flaws.missing_s)
            text = f"{flaws.missing_s:.1f} s of the declared length" if known else "its end"
            raise AudioError("truncated", f"{text} cannot be decoded: {cure}")
        if self.lost_s > 0 and (decoded.lossless or self.lost_s > heard):
            text = f"damaged, {self.lost_s:.1f} s of {self.lost_s + heard:.1f} s cannot be decoded"
            raise AudioError("decode", f"{text}: {cure}")

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
        """The report of the pass; rate: Hz, size: samples of a segment."""
        self._power[:2] = 0  # an offset is not content
        heard = np.flatnonzero(self._power > BAND_FLOOR * self._power.max())
        bandwidth = float(heard[-1]) * rate / self.N_FFT if len(heard) else 0.0
        codes = {
            "resampled": self.rate != rate,
            "short": self.out < size,
            "silent": self._silent == self._segments,
            "silent-segments": 0 < self._silent < self._segments,
            "clipped": self._over or self._clipped > CLIPPED * self._values,
            "band-limited": 0 < bandwidth < BAND_LIMIT_HZ,
            "truncated": self.truncated,
            "damaged": self.lost_s > 0,
            "phase": self._phase,
            "scaled": self._scaled,
        }
        warnings = tuple(code for code, present in codes.items() if present)
        seconds = self.frames / self.rate
        return AudioReport(
            seconds,
            self.rate,
            self.channels,
            bandwidth,
            warnings,
            self.notices,
            round(self.lost_s, 3),
            self.track,
        )


def resampled(
    blocks: Iterator[np.ndarray], rate: int, target: int, sides: int = 1
) -> Iterator[np.ndarray]:
    """float32 blocks [frames, channels] at `rate` -> float32 blocks [sides, n] at `target`.

    The first row is the mean over the channels. The second is what is there where they cancel:
    half the difference of two channels, the first of more, nothing of one. At another rate it is
    zeros up to the first second in which they nearly do, for resampling it costs as much again.
    """
    if rate == target:
        yield from (_rows(block, sides) for block in blocks)
        return
    import soxr

    def stream() -> Any:
        return soxr.ResampleStream(rate, target, 1, "float32", "HQ")

    first, second = stream(), None
    lengths: list[int] = []
    last = np.zeros((0, 1), np.float32)
    for block in itertools.chain(_seconds(blocks, rate) if sides == 2 else blocks, [last]):
        # The filter overflows near the largest float32; music is not there.
        rows, end = np.clip(_rows(block, sides), -1e6, 1e6), block is last
        if sides == 2 and second is None and _cancel(rows, 4 * CANCELLED):
            second = stream()
            for length in lengths:
                second.resample_chunk(np.zeros(length, np.float32))
        lengths.append(len(block))
        mean = first.resample_chunk(rows[0], last=end)
        out = np.zeros((sides, len(mean)), np.float32)
        out[0] = mean
        if second is not None:
            out[1] = second.resample_chunk(rows[1], last=end)
        yield out


def _rows(block: np.ndarray, sides: int) -> np.ndarray:
    """A block [frames, channels] as the rows of `resampled`, at its own rate."""
    rows = np.zeros((sides, len(block)), np.float32)
    rows[0] = to_mono(block)
    if sides == 2 and block.shape[1] == 2:
        np.subtract(block[:, 0], block[:, 1], out=rows[1])
        rows[1] *= np.float32(0.5)
    elif sides == 2 and block.shape[1] > 2:
        rows[1] = block[:, 0]
    return rows


def _cancel(rows: np.ndarray, share: float) -> bool:
    """Whether the mean has less than a share of the other row's energy."""
    with np.errstate(over="ignore"):
        mean, other = np.square(rows).sum(axis=1).tolist()
    return bool(mean < share * other)


def _seconds(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """The same in blocks of a second, but before other channels: whatever the reader's blocks."""
    held: list[np.ndarray] = []
    for block in blocks:
        if held and held[0].shape[1] != block.shape[1]:
            yield np.concatenate(held)
            held.clear()
        held.append(block)
        while (count := sum(map(len, held))) >= rate:
            whole = held[0] if len(held) == 1 else np.concatenate(held)
            yield whole[:rate]
            held = [whole[rate:]] if count > rate else []
    if held:
        yield np.concatenate(held)


def to_mono(block: np.ndarray) -> np.ndarray:
    """Mean over channels, summed in float64 and channel order so that it is exact and repeats."""
    if block.shape[1] == 1:
        return np.ascontiguousarray(block[:, 0])
    total = block[:, 0].astype(np.float64)
    for channel in range(1, block.shape[1]):
        total += block[:, channel]
    mean: np.ndarray = (total / block.shape[1]).astype(np.float32)
    return mean


def _cut(
    blocks: Iterator[np.ndarray], starts: Iterator[int], size: int, min_tail: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, rows [k, n]) for each start, ascending; the last piece may have fewer than `size`."""
    held: list[np.ndarray] = []
    offset = end = 0  # of what is held
    start: int | None = next(starts)
    uncut = True
    for block in blocks:
        held.append(block)
        end += block.shape[1]
        # Without another start the blocks are read on all the same: the report covers them.
        while start is not None and start + size <= end:
            whole = held[0] if len(held) == 1 else np.concatenate(held, axis=1)
            yield start, whole[:, start - offset : start - offset + size]
            start, uncut = next(starts, None), False
            drop = whole.shape[1] if start is None else min(start - offset, whole.shape[1])
            held, offset = [whole[:, drop:]], offset + drop
        if start is None:
            held.clear()
            offset = end
        while held and start is not None and offset + held[0].shape[1] <= start:
            offset += held.pop(0).shape[1]
    if held and start is not None and end > start:
        rest = np.concatenate(held, axis=1)[:, start - offset :]
        if rest.shape[1] >= (1 if uncut else min_tail):
            yield start, rest
