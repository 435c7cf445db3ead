"""The statistics of `texture` in JAX: all resolutions in one array, so in few kernels.

Another algorithm than NumPy's on purpose: that one lists the few peaks by index, this one has fixed
shapes. Spectrograms of all resolutions have about the same number of values, but no size in common:
they are cut into pieces of equally many frames, which lie beside each other along the bins, each
with a margin of what is around it. Then every step is one for all of them: a shift by bins or
frames is the same slice of the whole array, and a mean over frames is a sum over its rows. What a
piece belongs to is said by constants along the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.config import Texture
from artifactnet_jax.texture import (
    BOX,
    ENVELOPE,
    MARGIN,
    PEAK_DB,
    PEAK_SIDE,
    SHAPE,
    SHAPE_DB,
    WAVER_DB,
    band_matrix,
    band_rows,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SIDE = max(SHAPE)  # bins around a piece: as far as flanks, lags and the local mean reach
HALF = BOX // 2
ALIGNED = 128  # columns, of which there is a multiple
MOST = 6  # sums of one kernel: with nine its registers do not suffice
FEW = 31  # rows that XLA sums in a plain loop on a GPU, so that one kernel takes many sums


class Layout:
    """Where the pieces of several spectrograms lie; arrays by column are constants."""

    def __init__(
        self, sizes: Sequence[tuple[int, int]], rows: Sequence[np.ndarray], texture: Texture
    ):
        """`sizes` (bins up to the top, frames) and edges of the bands, by resolution."""
        shifts = [dt for _, dt in texture.lags]
        self.before, self.after = max(0, *shifts) + HALF, max(0, -min(shifts)) + HALF
        self.sizes = [frames for _, frames in sizes]
        self.groups = -(-min(self.sizes) // FEW)
        self.length = -(-min(self.sizes) // self.groups) * self.groups  # of a piece
        self.pieces = [-(-frames // self.length) for frames in self.sizes]
        columns: list[np.ndarray] = []
        piece = 0
        for k, (top, frames) in enumerate(sizes):
            bins = np.arange(-SIDE, top + SIDE)
            band = np.searchsorted(rows[k], bins, "right") - 1
            band = np.where((band >= 0) & (band < len(rows[k]) - 1), band, -1)
            for n in range(self.pieces[k]):
                what = (k, piece + n, n * self.length, top, frames, bins, band)
                columns.append(np.stack(np.broadcast_arrays(*what)))
            piece += self.pieces[k]
        values = np.concatenate(columns, axis=1).astype(np.int32)
        # Columns that are of nothing, up to a size that suits memory: repeats of the first one.
        count = values.shape[1]
        values = np.pad(values, ((0, 0), (0, -count % ALIGNED)), mode="wrap")
        values[5:, count:] = -1  # bin and band
        self.resolution, self.piece, self.start, self.top, self.frames, self.bin, self.band = values
        self.widths = np.stack([np.diff(edges) for edges in rows])
        # Mean over each band of each resolution: [resolutions * bands, columns].
        own = self.resolution * self.widths.shape[1] + self.band
        hits = (own == np.arange(self.widths.size)[:, None]) & (self.band >= 0)
        self.means = hits / self.widths.reshape(-1, 1)

    def frame(self, first: int, count: int, columns: slice = slice(None)) -> jax.Array:
        """Frame of each row from `first` on, counted from the piece's own: [count, columns].

        Computed where it is used: as a constant it would be as large as the data.
        """
        start = jnp.asarray(self.start[columns])[None]
        return first + start + lax.broadcasted_iota(jnp.int32, (count, start.shape[1]), 0)


def statistics(
    found: Iterable[tuple[int, Float[Array, "*b F T"]]], texture: Texture, sample_rate: int
) -> Float[Array, "*b K"]:
    """Window lengths and magnitudes of all resolutions -> their statistics, the dtype kept."""
    n_ffts, magnitudes = zip(*found, strict=True)
    lead = magnitudes[0].shape[:-2]
    flat = tuple(each.reshape(-1, *each.shape[-2:]) for each in magnitudes)
    done: jax.Array = _statistics(flat, n_ffts, texture, sample_rate).reshape(*lead, -1)
    return done


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _statistics(
    magnitudes: tuple[jax.Array, ...], n_ffts: tuple[int, ...], texture: Texture, sample_rate: int
) -> jax.Array:
    rows = [band_rows(texture, n_fft, sample_rate) for n_fft in n_ffts]
    tops = [min(int(r[-1]) + MARGIN, m.shape[1]) for r, m in zip(rows, magnitudes, strict=True)]
    parts = [jnp.swapaxes(m[:, :top], 1, 2) for m, top in zip(magnitudes, tops, strict=True)]
    layout = Layout([(part.shape[2], part.shape[1]) for part in parts], rows, texture)
    dtype, batch = parts[0].dtype, len(parts[0])

    most = max(part[0].size for part in parts)
    flat = [(part * part).reshape(batch, -1) for part in parts]
    flat = [jnp.pad(each, ((0, 0), (0, most - each.shape[1]))) for each in flat]
    stacked = lax.optimization_barrier(jnp.stack(flat, axis=1))  # [batch, resolutions, values]
    peak = jnp.sqrt(jnp.max(stacked, axis=-1))
    squares = [stacked[:, k, : part[0].size].reshape(part.shape) for k, part in enumerate(parts)]
    power, weight, count = _frames(squares, rows, layout, texture)
    floor = texture.floor * peak[:, layout.resolution] + jnp.asarray(1e-12, dtype)

    # In dB, with the reflected margins that the local mean reads.
    height = layout.length + layout.before + layout.after
    last = jnp.asarray(layout.frames - 1)[None]
    first = _reflected(layout.bin, layout.top - 1) + layout.resolution * np.int32(most)
    place = _reflected(layout.frame(-layout.before, height), last) * jnp.asarray(layout.top)[None]
    place = place + jnp.asarray(first)[None]
    near = _apart(jnp.take(stacked.reshape(batch, -1), place, axis=1, mode="clip"))
    near = jnp.sqrt(near)
    level = jnp.asarray(20 / np.log(10), dtype) * jnp.log(near + floor[:, None])
    level = lax.optimization_barrier(level)  # here and below: computed once for all its readers
    box = lax.optimization_barrier(_box(level, 1))
    wide = [(0, 0), (0, 0), (HALF, HALF)]
    grain = level[:, HALF:-HALF] - jnp.pad(_box(box, 2), wide)
    own = slice(layout.before - HALF, layout.before - HALF + layout.length)
    heard = _by_piece(weight, layout)
    grain = lax.optimization_barrier(grain)

    means = jnp.asarray(layout.means, dtype)
    inside = jnp.asarray((layout.bin >= 0) & (layout.bin < layout.top))[None]
    mean = _over_columns(
        _over_frames(lambda *x: [x[0] * x[1]], (grain[:, own], heard), layout)[0], means
    )
    # Without the mean of its band; the bins outside every band keep theirs.
    bands = layout.widths.shape[1]
    band = np.where(layout.band < 0, means.shape[0], layout.resolution * bands + layout.band)
    taken = jnp.pad(mean, ((0, 0), (0, 1)))[:, band] / jnp.maximum(count[:, layout.resolution], 1)
    there = layout.frame(HALF - layout.before, grain.shape[1])
    there = (there >= 0) & (there <= last) & inside
    z = jnp.where(there[None], grain - taken[:, None], jnp.zeros_like(grain))
    z = lax.optimization_barrier(jnp.pad(z, ((0, 0), (0, 0), (SIDE, 0))))
    lags = [(0, 0), *texture.lags]

    def shifted(z: jax.Array, bins: int, frames: int) -> jax.Array:
        row, column = own.start - frames, SIDE - bins
        return z[:, row : row + layout.length, column : column + grain.shape[2]]

    def together(z: jax.Array, weighted: jax.Array) -> list[jax.Array]:
        return [weighted * shifted(z, *lag) for lag in lags]

    weighted = lax.optimization_barrier(shifted(z, 0, 0) * heard)
    sums = _over_frames(together, (z, weighted), layout)
    sums += _peaks(level, heard, layout)
    kinds = _product("kbc,mc->bkm", jnp.stack(sums), means)
    kinds = jnp.swapaxes(kinds.reshape(batch, len(sums), -1, bands), 1, 2)
    kinds = kinds / jnp.maximum(count, 1)[:, :, None, None]
    named = _named(kinds, len(lags), layout)
    envelopes = _envelopes(power, weight, count, peak, layout.sizes)
    return jnp.concatenate([named, *envelopes], axis=-1).reshape(batch, -1)


def _product(terms: str, *arrays: jax.Array) -> jax.Array:
    """Sum of products, in float32 on hardware that would take less."""
    return jnp.einsum(terms, *arrays, precision=lax.Precision.HIGHEST)


def _apart(x: jax.Array) -> jax.Array:
    """`x`, which on a CPU is stored: fused with what follows, that would be scalar code."""
    done: jax.Array = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
    return done


def _over_frames(
    terms: Callable[..., list[jax.Array]], arrays: tuple[jax.Array, ...], layout: Layout
) -> list[jax.Array]:
    """Sums over the rows of what `terms` makes of the arrays: [batch, columns] each."""

    def stored(*arrays: jax.Array) -> list[jax.Array]:
        # On a CPU, XLA fuses a sum with its terms into scalar code, several times slower.
        values = lax.optimization_barrier(terms(*arrays))
        ones = jnp.ones((len(values[0]), 1, layout.length), values[0].dtype)
        return [_product("bir,brc->bic", ones, value)[:, 0] for value in values]

    def fused(*arrays: jax.Array) -> list[jax.Array]:
        sums: list[jax.Array] = []
        for k in range(0, len(terms(*arrays)), MOST):
            arrays = lax.optimization_barrier(arrays)  # so that these make a kernel of their own
            some = terms(*arrays)[k : k + MOST]
            groups = [x.reshape(len(x), layout.groups, -1, x.shape[2]) for x in some]
            sums += lax.optimization_barrier([jnp.sum(each, axis=2) for each in groups])
        return [jnp.sum(each, axis=1) for each in sums]

    done: list[jax.Array] = lax.platform_dependent(*arrays, cpu=stored, default=fused)
    return done


def _over_columns(sums: jax.Array, means: jax.Array) -> jax.Array:
    """Means over bands of sums over frames: [batch, columns] -> [batch, resolutions * bands]."""
    return jnp.sum(sums[:, None] * means[None], axis=-1)


def _reflected(index: Any, last: Any) -> Any:
    """Indices into samples up to `last` that go on by reflection about the first and the last."""
    return (last - abs(last - abs(index))).clip(0)


def _box(x: jax.Array, axis: int) -> jax.Array:
    """Mean of `BOX` neighbours; the axis gets BOX - 1 shorter."""
    n = x.shape[axis] - BOX + 1
    total = lax.slice_in_dim(x, 0, n, axis=axis)
    for k in range(1, BOX):
        total = total + lax.slice_in_dim(x, k, k + n, axis=axis)
    return total / BOX


def _frames(
    squares: Sequence[jax.Array], rows: Sequence[np.ndarray], layout: Layout, texture: Texture
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Frames of all resolutions, one after the other: power by band, which are heard, how many.

    [batch, bands, frames]; 0 or 1 [batch, frames]; [batch, resolutions].
    """
    dtype = squares[0].dtype
    found = []
    for square, edges in zip(squares, rows, strict=True):
        matrix = band_matrix(edges, square.shape[2])
        matrix = np.concatenate([matrix, np.ones((1, square.shape[2]))])
        found.append(
            lax.platform_dependent(
                square, jnp.asarray(matrix, dtype), cpu=_as_product, default=_as_sums
            )
        )
    both = lax.optimization_barrier(jnp.concatenate(found, axis=-1))
    power, total = both[:, :-1], both[:, -1]
    own = jnp.asarray(_owner(layout.sizes))[None]
    zero = jnp.zeros((), dtype)
    most = jnp.max(jnp.where(own, total[:, None], zero), axis=-1)
    weight = (total > texture.frame_floor * _spread(most, layout.sizes)).astype(dtype)
    weight = lax.optimization_barrier(weight)
    count = jnp.sum(jnp.where(own, weight[:, None], zero), axis=-1)
    return power, weight, count


def _as_product(square: jax.Array, matrix: jax.Array) -> jax.Array:
    return _product("btf,kf->bkt", square, matrix)


def _as_sums(square: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(jnp.sum(square[:, :, None] * matrix[None, None], axis=-1), 1, 2)


def _owner(sizes: Sequence[int]) -> np.ndarray:
    """Whether a frame is of a resolution: [resolutions, frames]."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    own: np.ndarray = owner == np.arange(len(sizes))[:, None]
    return own


def _spread(values: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """[..., resolutions] -> [..., frames]."""
    return values[..., np.repeat(np.arange(len(sizes)), sizes)]


def _by_piece(weight: jax.Array, layout: Layout) -> jax.Array:
    """Weights of frames where the pieces have them: [batch, length, columns]."""
    frame, last = layout.frame(0, layout.length), jnp.asarray(layout.frames - 1)[None]
    start = np.cumsum([0, *layout.sizes[:-1]])[layout.resolution].astype(np.int32)
    place = jnp.minimum(frame, last) + jnp.asarray(start)[None]
    found = jnp.take(weight, place, axis=1, mode="clip")
    return jnp.where((frame <= last)[None], found, jnp.zeros((), weight.dtype))


def _peaks(level: jax.Array, heard: jax.Array, layout: Layout) -> list[jax.Array]:
    """Weighted sums over frames for partials' peaks: [batch, columns] each.

    Their number; each flank's fall and its square; the two changes, plain and bounded. None within
    8 bins or a frame of the rim is a peak.
    """
    dtype = level.dtype
    size = level.shape[2] - 2 * SIDE

    def real(value: float) -> jax.Array:
        return jnp.asarray(value, dtype)

    def at(level: jax.Array, bins: int, frames: int = 0) -> jax.Array:
        row, column = layout.before + frames, SIDE + bins
        return level[:, row : row + layout.length, column : column + size]

    inner = slice(SIDE, SIDE + size)
    frame, last = layout.frame(0, layout.length, inner), layout.frames[inner] - 1
    inside = (layout.bin[inner] >= SIDE) & (layout.bin[inner] < layout.top[inner] - SIDE)
    where = (frame > 0) & (frame < jnp.asarray(last)[None]) & jnp.asarray(inside)[None]
    height, sides = at(level, 0), [at(level, side) for side in (-PEAK_SIDE, PEAK_SIDE)]
    peak = height >= jnp.maximum(at(level, -1), at(level, 1))
    peak &= height > jnp.maximum(*sides) + real(PEAK_DB)
    peak &= where[None]
    found = lax.optimization_barrier(peak.astype(dtype) * heard[:, :, inner])

    def values(level: jax.Array, found: jax.Array) -> list[jax.Array]:
        height, done = at(level, 0), [found]
        for bins in SHAPE:
            fall = height - (at(level, -bins) + at(level, bins)) * real(0.5)
            fall = jnp.clip(fall, real(0), real(SHAPE_DB))
            done += [fall * found, fall * fall * found]
        before, after = at(level, 0, -1), at(level, 0, 1)
        for change in (jnp.abs(before - 2 * height + after), jnp.abs(before - after)):
            done += [change * found, jnp.minimum(change, real(WAVER_DB)) * found]
        return done

    sums = _over_frames(values, (level, found), layout)
    return [jnp.pad(each, ((0, 0), (SIDE, SIDE))) for each in sums]


def _named(kinds: jax.Array, lags: int, layout: Layout) -> jax.Array:
    """Sums over frames and means over bands [batch, resolutions, kinds, bands] -> statistics.

    Every formula for every kind, of which each takes its own: cut and joined, they were more
    kernels than values.
    """
    dtype, count = kinds.dtype, kinds.shape[2]
    frames = np.array(layout.sizes)[:, None]
    least = jnp.asarray(3 / (layout.widths * frames), dtype)  # as if there were three peaks more
    variance = kinds[:, :, :1] + jnp.asarray(0.05, dtype)
    share = kinds[:, :, lags : lags + 1] + least[None, :, None]
    ratio = kinds / share
    before = jnp.pad(ratio[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    spread = jnp.sqrt(jnp.maximum(ratio - before * before, 0))
    kind = np.arange(count)
    flank = (kind > lags) & (kind < count - 4)
    even = (kind - lags) % 2 == 0
    chosen = [
        (kind == 0, jnp.log(variance)),
        ((kind > 0) & (kind < lags), kinds / variance),
        (kind == lags, jnp.log(share)),
        (flank & ~even, ratio / 5),
        (flank & even, spread / 5),
        (~flank & ~even, jnp.log(jnp.maximum(ratio, 0) + jnp.asarray(0.1, dtype))),
    ]
    done = ratio
    for where, value in reversed(chosen):
        here = jnp.asarray(where)[None, None, :, None]
        done = jnp.where(here, jnp.broadcast_to(value, done.shape), done)
    return done.reshape(*kinds.shape[:2], -1)


def _envelopes(
    power: jax.Array,
    weight: jax.Array,
    count: jax.Array,
    peak: jax.Array,
    sizes: Sequence[int],
) -> list[jax.Array]:
    """How the levels of neighbouring bands go together, and their spread: [batch, res, ...]."""
    dtype, half = power.dtype, ENVELOPE // 2

    def real(value: float) -> jax.Array:
        return jnp.asarray(value, dtype)

    least = _spread(real(1e-10) * peak * peak + real(1e-20), sizes)
    level = real(10 / np.log(10)) * jnp.log(power + least[:, None])
    level = lax.optimization_barrier(level)
    starts = np.cumsum([0, *sizes[:-1]])
    shifts = np.arange(-half, half + 1)[:, None]
    near = [
        s + _reflected(np.arange(n) + shifts, n - 1) for s, n in zip(starts, sizes, strict=True)
    ]
    smooth = jnp.sum(level[:, :, np.concatenate(near, axis=1)], axis=2) / ENVELOPE
    level = lax.optimization_barrier(level - smooth)
    heard = weight[:, None] * jnp.asarray(_owner(sizes), dtype)[None]
    heard = heard[:, :, None]  # [batch, resolutions, 1, frames]
    count = jnp.maximum(count, 1)[:, :, None]
    mean = jnp.sum(level[:, None] * heard, axis=-1) / count
    level = lax.optimization_barrier(level - _spread(jnp.swapaxes(mean, 1, 2), sizes))
    ends = [((0, 0), (0, step), (0, 0)) for step in range(3)]
    pairs = [level * jnp.pad(level[:, step:], ends[step]) for step in range(3)]
    sums = [jnp.sum(pair[:, None] * heard, axis=-1) / count for pair in pairs]
    spread = jnp.sqrt(sums[0] + real(1e-6))
    done = [sums[step][..., :-step] / (spread[..., :-step] * spread[..., step:]) for step in (1, 2)]
    return [*done, jnp.log(spread + real(0.1))]
