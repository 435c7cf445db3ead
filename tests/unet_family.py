"""Random members of the family of bounded-mask UNets, as layers with tensors and a front end."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from artifactnet_jax.config import CHANNELS, CNN, Config, Decision, FrontEnd, Imported
from artifactnet_jax.layers import INPUT, Layer, layer, shapes
from artifactnet_jax.weights import Weights, random_tensors, weights_digest

ZERO = ((0, 0), (0, 0))


class Builder:
    """Appends layers; each method returns the name of its output."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]):
        self.rng, self.layers, self.shape = rng, list[Layer](), shape
        self.tensors: dict[str, np.ndarray] = {}

    def size(self, name: str) -> tuple[int, ...]:
        return shapes(self.layers, self.shape)[name]

    def add(self, op: str, inputs: list[str], tensors: dict[str, Any] | None = None, **attributes):
        name = f"{op}.{len(self.layers)}"
        arrays = {leaf: np.asarray(x, np.float32) for leaf, x in (tensors or {}).items()}
        shape_of = {leaf: x.shape for leaf, x in arrays.items()}
        self.layers.append(layer(name, op, inputs, attributes, shape_of))
        self.tensors |= {f"{name}.{leaf}": x for leaf, x in arrays.items()}
        return name

    def conv(self, x: str, o: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> str:
        i = self.size(x)[0]
        scale = np.sqrt(1.5 / (kernel * kernel * i))
        weights = {
            "kernel": self.rng.standard_normal((kernel, kernel, i, o)) * scale,
            "bias": self.rng.standard_normal(o) * 0.1,
        }
        pad = (kernel - stride + 1) // 2 if stride > 1 else dilation * (kernel // 2)
        return self.add(
            "conv",
            [x],
            weights,
            strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            dilations=(dilation, dilation),
            groups=1,
        )

    def norm(self, x: str, kind: str) -> str:
        c = self.size(x)[0]
        affine = {"scale": self.rng.uniform(0.5, 1.5, c), "bias": self.rng.standard_normal(c) * 0.1}
        if kind == "batch":
            moments = {"mean": self.rng.standard_normal(c), "var": self.rng.uniform(0.5, 2, c)}
            return self.add("batch_norm", [x], affine | moments, epsilon=1e-5)
        if kind == "none":
            return x
        groups = c if kind == "instance" else 2
        return self.add("group_norm", [x], affine, groups=groups, epsilon=1e-5)

    def act(self, x: str, kind: str) -> str:
        if kind == "silu":
            return self.add("mul", [x, self.add("sigmoid", [x])])
        attributes: dict[str, Any] = {
            "leaky_relu": {"alpha": 0.1},
            "elu": {"alpha": 1.0},
            "gelu": {"approximate": "none"},
        }.get(kind, {})
        return self.add(kind, [x], **attributes)

    def block(self, x: str, o: int, kind: str, norm: str, act: str) -> str:
        if kind == "glu":
            both = self.norm(self.conv(x, 2 * o), norm)
            value = self.add("slice", [both], axis="c", start=0, stop=o, step=1)
            gate = self.add("slice", [both], axis="c", start=o, stop=2 * o, step=1)
            return self.add("mul", [value, self.add("sigmoid", [gate])])
        y = self.act(self.norm(self.conv(x, o), norm), act)
        y = self.norm(self.conv(y, o), norm)
        if kind == "residual":
            same = self.size(x)[0] == o
            y = self.add("add", [y, x if same else self.conv(x, o, 1)])
        return self.act(y, act)


def unet(rng: np.random.Generator, shape: tuple[int, int, int], kinds: dict[str, Any]) -> Builder:
    """A UNet from magnitude to mask, of the kinds drawn."""
    b = Builder(rng, shape)
    x = INPUT
    if kinds["input"] == "log1p":
        x = b.add("log", [b.add("add", [x], value=1.0)])
    elif kinds["input"] == "log":
        x = b.add("log", [b.add("clip", [x], low=1e-4, high=None)])
    elif kinds["input"] == "instance":
        centred = b.add("sub", [x, b.add("mean", [x], axes="chw")])
        power = b.add("mean", [b.add("mul", [centred, centred])], axes="chw")
        x = b.add("div", [centred, b.add("sqrt", [b.add("add", [power], value=1e-5)])])
    depth = len(kinds["widths"])
    rest = [-n % 2**depth for n in shape[1:]]
    if kinds["size"] == "pad" and any(rest):
        padding = ((0, rest[0]), (0, rest[1]))
        x = b.add("pad", [x], padding=padding, mode=kinds["pad"], value=0.0)
    block = (kinds["block"], kinds["norm"], kinds["act"])
    skips = []
    for o in kinds["widths"]:
        x = b.block(x, o, *block)
        skips.append(x)
        if kinds["down"] == "max":
            x = b.add("max_pool", [x], kernel=(2, 2), strides=(2, 2), padding=ZERO)
        else:
            x = b.conv(x, o, kinds["down"], 2)
    x = b.block(x, kinds["bottleneck"], *block)
    if kinds["gate"]:
        h = b.block(x, kinds["bottleneck"], *block)
        h = b.add("mul", [h, b.add("sigmoid", [b.conv(h, kinds["bottleneck"], 1)])])
        x = b.add("add", [x, h])
    for o in reversed(kinds["widths"]):
        skip = skips.pop()
        c, h, w = b.size(x)
        if kinds["up"] == "transpose":
            weights = {"kernel": rng.standard_normal((2, 2, c, o)) * c**-0.5, "bias": np.zeros(o)}
            x = b.add(
                "conv_transpose", [x], weights, strides=(2, 2), padding=ZERO, output_padding=(0, 0)
            )
        elif kinds["up"] == "shuffle":
            x = b.add("depth_to_space", [b.conv(x, 4 * o, 1)], rows=2, cols=2, order="CRD")
        else:
            x = b.add(
                "resize",
                [x],
                size=(2 * h, 2 * w),
                scales=(2.0, 2.0),
                mode=kinds["up"],
                coordinates="asymmetric" if kinds["up"] == "nearest" else "half_pixel",
                rounding="floor",
            )
            x = b.conv(x, o)
        if b.size(x)[1:] != b.size(skip)[1:]:  # odd sizes: what pooling has dropped comes back
            missing = [n - m for n, m in zip(b.size(skip)[1:], b.size(x)[1:], strict=True)]
            padding = tuple((0, n) for n in missing)
            x = b.add("pad", [x], padding=padding, mode="constant", value=0.0)
        if kinds["skip"] == "concat":
            x = b.add("concat", [x, skip], axis="c")
        else:
            x = b.add("add", [x, skip])
        x = b.block(x, o, *block)
    x = b.conv(x, 1, kinds["head"])
    for axis, n, more in zip("hw", shape[1:], rest, strict=True):
        if kinds["size"] == "pad" and more:
            x = b.add("slice", [x], axis=axis, start=0, stop=n, step=1)
    b.add("mul", [b.add("sigmoid", [x])], value=0.5)
    return b


def member(seed: int, kinds: dict[str, Any], front_end: FrontEnd, **verdict: Any) -> Weights:
    """A whole detector with random tensors whose scores of music are not saturated."""
    rng = np.random.default_rng(seed)
    network = unet(rng, (1, front_end.n_bins, front_end.n_frames), kinds)
    config = Config(
        preset="converted",
        front_end=front_end,
        unet=Imported(tuple(network.layers), 0.5),
        cnn=CNN(widths=(4, 6, 8), hidden=8),
        verdict=Decision(**verdict),
    )
    tensors = random_tensors(config, seed)
    tensors |= {f"unet.{name}": array for name, array in network.tensors.items()}
    tensors["cnn.conv.0.kernel"] = tensors["cnn.conv.0.kernel"] / 40  # its input is in dB
    provenance: dict[str, Any] = {"source": "family"}
    digest = weights_digest(config, tensors)
    return Weights("member", config, tensors, digest, "CC0-1.0", provenance)


SMALL = dataclasses.replace(
    FrontEnd(),
    segment_samples=40_960,
    n_fft=256,
    hop=256,
    stft_pad=128,
    hpss_width=17,
    percussive_width=9,
    n_mels=24,
    channels=CHANNELS,
)
