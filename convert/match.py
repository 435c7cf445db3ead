"""Is an imported network one of our presets' layouts? Then it gets their modules and names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.convert.networks import Network
from artifactnet_jax.layers import BN_EPSILON, FOLDED_VARIANCE, INPUT, Layer, preset_layers

_TAIL = ("slice", "sigmoid", "mul")  # they commute, and exporters write them in any order


@dataclasses.dataclass(frozen=True, eq=False)
class Matched:
    """A preset's config, its tensors by full name, and for each imported tensor the name under
    which `export` finds it (in the weights, or in `layers.preset_tensors`)."""

    config: Any
    tensors: dict[str, np.ndarray]
    names: dict[str, str]


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
    n_fft = 2 * (n_bins - 1)  # a front end of these sizes
    samples = n_fft + n_frames - 1
    front_end = cfg.FrontEnd(n_fft=n_fft, hop=1, stft_pad=0, segment_samples=samples)
    layers, _ = preset_layers(cfg.Config("converted", front_end, candidate))
    pairs = _paired(network.layers, layers)
    return None if pairs is None else _filled("unet", candidate, network, pairs)


def match_cnn(network: Network, channels: int) -> Matched | None:
    """The classifier as `config.CNN`, if it has that layout."""
    kernels = [dict(x.tensors)["kernel"] for x in network.layers if x.op in ("conv", "linear")]
    if len(kernels) < 3:
        return None
    candidate = cfg.CNN(widths=tuple(k[-1] for k in kernels[:-2]), hidden=kernels[-2][-1])
    front_end = cfg.FrontEnd(channels=cfg.CHANNELS[:1] * channels)
    _, layers = preset_layers(cfg.Config("converted", front_end, cnn=candidate))
    pairs = _paired(network.layers, layers)
    return None if pairs is None else _filled("cnn", candidate, network, pairs)


def _paired(ours: tuple[Layer, ...], preset: tuple[Layer, ...]) -> dict[str, list[Layer]] | None:
    """Preset layer -> the imported layers that stand for it (a norm may follow), or None."""
    a_of = {x.name: x for x in ours}
    b_of = {x.name: x for x in preset}
    pairs: dict[str, list[Layer]] = {}

    def kernel(x: Layer) -> tuple[int, ...]:
        shape = dict(x.tensors).get("kernel", ())
        return (1, 1, *shape) if x.op == "linear" else shape

    def same(a: Layer, b: Layer) -> bool:
        products = ("conv", "linear")
        if a.op != b.op and not (a.op in products and b.op in products):
            return False
        if kernel(a) != kernel(b):
            return False
        return a.op != b.op or {**a.attrs, "reverse": 0} == {**b.attrs, "reverse": 0}

    def meet(a_name: str, b_name: str) -> bool:
        while b_name in b_of and b_of[b_name].op == "flatten":
            b_name = b_of[b_name].inputs[0]
        while a_name in a_of and a_of[a_name].op == "flatten":
            a_name = a_of[a_name].inputs[0]
        if INPUT in (a_name, b_name):
            return a_name == b_name
        a, b = a_of[a_name], b_of[b_name]
        if b.name in pairs:
            return pairs[b.name][-1] is a
        group = [a]
        if a.op == "batch_norm" and b.op == "conv":
            a = a_of.get(a.inputs[0], a)
            if a.op != "conv" or abs(group[0].attrs["epsilon"] - BN_EPSILON) > 1e-9:
                return False
            group = [a, group[0]]
        if not same(a, b) or len(a.inputs) != len(b.inputs):
            return False
        leaves = {leaf for leaf, _ in a.tensors} | ({"bias"} if len(group) == 2 else set())
        if b.tensors and leaves != {leaf for leaf, _ in b.tensors}:
            return False
        kept = dict(pairs)
        pairs[b.name] = group
        orders = [b.inputs]
        if a.op in ("add", "mul") and len(b.inputs) == 2:
            orders.append(b.inputs[::-1])
        for order in orders:
            before = dict(pairs)
            if all(meet(one, two) for one, two in zip(a.inputs, order, strict=True)):
                return True
            pairs.clear()
            pairs.update(before)
        pairs.clear()
        pairs.update(kept)
        return False

    def tail(layers: Mapping[str, Layer], name: str) -> tuple[list[Any], str]:
        steps = []
        while name in layers and layers[name].op in _TAIL and len(layers[name].inputs) == 1:
            attrs = {k: v for k, v in layers[name].attrs.items() if k != "reverse"}
            steps.append((layers[name].op, sorted(attrs.items())))
            name = layers[name].inputs[0]
        return sorted(steps, key=repr), name

    a_tail, a_name = tail(a_of, ours[-1].name)
    b_tail, b_name = tail(b_of, preset[-1].name)
    return pairs if a_tail == b_tail and meet(a_name, b_name) else None


def _filled(
    part: str, config: Any, network: Network, pairs: Mapping[str, list[Layer]]
) -> Matched | None:
    """The preset's tensors, a norm that the exporter folded away being the identity."""
    tensors: dict[str, np.ndarray] = {}
    names: dict[str, str] = {}
    for name, group in pairs.items():
        product = group[0]
        if not product.tensors:
            continue
        full = f"{part}.{name}"
        kernel = network.tensors[f"{product.name}.kernel"]
        bias = network.tensors.get(f"{product.name}.bias")
        if name.startswith("up."):
            i, o = kernel.shape[2:]
            tensors[f"{full}.conv.kernel"] = kernel.transpose(2, 0, 1, 3).reshape(1, 1, i, 4 * o)
        elif product.op == "conv" and name in ("hidden", "out"):
            tensors[f"{full}.kernel"] = kernel.reshape(kernel.shape[2:])
        else:
            tensors[f"{full}.kernel"] = kernel
        names[f"{product.name}.kernel"] = f"{full}.kernel"
        norm = full.replace(".conv", ".norm") if ".conv" in full else None
        own_bias = part == "cnn" or norm is None  # the UNet's convolutions before a norm have none
        if norm is None:
            tensors[f"{full}.bias"] = bias  # type: ignore[assignment]
            names[f"{product.name}.bias"] = f"{full}.bias"
            continue
        features = kernel.shape[-1]
        if len(group) == 2:
            if (bias is not None) != own_bias:
                return None
            for leaf in ("scale", "bias", "mean", "var"):
                tensors[f"{norm}.{leaf}"] = network.tensors[f"{group[1].name}.{leaf}"]
                names[f"{group[1].name}.{leaf}"] = f"{norm}.{leaf}"
            if own_bias:
                tensors[f"{full}.bias"] = bias  # type: ignore[assignment]
                names[f"{product.name}.bias"] = f"{full}.bias"
            continue
        assert bias is not None  # a folded norm leaves one
        tensors[f"{norm}.scale"] = np.ones(features, np.float32)
        tensors[f"{norm}.mean"] = np.zeros(features, np.float32)
        tensors[f"{norm}.var"] = np.full(features, FOLDED_VARIANCE, np.float32)
        tensors[f"{norm}.bias"] = np.zeros(features, np.float32) if own_bias else bias
        if own_bias:
            tensors[f"{full}.bias"] = bias
        names[f"{product.name}.bias"] = f"{full}.bias"
    return Matched(config, tensors, names)
