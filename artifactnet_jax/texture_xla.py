"""The statistics of `texture` in JAX, in few kernels: compile time goes by their number.

Another algorithm than NumPy's on purpose: that one lists the few peaks by index, this one has fixed
shapes. On a CPU, XLA fuses a reduction with its inputs into scalar code, four times slower. So the
terms of a sum over frames are stored, and multiplied by a column. Lags and flanks are loops over
one compiled body each.
"""

from __future__ import annotations

import functools
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


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def statistics(
    magnitude: Float[Array, "*b F T"], n_fft: int, texture: Texture, sample_rate: int
) -> Float[Array, "*b K"]:
    """Magnitudes of one resolution -> its statistics, the dtype kept."""
    rows = band_rows(texture, n_fft, sample_rate)
    top = min(int(rows[-1]) + MARGIN, magnitude.shape[-2])
    p = magnitude[..., :top, :]
    frames, dtype, lead = p.shape[-1], p.dtype, p.ndim - 2

    def real(value: Any) -> jax.Array:
        return jnp.asarray(value, dtype)

    def shifted(x: jax.Array, row: Any, column: Any, size: tuple[int, int]) -> jax.Array:
        starts = (*[0] * lead, row, column)
        return lax.dynamic_slice(x, starts, (*x.shape[:-2], *size))

    square = p * p
    power = jnp.sum(square, axis=-2)
    most = jnp.max(power, axis=-1, keepdims=True)
    weight = (power > texture.frame_floor * most).astype(dtype)
    weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1)
    weight, column = weight[..., None, :], weight[..., None]
    peak = jnp.max(p, axis=(-2, -1), keepdims=True)
    level = real(20 / np.log(10)) * jnp.log(p + (texture.floor * peak + real(1e-12)))
    level = lax.optimization_barrier(level)  # here and below: computed once for all its readers
    grain = lax.optimization_barrier(level - _local_mean(_local_mean(level, -1, BOX), -2, BOX))

    means = band_matrix(rows, top)
    matrix, inside = real(means), real(means.T > 0)
    # Without the mean of its band; the bins outside every band keep theirs.
    z = grain - _product(inside, _product(matrix, _product(grain, column)))
    wide = jnp.pad(z, [*lead * [(0, 0)], (8, 8), (8, 8)])
    weighted, wide = lax.optimization_barrier((z * weight, wide))
    ones = jnp.ones((frames, 1), dtype)

    def together(start: jax.Array) -> jax.Array:
        other = shifted(wide, start[0], start[1], (top, frames))
        return _product(weighted * other, ones)[..., 0]

    lags = np.array([(0, 0), *texture.lags], np.int32)
    sums = [lax.map(together, jnp.asarray(8 - lags)), *_peaks(level, weight, shifted, real)]
    kinds = _product(jnp.concatenate(sums), matrix.T)  # [kinds, ..., bands]

    n, bands = len(lags), kinds.shape[1:]
    variance = kinds[:1] + real(0.05)
    least = real(3 / (np.diff(rows) * frames))  # as if there were three peaks more
    share = kinds[n : n + 1] + least.reshape((1,) * (lead + 1) + (-1,))
    flanks = (kinds[n + 1 : -4] / share).reshape(len(SHAPE), 2, *bands)
    mean = flanks[:, :1]
    spread = jnp.sqrt(jnp.maximum(flanks[:, 1:] - mean * mean, 0))
    flanks = jnp.concatenate([mean, spread], axis=1) / 5
    changes = (kinds[-4:] / share).reshape(2, 2, *bands)
    changes = jnp.concatenate([jnp.log(changes[:, :1] + real(0.1)), changes[:, 1:]], axis=1)
    out = [jnp.log(variance), kinds[1:n] / variance, jnp.log(share)]
    out += [part.reshape(-1, *bands) for part in (flanks, changes)]
    named = jnp.moveaxis(jnp.concatenate(out), 0, -2)
    named = named.reshape(*named.shape[:-2], -1)

    least = real(1e-10) * peak * peak + real(1e-20)
    envelope = real(10 / np.log(10)) * jnp.log(_product(matrix, square) + least)
    envelope = envelope - _local_mean(envelope, -1, ENVELOPE)
    envelope = lax.optimization_barrier(envelope - _product(envelope, column))
    spread = jnp.sqrt(jnp.sum(envelope * envelope * weight, axis=-1) + real(1e-6))
    ends = [named]
    for step in (1, 2):
        pairs = envelope[..., :-step, :] * envelope[..., step:, :] * weight
        ends.append(jnp.sum(pairs, axis=-1) / (spread[..., :-step] * spread[..., step:]))
    return jnp.concatenate([*ends, jnp.log(spread + real(0.1))], axis=-1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, in float32 on hardware that would take less."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _local_mean(x: jax.Array, axis: int, width: int) -> jax.Array:
    """Mean of `width` samples along an axis that is reflected without repetition."""
    n, axis = x.shape[axis], axis % x.ndim
    pads = [(width // 2, width // 2) if k == axis else (0, 0) for k in range(x.ndim)]
    padded = lax.optimization_barrier(jnp.pad(x, pads, mode="reflect"))
    total = lax.slice_in_dim(padded, 0, n, axis=axis)
    for k in range(1, width):
        total = total + lax.slice_in_dim(padded, k, k + n, axis=axis)
    return total / width


def _peaks(level: jax.Array, weight: jax.Array, shifted: Any, real: Any) -> list[jax.Array]:
    """Weighted sums over frames for partials' peaks: [kinds, ..., F] each.

    Their number; each flank's fall and its square; the two changes, plain and bounded. None within
    8 bins or a frame of the rim is a peak.
    """
    size = level.shape[-2] - 16, level.shape[-1] - 2

    def at(bins: Any, frames: int = 0) -> Any:
        return shifted(level, 8 + bins, 1 + frames, size)

    height = at(0)
    peak = height >= jnp.maximum(at(-1), at(1))
    peak &= height > jnp.maximum(at(-PEAK_SIDE), at(PEAK_SIDE)) + real(PEAK_DB)
    peak = lax.optimization_barrier(peak.astype(level.dtype) * weight[..., 1:-1])
    ones = jnp.ones((size[1], 1), level.dtype)

    def sums(*values: jax.Array) -> jax.Array:
        return jnp.stack([_product(value * peak, ones)[..., 0] for value in values])

    def flank(bins: jax.Array) -> jax.Array:
        fall = height - (at(-bins) + at(bins)) * real(0.5)
        fall = jnp.clip(fall, real(0), real(SHAPE_DB))
        return sums(fall, fall * fall)

    before, after = at(0, -1), at(0, 1)
    bend, drift, bound = jnp.abs(before - 2 * height + after), jnp.abs(before - after), WAVER_DB
    flanks = lax.map(flank, jnp.asarray(SHAPE, np.int32))
    changes = sums(bend, jnp.minimum(bend, real(bound)), drift, jnp.minimum(drift, real(bound)))
    found = [sums(jnp.ones_like(peak)), flanks.reshape(-1, *flanks.shape[2:]), changes]
    rim = [(0, 0)] * (level.ndim - 1) + [(8, 8)]
    return [jnp.pad(part, rim) for part in found]
