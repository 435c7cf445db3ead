"""A model small enough to train in tests: the edge layout, few features, segments of 1 s.

Its medians are short because they are what takes longest to compile.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from artifactnet_jax.config import CNN, Config, FrontEnd, Texture, UNet
from artifactnet_jax.weights import random_tensors, save_weights

TINY = Config(
    preset="tiny",
    front_end=FrontEnd(segment_samples=44_100, hpss_width=5, percussive_width=3, n_mels=32),
    unet=UNet(patch=(8, 8), stem=8, widths=(4, 8), bottleneck=8, input_scale="log"),
    cnn=CNN(widths=(4, 8), hidden=8),
)

# A whole detector of 4 s segments that scores, compiles and loads many times as fast as `edge`.
SMALL = dataclasses.replace(
    TINY,
    preset="edge",
    front_end=dataclasses.replace(TINY.front_end, segment_samples=FrontEnd.segment_samples),
    texture=Texture(
        resolutions=((512, 128),),
        edges=(100.0, 1300.0, 5500.0, 16_000.0),
        lags=((0, 1), (1, 0), (1, 1)),
        hidden=(4,),
    ),
)


def save_tiny(path: Path, seed: int = 0, **facts: object) -> Path:
    """Weights file of random tensors; `facts` as of `save_weights`."""
    known = {"name": "tiny", "licence": "test licence", "provenance": {}, **facts}
    save_weights(path, TINY, random_tensors(TINY, seed), **known)  # type: ignore[arg-type]
    return path
