"""Training speed of every phase, the step alone: synthetic batches, no loader.

    python -m artifactnet_jax.bench.training [--preset edge v94] [--phase PHASE ...] [--batch N]

Prints a Markdown table: tracks in a batch, seconds to compile, milliseconds of a step (median),
steps and segments per second. A track of phase codec is four segments, one in each codec. The
loader's own speed is that of `artifactnet_jax.bench.loader`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from artifactnet_jax.backends import leave_memory
from artifactnet_jax.config import Config
from artifactnet_jax.train.loop import Trainer
from artifactnet_jax.train.phases import PHASES
from artifactnet_jax.weights import random_tensors


def measure(preset: str, phase: str, batch: int, seconds: float, dtype: Any, steps: int) -> str:
    """One row of the table."""
    settings = dataclasses.replace(PHASES[phase], batch=batch, seconds=seconds, dtype=dtype)
    config = Config.from_preset(preset)
    trainer = Trainer(config, random_tensors(config), settings)
    versions = max(1, len(settings.versions))
    rng = np.random.default_rng(0)
    shape = (batch, versions, trainer.samples)
    audio = rng.standard_normal(shape, np.float32) * np.float32(0.1)
    arrays = {"audio": audio, "label": np.arange(batch, dtype=np.float32) % 2}
    if settings.distill:
        arrays["residual"] = audio * np.float32(0.1)
    state, times = trainer.initial(), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = trainer.step(state, arrays)
        float(metrics["loss"])
        times.append(time.perf_counter() - began)
    step = statistics.median(times[1:])
    cells = [preset, phase, str(batch), f"{times[0] - step:.0f}", f"{1000 * step:.0f}"]
    cells += [f"{1 / step:.2f}", f"{batch * versions / step:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", nargs="+", default=["edge"], choices=("edge", "v94"))
    parser.add_argument("--phase", nargs="+", default=list(PHASES), choices=tuple(PHASES))
    parser.add_argument("--batch", type=int, default=4, help="tracks")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a segment")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    leave_memory()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {args.seconds:g} s\n")
    print("| preset | phase | tracks | compile s | ms/step | steps/s | segments/s |")
    print("|---|---|---|---|---|---|---|")
    for preset in args.preset:
        for phase in args.phase:
            row = measure(preset, phase, args.batch, args.seconds, args.dtype, args.steps)
            print(row, flush=True)


if __name__ == "__main__":
    main()
