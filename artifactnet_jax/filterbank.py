"""Window and mel matrix, built once in float64 NumPy and shared by every backend."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from artifactnet_jax.config import FrontEnd

if TYPE_CHECKING:
    from jaxtyping import Float64


def hann(n: int) -> Float64[np.ndarray, " {n}"]:
    """Periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def analysis_window(front_end: FrontEnd) -> Float64[np.ndarray, " {front_end.n_fft}"]:
    """Window of the STFT; ValueError for one that is given as a tensor."""
    if front_end.window == "given":
        raise ValueError("the front end's window is given: pass the tensor front_end.window")
    return hann(front_end.n_fft)


def hz_to_mel(hz: Float64[np.ndarray, "*d"], scale: str) -> Float64[np.ndarray, "*d"]:
    """Frequency in Hz -> mel, "htk" (O'Shaughnessy) or "slaney" (Auditory Toolbox)."""
    hz = np.asarray(hz, np.float64)
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    linear = 3.0 * hz / 200.0  # below 1 kHz
    return np.where(
        hz < 1000.0, linear, 15.0 + 27.0 * np.log(np.maximum(hz, 1e-9) / 1000.0) / np.log(6.4)
    )


def mel_to_hz(mel: Float64[np.ndarray, "*d"], scale: str) -> Float64[np.ndarray, "*d"]:
    """Inverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))


@functools.cache
def mel_filterbank(
    front_end: FrontEnd,
) -> Float64[np.ndarray, "{front_end.n_mels} {front_end.n_bins}"]:
    """Triangular mel filters from 0 Hz to Nyquist.

    Equal to librosa.filters.mel; `mel_norm` "slaney" gives each band unit area in Hz. ValueError
    for a matrix that is given as a tensor.
    """
    if front_end.mel_scale == "given":
        raise ValueError("the front end's mel matrix is given: pass the tensor front_end.mel")
    nyquist = front_end.sample_rate / 2
    top = hz_to_mel(np.array(nyquist), front_end.mel_scale)
    edges = mel_to_hz(np.linspace(0.0, top, front_end.n_mels + 2), front_end.mel_scale)
    # Of an odd n_fft the highest bin lies half a bin below Nyquist.
    bins = np.arange(front_end.n_bins) * (front_end.sample_rate / front_end.n_fft)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rise = (bins - lower) / (centre - lower)
    fall = (upper - bins) / (upper - centre)
    weights: np.ndarray = np.maximum(0.0, np.minimum(rise, fall))
    if front_end.mel_norm == "slaney":
        weights *= 2.0 / (upper - lower)
    weights.setflags(write=False)  # cached: shared by every caller
    return weights
