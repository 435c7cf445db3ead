"""The median program on NumPy: a few hundred in-place ufunc calls on planes that stay in cache."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from .median import median_program

# Bytes of one plane. About 90 are live at a time for width 31: smaller ones pay the call overhead
# more often, larger ones leave the second-level cache.
PLANE_BYTES = 32768


class _Plan(NamedTuple):
    tile: int
    rows: int  # rows read beyond a tile's own
    buffers: int
    steps: list[tuple[np.ufunc, int, int, int, int, int]]  # ufunc, buffers a b dst, shift, rows
    stores: list[list[tuple[int, int, int]]]  # after each step: residue, buffer, shift


@functools.cache
def _plan(size: int) -> _Plan:
    """The program with its planes assigned to as few buffers as there are live planes."""
    tile = min(32, 1 << ((size + 1) // 2).bit_length() - 1)
    program = median_program(size, tile)
    extra = [0] * (tile + len(program.steps))
    last_use = [0] * len(extra)
    for plane, shift in program.outputs:
        extra[plane] = max(extra[plane], shift)
    for k, (_, a, b, shift) in reversed(list(enumerate(program.steps))):
        for source, more in ((a, 0), (b, shift)):
            extra[source] = max(extra[source], extra[tile + k] + more)
            last_use[source] = max(last_use[source], k)
    buffer = dict(enumerate(range(tile)))
    free: list[int] = []
    buffers = tile
    steps: list[tuple[np.ufunc, int, int, int, int, int]] = []
    stores = []
    for k, (op, a, b, shift) in enumerate(program.steps):
        # Taken before the sources are freed: a destination may not overlap a shifted source.
        if free:
            dst = free.pop()
        else:
            dst, buffers = buffers, buffers + 1
        buffer[tile + k] = dst
        ufunc: np.ufunc = np.minimum if op == "min" else np.maximum
        steps.append((ufunc, buffer[a], buffer[b], dst, shift, extra[tile + k]))
        outputs = enumerate(program.outputs)
        stores.append([(r, dst, shift) for r, (plane, shift) in outputs if plane == tile + k])
        free += [buffer[plane] for plane in {a, b} if last_use[plane] == k]
        if last_use[tile + k] <= k:
            free.append(dst)
    return _Plan(tile, (tile + size - 2) // tile, buffers, steps, stores)


def median_filter(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Running median of odd `size` along `axis` >= 0; see `artifactnet_jax.kernels`."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiu":
        raise TypeError(f"the NumPy median takes floating and integer arrays, not {x.dtype}")
    if size == 1 or x.size == 0:
        return x.copy()
    plan = _plan(size)
    tile = plan.tile
    before, length, after = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    blocks = -(-length // tile)

    source = x.reshape(before, length, after)
    mirrored = np.arange((blocks + plan.rows) * tile) - size // 2
    mirrored %= max(1, 2 * length - 2)
    mirrored = np.minimum(mirrored, 2 * length - 2 - mirrored)
    padded = np.empty((before, len(mirrored), after), x.dtype)
    inner = slice(size // 2, size // 2 + length)
    padded[:, : inner.start] = source[:, mirrored[: inner.start]]
    padded[:, inner] = source
    padded[:, inner.stop :] = source[:, mirrored[inner.stop :]]
    out = np.empty(x.shape, x.dtype)
    target = out.reshape(before, length, after)

    # One tile: q rows of the filtered axis, by a and c samples of the axes before and after it.
    plane = max(1, PLANE_BYTES // x.itemsize)
    q = _even_part(blocks, plane)
    c = _even_part(after, plane // q)
    a = _even_part(before, plane // (q * c))
    lanes = a * c
    buffers = np.empty((plan.buffers, (q + plan.rows) * lanes), x.dtype)
    load = buffers[:tile].reshape(tile, q + plan.rows, a, c)
    steps = [
        (
            ufunc,
            buffers[one, : (q + extra) * lanes],
            buffers[two, shift * lanes : (q + extra + shift) * lanes],
            buffers[dst, : (q + extra) * lanes],
            [
                (r, buffers[dst, more * lanes : (q + more) * lanes].reshape(q, a, c))
                for r, dst, more in stores
            ],
        )
        for (ufunc, one, two, dst, shift, extra), stores in zip(
            plan.steps, plan.stores, strict=True
        )
    ]
    for i, j, k in itertools.product(_starts(before, a), _starts(blocks, q), _starts(after, c)):
        rows = padded[i : i + a, j * tile : (j + q + plan.rows) * tile, k : k + c]
        load[...] = rows.reshape(a, q + plan.rows, tile, c).transpose(2, 1, 0, 3)
        for ufunc, one, two, dst, stores in steps:
            ufunc(one, two, out=dst)
            for r, values in stores:
                # The last row of the axis may lack its last residues.
                part = target[i : i + a, r + j * tile : (j + q) * tile : tile, k : k + c]
                part[...] = values[: part.shape[1]].transpose(1, 0, 2)
    return out


def _even_part(total: int, limit: int) -> int:
    """The size of the fewest equal parts of `total`, each at most `limit` (at least 1)."""
    return -(-total // -(-total // max(1, limit)))


def _starts(total: int, part: int) -> list[int]:
    """Where parts of one size start; the last one may overlap the one before it."""
    return [min(start, total - part) for start in range(0, total, part)]
