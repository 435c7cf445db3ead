"""What public removers of AI marks do to a track, written anew: timing, phase, noise, harmonics.

Such tools promise that a detector is misled and a listener hears nothing. Each change here is one
of their steps; the last two are all steps but `wow` together, moderate and extreme.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import soxr

from artifactnet_jax.data.augment import RATE

Step = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]

FRAME = 2048  # samples of the frames whose phases are moved
HOP = FRAME // 4
CONTROL_S = 0.25  # between the points that timing wanders by
OVER = 4  # oversampling where samples are read between others


def timing(audio: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Every moment is up to about 0.05 ms `strength` (1 deviation) early or late."""
    away = 5e-5 * RATE * strength * _wander(len(audio), rng)
    return _read(audio, np.arange(len(audio)) + away)


def wow(audio: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Playing speed wanders by `strength` permille (1 deviation), as a worn tape's does."""
    speed = 1 + 1e-3 * strength * _wander(len(audio), rng)
    return _read(audio, np.concatenate([[0.0], np.cumsum(speed[:-1])]))


def _wander(n: int, rng: np.random.Generator) -> np.ndarray:
    """Normal numbers, `CONTROL_S` apart, joined by straight lines: float64 [n]."""
    count = int(np.ceil(n / (CONTROL_S * RATE))) + 1
    return np.asarray(
        np.interp(np.arange(n), np.arange(count) * CONTROL_S * RATE, rng.standard_normal(count))
    )


def _read(audio: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Samples at places between samples: float32 [len(place)]."""
    fine = soxr.resample(audio, RATE, OVER * RATE, "HQ")
    return np.asarray(np.interp(place * OVER, np.arange(len(fine)), fine), np.float32)


def phase(audio: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Phases of frames of 46 ms are moved at random by 0.1 `strength` radians (1 deviation)."""
    window = np.sqrt(np.hanning(FRAME + 1)[:-1])
    padded = np.pad(audio, (FRAME, FRAME + -len(audio) % HOP))
    out = np.zeros(len(padded))
    for start in range(0, len(padded) - FRAME + 1, HOP):
        bins = np.fft.rfft(padded[start : start + FRAME] * window)
        bins *= np.exp(0.1j * strength * rng.standard_normal(len(bins)))
        out[start : start + FRAME] += np.fft.irfft(bins, FRAME) * window
    return np.asarray(out[FRAME : FRAME + len(audio)] * HOP * 2 / FRAME, np.float32)


def noise(audio: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """White noise that follows the level of the music, 60 dB below at strength 1."""
    size = RATE // 20
    squares = np.square(np.pad(audio, (0, -len(audio) % size)).astype(np.float64))
    level = np.sqrt(squares.reshape(-1, size).mean(axis=1)).repeat(size)[: len(audio)]
    added = 1e-3 * strength * level * rng.standard_normal(len(audio))
    return np.asarray(audio + added, np.float32)


def harmonics(audio: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A tape's curve: of a full-scale tone, second and third harmonic of 0.01 `strength` each."""
    share = 0.01 * strength  # x = cos t: cos 2t = 2 x^2 - 1, cos 3t = 4 x^3 - 3 x
    bent = audio + share * (2 * np.square(audio) + 4 * audio**3 - 3 * audio)
    bent -= 2 * share * np.square(audio).mean()
    return np.asarray(bent / max(1.0, float(np.abs(bent).max(initial=0))), np.float32)


STEPS: tuple[Step, ...] = (timing, phase, noise, harmonics)


def together(audio: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """All of `STEPS`."""
    for step in STEPS:
        audio = step(audio, rng, strength)
    return audio


CHANGES: dict[str, tuple[Step, float]] = {
    "timing-jitter": (timing, 1.0),
    "wow": (wow, 1.0),
    "phase-jitter": (phase, 1.0),
    "music-noise": (noise, 1.0),
    "harmonics": (harmonics, 1.0),
    "remover-moderate": (together, 1.0),
    "remover-extreme": (together, 4.0),
}
