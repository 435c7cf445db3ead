"""Is an imported network one of our presets' layouts? Then it gets their lists and names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.convert.networks import Network
from artifactnet_jax.layers import FOLDED_VARIANCE, INPUT, Layer
from artifactnet_jax.passes import fold, sized
from artifactnet_jax.presets import Layers, cnn_layers, unet_layers

_TAIL = ("slice", "sigmoid", "mul")  # they commute, and exporters write them in any order


@dataclasses.dataclass(frozen=True, eq=False)
class Matched:
    """An imported network as a preset's."""

    config: Any
    tensors: dict[str, np.ndarray]  # by full name
    names: dict[str, str]  # imported tensor -> where `export` finds it: weights, `passes.folded`


def match_unet(network: Network, n_bins: int, n_frames: int) -> Matched | None:
    """The UNet as `config.UNet`, if it has that layout."""
    convs = [x for x in network.layers if x.op == "conv"]
    shapes = [dict(x.tensors)["kernel"] for x in convs]
    downs = [
        shape[3]
        for x, shape in zip(convs, shapes, strict=True)
        if shape[:2] == (4, 4) and x.attrs["strides"] == (2, 2)
    ]
    ups = [dict(x.tensors)["kernel"] for x in network.layers if x.op == "conv_transpose"]
    scales = [x.attrs.get("value") for x in network.layers if x.op == "mul" and len(x.inputs) == 1]
    if not downs or len(ups) != len(downs) or not scales or scales[-1] is None:
        return None
    log = any(x.op == "log" for x in network.layers)
    floors = [x.attrs["low"] for x in network.layers if x.op == "clip"]
    first = convs[0]
    patch = first.attrs["strides"] if shapes[0][:2] == first.attrs["strides"] else (1, 1)
    try:
        candidate = cfg.UNet(
            patch=patch,
            stem=shapes[0][3] if patch != (1, 1) else 1,
            widths=tuple(downs),
            bottleneck=ups[0][2],
            input_scale="log" if log else "magnitude",
            log_floor=floors[0] if log and floors else cfg.UNet.log_floor,
            mask_max=scales[-1],
        )
    except ValueError:  # no UNet of ours has such figures
        return None
    preset = unet_layers(candidate)
    return _matched("unet", candidate, network, preset, sized(preset, n_bins, n_frames))


def match_cnn(network: Network, channels: int) -> Matched | None:
    """The classifier as `config.CNN`, if it has that layout."""
    kernels = [dict(x.tensors)["kernel"] for x in network.layers if x.op in ("conv", "linear")]
    if len(kernels) < 3:
        return None
    candidate = cfg.CNN(widths=tuple(k[-1] for k in kernels[:-2]), hidden=kernels[-2][-1])
    preset = cnn_layers(candidate, channels)
    return _matched("cnn", candidate, network, preset, preset)


def _matched(
    part: str, config: Any, network: Network, preset: Layers, as_sized: Layers
) -> Matched | None:
    """The network as the preset's list, if both are the same with their norms folded."""
    ours, theirs = (fold(layers, {})[0] for layers in (tuple(network.layers), as_sized))
    walk = _Walk(ours, theirs)
    a_tail, a_name = _tail(walk.ours, ours[-1].name)
    b_tail, b_name = _tail(walk.preset, theirs[-1].name)
    if a_tail != b_tail or not walk.meet(a_name, b_name):
        return None
    return _filled(part, config, network, preset, walk.pairs)


class _Walk:
    """Two networks side by side, from their outputs to their inputs."""

    def __init__(self, ours: Layers, preset: Layers) -> None:
        self.ours = {x.name: x for x in ours}
        self.preset = {x.name: x for x in preset}
        self.pairs: dict[str, Layer] = {}  # name in the preset -> the imported layer

    def meet(self, a_name: str, b_name: str) -> bool:
        """Whether two values are the same function of the inputs; then they are in `pairs`."""
        a_name, b_name = _past_flatten(self.ours, a_name), _past_flatten(self.preset, b_name)
        if INPUT in (a_name, b_name):
            return a_name == b_name
        a, b = self.ours[a_name], self.preset[b_name]
        if b.name in self.pairs:
            return self.pairs[b.name] is a
        if not _same(a, b):
            return False
        before = self.pairs
        orders = [b.inputs]
        if a.op in ("add", "mul") and len(b.inputs) == 2:
            orders.append(b.inputs[::-1])
        for order in orders:
            self.pairs = before | {b.name: a}
            if all(self.meet(one, two) for one, two in zip(a.inputs, order, strict=True)):
                return True
        self.pairs = before
        return False


def _same(a: Layer, b: Layer) -> bool:
    """Whether two layers are one operator; a linear layer may be a 1x1 convolution."""
    kernels = [dict(x.tensors).get("kernel", ()) for x in (a, b)]
    one, two = ((1, 1, *k) if x.op == "linear" else k for x, k in zip((a, b), kernels, strict=True))
    if one != two or len(a.inputs) != len(b.inputs):
        return False
    if b.tensors and {leaf for leaf, _ in a.tensors} != {leaf for leaf, _ in b.tensors}:
        return False
    if a.op != b.op:
        return {a.op, b.op} == {"conv", "linear"}
    return {**a.attrs, "reverse": 0} == {**b.attrs, "reverse": 0}


def _past_flatten(layers: Mapping[str, Layer], name: str) -> str:
    while name in layers and layers[name].op == "flatten":
        name = layers[name].inputs[0]
    return name


def _tail(layers: Mapping[str, Layer], name: str) -> tuple[list[Any], str]:
    """What the last layers do, in any order, and what they read."""
    steps = []
    while name in layers and layers[name].op in _TAIL and len(layers[name].inputs) == 1:
        attrs = {k: v for k, v in layers[name].attrs.items() if k != "reverse"}
        steps.append((layers[name].op, sorted(attrs.items())))
        name = layers[name].inputs[0]
    return sorted(steps, key=repr), name


def _filled(
    part: str, config: Any, network: Network, preset: Layers, pairs: Mapping[str, Layer]
) -> Matched | None:
    """The preset's tensors, a norm that the exporter folded away being the identity."""
    tensors: dict[str, np.ndarray] = {}
    names: dict[str, str] = {}
    shapes = {x.name: dict(x.tensors) for x in preset}
    theirs = {x.inputs[0]: x for x in preset if x.op == "batch_norm"}
    ours = {x.inputs[0]: x for x in network.layers if x.op == "batch_norm"}
    if not set(ours) <= {product.name for product in pairs.values()}:
        return None  # a norm that follows a norm
    for name, product in pairs.items():
        if not product.tensors:
            continue
        full, norm, found = f"{part}.{name}", theirs.get(name), ours.get(product.name)
        kernel = network.tensors[f"{product.name}.kernel"]
        bias = network.tensors.get(f"{product.name}.bias")
        own_bias = "bias" in shapes[name]
        home = name if "kernel" in shapes[name] else f"{name}.conv"  # of a transposed convolution
        if home != name:
            kernel = kernel.transpose(2, 0, 1, 3)
        tensors[f"{part}.{home}.kernel"] = kernel.reshape(shapes[home]["kernel"])
        names[f"{product.name}.kernel"] = f"{full}.kernel"
        if bias is not None:
            names[f"{product.name}.bias"] = f"{full}.bias"
            tensors |= {f"{full}.bias": bias} if own_bias else {}
        if found is not None:
            if norm is None or (bias is not None) != own_bias:
                return None
            if abs(found.attrs["epsilon"] - norm.attrs["epsilon"]) > 1e-9:
                return None
            for leaf, _ in norm.tensors:
                tensors[f"{part}.{norm.name}.{leaf}"] = network.tensors[f"{found.name}.{leaf}"]
                names[f"{found.name}.{leaf}"] = f"{part}.{norm.name}.{leaf}"
        elif norm is not None:
            zeros = np.zeros(kernel.shape[-1], np.float32)
            identity = {"scale": zeros + 1, "mean": zeros, "var": zeros + FOLDED_VARIANCE}
            identity["bias"] = zeros if own_bias or bias is None else bias
            tensors |= {f"{part}.{norm.name}.{leaf}": v for leaf, v in identity.items()}
    return Matched(config, tensors, names)
