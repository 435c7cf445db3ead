"""Statistics of a spectrogram's texture: what the texture head of the detector looks at.

Ours, not the paper's. A neural decoder leaves its mark on the grain of a spectrogram: how sharply
partials stand out from their neighbours, how fast they waver, how a bin goes with the bins and
frames around it, how deep the holes are. Each of these is a mean over a frequency band and over
time of the spectrogram in dB, most of them after the local mean has been taken away, so that
level, equaliser and bandwidth enter as little as they can. Taken at several window lengths, they
separate generators that were left out of the training better than the seven channels do: see
MODEL_CARD.md for the figures.

Here in NumPy, of one segment, in float32 or float64 as the input. `texture_xla` computes the same
in JAX, by another algorithm on purpose: one formula for both would be slower on one side.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from artifactnet_jax.config import Config, FrontEnd, Texture

if TYPE_CHECKING:
    from jaxtyping import Float, Int

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


def band_rows(texture: Texture, n_fft: int, sample_rate: int) -> Int[np.ndarray, " edges"]:
    """First bin of every band, and the end of the last one: at least one bin each."""
    rows = np.round(np.array(texture.edges) * n_fft / sample_rate).astype(int)
    starts: np.ndarray = np.maximum(rows, np.arange(len(rows)) + 1)
    return starts


def band_matrix(rows: Int[np.ndarray, " edges"], bins: int) -> Float[np.ndarray, "edges-1 {bins}"]:
    """Means over bands as a product, float64."""
    matrix = np.zeros((len(rows) - 1, bins))
    for k, (a, b) in enumerate(itertools.pairwise(rows)):
        matrix[k, a:b] = 1 / (b - a)
    return matrix


def statistics(
    magnitude: Float[np.ndarray, "F T"], n_fft: int, texture: Texture, sample_rate: int
) -> Float[np.ndarray, " K"]:
    """Magnitude of one resolution -> its statistics, the dtype kept.

    Frames that are 60 dB below the loudest one's power count for nothing; of silence every
    statistic is finite. `texture_xla.statistics` is the same in JAX.
    """
    rows = band_rows(texture, n_fft, sample_rate)
    top = min(int(rows[-1]) + MARGIN, len(magnitude))
    p = magnitude[:top]
    frames, real = p.shape[1], p.dtype.type
    square = p * p
    power = square.sum(axis=0)
    weight = (power > texture.frame_floor * power.max()).astype(p.dtype)
    weight /= max(weight.sum(), 1)
    peak = p.max()

    # In dB, and with the reflected margins that the local mean reads.
    half = BOX // 2
    padded = np.empty((top + 2 * half, frames + 2 * half), p.dtype)
    level = padded[half:-half, half:-half]
    np.add(p, texture.floor * peak + real(1e-12), out=level)
    np.log(level, out=level)
    level *= real(20 / np.log(10))
    padded[:half, half:-half] = level[half:0:-1]
    padded[-half:, half:-half] = level[-2 : -2 - half : -1]
    padded[:, :half] = padded[:, 2 * half : half : -1]
    padded[:, -half:] = padded[:, -2 - half : -2 - 2 * half : -1]
    z = _box_sum(_box_sum(padded, BOX, 1), BOX, 0)
    z *= real(-1 / BOX**2)
    z += level

    matrix = band_matrix(rows, top).astype(p.dtype)
    # Without the mean of its band; the bins outside every band keep theirs.
    z[rows[0] : rows[-1]] -= np.repeat(matrix @ (z @ weight), np.diff(rows))[:, None]
    weighted = z * weight
    variance = matrix @ np.vecdot(weighted, z) + real(0.05)
    together = np.zeros((len(texture.lags), top), p.dtype)
    for row, (df, dt) in zip(together, texture.lags, strict=True):
        here = slice(max(dt, 0), max(frames + min(dt, 0), 0))
        there = slice(max(-dt, 0), max(frames - max(dt, 0), 0))
        np.vecdot(weighted[df:, here], z[: top - df, there], out=row[df:])
    out = [np.log(variance), (together @ matrix.T / variance).ravel()]
    out += _peaks(level, weight, rows)
    return np.concatenate([*out, *_envelopes(matrix @ square, weight, peak)])


def spectrograms(
    audio: Any, magnitude: Any, config: Config, stft_magnitude: Callable[..., Any]
) -> Iterator[tuple[int, Any]]:
    """Window length and magnitude [..., F, T] of every resolution, in their order.

    audio [..., N]; its magnitude [..., n_bins, n_frames] is taken where a resolution is the front
    end's own. `stft_magnitude` is that of `dsp_numpy` or `dsp_jax`.
    """
    own, head = config.front_end, config.texture
    assert head is not None
    for n_fft, hop in head.resolutions:
        plain = front_end(own, n_fft, hop)
        yield n_fft, magnitude if plain == own else stft_magnitude(audio, plain)


def logit(
    statistics: Float[Any, "*b K"], texture: Texture, tensors: Mapping[str, Any], lib: Any
) -> Float[Any, "*b"]:
    """The head: statistics -> what is added to the CNN's logit.

    `tensors` by full name, `lib` is `dsp_numpy` or `dsp_jax`.
    """
    mean, std = tensors["texture.mean"], tensors["texture.spread"]
    return dense(normalised(statistics, mean, std, texture, lib.xp), texture, tensors, lib)


def dense(
    x: Any,
    texture: Texture,
    tensors: Mapping[str, Any],
    lib: Any,
    after: Callable[[Any, int], Any] = lambda x, level: x,
) -> Any:
    """The layers of the head: normalised statistics [..., K] -> logits [...].

    `after` follows each hidden layer, with its level, as dropout does in training.
    """
    for level in range(len(texture.hidden) + 1):
        hidden = level < len(texture.hidden)
        name = f"texture.hidden.{level}" if hidden else "texture.out"
        bias = tensors[f"{name}.bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        x = lib.matmul(x, tensors[f"{name}.kernel"]) + bias
        x = after(lib.xp.maximum(x, 0), level) if hidden else x
    return x[..., 0]


def normalised(statistics: Any, mean: Any, spread: Any, texture: Texture, xp: Any = np) -> Any:
    """Statistics [..., K] in standard deviations from the mean of the training set, clipped."""
    mean, spread = (x.reshape((1,) * (statistics.ndim - 1) + (-1,)) for x in (mean, spread))
    return xp.clip((statistics - mean) / spread, -texture.limit, texture.limit)


def _box_sum(x: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Sums of `width` consecutive samples of an axis, which gets width - 1 shorter.

    By doubling: sums of 1, 2, 4 ... samples, of which those in the binary form of the width add up.
    """

    def part(values: np.ndarray, start: int, count: int) -> np.ndarray:
        span = slice(start, start + count)
        return values[span] if axis == 0 else values[:, span]

    count = x.shape[axis] - width + 1
    total, done, span = None, 0, 1
    while True:
        if width & span:
            piece = part(x, done, count)
            total = piece if total is None else total + piece
            done += span
        if 2 * span > width:
            assert total is not None
            return total
        more = x.shape[axis] - span
        x, span = part(x, 0, more) + part(x, span, more), 2 * span


def _peaks(level: np.ndarray, weight: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Share of bins that are a partial's peak; the shape of its flanks, and how it wavers.

    Peaks are few: what follows the search for them is of their neighbourhoods alone.
    """
    (f, t), real = level.shape, level.dtype.type
    first, last = max(8, rows[0]), max(8, rows[0], min(f - 8, rows[-1]))

    def at(bins: int) -> np.ndarray:
        return level[first + bins : last + bins, 1:-1]

    side = np.maximum(at(-PEAK_SIDE), at(PEAK_SIDE))
    side += real(PEAK_DB)
    found = at(0) > side
    found &= at(0) >= np.maximum(at(-1), at(1))
    row, frame = np.divmod(np.flatnonzero(found), t - 2)
    row, frame = row + first, frame + 1

    height = level[row, frame]
    values = [np.ones_like(height)]
    for q in SHAPE:
        flanks = (level[row - q, frame] + level[row + q, frame]) * real(0.5)
        fall = np.clip(height - flanks, real(0), real(SHAPE_DB))
        values += [fall, fall * fall]
    before, after = level[row, frame - 1], level[row, frame + 1]
    for change in (np.abs(before - 2 * height + after), np.abs(before - after)):
        values += [change, np.minimum(change, real(WAVER_DB))]
    table, heard = np.stack(values), weight[frame]
    sizes = np.diff(rows)
    sums = np.empty((len(values), len(sizes)), level.dtype)
    for band, (a, b) in enumerate(itertools.pairwise(np.searchsorted(row, rows))):
        sums[:, band] = table[:, a:b] @ heard[a:b] / real(sizes[band])

    share = sums[0] + (3 / (sizes * t)).astype(level.dtype)  # as if there were three peaks more
    out, sums = [np.log(share)], sums[1:] / share
    flanks, changes = sums[: 2 * len(SHAPE)], sums[2 * len(SHAPE) :]
    for mean, square in zip(flanks[::2], flanks[1::2], strict=True):
        out += [mean / 5, np.sqrt(np.maximum(square - mean * mean, 0)) / 5]
    for mean, bounded in zip(changes[::2], changes[1::2], strict=True):
        out += [np.log(mean + real(0.1)), bounded]
    return out


def _envelopes(power: np.ndarray, weight: np.ndarray, peak: Any) -> list[np.ndarray]:
    """How the levels of neighbouring bands go together from frame to frame, and their spread."""
    real, half = power.dtype.type, ENVELOPE // 2
    level = real(10 / np.log(10)) * np.log(power + (real(1e-10) * peak * peak + real(1e-20)))
    smooth = _box_sum(np.pad(level, ((0, 0), (half, half)), mode="reflect"), ENVELOPE, 1)
    level -= smooth / real(ENVELOPE)
    level -= (level @ weight)[:, None]
    weighted = level * weight
    variance = np.vecdot(weighted, level) + real(1e-6)
    out = []
    for step in (1, 2):
        together = np.vecdot(weighted[:-step], level[step:])
        out.append(together / np.sqrt(variance[:-step] * variance[step:]))
    return [*out, np.log(np.sqrt(variance) + real(0.1))]
