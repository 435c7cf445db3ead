"""Time the running median against scipy and against a sort of stacked shifts on XLA.

Run as `python -m artifactnet_jax.bench.median`. The candidates take turns within each round, so
that a change of the machine's pace meets all of them; the ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from artifactnet_jax.bench.rounds import interleaved, ratios, wall_clock
from artifactnet_jax.kernels import median_filter


def measure(shape: list[int], size: int, axis: int, rounds: int, with_sort: bool) -> dict[str, Any]:
    """Milliseconds and ratios of every candidate at one shape and axis."""
    import jax
    import jax.numpy as jnp
    from scipy import ndimage

    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    device = jnp.asarray(x)
    window = [1] * x.ndim
    window[axis] = size
    half = size // 2

    def sort(v: jax.Array) -> jax.Array:
        pad = [(half, half) if k == axis % v.ndim else (0, 0) for k in range(v.ndim)]
        padded, length = jnp.pad(v, pad, mode="reflect"), v.shape[axis]
        shifts = [jax.lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(size)]
        return jnp.sort(jnp.stack(shifts, axis=-1), axis=-1)[..., half]

    def total(v: jax.Array) -> jax.Array:
        return jnp.vdot(median_filter(v, size, axis), v)

    candidates: dict[str, Callable[[], Any]] = {
        "scipy": lambda: ndimage.median_filter(x, tuple(window), mode="mirror"),
        "numpy": lambda: median_filter(x, size, axis),
    }

    def finish(executable: Callable[..., Any]) -> Any:
        return jax.block_until_ready(executable(device))

    compile_s = {}
    compiled = {"xla": lambda v: median_filter(v, size, axis), "xla_gradient": jax.grad(total)}
    if with_sort:
        compiled["xla_sort"] = sort
    for name, function in compiled.items():
        start = time.perf_counter()
        executable = jax.jit(function).lower(device).compile()
        compile_s[name] = round(time.perf_counter() - start, 3)
        candidates[name] = functools.partial(finish, executable)

    results = {name: candidate() for name, candidate in candidates.items()}
    exact = {
        name: bool(np.array_equal(result, results["scipy"]))
        for name, result in results.items()
        if name != "xla_gradient"
    }
    label = f"shape {shape} axis {axis}"
    runs = interleaved(
        candidates, rounds, wall_clock, lambda text: print(f"{label}: {text}", file=sys.stderr)
    )
    times = {name: [1000 * taken.wall_s for taken, _ in own] for name, own in runs.items()}
    pairs = [("scipy", "numpy"), ("scipy", "xla")] + [("xla_sort", "xla")] * with_sort
    speeds = {f"{a}/{b}": round(ratios(times[a], times[b])["median"], 1) for a, b in pairs}
    return {
        "shape": shape,
        "axis": axis,
        "size": size,
        "ms_median": {name: round(statistics.median(ts), 2) for name, ts in times.items()},
        "ms_min": {name: round(min(ts), 2) for name, ts in times.items()},
        "compile_s": compile_s,
        "ratios": speeds,
        "equals_scipy": exact,
    }


def main(argv: list[str] | None = None) -> int:
    """Print one JSON object; exit status 1 if a result differs from scipy's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bins", type=int, default=1025)
    parser.add_argument("--frames", type=int, default=345)
    parser.add_argument("--size", type=int, default=31)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-sort", action="store_true", help="leave the slow XLA sort out")
    args = parser.parse_args(argv)
    import jax

    results = [
        measure([batch, args.bins, args.frames], args.size, axis, args.rounds, not args.no_sort)
        for batch in args.batch
        for axis in (-1, -2)
    ]
    device = jax.devices()[0]
    print(json.dumps({"device": f"{device.platform} {device.device_kind}", "results": results}))
    return 0 if all(all(result["equals_scipy"].values()) for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
