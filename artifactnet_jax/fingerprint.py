"""Decoder fingerprints: the faint lines that a neural decoder leaves in the fine spectrum.

A decoder upsamples in fixed steps, and each step leaves lines at fixed frequencies, whatever is
played. They drown in one segment and stand out in the mean over a track.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from artifactnet_jax.kernels import median_filter

RATE = 44_100  # Hz, of the audio
FRAME = 16_384  # samples; 2.69 Hz a bin
HOP = 8_192
BIN_HZ = RATE / FRAME
FIRST, LAST = 1_300, 7_432  # bins that are kept: 3.5 to 20.0 kHz
WINDOW_FRAMES = 108  # 20.06 s
MOST_WINDOWS = 64  # then pairs are merged
FLOOR = 1e-12  # power a bin; 16-bit noise has 8e-11
SILENCE_DB = -98.0  # a frame whose mean level is lower is left out

_HANN = np.hanning(FRAME + 1)[:-1]
_HANN = (_HANN / np.sqrt(np.square(_HANN).sum())).astype(np.float32)  # white noise: its variance
_DB = 10 / np.log(10)


# The log-frequency axis on which a change of speed is a shift. A step is 2.4 Hz at 16 kHz.
GRID_HZ, GRID_STEP, GRID = 3_600.0, 1.5e-4, 10_620  # up to 17.7 kHz
LOW_HZ = 5_000.0  # below, music has lines of its own
FINE, WIDE = 21, 101  # bins; running medians that residuals are taken from
CLIP_DB = 3.0  # of a line; a decoder's are faint
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
        return _DB * np.stack([self.log / self.frames, np.log(self.power / self.frames + FLOOR)])


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
        log = np.log(power + np.float32(FLOOR))
        if log.mean() * _DB < SILENCE_DB:
            return
        window = self.windows[-1]
        window.frames += 1
        window.log += log
        window.power += power


def band_end(power_db: np.ndarray) -> float:
    """The frequency in Hz above which the file holds nothing: its encoder's or sample rate's end."""
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

    Rows: fine of both statistics, wide of both. A fine line counts up to `CLIP_DB`, then less and
    less: over 7 times as much, which only tones reach, not at all.
    """
    levels = levels.astype(np.float32)
    fine = levels - median_filter(levels, FINE, 1)
    height = np.minimum(np.abs(fine), CLIP_DB)
    height = np.minimum(height, np.maximum(0, 2 * CLIP_DB - np.abs(fine) / 3.5))
    wide = levels - median_filter(levels, WIDE, 1)
    spread = np.median(np.abs(wide[:, 600:4600]), axis=1, keepdims=True) + 1e-3
    wide = np.clip(wide / spread, -SPREADS, SPREADS)
    return np.concatenate([np.copysign(height, fine), wide])


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
    return grid / (np.sqrt(np.square(grid).sum(-1, keepdims=True)) + np.float32(1e-9))
