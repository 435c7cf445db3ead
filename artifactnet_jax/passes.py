"""What is done to a network before it runs: `fold` for any network, `sized` for one input size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from artifactnet_jax import config as cfg
from artifactnet_jax.layers import INPUT, PRODUCTS, Layer, layer, tensor_shapes
from artifactnet_jax.presets import Layers, input_shapes, networks

Tensors = Mapping[str, np.ndarray]


def folded(
    config: cfg.Config, tensors: Tensors | None = None, dtype: Any = np.float32
) -> tuple[dict[str, Layers], dict[str, np.ndarray]]:
    """{"unet", "cnn"} as they run, and their tensors by full name, cast to `dtype`.

    A preset is folded in float64, and sized for one segment. An imported network stays as its file
    has it, so that the file's tensors can be written back. The texture head's tensors follow.
    """
    parts, shapes, done = networks(config), input_shapes(config), dict[str, np.ndarray]()
    for part, found in parts.items():
        own = {name: v for name, v in (tensors or {}).items() if name.startswith(f"{part}.")}
        if not isinstance(getattr(config, part), cfg.Imported):
            found, own = fold(found, own, f"{part}.")
            parts[part] = found = sized(found, *shapes[part][1:])
        done |= {name: own[name] for name in tensor_shapes(found, part) if own}
    done |= {name: v for name, v in (tensors or {}).items() if name.startswith("texture.")}
    return parts, {name: np.ascontiguousarray(value, dtype) for name, value in done.items()}


def fold(
    layers: Layers, tensors: Tensors, prefix: str = ""
) -> tuple[Layers, dict[str, np.ndarray]]:
    """The same function with fewer layers, and its tensors in float64.

    Three rules: a dropout is nothing; a batch norm goes into the product that only it reads; a 1x1
    convolution, depth to space and bias are one transposed convolution. `tensors` by `prefix` +
    "layer.leaf", or none at all for the layers alone.
    """
    layers, done = _without_dropout(layers), list[Layer]()
    named = _Tensors(tensors, prefix)
    names = {INPUT: INPUT}  # what each value is called from now on
    readers = [name for x in layers for name in x.inputs]
    for found in layers:
        x = dataclasses.replace(found, inputs=tuple(names[name] for name in found.inputs))
        alone = readers.count(found.inputs[0]) == 1 and done and x.inputs[0] == done[-1].name
        names[x.name] = x.name
        if x.op == "batch_norm" and alone and done[-1].op in PRODUCTS:
            names[x.name] = done[-1].name
            x = _with_norm(done.pop(), x, named)
        elif x.op == "bias" and alone and _is_sub_pixel(done, readers):
            x = _transposed(done.pop(-2), done.pop(), x, named)
        done.append(x)
    return tuple(done), named.values


class _Tensors:
    """Tensors that are replaced while a network is folded, in float64."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self.values = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self._prefix = prefix

    def take(self, x: Layer) -> dict[str, Any]:
        """A layer's tensors by leaf, which are no longer there."""
        return {leaf: self.values.pop(f"{self._prefix}{x.name}.{leaf}") for leaf, _ in x.tensors}

    def put(self, x: Layer, **tensors: np.ndarray) -> None:
        self.values |= {f"{self._prefix}{x.name}.{leaf}": v for leaf, v in tensors.items()}


def _without_dropout(layers: Layers) -> Layers:
    names, done = {INPUT: INPUT}, []
    for x in layers:
        inputs = tuple(names[name] for name in x.inputs)
        names[x.name] = inputs[0] if x.op == "dropout" else x.name
        done += [dataclasses.replace(x, inputs=inputs)] if x.op != "dropout" else []
    return tuple(done)


def _with_norm(product: Layer, norm: Layer, tensors: _Tensors) -> Layer:
    """The product that scales and shifts as the batch norm after it."""
    if tensors.values:
        own, its = tensors.take(product), tensors.take(norm)
        scale = its["scale"] / np.sqrt(its["var"] + norm.attrs["epsilon"])
        bias = (own.get("bias", 0.0) - its["mean"]) * scale + its["bias"]
        tensors.put(product, kernel=own["kernel"] * scale, bias=bias)
    shapes = dict(product.tensors)
    shapes["bias"] = shapes["kernel"][-1:]
    return dataclasses.replace(product, tensors=tuple(sorted(shapes.items())))


def _is_sub_pixel(layers: list[Layer], readers: list[str]) -> bool:
    """Whether these end with a plain 1x1 convolution without bias, and its depth to space."""
    if len(layers) < 2 or layers[-1].op != "depth_to_space" or layers[-2].op != "conv":
        return False
    conv, space = layers[-2:]
    attrs, shapes = conv.attrs, dict(conv.tensors)
    single = shapes["kernel"][:2] == (1, 1) == attrs["strides"] and attrs["groups"] == 1
    plain = single and "bias" not in shapes and not any(map(any, attrs["padding"]))
    alone = space.inputs[0] == conv.name and readers.count(conv.name) == 1
    return plain and alone and space.attrs["order"] == "DCR"


def _transposed(conv: Layer, space: Layer, bias: Layer, tensors: _Tensors) -> Layer:
    """The transposed convolution that three layers are."""
    rows, cols = space.attrs["rows"], space.attrs["cols"]
    _, _, i, columns = dict(conv.tensors)["kernel"]
    o = columns // (rows * cols)
    if tensors.values:  # columns are ordered (row, column, feature)
        kernel = tensors.take(conv)["kernel"].reshape(i, rows, cols, o)
        tensors.put(bias, kernel=kernel.transpose(1, 2, 0, 3))
    attrs = {"strides": (rows, cols), "padding": ((0, 0), (0, 0)), "output_padding": (0, 0)}
    shapes = {"kernel": (rows, cols, i, o), "bias": (o,)}
    return layer(bias.name, "conv_transpose", conv.inputs, attrs, shapes)


def sized(layers: Layers, height: int, width: int) -> Layers:
    """The same network for inputs (C, height, width) only: `pad` and `slice` with numbers."""
    done: list[Layer] = []
    names = {INPUT: INPUT}
    more = (0, 0)
    for x in layers:
        inputs = tuple(names[name] for name in x.inputs)
        names[x.name] = inputs[0]
        if x.op == "pad_to_multiple":
            rows, cols = x.attrs["multiple"]
            more = (-height % rows, -width % cols)
            padding = {"padding": ((0, more[0]), (0, more[1])), "mode": "reflect", "value": 0.0}
            new = [layer(x.name, "pad", inputs, padding)] if any(more) else []
        elif x.op == "crop_to":
            new = []
            sides = (("bins", "h", height), ("frames", "w", width))
            for excess, (name, axis, stop) in zip(more, sides, strict=True):
                if excess:
                    cut = {"axis": axis, "start": 0, "stop": stop, "step": 1}
                    before = new[-1].name if new else inputs[0]
                    new.append(layer(f"{x.name}.{name}", "slice", [before], cut))
        else:
            new = [dataclasses.replace(x, inputs=inputs)]
        done += new
        names[x.name] = new[-1].name if new else inputs[0]
    return tuple(done)
