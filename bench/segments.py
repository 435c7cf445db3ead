"""Segments per second of every preset on every backend that runs here.

Run as `python -m artifactnet_jax.bench.segments`. Weights are random: speed does not depend on
them. The backends take turns within each round, so that a change of the machine's pace meets all;
the ratio is the median over the rounds. Scores are compared, so that no speed is won by error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from artifactnet_jax.backends import BACKENDS, Backend, load_backend, why_unavailable
from artifactnet_jax.config import Config, flops
from artifactnet_jax.weights import Weights, random_tensors


def measure(preset: str, segments: int, rounds: int) -> dict[str, Any]:
    """Build time, seconds per segment and largest score difference of every backend."""
    config = Config.from_preset(preset)
    weights = Weights("random", config, random_tensors(config), "", "", {})
    noise = np.random.default_rng(0).standard_normal((segments, config.front_end.segment_samples))
    audio = (0.1 * noise).astype(np.float32)
    backends: dict[str, Backend] = {}
    build_s = {}
    for name in BACKENDS:
        if reason := why_unavailable(name):
            print(reason, file=sys.stderr)
            continue
        start = time.perf_counter()
        backends[name] = load_backend(name, weights)
        build_s[name] = round(time.perf_counter() - start, 2)
    scores = {name: backend(audio) for name, backend in backends.items()}  # warm-up too
    times: dict[str, list[float]] = {name: [] for name in backends}
    for k in range(rounds):
        print(f"{preset}: round {k + 1} of {rounds}", file=sys.stderr)
        for name, backend in backends.items():
            start = time.perf_counter()
            backend(audio)
            times[name].append((time.perf_counter() - start) / segments)
    pairs = {name: zip(times["numpy"], ts, strict=True) for name, ts in times.items()}
    return {
        "preset": preset,
        "gflop_per_segment": round(flops(config)["total"] / 1e9, 1),
        "build_s": build_s,
        "ms_per_segment_median": {
            n: round(1e3 * statistics.median(t), 1) for n, t in times.items()
        },
        "ms_per_segment_min": {name: round(1e3 * min(ts), 1) for name, ts in times.items()},
        "segments_per_s": {n: round(1 / statistics.median(t), 2) for n, t in times.items()},
        "numpy_over": {
            n: round(statistics.median(a / b for a, b in p), 2) for n, p in pairs.items()
        },
        "max_difference": float(max(np.ptp(p) for p in np.stack(list(scores.values()), axis=1))),
    }


def main(argv: list[str] | None = None) -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--presets", nargs="+", default=["edge", "v94"], choices=("edge", "v94"))
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    print(json.dumps([measure(p, args.segments, args.rounds) for p in args.presets], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
