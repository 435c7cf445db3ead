"""The front end's functions in JAX, as far as the array libraries differ: see `forward`.

Pure functions of batches, jit-compiled by whoever calls them. Gradients are finite everywhere, in
digital silence too. Matrix products state `Precision.HIGHEST`: new GPUs would otherwise run them in
TF32 and lose the low bits in which the residual lives. `dsp_numpy` has the same in NumPy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from artifactnet_jax import texture_xla
from artifactnet_jax.config import FrontEnd
from artifactnet_jax.filterbank import analysis_window
from artifactnet_jax.forward import to_power

if TYPE_CHECKING:
    from jaxtyping import Array, Complex, Float

xp = jnp

SLOPE_FLOOR = 1e-5  # magnitude; its power is `FrontEnd.amin`, the floor of the mel bands

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
# [n_mels, F], [..., F, T]: in this order of axes the sums of a segment do not depend on the batch.
mel_bands = functools.partial(jnp.einsum, "mf,...ft->...mt", precision=jax.lax.Precision.HIGHEST)
statistics = texture_xla.statistics


def stft(
    audio: Float[Array, "B N"], front_end: FrontEnd, window: Float[Array, " n_fft"] | None = None
) -> Complex[Array, "B F T"]:
    """Audio -> complex spectrum.

    The defaults are the convention of torch.stft: periodic Hann, frames centred, edges reflected
    without repetition, no scaling. `window` is that of window "given".
    """
    pad = front_end.stft_pad
    padded = jnp.pad(audio, ((0, 0), (pad, pad)), mode=front_end.stft_edge)
    weights = jnp.asarray(analysis_window(front_end) if window is None else window, audio.dtype)
    frames = _frames(padded, front_end.n_fft, front_end.hop)
    return jnp.swapaxes(jnp.fft.rfft(frames * weights[None, None, :]), 1, 2)


def stft_magnitude(
    audio: Float[Array, "B N"], front_end: FrontEnd, window: Float[Array, " n_fft"] | None = None
) -> Float[Array, "B F T"]:
    """Audio -> spectrogram; see `stft`."""
    return magnitude(stft(audio, front_end, window), front_end)


def magnitude(spectrum: Complex[Array, "*d"], front_end: FrontEnd) -> Float[Array, "*d"]:
    """Complex spectrum -> spectrogram."""
    power = spectrum.real**2 + spectrum.imag**2
    if front_end.spectrum_eps:
        power = power + front_end.spectrum_eps
    # The slope of sqrt at 0 is infinite: give an empty bin slope 0 instead of NaN.
    empty = power == 0
    magnitude = jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, power)))
    if front_end.spectrum_scale != 1:
        magnitude = magnitude * front_end.spectrum_scale
    spectrogram: jax.Array = to_power(magnitude, front_end.spectrum_power, jnp)
    return spectrogram


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


def soft_masks(
    h: Float[Array, "*d"], p: Float[Array, "*d"], front_end: FrontEnd
) -> tuple[Float[Array, "*d"], Float[Array, "*d"]]:
    """Shares of two magnitudes in h^q + p^q + eps, 0 where that sum is 0."""
    eps, exponent = jnp.asarray(front_end.hpss_eps, h.dtype), front_end.hpss_power
    return _soft_mask(h, p, eps, exponent), _soft_mask(p, h, eps, exponent)


def flat_share(
    h: Float[Array, "*d"], p: Float[Array, "*d"], front_end: FrontEnd
) -> Float[Array, ""]:
    """Share of bins where the gradient of `soft_masks` is set to 0."""
    eps, exponent = jnp.asarray(front_end.hpss_eps, h.dtype), front_end.hpss_power
    return jnp.mean(_scale(h, p, eps, exponent)[0] <= SLOPE_FLOOR)


def _scale(
    part: jax.Array, other: jax.Array, eps: jax.Array, exponent: float
) -> tuple[jax.Array, jax.Array]:
    """The largest of what a soft mask weighs, and the magnitude that eps is a power of."""
    root = jnp.sqrt(eps) if exponent == 2 else eps ** (1 / exponent)
    return jnp.maximum(jnp.maximum(part, other), root), root


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _soft_mask(part: jax.Array, other: jax.Array, eps: jax.Array, exponent: float) -> jax.Array:
    top = to_power(part, exponent, jnp)
    total = top + to_power(other, exponent, jnp) + eps
    return jnp.where(total > 0, top / jnp.where(total > 0, total, 1.0), 0.0)


@_soft_mask.defjvp
def _soft_mask_jvp(
    exponent: float, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    # The textbook slope squares the denominator, which underflows to 0/0 for magnitudes below
    # 1e-9. The mask depends on ratios only, so divide by the larger magnitude first. The gradient
    # is of the order of 1 / scale. Below SLOPE_FLOOR it would grow without limit: it is set to 0.
    part, other, eps = primals
    scale, root = _scale(part, other, eps, exponent)
    safe = jnp.where(scale > SLOPE_FLOOR, scale, 1.0)
    p, o, e = part / safe, other / safe, root / safe
    tops, rest = to_power(p, exponent, jnp), to_power(o, exponent, jnp)
    total = jnp.maximum(tops + rest + to_power(e, exponent, jnp), 0.5)
    slope_part = exponent * to_power(p, exponent - 1, jnp) * (total - tops) / total**2
    slope_other = -exponent * tops * to_power(o, exponent - 1, jnp) / total**2
    slope = (slope_part * tangents[0] + slope_other * tangents[1]) / safe
    return _soft_mask(*primals, exponent), jnp.where(scale > SLOPE_FLOOR, slope, 0.0)
