"""The median program on XLA: one elementwise loop over shifted slices, and its subgradient."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .median import median_program


def median_filter(x: Any, size: int, axis: int) -> jax.Array:
    """Running median of odd `size` along `axis` >= 0; see `artifactnet_jax.kernels`."""
    x = check(x, "XLA")
    done: jax.Array = x if size == 1 or x.size == 0 else _jitted(x, size, axis)
    return done


def check(x: Any, name: str) -> jax.Array:
    """`x` as a JAX array; TypeError where it cannot be that, or has no median."""
    dtype, array = x.dtype, jnp.asarray(x)
    if array.dtype != dtype:
        raise TypeError(f"JAX would turn {dtype} into {array.dtype}: enable x64 or cast the array")
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"the {name} median takes floating and integer arrays, not {dtype}")
    return array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _median(x: jax.Array, size: int, axis: int) -> jax.Array:
    shifted = _slices(mirror(x, size, axis), 0, x.shape[axis], size, axis)
    program = median_program(size, 1)

    @functools.cache
    def plane(index: int, shift: int) -> jax.Array:
        if index == 0:
            return shifted[shift]
        op, a, b, more = program.steps[index - 1]
        one, two = plane(a, shift), plane(b, shift + more)
        # Not lax.min and lax.max: those carry NaNs at three instructions more for each step.
        less = lax.lt(one, two)
        return lax.select(less, one, two) if op == "min" else lax.select(less, two, one)

    ((index, shift),) = program.outputs
    median = plane(index, shift)
    if jnp.issubdtype(x.dtype, jnp.floating):
        nan = functools.reduce(lax.bitwise_or, (lax.ne(part, part) for part in shifted))
        median = lax.select(nan, lax.full_like(median, jnp.nan), median)
    # Stored, or each reader of the result would take the whole median again.
    spare = lax.full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), 0, x.dtype)
    return lax.slice_in_dim(_stored([median, spare], axis), 0, x.shape[axis], axis=axis)


def _forward(x: jax.Array, size: int, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    median = _median(x, size, axis)
    return median, (x, median)


def backward(
    size: int, axis: int, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array]:
    """Cotangent of `x` from `saved`, x and its median, and that of the median."""
    x, median = saved
    mirrored, unmirror = jax.vjp(lambda x: mirror(x, size, axis), x)
    windows = _slices(mirrored, 0, x.shape[axis], size, axis)
    one, zero = lax.full_like(median, 1), lax.full_like(median, 0)
    hits = (lax.select(lax.eq(part, median), one, zero) for part in windows)
    # At least 1: only a NaN median equals no sample, and then no gradient flows.
    share = lax.div(cotangent, lax.max(functools.reduce(lax.add, hits), one))
    edge = lax.full((*x.shape[:axis], size - 1, *x.shape[axis + 1 :]), 0, x.dtype)
    median, share = (_stored([edge, y, edge], axis) for y in (median, share))

    def gather(start: int, stop: int) -> jax.Array:
        # What the mirrored samples start ... stop - 1 get from the windows they lie in.
        samples = lax.slice_in_dim(mirrored, start, stop, axis=axis)
        zero = lax.full_like(samples, 0)
        near = (_slices(y, start, stop, size, axis) for y in (median, share))
        parts = (lax.select(lax.eq(samples, m), s, zero) for m, s in zip(*near, strict=True))
        return functools.reduce(lax.add, parts)

    # In three pieces, only to be stored: a single sum would be fused into `unmirror` and
    # evaluated again for each of its reads.
    length, half = x.shape[axis], size // 2
    ends = (0, half, half + length, 2 * half + length)
    pieces = [gather(*span) for span in itertools.pairwise(ends)]
    slope: tuple[jax.Array] = unmirror(_stored(pieces, axis))
    return slope


_median.defvjp(_forward, backward)
# Compiled also where the caller does not: one by one the steps would take a hundred times longer.
_jitted = jax.jit(_median, static_argnums=(1, 2))


def mirror(x: jax.Array, size: int, axis: int) -> jax.Array:
    """`x` with `size // 2` samples added at both ends of the axis, the edge not repeated."""
    half = size // 2
    pad = [(half, half) if k == axis else (0, 0) for k in range(x.ndim)]
    return jnp.pad(x, pad, mode="reflect")


def _stored(pieces: list[jax.Array], axis: int) -> jax.Array:
    # XLA on CPU takes min and max for cheap and fuses them into every reader, here a whole median
    # into each of 31 reads. What it concatenates it stores; the barrier keeps readers from
    # reaching past the concatenation to its pieces.
    stored: jax.Array = lax.optimization_barrier(lax.concatenate(pieces, axis))
    return stored


def _slices(x: jax.Array, start: int, stop: int, size: int, axis: int) -> list[jax.Array]:
    """The samples start ... stop - 1 of the axis, and on by 1, 2, ... size - 1."""
    return [lax.slice_in_dim(x, start + k, stop + k, axis=axis) for k in range(size)]
