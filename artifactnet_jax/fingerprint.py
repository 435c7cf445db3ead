"""Decoder fingerprints: the faint lines that a neural decoder leaves in the fine spectrum.

A decoder upsamples in fixed steps, and each step leaves lines at fixed frequencies, whatever is
played. They drown in one segment and stand out in the mean over a track.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from artifactnet_jax.kernels import median_filter

RATE = 44_100  # Hz, of the audio
FRAME = 16_384  # samples; 2.69 Hz a bin
HOP = 8_192
BIN_HZ = RATE / FRAME
FIRST, LAST = 1_300, 7_432  # bins that are kept: 3.5 to 20.0 kHz
WINDOW_FRAMES = 108  # 20.06 s
MOST_WINDOWS = 64  # then pairs are merged
FLOOR = 1e-12  # power a bin; white noise of 16 bits has 8e-11
SILENCE = 1e-10  # mean power a bin, -100 dB; a frame with less is left out

_HANN = np.hanning(FRAME + 1)[:-1]
_HANN = (_HANN / np.sqrt(np.square(_HANN).sum())).astype(np.float32)  # white noise: its variance
_DB = 10 / np.log(10)


# The log-frequency axis on which a change of speed is a shift. A step is 2.4 Hz at 16 kHz.
GRID_HZ, GRID_STEP, GRID = 3_600.0, 1.5e-4, 10_620  # up to 17.7 kHz
LOW_HZ = 5_000.0  # below, music has lines of its own
FINE, WIDE = 21, 101  # bins; running medians that residuals are taken from
CLIP_DB = 3.0  # of a line; a decoder's are faint
TONE_DB, SKIRT = 18.0, 8  # bins on either side of a tone
SPREADS = 6.0  # wide residuals are clipped at so many of their median magnitude


@dataclasses.dataclass
class Mean:
    """Sums over the frames of a stretch of audio."""

    frames: int = 0  # that were not silent
    log: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(LAST - FIRST))
    power: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(LAST - FIRST))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.frames + other.frames, self.log + other.log, self.power + other.power)

    def levels(self) -> np.ndarray:
        """float64 [2, bins]: the mean of dB, and dB of the mean power."""
        power = np.log(self.power / self.frames + FLOOR)
        return np.asarray(_DB * np.stack([self.log / self.frames, power]))


class Accumulator:
    """Mono audio at 44.1 kHz in blocks of any size -> mean fine spectra of windows of 20 s.

    Memory is constant: above `MOST_WINDOWS` windows, pairs are merged and windows get longer.
    """

    def __init__(self, window_frames: int = WINDOW_FRAMES, most: int = MOST_WINDOWS) -> None:
        self.samples = 0
        self.frames = 0  # silent ones included
        self.window_frames, self._most = window_frames, most
        self.windows: list[Mean] = []
        self._pending = np.zeros(FRAME, np.float32)
        self._held = 0

    def add(self, block: np.ndarray) -> None:
        """Count the samples [n] in."""
        block = np.asarray(block, np.float32)
        self.samples += len(block)
        while len(block):
            taken = min(len(block), FRAME - self._held)
            self._pending[self._held : self._held + taken] = block[:taken]
            block, self._held = block[taken:], self._held + taken
            if self._held == FRAME:
                self._frame()
                self._pending[: FRAME - HOP] = self._pending[HOP:]
                self._held = FRAME - HOP

    def band_end(self) -> float | None:
        """Where the band of the audio ends, in Hz; None of less than a frame."""
        total = sum(self.windows, Mean())
        if not total.frames:
            return FIRST * BIN_HZ if self.frames else None
        return band_end(total.levels()[1])

    def _frame(self) -> None:
        if self.frames % self.window_frames == 0:
            if len(self.windows) == self._most:
                pairs = zip(self.windows[::2], self.windows[1::2], strict=True)
                self.windows = [a + b for a, b in pairs]
                self.window_frames *= 2
            self.windows.append(Mean())
        self.frames += 1
        spectrum = np.fft.rfft(self._pending * _HANN)[FIRST:LAST]
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        if power.mean() < SILENCE:
            return
        window = self.windows[-1]
        window.frames += 1
        window.log += np.log(power + np.float32(FLOOR))
        window.power += power


def band_end(power_db: np.ndarray) -> float:
    """Where the file's band ends, in Hz: by its encoder or its sample rate."""
    size = 64
    blocks = np.median(power_db[: len(power_db) // size * size].reshape(-1, size), axis=1)
    lowest = blocks.min()
    end = len(blocks)
    if lowest < -90:
        end = int(np.flatnonzero(blocks > max(lowest + 6, -112)).max(initial=-1)) + 1
    falls = [
        i + 1
        for i in range(len(blocks) - 3)
        if blocks[i] - blocks[i + 3] > 20 and blocks[i + 3 :].max() < blocks[i] - 15
    ]
    end = min([end, *falls])
    return (FIRST + end * size) * BIN_HZ if end < len(blocks) else RATE / 2


HZ = (FIRST + np.arange(LAST - FIRST)) * BIN_HZ
GRID_AXIS = GRID_HZ * np.exp(GRID_STEP * np.arange(GRID))


def residuals(levels: np.ndarray) -> np.ndarray:
    """Levels [2, bins] in dB -> what stands out of their running medians, float32 [4, bins].

    Rows: fine of both statistics, wide of both. A fine line counts up to `CLIP_DB`. What stands out
    by more than `TONE_DB` is a tone, not a decoder's line: it and its skirt do not count.
    """
    levels = levels.astype(np.float32)
    fine = levels - median_filter(levels, FINE, 1)
    wide = levels - median_filter(levels, WIDE, 1)
    spread = np.median(np.abs(wide[:, 600:4600]), axis=1, keepdims=True) + 1e-3
    for n, out in enumerate(_near(np.abs(fine) > TONE_DB)):
        if out.any() and not out.all():
            # Beside strong lines the median is high: what does not count must not stand out.
            for rows in (fine, wide):
                rows[n, out] = np.median(rows[n, ~out])
    fine = np.clip(fine, -CLIP_DB, CLIP_DB)
    wide = np.clip(wide / spread, -SPREADS, SPREADS)
    return np.concatenate([fine, wide])


def residuals_of(levels: Sequence[np.ndarray]) -> np.ndarray:
    """`residuals` of many, float32 [n, 4, bins], to the bit: together they take less time."""
    rows = residuals(np.concatenate(levels))
    return rows.reshape(2, len(levels), 2, -1).swapaxes(0, 1).reshape(len(levels), 4, -1)


def _near(tone: np.ndarray) -> np.ndarray:
    """Bins beside a tone, of rows [n, bins]."""
    kernel = np.ones(2 * SKIRT + 1)
    return np.stack([np.convolve(row, kernel, "same") > 0.5 for row in tone])


def tone_share(levels: np.ndarray) -> float:
    """Share of the bins from 5 to 16 kHz that lie beside tones too strong for a decoder."""
    bins = slice(round(LOW_HZ / BIN_HZ) - FIRST, round(16_000 / BIN_HZ) - FIRST)
    levels = levels[:, bins].astype(np.float32)
    return float(_near(np.abs(levels - median_filter(levels, FINE, 1)) > TONE_DB).mean())


def on_grid(rows: np.ndarray) -> np.ndarray:
    """Rows [n, bins] -> float32 [n, GRID] on the log axis, weighted for an even share per Hz."""
    weight = np.sqrt(GRID_AXIS / GRID_HZ)
    return np.stack([np.interp(GRID_AXIS, HZ, row) * weight for row in rows]).astype(np.float32)


def in_band(grid: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rows [..., GRID], zero outside the band, without their mean inside it and of length 1."""
    inside = ((low <= GRID_AXIS) & (high > GRID_AXIS)).astype(np.float32)
    weight = np.sqrt(GRID_AXIS / GRID_HZ).astype(np.float32) * inside
    mean = (grid * weight).sum(-1, keepdims=True) / np.square(weight).sum()
    grid = grid * inside - mean * weight
    size = np.sqrt(np.square(grid).sum(-1, keepdims=True))
    return np.asarray(grid / (size + np.float32(1e-9)))


COMBS = 3  # steady tones or pulses that are taken out, one after the other
SPACINGS = (7.0, 1_500.0)  # Hz of them
DENSE_HZ = 60.0
_COMB_FFT = 1 << 16


@functools.cache
def _harmonics() -> tuple[np.ndarray, np.ndarray]:
    """Conjugate transforms of the harmonics' places on the log axis: for sums, and for counts."""
    low, high = SPACINGS
    n = np.arange(math.floor(GRID_HZ / high), math.ceil(GRID_AXIS[-1] / low) + 1)
    place = np.rint((np.log(n) - math.log(GRID_HZ / high)) / GRID_STEP).astype(int)
    lines = np.bincount(place[place >= 0], minlength=_COMB_FFT)[:_COMB_FFT]
    return np.conj(np.fft.rfft(lines)), lines


def comb(spacing: float) -> np.ndarray:
    """A line of the frames' width at each multiple of `spacing` Hz, float32 [GRID]."""
    away = np.abs(GRID_AXIS - np.rint(GRID_AXIS / spacing) * spacing)
    return np.asarray(np.maximum(0, 1 - away / (2.2 * BIN_HZ)), np.float32)


def strongest_comb(row: np.ndarray) -> float:
    """The spacing in Hz of the harmonics that lie highest in a residual [GRID], zero outside."""
    lines, _ = _harmonics()
    inside = (row != 0).astype(np.float32)
    steps = round(math.log(SPACINGS[1] / SPACINGS[0]) / GRID_STEP)
    both = np.fft.irfft(np.fft.rfft(np.stack([row, inside]), _COMB_FFT) * lines, _COMB_FFT)
    # A spacing below the highest by a factor exp(k step) puts its lines k steps lower.
    total, count = np.roll(both, steps, axis=1)[:, : steps + 1][:, ::-1] * 1.0
    score = total / np.sqrt(np.maximum(count, 8))
    return float(SPACINGS[1] * math.exp(-GRID_STEP * int(score.argmax())))


def combs(rows: np.ndarray) -> tuple[np.ndarray, tuple[float, ...]]:
    """What steady tones and pulses may have laid in residuals [4, GRID], zero outside a band.

    An orthonormal basis [n, GRID], and the spacings in Hz of the `COMBS` strongest combs, one found
    after the other. Of each the basis holds all heights that follow frequency in straight lines
    between five knots.
    """
    part = np.flatnonzero((rows != 0).any(axis=0))
    if not len(part):
        return np.zeros((0, GRID)), ()
    knots = np.linspace(part[0], part[-1], 5)
    hats = np.stack([np.interp(part, knots, unit) for unit in np.eye(5)])
    left, spacings = rows[:2, part].sum(axis=0, dtype=np.float64), []
    basis = np.zeros((0, len(part)))
    for _ in range(COMBS):
        whole = np.zeros(GRID, np.float32)
        whole[part] = left
        spacings.append(strongest_comb(whole))
        shapes = [comb(spacings[-1])[part]]
        if spacings[-1] < DENSE_HZ:  # lines run into each other: a wave
            turns = 2 * np.pi * GRID_AXIS[part] / spacings[-1]
            shapes += [np.cos(k * turns) for k in (1, 2, 3)]
        new = np.concatenate([hats * shape for shape in shapes])
        new -= _part(new, basis)
        size, turn = np.linalg.eigh(_products(new, new))
        sound = size > 1e-6  # others are in the basis already
        basis = np.concatenate([basis, _products((turn[:, sound] / np.sqrt(size[sound])).T, new.T)])
        left -= _part(left[None], basis)[0]
    out = np.zeros((len(basis), GRID))
    out[:, part] = basis
    return out, tuple(spacings)


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products [n, m] of rows, without BLAS: no number of threads may change their bits.

    To limit its threads here would be no help: the limit is the process's, and other threads set
    and restore it meanwhile.
    """
    return np.asarray(np.einsum("ng,mg->nm", a, b))


def _part(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The part of rows [n, g] in an orthonormal basis [m, g]."""
    return _products(_products(rows, basis), basis.T)


def without(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Rows [n, GRID] less their part in an orthonormal basis, of length 1."""
    rows = rows - _part(rows, basis)
    return np.asarray(rows / (np.sqrt(np.square(rows).sum(axis=1, keepdims=True)) + 1e-9))
