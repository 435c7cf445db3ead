"""Small networks for tests: of the presets' layouts, and of layers that the presets lack."""

from __future__ import annotations

import dataclasses

import numpy as np

from artifactnet_jax.config import CNN, Config, FrontEnd, Imported, UNet
from artifactnet_jax.layers import layer
from artifactnet_jax.passes import folded

SMALL = Config(
    "small",
    FrontEnd(
        segment_samples=4_096,
        n_fft=256,
        hop=128,
        stft_pad=128,
        n_mels=16,
        hpss_width=5,
        percussive_width=5,
    ),
    UNet(widths=(4,), bottleneck=6),
    CNN(widths=(4, 6), hidden=5),
)
PATCH = dataclasses.replace(
    SMALL, unet=UNet(patch=(4, 2), stem=5, widths=(4,), bottleneck=6, input_scale="log")
)


def as_layers(config: Config) -> Config:
    """A preset written out as the layers that are run, as a foreign graph would have it."""
    unet, cnn = folded(config)[0].values()
    return dataclasses.replace(config, unet=Imported(unet, 0.5), cnn=Imported(cnn))


def noise(config: Config, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tone = np.sin(np.arange(config.front_end.segment_samples) * 0.05)
    x = rng.standard_normal((n, config.front_end.segment_samples)) * 0.1 + 0.3 * tone
    return x.astype(np.float32)


def zoo() -> Config:
    """A small UNet and CNN with what the presets lack, as layers."""
    c = {"padding": ((1, 1), (1, 1))}
    up = {"mode": "linear", "coordinates": "half_pixel", "rounding": "floor"}
    norm = {leaf: (4,) for leaf in ("scale", "bias", "mean", "var")}
    unet = (
        layer("log", "add", ["input"], {"value": 1e-3}),
        layer("log.ln", "log", ["log"]),
        layer("in", "conv", ["log.ln"], c, {"kernel": (3, 3, 1, 4), "bias": (4,)}),
        layer("in.norm", "batch_norm", ["in"], {}, norm),
        layer("in.act", "gelu", ["in.norm"]),
        layer("down", "avg_pool", ["in.act"], {"kernel": (2, 2), "strides": (2, 2)}),
        layer("mid", "conv", ["down"], c, {"kernel": (3, 3, 4, 8)}),
        layer("mid.norm", "group_norm", ["mid"], {"groups": 2}, {"scale": (8,), "bias": (8,)}),
        layer("mid.act", "mish", ["mid.norm"]),
        layer("mid.pool", "mean", ["mid.act"], {"axes": "hw"}),
        layer("mid.gate", "conv", ["mid.pool"], {}, {"kernel": (1, 1, 8, 8)}),
        layer("mid.sigmoid", "sigmoid", ["mid.gate"]),
        layer("mid.out", "mul", ["mid.act", "mid.sigmoid"]),
        layer("up", "resize", ["mid.out"], {**up, "size": (65, 45), "scales": (65 / 32, 45 / 22)}),
        layer("cat", "concat", ["up", "in.act"], {"axis": "c"}),
        layer("out", "conv", ["cat"], c, {"kernel": (3, 3, 12, 1), "bias": (1,)}),
        layer("sigmoid", "sigmoid", ["out"]),
        layer("mask", "mul", ["sigmoid"], {"value": 0.5}),
    )
    cnn = (
        layer("conv", "conv", ["input"], c, {"kernel": (3, 3, 3, 6)}),
        layer("act", "prelu", ["conv"], {}, {"slope": (6,)}),
        layer("pool", "max", ["act"], {"axes": "hw"}),
        layer("out", "conv", ["pool"], {}, {"kernel": (1, 1, 6, 1), "bias": (1,)}),
    )
    front_end = FrontEnd(
        segment_samples=44 * 64,
        n_fft=128,
        hop=64,
        stft_pad=64,
        n_mels=16,
        window="given",
        mel_scale="given",
        channels=("ratio", "mel_res", "flux"),
        hpss_width=3,
        percussive_width=5,
    )
    return Config("zoo", front_end, Imported(unet, 0.5), Imported(cnn))
