"""What training minimises. Pure functions of arrays, float32 (or float64), differentiable.

Phase 1 compares waveforms of residuals (paper III-B: L1 + multi-resolution STFT); all others
compare logits with labels, by binary cross-entropy, and with each other across codecs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from artifactnet_jax import dsp_jax
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.filterbank import analysis_window

RESOLUTIONS = (512, 1024, 2048)  # n_fft of the multi-resolution STFT, hop a quarter of each
LEVEL_FLOOR = 1e-3  # full scale; a clip quieter than that weighs no more than one at this level
# Magnitude below which the logarithmic distance does not look: about that of 16-bit noise.
MAGNITUDE_FLOOR = 1e-3


def masked_audio(spectrum: jax.Array, mask: jax.Array, front_end: FrontEnd, n: int) -> jax.Array:
    """Waveform [B, n] of mask x spectrum (complex [B, F, T], real [B, F, T]), phase as it was.

    Least-squares overlap-add: each frame is windowed again and the sum divided by that of the
    squared windows. ValueError unless the window's length is a multiple of the hop.
    """
    n_fft, hop, pad = front_end.n_fft, front_end.hop, front_end.stft_pad
    if n_fft % hop or front_end.window == "given":
        raise ValueError("distillation needs a Hann window whose length is a multiple of the hop")
    window = jnp.asarray(analysis_window(front_end), mask.dtype)
    frames = (
        jnp.fft.irfft(jnp.swapaxes(spectrum * mask.astype(spectrum.dtype), 1, 2), n_fft)
        * window[None, None, :]
    )
    squares = jnp.broadcast_to(window[None, None, :] ** 2, (1, *frames.shape[1:]))
    total = _overlap_add(frames, hop) / jnp.maximum(_overlap_add(squares, hop), 1e-8)
    return total[:, pad : pad + n]


def _overlap_add(frames: jax.Array, hop: int) -> jax.Array:
    """Frames [B, T, n_fft] every `hop` samples -> [B, (T - 1) * hop + n_fft]."""
    b, t, n_fft = frames.shape
    parts = frames.reshape(b, t, n_fft // hop, hop)
    last = parts.shape[2] - 1
    padded = [
        jnp.pad(parts[:, :, k], ((0, 0), (k, last - k), (0, 0))) for k in range(parts.shape[2])
    ]
    total: jax.Array = sum(padded[1:], start=padded[0])
    return total.reshape(b, -1)


def multi_resolution_stft(estimate: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over `RESOLUTIONS` of spectral convergence plus log-magnitude L1: [B, n] x 2 -> [B].

    Spectral convergence is |T - E| / |T| (Frobenius norms of magnitudes). Where the target is
    silent the ratio is taken to the norm of `MAGNITUDE_FLOOR` instead.
    """
    total = jnp.zeros(len(target), target.dtype)
    for n_fft in RESOLUTIONS:
        grid = dataclasses.replace(FrontEnd(), n_fft=n_fft, hop=n_fft // 4, stft_pad=n_fft // 2)
        e, t = (dsp_jax.stft_magnitude(x, grid) for x in (estimate, target))
        floor = MAGNITUDE_FLOOR * (t[0].size ** 0.5)
        convergence = _norm(t - e) / jnp.maximum(_norm(t), floor)
        e, t = (jnp.log(jnp.maximum(x, MAGNITUDE_FLOOR)) for x in (e, t))
        total = total + convergence + jnp.mean(jnp.abs(t - e), axis=(1, 2))
    return total / len(RESOLUTIONS)


def _norm(x: jax.Array) -> jax.Array:
    """Frobenius norm of each [F, T], with slope 0 where it is 0: [B, F, T] -> [B]."""
    squares = jnp.sum(x**2, axis=(1, 2))
    empty = squares == 0
    return jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, squares)))


def waveform_l1(estimate: jax.Array, target: jax.Array, audio: jax.Array) -> jax.Array:
    """Mean |estimate - target| over that of the input's own samples: three [B, n] -> [B].

    The ratio makes a quiet clip count like a loud one.
    """
    level = jnp.maximum(jnp.mean(jnp.abs(audio), axis=1), LEVEL_FLOOR)
    return jnp.mean(jnp.abs(estimate - target), axis=1) / level


def binary_cross_entropy(logit: jax.Array, label: jax.Array, smoothing: float) -> jax.Array:
    """Scalar from logits [B] and labels [B] in {0, 1}: each class counts half, whatever its number.

    A label is moved `smoothing` / 2 towards the other. With one class present it is its mean.
    """
    loss = optax.sigmoid_binary_cross_entropy(logit, label * (1 - smoothing) + smoothing / 2)
    ai, real = jnp.sum(label), jnp.sum(1 - label)
    weight = label / jnp.maximum(ai, 1) + (1 - label) / jnp.maximum(real, 1)
    return jnp.sum(loss * weight) / jnp.sum(weight)


def cross_codec_delta(logit: jax.Array) -> jax.Array:
    """Largest less smallest P(AI) over the versions of each track (paper IV-H): [B, V] -> [B]."""
    score = jax.nn.sigmoid(logit)
    return jnp.max(score, axis=1) - jnp.min(score, axis=1)
