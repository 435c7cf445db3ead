"""A made-up decoder, for tests: noise, and the lines that a decoder would leave in it."""

from __future__ import annotations

import numpy as np
import soxr

RATE = 44_100
SECONDS = 24


def coloured(seed: int, seconds: float = SECONDS, rms: float = 0.1) -> np.ndarray:
    """Noise that falls 4 dB an octave, with loud and soft seconds, as a mix does."""
    rng = np.random.default_rng(seed)
    n = round(seconds * RATE)
    hz = np.fft.rfftfreq(n, 1 / RATE)
    spectrum = np.fft.rfft(rng.normal(size=n)) * np.maximum(hz, 40) ** -0.66
    audio = np.fft.irfft(spectrum, n) * np.repeat(rng.uniform(0.3, 1, n // RATE + 1), RATE)[:n]
    return (audio * rms / audio.std()).astype(np.float32)


def combed(seed: int, spacing: float, speed: float = 1.0, seconds: float = SECONDS) -> np.ndarray:
    """A made-up decoder: noise through a filter that lifts narrow lines about `spacing` Hz apart.

    Lines have heights and places of their own, as a network's have: no other comb looks so.
    """
    audio = coloured(seed, seconds * speed)
    n = len(audio)
    hz = np.fft.rfftfreq(n, 1 / RATE)
    order = np.rint(hz / spacing).astype(int)
    rng = np.random.default_rng(1234)
    count = round(RATE / 2 / spacing) + 2
    height = rng.uniform(0.3, 3.0, count)[order]
    place = (np.arange(count) * spacing + rng.uniform(-0.3, 0.3, count) * spacing)[order]
    lifted = 1 + height * np.exp(-0.5 * ((hz - place) / 2) ** 2)
    audio = np.fft.irfft(np.fft.rfft(audio) * lifted, n)
    if speed != 1:
        audio = soxr.resample(audio, round(RATE * speed), RATE, quality="VHQ")
    return audio.astype(np.float32)
