"""Statistics of a spectrogram's texture: what the texture head of the detector looks at.

Ours, not the paper's. A neural decoder leaves its mark on the grain of a spectrogram: how sharply
partials stand out from their neighbours, how fast they waver, how a bin goes with the bins and
frames around it, how deep the holes are. Each of these is a mean over a frequency band and over
time of the spectrogram in dB, most of them after the local mean has been taken away, so that
level, equaliser and bandwidth enter as little as they can. Taken at several window lengths, they
separate generators that were left out of the training better than the seven channels do: see
MODEL_CARD.md for the figures.

One source for NumPy and JAX: `xp` is `numpy` or `jax.numpy`. Arrays keep their dtype, float32 or
float64; any leading axes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from artifactnet_jax.config import Config, FrontEnd, Texture

BOX = 9  # bins and frames of the local mean
PEAK_SIDE = 4  # bins to either side that a partial's peak is compared with
PEAK_DB = 10.0  # by which it exceeds both
SHAPE = (1, 2, 3, 4, 6, 8)  # bins from a peak: how far its flanks have fallen there
SHAPE_DB = 40.0  # of that counted at most
WAVER_DB = 3.0  # of a peak's change between frames counted at most, in one of the two means
ENVELOPE = 15  # frames of the local mean of a band's level
MARGIN = 16  # bins kept above the uppermost edge


def front_end(own: FrontEnd, n_fft: int, hop: int) -> FrontEnd:
    """`own` with the plain magnitude STFT of one resolution: periodic Hann, centred, reflected."""
    return dataclasses.replace(
        own,
        n_fft=n_fft,
        hop=hop,
        window="hann",
        stft_pad=n_fft // 2,
        stft_edge="reflect",
        spectrum_power=1.0,
        spectrum_scale=1.0,
        spectrum_eps=0.0,
    )


def names(texture: Texture, sample_rate: int) -> list[str]:
    """A name for every statistic, in the order of `statistics` over `texture.resolutions`."""
    kinds = ["spread"]
    kinds += [f"lag {df} bins {dt} frames" for df, dt in texture.lags]
    kinds += ["peaks"]
    kinds += [f"flank {q} {what}" for q in SHAPE for what in ("mean", "spread")]
    kinds += [f"{what} {how}" for what in ("bend", "drift") for how in ("mean", "bounded")]
    done = []
    for n_fft, _ in texture.resolutions:
        edges = band_rows(texture, n_fft, sample_rate) * sample_rate / n_fft
        bands = [f"{low:.0f}-{high:.0f} Hz" for low, high in itertools.pairwise(edges)]
        done += [f"{n_fft}: {kind}, {band}" for kind in kinds for band in bands]
        for step in (1, 2):
            pairs = zip(bands[:-step], bands[step:], strict=True)
            done += [f"{n_fft}: envelopes of {low} and {high}" for low, high in pairs]
        done += [f"{n_fft}: envelope spread, {band}" for band in bands]
    return done


def texture_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the head's tensors; none without a texture head."""
    if config.texture is None:
        return {}
    i = len(names(config.texture, config.front_end.sample_rate))
    shapes: dict[str, tuple[int, ...]] = {"texture.mean": (i,), "texture.spread": (i,)}
    for level, o in enumerate(config.texture.hidden):
        shapes |= {f"texture.hidden.{level}.kernel": (i, o), f"texture.hidden.{level}.bias": (o,)}
        i = o
    return shapes | {"texture.out.kernel": (i, 1), "texture.out.bias": (1,)}


def band_rows(texture: Texture, n_fft: int, sample_rate: int) -> np.ndarray:
    """First bin of every band, and the end of the last one: at least one bin each."""
    rows = np.round(np.array(texture.edges) * n_fft / sample_rate).astype(int)
    return np.maximum(rows, np.arange(len(rows)) + 1)


def statistics(magnitude: Any, n_fft: int, texture: Texture, sample_rate: int, xp: Any = np) -> Any:
    """Magnitudes [..., F, T] of one resolution -> its statistics [..., K], the dtype kept.

    Frames that are 60 dB below the loudest one's power count for nothing; of silence every
    statistic is finite.
    """
    rows = band_rows(texture, n_fft, sample_rate)
    top = min(int(rows[-1]) + MARGIN, magnitude.shape[-2])
    p = magnitude[..., :top, :]
    real = p.dtype.type if xp is np else (lambda value: xp.asarray(value, p.dtype))
    power = xp.sum(p * p, axis=-2)
    most = xp.max(power, axis=-1, keepdims=True)
    weight = (power > texture.frame_floor * most).astype(p.dtype)  # [..., T]
    weight = weight / xp.maximum(xp.sum(weight, axis=-1, keepdims=True), 1)
    peak = xp.max(p, axis=(-2, -1), keepdims=True)
    floor = texture.floor * peak + real(1e-12)
    level = real(20 / np.log(10)) * xp.log(p + floor)
    smooth = _local_mean(_local_mean(level, -1, BOX, xp), -2, BOX, xp)
    grain = level - smooth
    if xp is not np:  # what fifty sums read is computed once
        import jax

        level, grain = jax.lax.optimization_barrier((level, grain))

    matrix = np.zeros((len(rows) - 1, top))
    for k, (a, b) in enumerate(itertools.pairwise(rows)):
        matrix[k, a:b] = 1 / (b - a)
    matrix = xp.asarray(matrix.astype(p.dtype))
    column = weight[..., None]

    def band(values: Any) -> Any:  # [..., F, T] -> [..., bands]
        if xp is np:
            by_row = values @ column
        else:
            by_row = xp.sum(values * weight[..., None, :], axis=-1, keepdims=True)
        return _product(matrix, by_row, xp)[..., 0]

    # Without the mean of its band; the bins outside every band keep theirs.
    mean = _product(xp.swapaxes(xp.asarray(matrix > 0, p.dtype), 0, 1), band(grain)[..., None], xp)
    z = grain - mean
    variance = band(z * z) + real(0.05)
    out = [xp.log(variance)]
    padded = xp.pad(z, [(0, 0)] * (z.ndim - 2) + [(8, 8), (8, 8)])
    for df, dt in texture.lags:
        other = padded[..., 8 - df : 8 - df + top, 8 - dt : 8 - dt + z.shape[-1]]
        out.append(band(z * other) / variance)
    out += _peaks(level, band, rows, real, xp)
    return xp.concatenate([*out, *_envelopes(p, matrix, weight, peak, real, xp)], axis=-1)


def of_segment(
    audio: Any, magnitude: Any, config: Config, stft_magnitude: Callable[..., Any], xp: Any = np
) -> Any:
    """What the head reads [..., K]: audio [..., N], its magnitude [..., n_bins, n_frames].

    `stft_magnitude` is that of `reference` or `dsp`.
    """
    own, head = config.front_end, config.texture
    assert head is not None
    parts = []
    for n_fft, hop in head.resolutions:
        plain_stft = front_end(own, n_fft, hop)
        plain = magnitude if plain_stft == own else stft_magnitude(audio, plain_stft)
        parts.append(statistics(plain, n_fft, head, own.sample_rate, xp))
    return xp.concatenate(parts, axis=-1)


def logit(statistics: np.ndarray, texture: Texture, tensors: Mapping[str, np.ndarray]) -> Any:
    """The head in NumPy: statistics [..., K] -> what is added to the CNN's logit [...]."""
    x = normalised(statistics, tensors["texture.mean"], tensors["texture.spread"], texture)
    for level in range(len(texture.hidden)):
        name = f"texture.hidden.{level}"
        x = np.maximum(x @ tensors[f"{name}.kernel"] + tensors[f"{name}.bias"], 0)
    return (x @ tensors["texture.out.kernel"] + tensors["texture.out.bias"])[..., 0]


def normalised(statistics: Any, mean: Any, spread: Any, texture: Texture, xp: Any = np) -> Any:
    """Statistics [..., K] in standard deviations from the mean of the training set, clipped."""
    mean, spread = (x.reshape((1,) * (statistics.ndim - 1) + (-1,)) for x in (mean, spread))
    return xp.clip((statistics - mean) / spread, -texture.limit, texture.limit)


def _product(matrix: Any, x: Any, xp: Any) -> Any:
    """matrix @ x, in float32 on hardware that would take less."""
    if xp is np:
        return matrix @ x
    import jax

    return xp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _local_mean(x: Any, axis: int, width: int, xp: Any) -> Any:
    """Mean of `width` samples along an axis that is reflected without repetition."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (width // 2, width // 2)
    padded = xp.pad(x, widths, mode="reflect")
    n = x.shape[axis]

    def part(k: int) -> Any:
        index = [slice(None)] * x.ndim
        index[axis] = slice(k, k + n)
        return padded[tuple(index)]

    return functools.reduce(lambda total, k: total + part(k), range(1, width), part(0)) / width


def _peaks(level: Any, band: Callable[[Any], Any], rows: Any, real: Any, xp: Any) -> list[Any]:
    """Share of bins that are a partial's peak; the shape of its flanks, and how it wavers."""
    f, t = level.shape[-2:]
    inner = np.zeros((1,) * (level.ndim - 2) + (f, t), bool)
    inner[..., 8 : f - 8, 1 : t - 1] = True
    wide = xp.pad(level, [(0, 0)] * (level.ndim - 2) + [(8, 8), (1, 1)], mode="edge")

    def at(bins: int, frames: int = 0) -> Any:
        return wide[..., 8 + bins : 8 + bins + f, 1 + frames : 1 + frames + t]

    peak = (level >= xp.maximum(at(-1), at(1))) & xp.asarray(inner)
    peak &= level > xp.maximum(at(-PEAK_SIDE), at(PEAK_SIDE)) + real(PEAK_DB)
    peak = peak.astype(level.dtype)
    least = (3 / (np.diff(rows) * t)).astype(level.dtype)  # as if there were three peaks more
    share = band(peak) + xp.asarray(least.reshape((1,) * (level.ndim - 2) + (-1,)))
    out = [xp.log(share)]
    for bins in SHAPE:
        flanks = (at(-bins) + at(bins)) * real(0.5)
        fall = xp.clip(level - flanks, real(0), real(SHAPE_DB)) * peak
        mean = band(fall) / share
        out += [mean / 5, xp.sqrt(xp.maximum(band(fall * fall) / share - mean * mean, 0)) / 5]
    before, after = at(0, -1), at(0, 1)
    for change in (xp.abs(before - 2 * level + after), xp.abs(before - after)):
        change = change * peak
        bounded = xp.minimum(change, real(WAVER_DB))
        out += [xp.log(band(change) / share + real(0.1)), band(bounded) / share]
    return out


def _envelopes(p: Any, matrix: Any, weight: Any, peak: Any, real: Any, xp: Any) -> list[Any]:
    """How the levels of neighbouring bands go together from frame to frame, and their spread."""
    power = _product(matrix, p * p, xp) + real(1e-10) * peak * peak + real(1e-20)
    level = real(10 / np.log(10)) * xp.log(power)
    level = level - _local_mean(level, -1, ENVELOPE, xp)
    weight = weight[..., None, :]
    level = level - xp.sum(level * weight, axis=-1, keepdims=True)
    variance = xp.sum(level * level * weight, axis=-1) + real(1e-6)
    out = []
    for step in (1, 2):
        together = xp.sum(level[..., :-step, :] * level[..., step:, :] * weight, axis=-1)
        out.append(together / xp.sqrt(variance[..., :-step] * variance[..., step:]))
    return [*out, xp.log(xp.sqrt(variance) + real(0.1))]
