"""The front end's functions in NumPy, as far as the array libraries differ: see `forward`.

Each is for one segment, or for as many as there are leading axes, and keeps the dtype: float32 to
score, float64 as the oracle of everything else. `dsp_jax` has the same functions in JAX.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from artifactnet_jax import texture
from artifactnet_jax.config import FrontEnd, Texture
from artifactnet_jax.filterbank import analysis_window
from artifactnet_jax.forward import to_power

if TYPE_CHECKING:
    from jaxtyping import Float

xp = np
FFT_SAMPLES = 2**16  # at a time: they and their spectra fit the L2 cache, at twice the speed

matmul = mel_bands = np.matmul  # [n_mels, F] @ [..., F, T]


def statistics(
    found: Iterable[tuple[int, Float[np.ndarray, "F T"]]], head: Texture, sample_rate: int
) -> Float[np.ndarray, " K"]:
    """Window lengths and magnitudes of all resolutions -> the texture head's statistics."""
    return np.concatenate([texture.statistics(m, n, head, sample_rate) for n, m in found])


def stft_magnitude(
    audio: Float[np.ndarray, " N"],
    front_end: FrontEnd,
    window: Float[np.ndarray, " n_fft"] | None = None,
) -> Float[np.ndarray, "F T"]:
    """Audio -> spectrogram; `window` is that of window "given"."""
    return _magnitude(_frames(audio, front_end), front_end, window)


class StreamStft:
    """`stft_magnitude` for overlapping windows of one stream, the same bits.

    Set `start`, the position in the stream of the window's first sample, before each window. Frames
    that lie whole in both this window and the one before are taken over, if the windows are a
    multiple of the hop apart; those that hold mirrored samples at an edge are of one window only.
    """

    def __init__(self) -> None:
        self.start = 0
        self._last: dict[FrontEnd, tuple[int, np.ndarray]] = {}

    def __call__(
        self,
        audio: Float[np.ndarray, " N"],
        front_end: FrontEnd,
        window: Float[np.ndarray, " n_fft"] | None = None,
    ) -> Float[np.ndarray, "F T"]:
        """As `stft_magnitude`, of the window at `start`; N and `window` never change."""
        frames = _frames(audio, front_end)
        hop, pad = front_end.hop, front_end.stft_pad
        first = -(-pad // hop)  # frames before it, and from `end` on, reach beyond the window
        end = (len(audio) + pad - front_end.n_fft) // hop + 1
        start, known = self._last.get(front_end, (self.start, None))
        shift, rest = divmod(self.start - start, hop)
        if known is None or rest or not 0 < shift < end - first:
            out = _magnitude(frames, front_end, window)
        else:
            kept = known[:, first + shift : end]
            before = _magnitude(frames[:first], front_end, window)
            after = _magnitude(frames[end - shift :], front_end, window)
            out = np.concatenate([before, kept, after], axis=1)
        self._last[front_end] = self.start, out
        return out


def _frames(audio: np.ndarray, front_end: FrontEnd) -> np.ndarray:
    """Frames of a segment [n_frames, n_fft], as a view of it and its padding."""
    padded = np.pad(audio, front_end.stft_pad, mode=front_end.stft_edge)
    return np.lib.stride_tricks.sliding_window_view(padded, front_end.n_fft)[:: front_end.hop]


def _magnitude(frames: np.ndarray, front_end: FrontEnd, window: np.ndarray | None) -> np.ndarray:
    """Frames [n, n_fft], each by itself -> [n_bins, n]."""
    window = analysis_window(front_end) if window is None else window
    window = window.astype(frames.dtype)
    power = np.empty((front_end.n_bins, len(frames)), frames.dtype)
    step = max(1, FFT_SAMPLES // front_end.n_fft)
    for k in range(0, len(frames), step):
        parts = np.fft.rfft(frames[k : k + step] * window).view(frames.dtype)
        parts *= parts
        np.add(parts[:, ::2].T, parts[:, 1::2].T, out=power[:, k : k + step])
    if front_end.spectrum_eps:
        power += frames.dtype.type(front_end.spectrum_eps)
    magnitude = np.sqrt(power, out=power)
    if front_end.spectrum_scale != 1:
        magnitude *= frames.dtype.type(front_end.spectrum_scale)
    spectrogram: np.ndarray = to_power(magnitude, front_end.spectrum_power, np)
    return spectrogram


def soft_masks(
    h: Float[np.ndarray, "*d"], p: Float[np.ndarray, "*d"], front_end: FrontEnd
) -> tuple[Float[np.ndarray, "*d"], Float[np.ndarray, "*d"]]:
    """Shares of two magnitudes in h^q + p^q + eps, 0 where that sum is 0."""
    h, p = to_power(h, front_end.hpss_power, np), to_power(p, front_end.hpss_power, np)
    total = h + p + h.dtype.type(front_end.hpss_eps)
    one, two = (np.divide(x, total, out=np.zeros_like(x), where=total > 0) for x in (h, p))
    return one, two


def effective_bandwidth(energy: Float[np.ndarray, " F"], rate: int) -> float:
    """Smallest upper bound in Hz with 95 % of the energy of bins from 0 Hz to rate / 2; 0 of none.

    Of a residual's energy it is the figure of the paper's appendix C.
    """
    total = np.cumsum(energy, dtype=np.float64)
    if not total[-1]:
        return 0.0
    return float(np.searchsorted(total, 0.95 * total[-1])) * rate / 2 / (len(energy) - 1)


def sigmoid(x: Float[np.ndarray, "*d"]) -> Float[np.ndarray, "*d"]:
    """Logistic function that never overflows."""
    e = np.exp(-np.abs(x))
    out: np.ndarray = np.where(x >= 0, 1, e) / (1 + e)
    return out
