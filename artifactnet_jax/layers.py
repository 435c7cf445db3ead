"""Networks as data: a list of layers, as read from a foreign graph or written out from a preset.

A network is a tuple of `Layer`s in the order of computation; each names the earlier layers that it
reads, "input" being the network's own input, and the last one is the output. Values are feature
maps (C, H, W), H frequency and W time (the batch is implied), or vectors (C,). Executors choose
their own memory layout: `model` and `reference` run NHWC, the ONNX writer NCHW.

Operators, with their attributes and tensors (optional ones in brackets):

    conv             strides, padding, dilations, groups; kernel (kh, kw, I / groups, O), [bias (O)]
    conv_transpose   strides, padding, output_padding; kernel (kh, kw, I, O), [bias (O)]
                     out[s * i + k] += x[i] @ kernel[k], then cropped by `padding` at each side;
                     `output_padding` appends rows and columns that hold what falls there
    linear           kernel (I, O), [bias (O)]; on a vector
    batch_norm       epsilon; scale, bias, mean, var (C)
    group_norm       groups, epsilon; [scale, bias (C)]; an instance norm has as many groups as C
    prelu            slope (C) or (1)
    max_pool         kernel, strides, padding; padded with -inf
    avg_pool         kernel, strides, padding, count_include_pad
    mean, max, sum   axes: letters out of "chw"; the axes stay, with size 1
    resize           size, scales, mode "nearest" | "linear", coordinates, rounding: see `sampling`
    pad              padding, mode "constant" | "reflect" | "edge", value
    slice            axis "c" | "h" | "w", start, stop, step, all >= 0
    concat           axis "c" | "h" | "w"; any number of inputs
    transpose_hw     swaps H and W
    depth_to_space   rows, cols, order "DCR" | "CRD" (as ONNX); space_to_depth is its inverse
    flatten          (C, H, W) -> vector, C slowest
    softmax          axis "c" | "h" | "w"
    relu, sigmoid, tanh, softplus, softsign, hard_swish, mish, exp, log, sqrt, reciprocal, abs, neg,
    erf              elementwise
    leaky_relu, elu, celu   alpha;   selu  alpha, gamma;   hard_sigmoid  alpha, beta
    gelu             approximate "none" | "tanh"
    clip             low, high: numbers or None
    add, sub, mul, div, pow, maximum, minimum
                     of two inputs; or of one and of a constant: attribute value (a number), or
                     tensor value of a shape that broadcasts to (C, H, W) or to (C). `reverse` True
                     puts the constant first. Two maps broadcast as NumPy arrays do.

`padding` is ((top, bottom), (left, right)); `kernel`, `strides`, `dilations`, `size`, `scales`,
`output_padding` are (along H, along W).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from artifactnet_jax.config import Config

INPUT = "input"
BN_EPSILON = 1e-5  # of the presets' batch norms
FOLDED_VARIANCE = 1 - BN_EPSILON  # float32: marks a norm that is folded into its convolution

Shape = tuple[int, ...]  # (C, H, W) or (C,)

# Attributes that a layer may leave out; where ONNX has the attribute, its default.
_ZERO = ((0, 0), (0, 0))
DEFAULTS: dict[str, dict[str, Any]] = {
    "conv": {"strides": (1, 1), "padding": _ZERO, "dilations": (1, 1), "groups": 1},
    "conv_transpose": {"strides": (1, 1), "padding": _ZERO, "output_padding": (0, 0)},
    "batch_norm": {"epsilon": 1e-5},
    "group_norm": {"epsilon": 1e-5},
    "max_pool": {"strides": (1, 1), "padding": _ZERO},
    "avg_pool": {"strides": (1, 1), "padding": _ZERO, "count_include_pad": False},
    "resize": {"rounding": "round_prefer_floor"},
    "pad": {"mode": "constant", "value": 0.0},
    "slice": {"step": 1},
    "depth_to_space": {"order": "DCR"},
    "space_to_depth": {"order": "DCR"},
    "leaky_relu": {"alpha": 0.01},
    "elu": {"alpha": 1.0},
    "celu": {"alpha": 1.0},
    "selu": {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805},
    "hard_sigmoid": {"alpha": 0.2, "beta": 0.5},
    "gelu": {"approximate": "none"},
    "clip": {"low": None, "high": None},
}
ELEMENTWISE = (
    *("relu", "sigmoid", "tanh", "softplus", "softsign", "hard_swish", "mish", "exp", "log"),
    *("sqrt", "reciprocal", "abs", "neg", "erf", "leaky_relu", "elu", "celu", "selu"),
    *("hard_sigmoid", "gelu"),
)
ARITHMETIC = ("add", "sub", "mul", "div", "pow", "maximum", "minimum")
PRODUCTS = ("conv", "conv_transpose", "linear")  # where all the work is


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operator: see the module's table for what each `op` means."""

    name: str  # of its output, and the prefix of its tensors
    op: str
    inputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()  # sorted pairs, values hashable
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()  # leaf -> shape, in sorted order

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes as a dict, those left out at their defaults."""
        return {**DEFAULTS.get(self.op, {}), **dict(self.attributes)}

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as stored in a weights file."""
        return {
            "name": self.name,
            "op": self.op,
            "inputs": list(self.inputs),
            "attributes": dict(self.attributes),
            "tensors": dict(self.tensors),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Layer:
        """Inverse of `to_dict`, also after JSON has turned tuples into lists."""
        attributes, tensors = {**data["attributes"]}, {**data["tensors"]}
        return layer(data["name"], data["op"], data["inputs"], attributes, tensors)


def layer(
    name: str,
    op: str,
    inputs: Any,
    attributes: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> Layer:
    """A `Layer` from lists and dicts."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value

    pairs = sorted((attributes or {}).items())
    shapes = sorted((tensors or {}).items())
    return Layer(
        name,
        op,
        tuple(inputs),
        tuple((key, frozen(value)) for key, value in pairs),
        tuple((leaf, tuple(int(n) for n in shape)) for leaf, shape in shapes),
    )


def shapes(layers: Sequence[Layer], input_shape: Shape) -> dict[str, Shape]:
    """Name -> shape of every value of a network, "input" included.

    ValueError naming the layer whose operator, inputs, attributes or tensors are impossible.
    """
    known: dict[str, Shape] = {INPUT: tuple(input_shape)}
    for layer in layers:
        try:
            if layer.name in known:
                raise ValueError("an earlier value has this name")
            for name in layer.inputs:
                if name not in known:
                    raise ValueError(f"it reads {name!r}, which no earlier layer gives")
            known[layer.name] = _shape(layer, [known[name] for name in layer.inputs])
        except KeyError as error:
            raise ValueError(f"layer {layer.name!r} ({layer.op}): no attribute {error}") from None
        except ValueError as error:
            raise ValueError(f"layer {layer.name!r} ({layer.op}): {error}") from None
    return known


def _shape(layer: Layer, inputs: list[Shape]) -> Shape:
    """Shape of a layer's output; ValueError (or KeyError: a missing attribute) if it has none."""
    op, attrs, tensors = layer.op, layer.attrs, dict(layer.tensors)

    def expect(**expected: Shape) -> None:
        optional = {
            "conv": ("bias",),
            "conv_transpose": ("bias",),
            "linear": ("bias",),
            "group_norm": ("scale", "bias"),
        }.get(op, ())
        if missing := sorted(set(expected) - set(tensors) - set(optional)):
            raise ValueError(f"no tensor {missing[0]!r}")
        for leaf, shape in tensors.items():
            if leaf not in expected:
                raise ValueError(f"unexpected tensor {leaf!r}")
            if shape != expected[leaf]:
                raise ValueError(f"tensor {leaf!r} has shape {shape}, not {expected[leaf]}")

    def kernel(rank: int) -> Shape:
        if len(tensors.get("kernel", ())) != rank:
            raise ValueError(f"its kernel must have {rank} axes, not {tensors.get('kernel')}")
        return tensors["kernel"]

    if op in ARITHMETIC:
        operands = list(inputs)
        if "value" in tensors:
            expect(value=tensors["value"])
            operands.append(tensors["value"])
        elif "value" in attrs:
            expect()
            operands.append(())
        else:
            expect()
        if len(operands) != 2 or not inputs:
            raise ValueError("it takes two inputs, or one and a constant")
        if len(inputs) == 2 and len(inputs[0]) != len(inputs[1]):
            raise ValueError(f"a map and a vector do not combine: {inputs[0]}, {inputs[1]}")
        rank = len(inputs[0])
        one, two = ((1,) * (rank - len(shape)) + shape for shape in operands)
        fits = len(two) == rank
        if not fits or any(m != n and 1 not in (m, n) for m, n in zip(one, two, strict=True)):
            raise ValueError(f"shapes {operands[0]} and {operands[1]} do not broadcast")
        return tuple(n if m == 1 else m for m, n in zip(one, two, strict=True))

    if op == "concat":
        expect()
        axis = _axis(attrs["axis"], inputs[0] if inputs else ())
        others = {(*shape[:axis], 0, *shape[axis + 1 :]) for shape in inputs}
        if len(others) != 1:
            raise ValueError(f"shapes {inputs} do not join along {attrs['axis']!r}")
        first = inputs[0]
        return (*first[:axis], sum(shape[axis] for shape in inputs), *first[axis + 1 :])

    if len(inputs) != 1:
        raise ValueError(f"it takes one input, not {len(inputs)}")
    (x,) = inputs
    c = x[0]
    if op in ELEMENTWISE or op == "clip":
        expect()
        return x
    if op == "linear":
        i, o = kernel(2)
        expect(kernel=(i, o), bias=(o,))
        if x != (i,):
            raise ValueError(f"it takes a vector ({i},), not {x}")
        return (o,)
    if op == "batch_norm":
        expect(scale=(c,), bias=(c,), mean=(c,), var=(c,))
        return x
    if op == "group_norm":
        expect(scale=(c,), bias=(c,))
        if attrs["groups"] < 1 or c % attrs["groups"]:
            raise ValueError(f"{c} features do not divide into {attrs['groups']} groups")
        return x
    if op == "prelu":
        expect(slope=(1,) if tensors.get("slope") == (1,) else (c,))
        return x
    if op in ("mean", "max", "sum"):
        expect()
        axes = {_axis(letter, x) for letter in attrs["axes"]}
        return tuple(1 if axis in axes else n for axis, n in enumerate(x))
    if op in ("slice", "softmax"):
        expect()
        axis = _axis(attrs["axis"], x)
        if op == "softmax":
            return x
        start, stop, step = attrs["start"], attrs["stop"], attrs["step"]
        if min(start, stop) < 0 or step < 1:
            raise ValueError(f"start {start}, stop {stop}, step {step}: negative or no step")
        n = len(range(start, min(stop, x[axis]), step))
        return _positive((*x[:axis], n, *x[axis + 1 :]))
    if op == "flatten":
        expect()
        return (math.prod(x),)

    if len(x) != 3:
        raise ValueError(f"it takes a map (C, H, W), not {x}")
    size = x[1:]
    if op in ("conv", "conv_transpose", "max_pool", "avg_pool", "pad"):
        pad = attrs["padding"]
        if min(map(min, pad)) < 0:
            raise ValueError(f"padding {pad} is negative")
    if op == "conv":
        kh, kw, i, o = kernel(4)
        expect(kernel=(kh, kw, i, o), bias=(o,))
        groups = attrs["groups"]
        if groups < 1 or i * groups != c or o % groups:
            raise ValueError(f"kernel {(kh, kw, i, o)} in {groups} groups does not fit {c} inputs")
        return _positive((o, *_windows(size, (kh, kw), attrs["strides"], pad, attrs["dilations"])))
    if op == "conv_transpose":
        kh, kw, i, o = kernel(4)
        expect(kernel=(kh, kw, i, o), bias=(o,))
        if i != c:
            raise ValueError(f"kernel {(kh, kw, i, o)} does not fit {c} inputs")
        return _positive(
            (
                o,
                *(
                    s * (n - 1) + k - sum(p) + more
                    for n, k, s, p, more in zip(
                        size,
                        (kh, kw),
                        attrs["strides"],
                        pad,
                        attrs["output_padding"],
                        strict=True,
                    )
                ),
            )
        )
    expect()
    if op in ("max_pool", "avg_pool"):
        window = attrs["kernel"]
        if any(max(p) >= k for p, k in zip(pad, window, strict=True)):
            raise ValueError(f"padding {pad} leaves windows {window} empty")
        return _positive((c, *_windows(size, window, attrs["strides"], pad, (1, 1))))
    if op == "resize":
        for m, n, scale in zip(size, attrs["size"], attrs["scales"], strict=True):
            sampling(m, n, scale, attrs["mode"], attrs["coordinates"], attrs["rounding"])
        return _positive((c, *attrs["size"]))
    if op == "pad":
        if attrs["mode"] not in ("constant", "reflect", "edge"):
            raise ValueError(f"unknown mode {attrs['mode']!r}")
        if attrs["mode"] == "reflect" and any(max(p) >= n for p, n in zip(pad, size, strict=True)):
            raise ValueError(f"padding {pad} reflects more than {size} holds")
        return (c, *(n + sum(p) for n, p in zip(size, pad, strict=True)))
    if op == "transpose_hw":
        return (c, size[1], size[0])
    if op in ("depth_to_space", "space_to_depth"):
        rows, cols = attrs["rows"], attrs["cols"]
        if attrs["order"] not in ("DCR", "CRD"):
            raise ValueError(f"unknown order {attrs['order']!r}")
        if op == "depth_to_space":
            if c % (rows * cols):
                raise ValueError(f"{c} features do not hold {rows}x{cols} patches")
            return (c // (rows * cols), size[0] * rows, size[1] * cols)
        if size[0] % rows or size[1] % cols:
            raise ValueError(f"{size} does not divide into {rows}x{cols} patches")
        return (c * rows * cols, size[0] // rows, size[1] // cols)
    raise ValueError("no such operator")


def _axis(letter: str, shape: Shape) -> int:
    if letter not in tuple("chw"[: len(shape)]):
        raise ValueError(f"no axis {letter!r} in shape {shape}")
    return "chw".index(letter)


def _positive(shape: Shape) -> Shape:
    if min(shape) < 1:
        raise ValueError(f"its output would be empty: {shape}")
    return shape


def _windows(size: Shape, kernel: Shape, strides: Shape, padding: Any, dilations: Shape) -> Shape:
    """How many windows fit along H and W."""
    return tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, strides, padding, dilations, strict=True)
    )


def tensor_shapes(layers: Sequence[Layer], prefix: str) -> dict[str, Shape]:
    """Full name -> shape of every tensor: `prefix`.`layer`.`leaf`."""
    return {
        f"{prefix}.{layer.name}.{leaf}": shape for layer in layers for leaf, shape in layer.tensors
    }


def layer_flops(layers: Sequence[Layer], input_shape: Shape) -> int:
    """Floating-point operations of convolutions, transposed ones and linear layers.

    A multiply-add counts as two; a transposed convolution multiplies what it is given, no zeros.
    """
    known, total = shapes(layers, input_shape), 0
    for layer in layers:
        if layer.op in PRODUCTS:
            of = layer.inputs[0] if layer.op == "conv_transpose" else layer.name
            total += 2 * math.prod(known[of][1:]) * math.prod(dict(layer.tensors)["kernel"])
    return total


def sampling(
    size_in: int, size_out: int, scale: float, mode: str, coordinates: str, rounding: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a resized axis reads: (i0, i1, weight of i1), each [size_out].

    As ONNX Resize, in float32 as onnxruntime has it: `coordinates` "half_pixel",
    "pytorch_half_pixel", "align_corners" or "asymmetric" with `scale` = out / in; `rounding`
    "round_prefer_floor", "round_prefer_ceil", "floor" or "ceil" for "nearest", whose i1 is i0.
    ValueError for any other name.
    """
    import numpy as np

    out, scale32, half = np.arange(size_out, dtype=np.float32), np.float32(scale), np.float32(0.5)
    if coordinates == "align_corners":
        at = out * np.float32(size_in - 1) / np.float32(max(1, size_out - 1))
    elif coordinates == "asymmetric":
        at = out / scale32
    elif coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and size_out > 1):
        at = (out + half) / scale32 - half
    elif coordinates == "pytorch_half_pixel":
        at = np.zeros_like(out)
    else:
        raise ValueError(f"unknown coordinates {coordinates!r}")
    top = size_in - 1
    if mode == "linear":
        at = np.clip(at, 0, np.float32(top))
        low = np.floor(at)
        i0 = low.astype(np.int64)
        return i0, np.minimum(i0 + 1, top), at - low
    if mode != "nearest":
        raise ValueError(f"unknown mode {mode!r}")
    if rounding == "round_prefer_floor":
        at = np.ceil(at - half)
    elif rounding == "round_prefer_ceil":
        at = np.floor(at + half)
    elif rounding == "floor":
        at = np.floor(at)
    elif rounding == "ceil":
        at = np.ceil(at)
    else:
        raise ValueError(f"unknown rounding {rounding!r}")
    i0 = np.clip(at, 0, top).astype(np.int64)
    return i0, i0, np.zeros(size_out, np.float32)


AXES = {"c": -1, "h": -3, "w": -2}  # of [..., H, W, C]; a vector is [..., C]


def evaluate(layers: Sequence[Layer], x: Any, compute: Callable[[Layer, list[Any], bool], Any]):
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


def rearrange(x: Any, rows: int, cols: int, order: str) -> Any:
    """Depth to space: [..., H, W, C] -> [..., H * rows, W * cols, C / (rows * cols)]."""
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


def patches(x: Any, rows: int, cols: int, order: str = "DCR") -> Any:
    """Space to depth, the inverse of `rearrange`."""
    lead, (h, w, c) = x.shape[:-3], x.shape[-3:]
    h, w, n = h // rows, w // cols, len(lead)
    x = x.reshape(*lead, h, rows, w, cols, c)
    axes = (n, n + 2, n + 1, n + 3, n + 4) if order == "DCR" else (n, n + 2, n + 4, n + 1, n + 3)
    return x.transpose(*range(n), *axes).reshape(*lead, h, w, rows * cols * c)


def apply(layer: Layer, inputs: list[Any], tensors: Mapping[str, Any], xp: Any) -> Any:
    """Any operator but PRODUCTS and ELEMENTWISE, on [..., H, W, C] or [..., C].

    `xp` is numpy or jax.numpy, `tensors` the layer's by leaf.
    """
    op, attrs, x = layer.op, layer.attrs, inputs[0]
    if op in ARITHMETIC:
        return _arithmetic(op, attrs, inputs, tensors.get("value"), xp)
    if op == "concat":
        return xp.concatenate(inputs, axis=AXES[attrs["axis"]])
    if op == "clip":
        x = x if attrs["low"] is None else xp.maximum(x, attrs["low"])
        return x if attrs["high"] is None else xp.minimum(x, attrs["high"])
    if op == "prelu":
        return xp.where(x >= 0, x, x * _along_c(tensors["slope"], x))
    if op == "batch_norm":
        scale = tensors["scale"] / xp.sqrt(tensors["var"] + attrs["epsilon"])
        shift = tensors["bias"] - tensors["mean"] * scale
        return x * _along_c(scale, x) + _along_c(shift, x)
    if op == "group_norm":
        return _group_norm(x, attrs["groups"], attrs["epsilon"], tensors, xp)
    if op in ("mean", "max", "sum"):
        axes = tuple(AXES[letter] for letter in attrs["axes"])
        return getattr(xp, op)(x, axis=axes, keepdims=True)
    if op == "max_pool":
        return _pool(x, attrs, xp.maximum, -xp.inf, xp)
    if op == "avg_pool":
        total = _pool(x, attrs, xp.add, 0.0, xp)
        return total / xp.asarray(_pool_counts(x.shape[-3:-1], attrs), total.dtype).reshape(
            *(1,) * (x.ndim - 3), *total.shape[-3:-1], 1
        )
    if op == "resize":
        for axis, size, scale in zip((-3, -2), attrs["size"], attrs["scales"], strict=True):
            x = _resize(x, axis, size, scale, attrs, xp)
        return x
    if op == "pad":
        pad = [*[(0, 0)] * (x.ndim - 3), *attrs["padding"], (0, 0)]
        mode = attrs["mode"]
        value = {"constant_values": attrs["value"]} if mode == "constant" else {}
        return xp.pad(x, pad, mode=mode, **value)
    if op == "slice":
        cut = slice(attrs["start"], attrs["stop"], attrs["step"])
        return _cut(x, AXES[attrs["axis"]], cut)
    if op == "transpose_hw":
        return xp.swapaxes(x, -3, -2)
    if op == "depth_to_space":
        return rearrange(x, attrs["rows"], attrs["cols"], attrs["order"])
    if op == "space_to_depth":
        return patches(x, attrs["rows"], attrs["cols"], attrs["order"])
    if op == "flatten":
        return xp.moveaxis(x, -1, -3).reshape(*x.shape[:-3], -1) if _is_map(x) else x
    if op == "softmax":
        axis = AXES[attrs["axis"]]
        e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
        return e / xp.sum(e, axis=axis, keepdims=True)
    raise ValueError(f"layer {layer.name!r}: no operator {op!r}")


def _is_map(x: Any) -> bool:
    return x.ndim > 2  # with or without a batch axis


def _along_c(tensor: Any, x: Any) -> Any:
    """A tensor [C] or [1] as something that multiplies x."""
    return tensor.reshape((1,) * (x.ndim - 1) + tensor.shape)


def _cut(x: Any, axis: int, cut: slice) -> Any:
    index = [slice(None)] * x.ndim
    index[axis] = cut
    return x[tuple(index)]


def _arithmetic(op: str, attrs: dict[str, Any], inputs: list[Any], value: Any, xp: Any) -> Any:
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
    if op == "add":
        return one + two
    if op == "sub":
        return one - two
    if op == "mul":
        return one * two
    if op == "div":
        return one / two
    if op == "pow":
        return one**two
    return xp.maximum(one, two) if op == "maximum" else xp.minimum(one, two)


def _group_norm(x: Any, groups: int, epsilon: float, tensors: Mapping[str, Any], xp: Any) -> Any:
    split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    axes = (-1, -3, -4) if _is_map(x) else (-1,)

    def mean(y: Any) -> Any:
        # Axis by axis: NumPy would add up a million numbers one after another, in float32.
        for axis in axes:
            y = xp.mean(y, axis=axis, keepdims=True)
        return y

    centred = split - mean(split)
    y = (centred / xp.sqrt(mean(centred * centred) + epsilon)).reshape(x.shape)
    if "scale" in tensors:
        y = y * _along_c(tensors["scale"], x)
    return y + _along_c(tensors["bias"], x) if "bias" in tensors else y


def _pool(x: Any, attrs: dict[str, Any], combine: Callable[..., Any], fill: float, xp: Any) -> Any:
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


def _pool_counts(size: Shape, attrs: dict[str, Any]) -> np.ndarray:
    """How many samples each window averages: [H', W']."""
    import numpy as np

    counts = []
    sides = zip(size, attrs["kernel"], attrs["strides"], attrs["padding"], strict=True)
    for n, kernel, stride, (before, after) in sides:
        start = np.arange(0, n + before + after - kernel + 1, stride) - before
        inside = np.minimum(start + kernel, n) - np.maximum(start, 0)
        counts.append(np.full_like(start, kernel) if attrs["count_include_pad"] else inside)
    return np.outer(*counts)


def _resize(x: Any, axis: int, size: int, scale: float, attrs: dict[str, Any], xp: Any) -> Any:
    import numpy as np

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


def preset_layers(config: Config) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """UNet and CNN of a config as layers, every batch norm of a preset folded away.

    The UNet goes from magnitude to mask, the CNN from channels to logit (1,), as
    `config.Imported` has them; an imported network is returned as it is. `preset_tensors` makes
    their tensors.
    """
    fe, unet, cnn = config.front_end, config.unet, config.cnn
    return (
        getattr(unet, "layers", None) or _preset_unet(unet, fe.n_bins, fe.n_frames),
        getattr(cnn, "layers", None) or _preset_cnn(cnn, len(fe.channels)),
    )


class _Chain:
    """Layers in the making: each reads the one before it unless told what else."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.last = INPUT

    def add(self, name: str, op: str, *inputs: str, tensors: Any = None, **attributes: Any) -> str:
        self.layers.append(layer(name, op, inputs or (self.last,), attributes, tensors))
        self.last = name
        return name

    def conv(
        self, name: str, size: Shape, i: int, o: int, stride: Shape = (1, 1), pad: int = 0
    ) -> str:
        return self.add(
            name,
            "conv",
            tensors={"kernel": (*size, i, o), "bias": (o,)},
            strides=stride,
            padding=((pad, pad), (pad, pad)),
            dilations=(1, 1),
            groups=1,
        )

    def residual(self, name: str, i: int, o: int) -> str:
        """conv3x3-ReLU-conv3x3."""
        self.conv(f"{name}.conv1", (3, 3), i, o, pad=1)
        self.add(f"{name}.relu1", "relu")
        return self.conv(f"{name}.conv2", (3, 3), o, o, pad=1)

    def block(self, name: str, i: int, o: int) -> str:
        """Residual block with a 1x1 shortcut where the width changes."""
        before = self.last
        inner = self.residual(name, i, o)
        if i != o:
            self.last = before
            before = self.conv(f"{name}.shortcut", (1, 1), i, o)
        self.add(f"{name}.add", "add", inner, before)
        return self.add(f"{name}.relu2", "relu")


def _preset_unet(unet: Any, n_bins: int, n_frames: int) -> tuple[Layer, ...]:
    chain, (rows, cols) = _Chain(), unet.patch
    if unet.input_scale == "log":
        log = chain.add("input.floor", "clip", low=unet.log_floor, high=None)
        log = chain.add("input.log", "log")
        mean = chain.add("input.mean", "mean", axes="chw")
        chain.add("input.centred", "sub", log, mean)
    below, right = -n_bins % unet.stride[0], -n_frames % unet.stride[1]
    if below or right:
        chain.add("pad", "pad", padding=((0, below), (0, right)), mode="reflect", value=0.0)
    i = 1
    if rows * cols > 1:
        i = unet.stem
        chain.conv("stem", unet.patch, 1, i, stride=unet.patch)
    skips = []
    for level, o in enumerate(unet.widths):
        skips.append(chain.block(f"encoder.{level}", i, o))
        chain.conv(f"down.{level}", (4, 4), o, o, stride=(2, 2), pad=1)
        i = o
    bottom = chain.block("bottom", i, unet.bottleneck)
    inner = chain.residual("gated", unet.bottleneck, unet.bottleneck)
    chain.conv("gated.gate", (1, 1), unet.bottleneck, unet.bottleneck)
    gate = chain.add("gated.sigmoid", "sigmoid")
    gated = chain.add("gated.mul", "mul", inner, gate)
    chain.add("gated.add", "add", bottom, gated)
    chain.add("gated.relu2", "relu")
    i = unet.bottleneck
    for level, o in enumerate(reversed(unet.widths)):
        up = chain.add(
            f"up.{level}",
            "conv_transpose",
            tensors={"kernel": (2, 2, i, o), "bias": (o,)},
            strides=(2, 2),
            padding=_ZERO,
            output_padding=(0, 0),
        )
        chain.add(f"decoder.{level}.concat", "concat", up, skips.pop(), axis="c")
        chain.block(f"decoder.{level}", 2 * o, o)
        i = o
    chain.conv("head", (1, 1), i, rows * cols)
    if rows * cols > 1:
        chain.add("head.map", "depth_to_space", rows=rows, cols=cols, order="DCR")
    if below:
        chain.add("crop.bins", "slice", axis="h", start=0, stop=n_bins, step=1)
    if right:
        chain.add("crop.frames", "slice", axis="w", start=0, stop=n_frames, step=1)
    chain.add("sigmoid", "sigmoid")
    chain.add("mask", "mul", value=unet.mask_max)
    return tuple(chain.layers)


def _preset_cnn(cnn: Any, i: int) -> tuple[Layer, ...]:
    chain = _Chain()
    for level, o in enumerate(cnn.widths):
        chain.conv(f"conv.{level}", (3, 3), i, o, pad=1)
        chain.add(f"relu.{level}", "relu")
        if level < len(cnn.widths) - 1:
            pool = {"kernel": (2, 2), "strides": (2, 2), "padding": _ZERO}
            chain.add(f"pool.{level}", "max_pool", **pool)
        i = o
    chain.add("mean", "mean", axes="hw")
    chain.add("flatten", "flatten")
    chain.add("hidden", "linear", tensors={"kernel": (i, cnn.hidden), "bias": (cnn.hidden,)})
    chain.add("hidden.relu", "relu")
    chain.add("out", "linear", tensors={"kernel": (cnn.hidden, 1), "bias": (1,)})
    return tuple(chain.layers)


def preset_tensors(
    config: Config, tensors: Mapping[str, np.ndarray], dtype: Any = "float32"
) -> dict[str, np.ndarray]:
    """Tensors of `preset_layers` by full name, from a model's own (`weights.parameter_shapes`),
    and those of the texture head, which is no layer.

    A preset's batch norms are folded in float64, then everything is cast to `dtype`.
    """
    import numpy as np

    presets = tuple(
        f"{part}." for part in ("unet", "cnn") if not hasattr(getattr(config, part), "layers")
    )
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(presets)}
    known = {**tensors, **fold(own)}
    unet, cnn = preset_layers(config)
    done = {}
    for name, shape in {**tensor_shapes(unet, "unet"), **tensor_shapes(cnn, "cnn")}.items():
        if name not in known:
            # unet.up: a 1x1 convolution there, its columns ordered (row, column, feature).
            kernel = known[f"{name.removesuffix('kernel')}conv.kernel"]
            value = kernel.reshape(shape[2], 2, 2, shape[3]).transpose(1, 2, 0, 3)
        else:
            value = known[name]
        done[name] = np.ascontiguousarray(value, dtype)
    head = {name: value for name, value in tensors.items() if name.startswith("texture.")}
    return done | {name: np.ascontiguousarray(value, dtype) for name, value in head.items()}


def fold(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A preset's tensors with every batch norm folded into the convolution before it, float64.

    Names follow `artifactnet_jax.weights.parameter_shapes`; each convolution `x` that a norm
    follows ends up with `x.kernel` and `x.bias`, and no norm is left.
    """
    import numpy as np

    wide = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    for name in [n for n in wide if n.endswith(".var")]:
        norm = name.removesuffix(".var")
        # unet: block.norm1 follows block.conv1; cnn: cnn.norm.0 follows cnn.conv.0
        conv = norm.replace(".norm", ".conv")
        scale = wide.pop(f"{norm}.scale") / np.sqrt(wide.pop(name) + BN_EPSILON)
        bias = wide.get(f"{conv}.bias", 0.0) - wide.pop(f"{norm}.mean")
        wide[f"{conv}.kernel"] = wide[f"{conv}.kernel"] * scale
        wide[f"{conv}.bias"] = bias * scale + wide.pop(f"{norm}.bias")
    return wide
