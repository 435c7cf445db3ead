"""The front end in JAX: STFT magnitude, HPSS, mel and the seven channels.

Pure functions on float32 arrays, jit-compiled by whoever calls them, differentiable with finite
gradients everywhere, digital silence included. Matrix products state `Precision.HIGHEST`: new GPUs
would otherwise run them in TF32 and lose the low bits in which the residual lives.
`artifactnet_jax.reference` is the same in NumPy.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from artifactnet_jax.config import FrontEnd
from artifactnet_jax.filterbank import analysis_window, mel_filterbank
from artifactnet_jax.kernels import median_filter

SLOPE_FLOOR = 1e-5  # magnitude; its power is `FrontEnd.amin`, the floor of the mel bands


def stft(audio: jax.Array, front_end: FrontEnd, window: jax.Array | None = None) -> jax.Array:
    """Complex spectrum: [B, segment_samples] -> [B, n_bins, n_frames].

    The defaults are the convention of torch.stft: periodic Hann, frames centred, edges reflected
    without repetition, no scaling. `window` [n_fft] is that of window "given".
    """
    pad = front_end.stft_pad
    padded = jnp.pad(audio, ((0, 0), (pad, pad)), mode=front_end.stft_edge)
    weights = jnp.asarray(analysis_window(front_end) if window is None else window, audio.dtype)
    frames = _frames(padded, front_end.n_fft, front_end.hop)
    return jnp.swapaxes(jnp.fft.rfft(frames * weights[None, None, :]), 1, 2)


def stft_magnitude(
    audio: jax.Array, front_end: FrontEnd, window: jax.Array | None = None
) -> jax.Array:
    """Spectrogram: [B, segment_samples] -> [B, n_bins, n_frames]; see `stft`."""
    return magnitude(stft(audio, front_end, window), front_end)


def magnitude(spectrum: jax.Array, front_end: FrontEnd) -> jax.Array:
    """Complex spectrum [B, n_bins, n_frames] -> spectrogram of the same shape."""
    power = spectrum.real**2 + spectrum.imag**2
    if front_end.spectrum_eps:
        power = power + front_end.spectrum_eps
    # The slope of sqrt at 0 is infinite: give an empty bin slope 0 instead of NaN.
    empty = power == 0
    magnitude = jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, power)))
    if front_end.spectrum_scale != 1:
        magnitude = magnitude * front_end.spectrum_scale
    return _power(magnitude, front_end.spectrum_power)


def _frames(padded: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """Overlapping frames: [B, N] -> [B, n_frames, n_fft]."""
    if n_fft % hop:
        starts = np.arange((padded.shape[1] - n_fft) // hop + 1) * hop
        return padded[:, starts[:, None] + np.arange(n_fft)[None, :]]
    # They are n_fft/hop shifted views of hop-sized blocks: no gather.
    n_blocks = padded.shape[1] // hop
    blocks = padded[:, : n_blocks * hop].reshape(padded.shape[0], n_blocks, hop)
    n_frames = n_blocks - n_fft // hop + 1
    shifted = [blocks[:, i : i + n_frames] for i in range(n_fft // hop)]
    return jnp.concatenate(shifted, axis=-1)


def _power(x: jax.Array, power: float) -> jax.Array:
    """x**power for x >= 0; a whole power takes products. A fractional one has slope 0 at 0."""
    if float(power).is_integer():
        return x ** int(power)
    empty = x <= 0
    return jnp.where(empty, 0.0, jnp.where(empty, 1.0, x) ** power)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _share(part: jax.Array, other: jax.Array, eps: jax.Array, power: float) -> jax.Array:
    """part^q / (part^q + other^q + eps), and exactly 0 where that denominator is 0."""
    top = _power(part, power)
    total = top + _power(other, power) + eps
    return jnp.where(total > 0, top / jnp.where(total > 0, total, 1.0), 0.0)


@_share.defjvp
def _share_jvp(power, primals, tangents):
    # The textbook slope squares the denominator, which underflows to 0/0 for magnitudes below
    # 1e-9. The share depends on ratios only, so divide by the larger magnitude first. What is left
    # is of the order of 1 / scale; below SLOPE_FLOOR, where a lone peak in silence would send that
    # to infinity, the share counts as constant.
    part, other, eps = primals
    root = jnp.sqrt(eps) if power == 2 else eps ** (1 / power)
    scale = jnp.maximum(jnp.maximum(part, other), root)
    safe = jnp.where(scale > SLOPE_FLOOR, scale, 1.0)
    p, o, e = part / safe, other / safe, root / safe
    tops, rest = _power(p, power), _power(o, power)
    total = jnp.maximum(tops + rest + _power(e, power), 0.5)
    slope_part = power * _power(p, power - 1) * (total - tops) / total**2
    slope_other = -power * tops * _power(o, power - 1) / total**2
    slope = (slope_part * tangents[0] + slope_other * tangents[1]) / safe
    return _share(*primals, power), jnp.where(scale > SLOPE_FLOOR, slope, 0.0)


def running_median(x: jax.Array, width: int, axis: int, edge: str) -> jax.Array:
    """Median of `width` samples along an axis that goes on as `edge` says; same shape."""
    if edge == "reflect":
        return median_filter(x, width, axis=axis)
    half = [(width // 2, width // 2) if k == axis else (0, 0) for k in range(x.ndim)]
    wide = median_filter(jnp.pad(x, half, mode=edge), width, axis=axis)
    return jax.lax.slice_in_dim(wide, width // 2, width // 2 + x.shape[axis], axis=axis)


def hpss(residual: jax.Array, front_end: FrontEnd) -> tuple[jax.Array, jax.Array]:
    """Harmonic and percussive parts of a magnitude: [B, F, T] -> two [B, F, T].

    Median along time (harmonic) and frequency (percussive), by default with reflected edges and
    soft masks of power 2 (paper III-C, facts of the exported graphs). A part is exactly 0 where
    both medians are 0 and there is no eps.
    """
    edge, power = front_end.hpss_edge, front_end.hpss_power
    h = running_median(residual, front_end.hpss_width, 2, edge)
    p = running_median(residual, front_end.percussive_width, 1, edge)
    eps = jnp.asarray(front_end.hpss_eps, residual.dtype)
    return residual * _share(h, p, eps, power), residual * _share(p, h, eps, power)


def mel_db(magnitude: jax.Array, front_end: FrontEnd, mel: jax.Array | None = None) -> jax.Array:
    """Mel power in dB: [..., F, T] -> [..., n_mels, T], floored by `amin`, no top-dB clamp.

    `mel` [n_mels, n_bins] is that of mel_scale "given".
    """
    weights = jnp.asarray(mel_filterbank(front_end) if mel is None else mel, magnitude.dtype)
    power = _power(magnitude, front_end.mel_power)
    bands = jnp.einsum("mf,...ft->...mt", weights, power, precision=jax.lax.Precision.HIGHEST)
    amin = front_end.amin
    floored = jnp.maximum(bands, amin) if front_end.amin_rule == "max" else bands + amin
    return front_end.db_factor * jnp.log10(floored)


def delta(x: jax.Array) -> jax.Array:
    """First difference along the last axis with a zero first frame: [..., T] -> [..., T]."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., 1:] - x[..., :-1]], axis=-1)


def mel_views(residual: jax.Array, front_end: FrontEnd, mel: jax.Array | None = None) -> jax.Array:
    """Residual [B, F, T] -> dB of residual, harmonic, percussive part [B, 3, n_mels, T]."""
    return mel_db(jnp.stack([residual, *hpss(residual, front_end)], axis=1), front_end, mel)


def loudest(views: jax.Array, front_end: FrontEnd) -> jax.Array:
    """What `channels` clamps below, each segment by itself: [B, 3, n_mels, T] -> dB [B, 3]."""
    peaks = jnp.max(views, axis=(2, 3))
    if front_end.joint.endswith("view"):
        return peaks
    return jnp.broadcast_to(jnp.max(peaks, axis=1, keepdims=True), peaks.shape)


def channels(views: jax.Array, front_end: FrontEnd, peaks: jax.Array) -> jax.Array:
    """Views [B, 3, n_mels, T] and their maxima [B, 3] -> features [B, C, n_mels, T].

    By default mel_res, mel_H, mel_P, delta, delta2, mel_H - mel_P, |delta| (paper, Table I).
    """
    if front_end.top_db is not None:
        views = jnp.maximum(views, peaks[:, :, None, None] - front_end.top_db)
    mel_res, mel_h, mel_p = views[:, 0], views[:, 1], views[:, 2]
    d = delta(mel_res)
    named = {
        "mel_res": lambda: mel_res,
        "mel_H": lambda: mel_h,
        "mel_P": lambda: mel_p,
        "delta": lambda: d,
        "delta2": lambda: delta(d),
        "ratio": lambda: mel_h - mel_p,
        "flux": lambda: jnp.abs(d),
    }
    return jnp.stack([named[name]() for name in front_end.channels], axis=1)


def seven_channels(
    residual: jax.Array, front_end: FrontEnd, mel: jax.Array | None = None
) -> jax.Array:
    """Forensic features, each segment by itself: residual [B, F, T] -> [B, C, n_mels, T]."""
    views = mel_views(residual, front_end, mel)
    return channels(views, front_end, loudest(views, front_end))
