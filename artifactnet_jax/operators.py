"""The arithmetic of layers, for NumPy and JAX arrays: [..., H, W, C] or [..., C].

`evaluate` runs a network layer by layer. `apply` computes every operator that both array libraries
share. `PRODUCTS` and `ELEMENTWISE` are each executor's own (`numpy_network`, `model`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from artifactnet_jax.layers import ARITHMETIC, INPUT, PRODUCTS, Layer, Shape

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

AXES = {"c": -1, "h": -3, "w": -2}  # of [..., H, W, C]; a vector is [..., C]


def evaluate(
    layers: Sequence[Layer], x: Any, compute: Callable[[Layer, list[Any], bool], Any]
) -> Any:
    """Run a network on `x` by calling `compute(layer, inputs, spare)` for each layer in turn.

    A value is dropped after its last reader. `spare` says that the first input is a fresh array
    that nothing else reads, not even through a view: it may be overwritten.
    """
    values = {INPUT: x}
    readers = [name for layer in layers for name in layer.inputs]
    last = {name: k for k, layer in enumerate(layers) for name in layer.inputs}
    fresh = {layer.name for layer in layers if layer.op in (*PRODUCTS, "batch_norm", "add")}
    spare = {name for name in fresh if readers.count(name) == 1}
    for k, layer in enumerate(layers):
        inputs = [values[name] for name in layer.inputs]
        x = compute(layer, inputs, layer.inputs[0] in spare)
        values[layer.name] = x
        for name in set(layer.inputs):
            if last[name] == k:
                del values[name]
    return x


def depth_to_space(
    x: Shaped[Any, "*b H W C"], rows: int, cols: int, order: str = "DCR"
) -> Shaped[Any, "*b H*{rows} W*{cols} C//({rows}*{cols})"]:
    """Each position becomes a patch of rows x cols positions: ONNX's operator."""
    lead, (h, w, c) = x.shape[:-3], x.shape[-3:]
    c //= rows * cols
    n = len(lead)
    if order == "DCR":
        x = x.reshape(*lead, h, w, rows, cols, c)
        x = x.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    else:
        x = x.reshape(*lead, h, w, c, rows, cols)
        x = x.transpose(*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return x.reshape(*lead, h * rows, w * cols, c)


def space_to_depth(
    x: Shaped[Any, "*b H W C"], rows: int, cols: int, order: str = "DCR"
) -> Shaped[Any, "*b H//{rows} W//{cols} C*{rows}*{cols}"]:
    """Each patch of rows x cols positions becomes one: the inverse of `depth_to_space`."""
    lead, (h, w, c) = x.shape[:-3], x.shape[-3:]
    h, w, n = h // rows, w // cols, len(lead)
    x = x.reshape(*lead, h, rows, w, cols, c)
    axes = (n, n + 2, n + 1, n + 3, n + 4) if order == "DCR" else (n, n + 2, n + 4, n + 1, n + 3)
    return x.transpose(*range(n), *axes).reshape(*lead, h, w, rows * cols * c)


def sampling(
    size_in: int, size_out: int, scale: float, mode: str, coordinates: str, rounding: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Where a resized axis reads: i0, i1 and the weight of i1, n = `size_out`.

    As ONNX Resize, in float32 as onnxruntime has it: `coordinates` out of `layers.COORDINATES`
    with `scale` = out / in; `rounding` out of `layers.ROUNDINGS` for "nearest", whose i1 is i0.
    """
    out, scale32, half = np.arange(size_out, dtype=np.float32), np.float32(scale), np.float32(0.5)
    top = size_in - 1
    if coordinates == "align_corners":
        at = out * np.float32(top) / np.float32(max(1, size_out - 1))
    elif coordinates == "asymmetric":
        at = out / scale32
    elif coordinates == "pytorch_half_pixel" and size_out == 1:
        at = np.zeros_like(out)
    else:
        at = (out + half) / scale32 - half
    if mode == "linear":
        at = np.clip(at, 0, np.float32(top))
        low = np.floor(at)
        i0 = low.astype(np.int64)
        return i0, np.minimum(i0 + 1, top), at - low
    if rounding.startswith("round"):
        at = np.ceil(at - half) if rounding == "round_prefer_floor" else np.floor(at + half)
    else:
        at = np.floor(at) if rounding == "floor" else np.ceil(at)
    i0 = np.clip(at, 0, top).astype(np.int64)
    return i0, i0, np.zeros(size_out, np.float32)


Attrs = Mapping[str, Any]
Own = Mapping[str, Any]  # a layer's tensors by leaf
_Rule = Callable[[Any, Attrs, Own, Any], Any]


def apply(layer: Layer, inputs: Sequence[Any], tensors: Own, xp: Any) -> Any:
    """Any operator but `PRODUCTS` and `ELEMENTWISE`, as in evaluation: a dropout does nothing.

    `xp` is numpy or jax.numpy. ValueError for an operator that is none of these.
    """
    op, attrs = layer.op, layer.attrs
    if op in ARITHMETIC:
        return _arithmetic(op, attrs, inputs, tensors.get("value"), xp)
    if op == "concat":
        return xp.concatenate(inputs, axis=AXES[attrs["axis"]])
    if op == "crop_to":
        height, width = inputs[1].shape[-3:-1]
        return inputs[0][..., :height, :width, :]
    if op not in _RULES:
        raise ValueError(f"layer {layer.name!r}: no operator {op!r}")
    return _RULES[op](inputs[0], attrs, tensors, xp)


def _is_map(x: Any) -> bool:
    return bool(x.ndim > 2)  # with or without a batch axis


def _along_c(tensor: Any, x: Any) -> Any:
    """A tensor [C] or [1] as something that multiplies x."""
    return tensor.reshape((1,) * (x.ndim - 1) + tensor.shape)


def _cut(x: Any, axis: int, cut: slice) -> Any:
    index = [slice(None)] * x.ndim
    index[axis] = cut
    return x[tuple(index)]


def _arithmetic(op: str, attrs: Attrs, inputs: Sequence[Any], value: Any, xp: Any) -> Any:
    one, two = inputs[0], inputs[-1]
    if len(inputs) == 1 and value is not None:
        if _is_map(one):  # (C, H, W), or fewer axes from the right
            two = value.reshape((1,) * (3 - value.ndim) + value.shape).transpose(1, 2, 0)
        else:
            two = value
        two = two.reshape((1,) * (one.ndim - two.ndim) + two.shape)
    elif len(inputs) == 1:
        two = attrs["value"]
        if op == "pow" and float(two).is_integer():
            two = int(two)  # a product: exact, and differentiable at 0
    if attrs.get("reverse"):
        one, two = two, one
    if op in ("maximum", "minimum"):
        return getattr(xp, op)(one, two)
    return _BINARY[op](one, two)


def _clip(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    x = x if attrs["low"] is None else xp.maximum(x, attrs["low"])
    return x if attrs["high"] is None else xp.minimum(x, attrs["high"])


def _batch_norm(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    scale = own["scale"] / xp.sqrt(own["var"] + attrs["epsilon"])
    shift = own["bias"] - own["mean"] * scale
    return x * _along_c(scale, x) + _along_c(shift, x)


def _group_norm(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    groups = attrs["groups"]
    split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    axes = (-1, -3, -4) if _is_map(x) else (-1,)

    def mean(y: Any) -> Any:
        # Axis by axis: NumPy would add up a million numbers one after another, in float32.
        for axis in axes:
            y = xp.mean(y, axis=axis, keepdims=True)
        return y

    centred = split - mean(split)
    y = (centred / xp.sqrt(mean(centred * centred) + attrs["epsilon"])).reshape(x.shape)
    if "scale" in own:
        y = y * _along_c(own["scale"], x)
    return y + _along_c(own["bias"], x) if "bias" in own else y


def _reduced(op: str) -> _Rule:
    def rule(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
        axes = tuple(AXES[letter] for letter in attrs["axes"])
        return getattr(xp, op)(x, axis=axes, keepdims=True)

    return rule


def _pool(x: Any, attrs: Attrs, combine: Callable[..., Any], fill: float, xp: Any) -> Any:
    """Rows, then columns, as strided slices: XLA's own pooling has a slow gradient on CPU."""
    sides = zip((-3, -2), attrs["kernel"], attrs["strides"], attrs["padding"], strict=True)
    for axis, kernel, stride, pad in sides:
        if any(pad):
            around = [(0, 0)] * x.ndim
            around[axis] = pad
            x = xp.pad(x, around, constant_values=fill)
        span = (x.shape[axis] - kernel) // stride * stride + 1
        parts = (_cut(x, axis, slice(k, k + span, stride)) for k in range(kernel))
        x = functools.reduce(combine, parts)
    return x


def _avg_pool(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    total = _pool(x, attrs, xp.add, 0.0, xp)
    counts = xp.asarray(_pool_counts(x.shape[-3:-1], attrs), total.dtype)
    return total / counts.reshape(*(1,) * (x.ndim - 3), *total.shape[-3:-1], 1)


def _pool_counts(size: Shape, attrs: Attrs) -> np.ndarray:
    """How many samples each window averages: [H', W']."""
    counts = []
    sides = zip(size, attrs["kernel"], attrs["strides"], attrs["padding"], strict=True)
    for n, kernel, stride, (before, after) in sides:
        start = np.arange(0, n + before + after - kernel + 1, stride) - before
        inside = np.minimum(start + kernel, n) - np.maximum(start, 0)
        counts.append(np.full_like(start, kernel) if attrs["count_include_pad"] else inside)
    return np.outer(*counts)


def _resize(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    for axis, size, scale in zip((-3, -2), attrs["size"], attrs["scales"], strict=True):
        x = _resize_axis(x, axis, size, scale, attrs, xp)
    return x


def _resize_axis(x: Any, axis: int, size: int, scale: float, attrs: Attrs, xp: Any) -> Any:
    n, mode, rounding = x.shape[axis], attrs["mode"], attrs["rounding"]
    i0, i1, weight = sampling(n, size, scale, mode, attrs["coordinates"], rounding)
    factor = size // n
    whole = size == n * factor and factor > 1
    if size == n and np.array_equal(i0, np.arange(n)) and not weight.any():
        return x
    if mode == "nearest":
        if whole and np.array_equal(i0, np.arange(size) // factor):
            return xp.repeat(x, factor, axis=axis)
        return xp.take(x, i0, axis=axis, mode="clip")
    if whole and scale == factor and attrs["coordinates"] != "align_corners":
        # Every `factor`-th sample has the same weights: slices, whose gradient is cheap too.
        around = [(0, 0)] * x.ndim
        around[axis] = (1, 1)
        wide = xp.pad(x, around, mode="edge")
        phases = []
        for phase in range(factor):
            at = phase / factor
            if attrs["coordinates"] != "asymmetric":
                at += 0.5 / factor - 0.5
            first = 1 + math.floor(at)
            w = at - math.floor(at)
            low = _cut(wide, axis, slice(first, first + n))
            high = _cut(wide, axis, slice(first + 1, first + 1 + n)) if w else low
            phases.append(low * (1 - w) + high * w if w else low)
        stacked = xp.stack(phases, axis=x.ndim + axis + 1)
        return stacked.reshape(*x.shape[:axis], size, *x.shape[axis:][1:])
    w = xp.asarray(weight, x.dtype)
    w = w.reshape((1,) * (x.ndim + axis) + (size,) + (1,) * (-axis - 1))
    low, high = (xp.take(x, i, axis=axis, mode="clip") for i in (i0, i1))
    return low * (1 - w) + high * w


def _padded(x: Any, padding: Any, xp: Any, **how: Any) -> Any:
    return xp.pad(x, [*[(0, 0)] * (x.ndim - 3), *padding, (0, 0)], **how)


def _pad(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    value = {"constant_values": attrs["value"]} if attrs["mode"] == "constant" else {}
    return _padded(x, attrs["padding"], xp, mode=attrs["mode"], **value)


def _pad_to_multiple(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    sides = zip(x.shape[-3:-1], attrs["multiple"], strict=True)
    return _padded(x, [(0, -n % m) for n, m in sides], xp, mode="reflect")


def _slice(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    cut = slice(attrs["start"], attrs["stop"], attrs["step"])
    return _cut(x, AXES[attrs["axis"]], cut)


def _flatten(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    return xp.moveaxis(x, -1, -3).reshape(*x.shape[:-3], -1) if _is_map(x) else x


def _softmax(x: Any, attrs: Attrs, own: Own, xp: Any) -> Any:
    axis = AXES[attrs["axis"]]
    e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
    return e / xp.sum(e, axis=axis, keepdims=True)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
}
_RULES: dict[str, _Rule] = {
    "clip": _clip,
    "bias": lambda x, attrs, own, xp: x + _along_c(own["bias"], x),
    "prelu": lambda x, attrs, own, xp: xp.where(x >= 0, x, x * _along_c(own["slope"], x)),
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    **{op: _reduced(op) for op in ("mean", "max", "sum")},
    "max_pool": lambda x, attrs, own, xp: _pool(x, attrs, xp.maximum, -xp.inf, xp),
    "avg_pool": _avg_pool,
    "resize": _resize,
    "pad": _pad,
    "pad_to_multiple": _pad_to_multiple,
    "slice": _slice,
    "transpose_hw": lambda x, attrs, own, xp: xp.swapaxes(x, -3, -2),
    "depth_to_space": lambda x, attrs, own, xp: depth_to_space(x, **attrs),
    "space_to_depth": lambda x, attrs, own, xp: space_to_depth(x, **attrs),
    "flatten": _flatten,
    "softmax": _softmax,
    "dropout": lambda x, attrs, own, xp: x,
}
