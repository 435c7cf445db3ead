"""The median program as a Pallas kernel, in Triton on an NVIDIA GPU (Ampere and later).

One program instance reads the samples of `TILE` neighbouring windows for `LANES` places beside each
other, takes all of the program's steps in registers, and writes the medians: of global memory that
is one read with a halo of `size - 1` rows for every `TILE`, and one write. Lowered for CUDA and
interpreted on a CPU in tests, never timed on a GPU: so nothing takes it unasked.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .median import median_program
from .median_xla import backward, check, mirror

TILE = 16  # outputs of an instance along the filtered axis, at most
LANES = 128  # and across; one to a thread


def median_filter(x: Any, size: int, axis: int) -> jax.Array:
    """Running median of odd `size` along `axis` >= 0; see `artifactnet_jax.kernels`.

    On anything but an NVIDIA GPU the kernel is interpreted, which is slow.
    """
    x = check(x, "Pallas")
    done: jax.Array = x if size == 1 or x.size == 0 else _jitted(x, size, axis)
    return done


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _median(x: jax.Array, size: int, axis: int) -> jax.Array:
    before, length, after = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    planes = mirror(x, size, axis).reshape(before, length + size - 1, after)
    # Lanes lie along the last axis, whose samples are neighbours in memory.
    last = after == 1
    if last:
        planes = planes.transpose(2, 1, 0)
    batch, _, across = planes.shape
    tile = min(TILE, 1 << ((size + 1) // 2).bit_length() - 1)
    rows = -(-length // tile) * tile
    columns = -(-across // LANES) * LANES
    planes = jnp.pad(planes, ((0, 0), (0, rows - length), (0, columns - across)))
    program = median_program(size, tile)

    def kernel(samples: Any, medians: Any) -> None:
        b, row, lane = pl.program_id(0), pl.program_id(1) * tile, pl.program_id(2) * LANES
        lanes = pl.ds(lane, LANES)

        @functools.cache
        def value(plane: int, shift: int) -> Any:
            if plane < tile:
                return samples[b, row + plane + tile * shift, lanes]
            op, one, two, more = program.steps[plane - tile]
            choose = lax.min if op == "min" else lax.max
            return choose(value(one, shift), value(two, shift + more))

        for r, output in enumerate(program.outputs):
            medians[b, row + r, lanes] = value(*output)

    def run(planes: jax.Array, interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((batch, rows, columns), planes.dtype),
            grid=(batch, rows // tile, columns // LANES),
            compiler_params=triton.CompilerParams(num_warps=LANES // 32, num_stages=1),
            interpret=interpret,
        )(planes)

    medians: jax.Array = lax.platform_dependent(
        planes,
        cuda=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )[:, :length, :across]
    return (medians.transpose(2, 1, 0) if last else medians).reshape(x.shape)


def _forward(x: jax.Array, size: int, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    median = _median(x, size, axis)
    return median, (x, median)


_median.defvjp(_forward, backward)
_jitted = jax.jit(_median, static_argnums=(1, 2))
