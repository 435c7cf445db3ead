"""The front end in JAX: STFT magnitude, HPSS, mel and the seven channels.

Pure functions on float32 arrays, jit-compiled by whoever calls them, differentiable with finite
gradients everywhere, digital silence included. Matrix products state `Precision.HIGHEST`: new GPUs
would otherwise run them in TF32 and lose the low bits in which the residual lives.
`artifactnet_jax.reference` is the same in NumPy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from artifactnet_jax.config import FrontEnd
from artifactnet_jax.filterbank import hann, mel_filterbank
from artifactnet_jax.kernels import median_filter

SLOPE_FLOOR = 1e-5  # magnitude; its power is `FrontEnd.amin`, the floor of the mel bands


def stft_magnitude(audio: jax.Array, front_end: FrontEnd) -> jax.Array:
    """Magnitude spectrogram: [B, segment_samples] -> [B, n_bins, n_frames].

    Periodic Hann, frames centred, edges reflected without repetition, no scaling (the convention
    of torch.stft with its defaults). ValueError unless hop divides n_fft.
    """
    n_fft, hop = front_end.n_fft, front_end.hop
    if n_fft % hop:
        raise ValueError(f"hop {hop} does not divide n_fft {n_fft}")
    padded = jnp.pad(audio, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    # Overlapping frames are n_fft/hop shifted views of hop-sized blocks: no gather.
    n_blocks = padded.shape[1] // hop
    blocks = padded[:, : n_blocks * hop].reshape(audio.shape[0], n_blocks, hop)
    n_frames = n_blocks - n_fft // hop + 1
    shifted = [blocks[:, i : i + n_frames] for i in range(n_fft // hop)]
    window = jnp.asarray(hann(n_fft), audio.dtype)
    spectrum = jnp.fft.rfft(jnp.concatenate(shifted, axis=-1) * window[None, None, :])
    power = spectrum.real**2 + spectrum.imag**2
    # The slope of sqrt at 0 is infinite: give an empty bin slope 0 instead of NaN.
    empty = power == 0
    magnitude = jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, power)))
    return jnp.swapaxes(magnitude, 1, 2)


@jax.custom_jvp
def _share(part: jax.Array, other: jax.Array, eps: jax.Array) -> jax.Array:
    """part^2 / (part^2 + other^2 + eps), and exactly 0 where that denominator is 0."""
    total = part**2 + other**2 + eps
    return jnp.where(total > 0, part**2 / jnp.where(total > 0, total, 1.0), 0.0)


@_share.defjvp
def _share_jvp(primals, tangents):
    # The textbook slope squares the denominator, which underflows to 0/0 for magnitudes below
    # 1e-9. The share depends on ratios only, so divide by the larger magnitude first. What is left
    # is of the order of 1 / scale; below SLOPE_FLOOR, where a lone peak in silence would send that
    # to infinity, the share counts as constant.
    part, other, eps = primals
    root = jnp.sqrt(eps)
    scale = jnp.maximum(jnp.maximum(part, other), root)
    safe = jnp.where(scale > SLOPE_FLOOR, scale, 1.0)
    p, o, e = part / safe, other / safe, root / safe
    total = jnp.maximum(p**2 + o**2 + e**2, 0.5)
    slope_part = 2 * p * (total - p**2) / total**2
    slope_other = -2 * p**2 * o / total**2
    slope = (slope_part * tangents[0] + slope_other * tangents[1]) / safe
    return _share(*primals), jnp.where(scale > SLOPE_FLOOR, slope, 0.0)


def hpss(residual: jax.Array, front_end: FrontEnd) -> tuple[jax.Array, jax.Array]:
    """Harmonic and percussive parts of a magnitude: [B, F, T] -> two [B, F, T].

    Median along time (harmonic) and frequency (percussive), reflected edges, soft masks of power
    2 (paper III-C, facts of the exported graphs). A part is exactly 0 where both medians are 0.
    """
    width = front_end.hpss_width
    h = median_filter(residual, width, axis=2)
    p = median_filter(residual, width, axis=1)
    eps = jnp.asarray(front_end.hpss_eps, residual.dtype)
    return residual * _share(h, p, eps), residual * _share(p, h, eps)


def mel_db(magnitude: jax.Array, front_end: FrontEnd) -> jax.Array:
    """Mel power in dB: [..., F, T] -> [..., n_mels, T], floored at `amin`, no top-dB clamp."""
    weights = jnp.asarray(mel_filterbank(front_end), magnitude.dtype)
    mel = jnp.einsum("mf,...ft->...mt", weights, magnitude**2, precision=jax.lax.Precision.HIGHEST)
    return 10.0 * jnp.log10(jnp.maximum(mel, front_end.amin))


def delta(x: jax.Array) -> jax.Array:
    """First difference along the last axis with a zero first frame: [..., T] -> [..., T]."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., 1:] - x[..., :-1]], axis=-1)


def seven_channels(residual: jax.Array, front_end: FrontEnd) -> jax.Array:
    """Forensic features: residual magnitude [B, F, T] -> [B, 7, n_mels, T] (paper, Table I).

    Order: mel_res, mel_H, mel_P, delta, delta2, mel_H - mel_P, |delta|. The top-dB clamp is joint
    over residual, harmonic and percussive parts of one segment.
    """
    harmonic, percussive = hpss(residual, front_end)
    views = mel_db(jnp.stack([residual, harmonic, percussive], axis=1), front_end)
    loudest = jnp.max(views, axis=(1, 2, 3), keepdims=True)
    views = jnp.maximum(views, loudest - front_end.top_db)
    mel_res, mel_h, mel_p = views[:, 0], views[:, 1], views[:, 2]
    d = delta(mel_res)
    return jnp.stack([mel_res, mel_h, mel_p, d, delta(d), mel_h - mel_p, jnp.abs(d)], axis=1)
