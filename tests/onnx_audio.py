"""Music-like segments for the ONNX fixtures: the same samples wherever they are asked for."""

from __future__ import annotations

import numpy as np

RATE = 44_100  # Hz
SAMPLES = 176_400  # 4.0 s


def segment(seed: int, samples: int = SAMPLES) -> np.ndarray:
    """Notes of decaying harmonics, noise bursts and clicks: float32 [samples] within [-1, 1]."""
    rng = np.random.default_rng(seed)
    audio = 1e-4 * (2 * rng.random(samples) - 1)  # a noise floor: no bin is exactly silent
    for start in np.sort(rng.integers(0, samples - 2000, 12)):
        t = np.arange(samples - start) / RATE
        pitch = 55 * 2 ** (rng.integers(0, 48) / 12)  # Hz, equal temperament
        harmonics = np.arange(1, 1 + min(12, int(18_000 / pitch)))
        decay = np.exp(-t * (1 + 8 * rng.random()))
        phases = 2 * np.pi * (pitch * harmonics[:, None] * t + rng.random(len(harmonics))[:, None])
        audio[start:] += 0.1 * decay * (np.sin(phases) / harmonics[:, None]).sum(axis=0)
    for start in rng.integers(0, samples - 6000, 6):
        burst = 2 * rng.random(6000) - 1
        audio[start : start + 6000] += 0.3 * rng.random() * burst * np.exp(-np.arange(6000) / 1200)
    audio[rng.integers(0, samples, 5)] += 0.5  # clicks
    loudness = 0.9 / 2 ** (seed % 4)
    return (audio * (loudness / np.abs(audio).max())).astype(np.float32)


def segments(count: int, samples: int = SAMPLES) -> np.ndarray:
    """Segments of seeds 0 to count - 1: float32 [count, samples]."""
    return np.stack([segment(seed, samples) for seed in range(count)])
