"""Networks as data: a list of layers, as read from a foreign graph or drawn in `presets`.

A network is a tuple of `Layer`s in the order of computation. Each names the earlier layers that it
reads, "input" being the network's own input, and the last one is the output. Values are feature
maps (C, H, W), H frequency and W time (the batch is implied), or vectors (C,). Executors choose
their own memory layout: `model` and `numpy_network` run NHWC, the ONNX writer NCHW.

Operators, with their attributes and tensors (optional ones in brackets):

    conv             strides, padding, dilations, groups; kernel (kh, kw, I / groups, O), [bias (O)]
    conv_transpose   strides, padding, output_padding; kernel (kh, kw, I, O), [bias (O)]
                     out[s * i + k] += x[i] @ kernel[k], then cropped by `padding` at each side;
                     `output_padding` appends rows and columns that hold what falls there
    linear           kernel (I, O), [bias (O)]; on a vector
    bias             bias (C)
    batch_norm       epsilon; scale, bias, mean, var (C)
    group_norm       groups, epsilon; [scale, bias (C)]; an instance norm has as many groups as C
    prelu            slope (C) or (1)
    max_pool         kernel, strides, padding; padded with -inf
    avg_pool         kernel, strides, padding, count_include_pad
    mean, max, sum   axes: letters out of "chw"; the axes stay, with size 1
    resize           size, scales, mode "nearest" | "linear", coordinates, rounding: see
                     `operators.sampling`
    pad              padding, mode "constant" | "reflect" | "edge", value
    pad_to_multiple  multiple; reflects at the bottom and at the right
    crop_to          of two inputs: H and W of the first, from its start, as those of the second
    slice            axis "c" | "h" | "w", start, stop, step, all >= 0
    concat           axis "c" | "h" | "w"; any number of inputs
    transpose_hw     swaps H and W
    depth_to_space   rows, cols, order "DCR" | "CRD" (as ONNX); space_to_depth is its inverse
    flatten          (C, H, W) -> vector, C slowest
    softmax          axis "c" | "h" | "w"
    dropout          rate; does nothing but in training
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
`output_padding`, `multiple` are (along H, along W).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

INPUT = "input"

Shape = tuple[int, ...]  # (C, H, W) or (C,)
Size = tuple[int, int]  # along H and W

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
FACTORS = ("kernel", "scale")  # tensors that a layer multiplies by
PRODUCTS = ("conv", "conv_transpose", "linear")  # where all the work is

# Of `resize`, as in ONNX.
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")

# The variance, float32, of a norm that is folded into the product before it: with scale 1, and
# mean 0, it is the identity.
FOLDED_VARIANCE = 1 - DEFAULTS["batch_norm"]["epsilon"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operator; the module's table says what each `op` means."""

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


def tensor_shapes(layers: Sequence[Layer], prefix: str) -> dict[str, Shape]:
    """Full name -> shape of every tensor: `prefix`.`layer`.`leaf`, factors before what is added."""
    return {
        f"{prefix}.{layer.name}.{leaf}": shape
        for layer in layers
        for leaf, shape in sorted(layer.tensors, key=lambda pair: pair[0] not in FACTORS)
    }


def layer_flops(layers: Sequence[Layer], input_shape: Shape) -> int:
    """Floating-point operations of convolutions, transposed ones and linear layers.

    A multiply-add counts as two. A transposed convolution multiplies what it is given, no zeros.
    """
    known, total = shapes(layers, input_shape), 0
    for layer in layers:
        if layer.op in PRODUCTS:
            of = layer.inputs[0] if layer.op == "conv_transpose" else layer.name
            total += 2 * math.prod(known[of][1:]) * math.prod(dict(layer.tensors)["kernel"])
    return total


def layer_traffic(layers: Sequence[Layer], input_shape: Shape) -> int:
    """Values that move if every layer reads its inputs and tensors, and writes, once."""
    known = shapes(layers, input_shape)
    moved = [known[name] for layer in layers for name in (*layer.inputs, layer.name)]
    return sum(map(math.prod, [*moved, *tensor_shapes(layers, "").values()]))


# --- The shape that each operator gives -----------------------------------------------------------
# A rule raises ValueError where there is none (or KeyError: a missing attribute).


def _shape(layer: Layer, inputs: list[Shape]) -> Shape:
    """Shape of a layer's output."""
    if layer.op in _OF_MANY:
        return _OF_MANY[layer.op](layer, inputs)
    if layer.op not in _OF_ONE and layer.op not in _OF_A_MAP:
        raise ValueError("no such operator")
    if len(inputs) != 1:
        raise ValueError(f"it takes one input, not {len(inputs)}")
    x = inputs[0]
    if layer.op in _OF_ONE:
        return _OF_ONE[layer.op](layer, x)
    if len(x) != 3:
        raise ValueError(f"it takes a map (C, H, W), not {x}")
    if "padding" in layer.attrs and min(map(min, layer.attrs["padding"])) < 0:
        raise ValueError(f"padding {layer.attrs['padding']} is negative")
    return _positive(_OF_A_MAP[layer.op](layer, x[0], (x[1], x[2])))


def _expect(layer: Layer, **expected: Shape) -> None:
    """ValueError unless the layer has these tensors, and no others."""
    tensors = dict(layer.tensors)
    optional = {"scale", "bias"} if layer.op in (*PRODUCTS, "group_norm") else set()
    if missing := sorted(set(expected) - set(tensors) - optional):
        raise ValueError(f"no tensor {missing[0]!r}")
    for leaf, shape in tensors.items():
        if leaf not in expected:
            raise ValueError(f"unexpected tensor {leaf!r}")
        if shape != expected[leaf]:
            raise ValueError(f"tensor {leaf!r} has shape {shape}, not {expected[leaf]}")


def _kernel(layer: Layer, rank: int) -> Shape:
    """Shape of a product's kernel; its last axis is the bias's."""
    shape = dict(layer.tensors).get("kernel", ())
    if len(shape) != rank:
        raise ValueError(f"its kernel must have {rank} axes, not {shape or None}")
    _expect(layer, kernel=shape, bias=shape[-1:])
    return shape


def _axis(letter: str, shape: Shape) -> int:
    if letter not in tuple("chw"[: len(shape)]):
        raise ValueError(f"no axis {letter!r} in shape {shape}")
    return "chw".index(letter)


def _positive(shape: Shape) -> Shape:
    if min(shape) < 1:
        raise ValueError(f"its output would be empty: {shape}")
    return shape


def _arithmetic(layer: Layer, inputs: list[Shape]) -> Shape:
    operands, tensors = list(inputs), dict(layer.tensors)
    if "value" in tensors:
        operands.append(tensors["value"])
    elif "value" in layer.attrs:
        operands.append(())
    _expect(layer, **({"value": tensors["value"]} if "value" in tensors else {}))
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


def _concat(layer: Layer, inputs: list[Shape]) -> Shape:
    _expect(layer)
    along = layer.attrs["axis"]
    axis = _axis(along, inputs[0] if inputs else ())
    if len({(*shape[:axis], 0, *shape[axis + 1 :]) for shape in inputs}) != 1:
        raise ValueError(f"shapes {inputs} do not join along {along!r}")
    first = inputs[0]
    return (*first[:axis], sum(shape[axis] for shape in inputs), *first[axis + 1 :])


def _crop_to(layer: Layer, inputs: list[Shape]) -> Shape:
    _expect(layer)
    if [len(shape) for shape in inputs] != [3, 3]:
        raise ValueError("it takes two maps (C, H, W)")
    x, like = inputs
    if any(n < m for n, m in zip(x[1:], like[1:], strict=True)):
        raise ValueError(f"{x} is smaller than {like}")
    return (x[0], *like[1:])


def _same(layer: Layer, x: Shape) -> Shape:
    _expect(layer)
    return x


def _of_features(*leaves: str) -> Callable[[Layer, Shape], Shape]:
    """Rule of an operator that keeps the shape and has a number of each feature in its tensors."""

    def rule(layer: Layer, x: Shape) -> Shape:
        single = layer.op == "prelu" and dict(layer.tensors).get("slope") == (1,)
        _expect(layer, **{leaf: (1,) if single else x[:1] for leaf in leaves})
        return x

    return rule


def _group_norm(layer: Layer, x: Shape) -> Shape:
    groups = layer.attrs["groups"]
    if groups < 1 or x[0] % groups:
        raise ValueError(f"{x[0]} features do not divide into {groups} groups")
    return _of_features("scale", "bias")(layer, x)


def _linear(layer: Layer, x: Shape) -> Shape:
    i, o = _kernel(layer, 2)
    if x != (i,):
        raise ValueError(f"it takes a vector ({i},), not {x}")
    return (o,)


def _reduced(layer: Layer, x: Shape) -> Shape:
    axes = {_axis(letter, x) for letter in layer.attrs["axes"]}
    return tuple(1 if axis in axes else n for axis, n in enumerate(_same(layer, x)))


def _softmax(layer: Layer, x: Shape) -> Shape:
    _axis(layer.attrs["axis"], x)
    return _same(layer, x)


def _slice(layer: Layer, x: Shape) -> Shape:
    axis = _axis(layer.attrs["axis"], _same(layer, x))
    start, stop, step = (layer.attrs[name] for name in ("start", "stop", "step"))
    if min(start, stop) < 0 or step < 1:
        raise ValueError(f"start {start}, stop {stop}, step {step}: negative or no step")
    n = len(range(start, min(stop, x[axis]), step))
    return _positive((*x[:axis], n, *x[axis + 1 :]))


def _flatten(layer: Layer, x: Shape) -> Shape:
    return (math.prod(_same(layer, x)),)


def _windows(layer: Layer, size: Size, kernel: Size) -> Size:
    """How many windows fit along H and W."""
    attrs = {"dilations": (1, 1), **layer.attrs}
    sides = zip(size, kernel, attrs["strides"], attrs["padding"], attrs["dilations"], strict=True)
    rows, cols = ((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    return rows, cols


def _conv(layer: Layer, c: int, size: Size) -> Shape:
    kh, kw, i, o = kernel = _kernel(layer, 4)
    groups = layer.attrs["groups"]
    if groups < 1 or i * groups != c or o % groups:
        raise ValueError(f"kernel {kernel} in {groups} groups does not fit {c} inputs")
    return (o, *_windows(layer, size, (kh, kw)))


def _conv_transpose(layer: Layer, c: int, size: Size) -> Shape:
    kh, kw, i, o = kernel = _kernel(layer, 4)
    if i != c:
        raise ValueError(f"kernel {kernel} does not fit {c} inputs")
    attrs = layer.attrs
    sides = zip(
        size, (kh, kw), attrs["strides"], attrs["padding"], attrs["output_padding"], strict=True
    )
    return (o, *(s * (n - 1) + k - sum(p) + more for n, k, s, p, more in sides))


def _pooled(layer: Layer, c: int, size: Size) -> Shape:
    _expect(layer)
    window, pad = layer.attrs["kernel"], layer.attrs["padding"]
    if any(max(p) >= k for p, k in zip(pad, window, strict=True)):
        raise ValueError(f"padding {pad} leaves windows {window} empty")
    return (c, *_windows(layer, size, window))


def _resized(layer: Layer, c: int, size: Size) -> Shape:
    _expect(layer)
    kinds = {"coordinates": COORDINATES, "mode": ("nearest", "linear"), "rounding": ROUNDINGS}
    for name, known in kinds.items():
        unused = name == "rounding" and layer.attrs["mode"] == "linear"
        if not unused and layer.attrs[name] not in known:
            raise ValueError(f"unknown {name} {layer.attrs[name]!r}")
    (rows, cols), _ = layer.attrs["size"], layer.attrs["scales"]
    return (c, rows, cols)


def _padded(layer: Layer, c: int, size: Size) -> Shape:
    _expect(layer)
    mode, pad = layer.attrs["mode"], layer.attrs["padding"]
    if mode not in ("constant", "reflect", "edge"):
        raise ValueError(f"unknown mode {mode!r}")
    if mode == "reflect" and any(max(p) >= n for p, n in zip(pad, size, strict=True)):
        raise ValueError(f"padding {pad} reflects more than {size} holds")
    return (c, *(n + sum(p) for n, p in zip(size, pad, strict=True)))


def _padded_to_multiple(layer: Layer, c: int, size: Size) -> Shape:
    _expect(layer)
    more = [-n % m for n, m in zip(size, layer.attrs["multiple"], strict=True)]
    if any(n >= of for n, of in zip(more, size, strict=True)):
        raise ValueError(f"{size} is too small to reflect {tuple(more)} more")
    return (c, *(n + m for n, m in zip(size, more, strict=True)))


def _transposed(layer: Layer, c: int, size: Size) -> Shape:
    _expect(layer)
    return (c, size[1], size[0])


def _patches(layer: Layer) -> Size:
    """Rows and columns of the patches of depth to space and its inverse."""
    _expect(layer)
    if layer.attrs["order"] not in ("DCR", "CRD"):
        raise ValueError(f"unknown order {layer.attrs['order']!r}")
    return layer.attrs["rows"], layer.attrs["cols"]


def _depth_to_space(layer: Layer, c: int, size: Size) -> Shape:
    rows, cols = _patches(layer)
    if c % (rows * cols):
        raise ValueError(f"{c} features do not hold {rows}x{cols} patches")
    return (c // (rows * cols), size[0] * rows, size[1] * cols)


def _space_to_depth(layer: Layer, c: int, size: Size) -> Shape:
    rows, cols = _patches(layer)
    if size[0] % rows or size[1] % cols:
        raise ValueError(f"{size} does not divide into {rows}x{cols} patches")
    return (c * rows * cols, size[0] // rows, size[1] // cols)


_OF_MANY: dict[str, Callable[[Layer, list[Shape]], Shape]] = {
    **dict.fromkeys(ARITHMETIC, _arithmetic),
    "concat": _concat,
    "crop_to": _crop_to,
}
_OF_ONE: dict[str, Callable[[Layer, Shape], Shape]] = {
    **dict.fromkeys((*ELEMENTWISE, "clip", "dropout"), _same),
    **dict.fromkeys(("mean", "max", "sum"), _reduced),
    "bias": _of_features("bias"),
    "batch_norm": _of_features("scale", "bias", "mean", "var"),
    "prelu": _of_features("slope"),
    "group_norm": _group_norm,
    "linear": _linear,
    "slice": _slice,
    "softmax": _softmax,
    "flatten": _flatten,
}
_OF_A_MAP: dict[str, Callable[[Layer, int, Size], Shape]] = {
    **dict.fromkeys(("max_pool", "avg_pool"), _pooled),
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "resize": _resized,
    "pad": _padded,
    "pad_to_multiple": _padded_to_multiple,
    "transpose_hw": _transposed,
    "depth_to_space": _depth_to_space,
    "space_to_depth": _space_to_depth,
}
