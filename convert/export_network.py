"""A network of `Layer`s as ONNX nodes, NCHW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from artifactnet_jax.convert.onnx_graph import OnnxGraph
from artifactnet_jax.layers import INPUT, PRODUCTS, Layer, shapes
from artifactnet_jax.operators import sampling

# In float16 these overflow, or lose what matters, within the range of their inputs.
_SINGLE = frozenset(
    ("group_norm", "mean", "sum", "softmax", "softplus", "mish", "gelu", "elu", "celu", "selu")
) | {"exp", "log", "sqrt", "reciprocal", "div", "pow"}


def network(
    g: OnnxGraph,
    layers: Sequence[Layer],
    tensors: Mapping[str, np.ndarray],
    prefix: str,
    x: str,
    shape: tuple[int, ...],
    half: bool,
) -> str:
    """Layers on a map [B, *shape] float32 -> their output, float32; `half` as in "fp16"."""
    from onnx import TensorProto

    sizes = shapes(layers, shape)
    last = max((k for k, layer in enumerate(layers) if layer.op in PRODUCTS), default=-1)
    values: dict[str, dict[Any, str]] = {
        INPUT: {np.float32: x}
    }  # name -> dtype -> value; the first one is what was computed
    raw = {INPUT}  # float32 from the input on, through no product

    def cast(name: str, dtype: Any) -> str:
        kinds = values[name]
        if dtype not in kinds:
            to = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
            kinds[dtype] = g.op("Cast", next(iter(kinds.values())), to=to)
        return kinds[dtype]

    for k, layer in enumerate(layers):
        dtype: Any = np.float32
        if half and k <= last and layer.op not in _SINGLE and not raw.issuperset(layer.inputs):
            computed = [next(iter(values[name])) for name in layer.inputs]
            if layer.op in PRODUCTS or np.float16 in computed:
                dtype = np.float16
        if layer.op not in PRODUCTS and raw.issuperset(layer.inputs):
            raw.add(layer.name)
        own = {leaf: tensors[f"{prefix}.{layer.name}.{leaf}"] for leaf, _ in layer.tensors}
        if dtype == np.float16:
            for leaf, tensor in own.items():
                if np.abs(tensor).max(initial=0) > np.finfo(np.float16).max:
                    raise ValueError(
                        f"tensor {prefix}.{layer.name}.{leaf} leaves the range of float16: "
                        "export with precision 'fp32'"
                    )
        inputs = [cast(name, dtype) for name in layer.inputs]
        with g.scope(layer.name):
            emit = _Emitter(g, layer, own, sizes, dtype, f"{prefix}.{layer.name}")
            values[layer.name] = {dtype: emit(inputs)}
    return cast(layers[-1].name, np.float32)


# Layers that are one operator: layer -> ONNX's name.
PLAIN = {
    **{op: op.capitalize() for op in ("relu", "sigmoid", "tanh", "softplus", "erf", "abs", "neg")},
    **{op: op.capitalize() for op in ("exp", "log", "sqrt", "reciprocal")},
}
BINARY = {
    **{op: op.capitalize() for op in ("add", "sub", "mul", "div", "pow")},
    **{"maximum": "Max", "minimum": "Min"},
}
_SCALED = {  # with their attributes
    "leaky_relu": ("LeakyRelu", ("alpha",)),
    "elu": ("Elu", ("alpha",)),
    "selu": ("Selu", ("alpha", "gamma")),
    "hard_sigmoid": ("HardSigmoid", ("alpha", "beta")),
}
_REDUCE = {"mean": "ReduceMean", "max": "ReduceMax", "sum": "ReduceSum"}


class _Emitter:
    """One layer as nodes, NCHW; operators that TensorRT lacks in terms of those that it has."""

    def __init__(
        self,
        g: OnnxGraph,
        layer: Layer,
        tensors: Mapping[str, np.ndarray],
        sizes: Mapping[str, tuple[int, ...]],
        dtype: Any,
        name: str,
    ):
        self.g, self.attrs, self.op = g, layer.attrs, layer.op
        self.tensors, self.dtype, self.name = tensors, dtype, name
        self.size_in = sizes[layer.inputs[0]]
        self.size = sizes[layer.name]

    def __call__(self, inputs: Sequence[str]) -> str:
        g, op, attrs = self.g, self.op, self.attrs
        if op in BINARY:
            return self.binary(inputs)
        if op == "concat":
            return g.op("Concat", *inputs, axis=self.axis())
        (x,) = inputs
        if op in PLAIN:
            return g.op(PLAIN[op], x)
        if op in _SCALED:
            kind, names = _SCALED[op]
            numbers: dict[str, Any] = {name: float(attrs[name]) for name in names}
            return g.op(kind, x, **numbers)
        if op in _REDUCE:
            # Axis by axis, the last first: a runtime may add up a whole plane one number after
            # another, in float32.
            for axis in sorted(("chw".index(letter) + 1 for letter in attrs["axes"]), reverse=True):
                x = g.op(_REDUCE[op], x, g.ints(axis), keepdims=1)
            return x
        return str(getattr(self, op)(x))

    def axis(self) -> int:
        return "chw".index(self.attrs["axis"]) + 1

    def number(self, value: float) -> str:
        return self.g.constant(value, self.dtype)

    def tensor(self, leaf: str, perm: tuple[int, ...] | None = None) -> str:
        """A tensor under its own name, its axes permuted."""
        value = self.tensors[leaf]
        value = value if perm is None else value.transpose(perm)
        return self.g.constant(value, self.dtype, f"{self.name}.{leaf}")

    def along_c(self, value: np.ndarray, leaf: str) -> str:
        """A vector [C] as an initialiser that broadcasts over the map."""
        shape = (-1, *(1 for _ in self.size[1:]))
        return self.g.constant(value.reshape(shape), self.dtype, f"{self.name}.{leaf}")

    def bias(self) -> list[str]:
        return [self.tensor("bias")] if "bias" in self.tensors else []

    def pads(self) -> list[int]:
        (top, bottom), (left, right) = self.attrs["padding"]
        return [top, left, bottom, right]

    def binary(self, inputs: Sequence[str]) -> str:
        operands = list(inputs)
        if "value" in self.tensors:
            operands.append(self.tensor("value"))
        elif len(operands) == 1:
            operands.append(self.number(self.attrs["value"]))
        if len(inputs) == 1 and self.attrs.get("reverse"):
            operands.reverse()
        return self.g.op(BINARY[self.op], *operands)

    def conv(self, x: str) -> str:
        return self.g.op(
            "Conv",
            x,
            self.tensor("kernel", (3, 2, 0, 1)),
            *self.bias(),
            strides=self.attrs["strides"],
            pads=self.pads(),
            dilations=self.attrs["dilations"],
            group=self.attrs["groups"],
        )

    def conv_transpose(self, x: str) -> str:
        return self.g.op(
            "ConvTranspose",
            x,
            self.tensor("kernel", (2, 3, 0, 1)),
            *self.bias(),
            strides=self.attrs["strides"],
            pads=self.pads(),
            output_padding=self.attrs["output_padding"],
        )

    def linear(self, x: str) -> str:
        return self.g.op("Gemm", x, self.tensor("kernel"), *self.bias())

    def batch_norm(self, x: str) -> str:
        wide = {leaf: tensor.astype(np.float64) for leaf, tensor in self.tensors.items()}
        scale = wide["scale"] / np.sqrt(wide["var"] + self.attrs["epsilon"])
        x = self.g.op("Mul", x, self.along_c(scale, "scale"))
        return self.g.op("Add", x, self.along_c(wide["bias"] - wide["mean"] * scale, "bias"))

    def group_norm(self, x: str) -> str:
        g, groups = self.g, self.attrs["groups"]
        if groups == self.size[0] and len(self.size) == 3:
            # Axis by axis, as in `__call__`: onnxruntime's own operator adds up carelessly.
            def mean(y: str) -> str:
                return g.op("ReduceMean", g.op("ReduceMean", y, g.ints(3)), g.ints(2))

            x = g.op("Sub", x, mean(x))
            variance = g.op("Add", mean(g.op("Mul", x, x)), self.number(self.attrs["epsilon"]))
            x = g.op("Div", x, g.op("Sqrt", variance))
        else:
            x = g.reshape(x, -1, groups, math.prod(self.size) // groups)
            one, zero = (g.constant(np.full(groups, value)) for value in (1.0, 0.0))
            x = g.op("InstanceNormalization", x, one, zero, epsilon=float(self.attrs["epsilon"]))
            x = g.reshape(x, -1, *self.size)
        if "scale" in self.tensors:
            x = self.g.op("Mul", x, self.along_c(self.tensors["scale"], "scale"))
        if "bias" in self.tensors:
            x = self.g.op("Add", x, self.along_c(self.tensors["bias"], "bias"))
        return x

    def prelu(self, x: str) -> str:
        return self.g.op("PRelu", x, self.along_c(self.tensors["slope"], "slope"))

    def max_pool(self, x: str) -> str:
        return self.g.op(
            "MaxPool",
            x,
            kernel_shape=self.attrs["kernel"],
            strides=self.attrs["strides"],
            pads=self.pads(),
        )

    def avg_pool(self, x: str) -> str:
        return self.g.op(
            "AveragePool",
            x,
            kernel_shape=self.attrs["kernel"],
            strides=self.attrs["strides"],
            pads=self.pads(),
            count_include_pad=int(self.attrs["count_include_pad"]),
        )

    def resize(self, x: str) -> str:
        g, mode, coordinates = self.g, self.attrs["mode"], self.attrs["coordinates"]
        scales = np.array(self.attrs["scales"], np.float32)
        sizes = list(zip(self.size_in[1:], self.size[1:], strict=True))
        fits = (
            all(  # in float32, in which a runtime multiplies, and in float64, in which another does
                int(np.float32(m) * s) == n == int(m * float(s))
                for (m, n), s in zip(sizes, scales, strict=True)
            )
        )
        if fits and (mode == "linear" or (scales == np.round(scales)).all()):
            more = {"nearest_mode": self.attrs["rounding"]} if mode == "nearest" else {}
            return g.op(
                "Resize",
                x,
                "",
                g.constant([1.0, 1.0, *scales]),
                mode=mode,
                coordinate_transformation_mode=coordinates,
                **more,
            )
        # No scale in float32 says what is wanted: read the very samples instead.
        for axis, ((m, n), scale) in enumerate(zip(sizes, scales, strict=True), start=2):
            if m == n and scale == 1:
                continue
            low, high, weight = sampling(m, n, scale, mode, coordinates, self.attrs["rounding"])
            read = g.op("Gather", x, g.constant(low, np.int64), axis=axis)
            if mode == "linear":
                step = g.op("Gather", x, g.constant(high, np.int64), axis=axis)
                weight = weight.reshape((-1, 1) if axis == 2 else (-1,))
                step = g.op("Mul", g.op("Sub", step, read), g.constant(weight, self.dtype))
                read = g.op("Add", read, step)
            x = read
        return x

    def pad(self, x: str) -> str:
        top, left, bottom, right = self.pads()
        pads = self.g.ints(0, 0, top, left, 0, 0, bottom, right)
        value = [self.number(self.attrs["value"])] if self.attrs["mode"] == "constant" else []
        return self.g.op("Pad", x, pads, *value, mode=self.attrs["mode"])

    def slice(self, x: str) -> str:
        attrs = self.attrs
        return self.g.cut(x, self.axis(), attrs["start"], attrs["stop"], attrs["step"])

    def transpose_hw(self, x: str) -> str:
        return self.g.op("Transpose", x, perm=[0, 1, 3, 2])

    def depth_to_space(self, x: str) -> str:
        (c, h, w), rows, cols = self.size_in, self.attrs["rows"], self.attrs["cols"]
        if self.attrs["order"] == "DCR":
            split, perm = (rows, cols, c // (rows * cols)), [0, 3, 4, 1, 5, 2]
        else:
            split, perm = (c // (rows * cols), rows, cols), [0, 1, 4, 2, 5, 3]
        x = self.g.op("Transpose", self.g.reshape(x, -1, *split, h, w), perm=perm)
        return self.g.reshape(x, -1, *self.size)

    def space_to_depth(self, x: str) -> str:
        (c, h, w), rows, cols = self.size_in, self.attrs["rows"], self.attrs["cols"]
        x = self.g.reshape(x, -1, c, h // rows, rows, w // cols, cols)
        perm = [0, 3, 5, 1, 2, 4] if self.attrs["order"] == "DCR" else [0, 1, 3, 5, 2, 4]
        return self.g.reshape(self.g.op("Transpose", x, perm=perm), -1, *self.size)

    def flatten(self, x: str) -> str:
        return self.g.reshape(x, -1, *self.size)

    def softmax(self, x: str) -> str:
        return self.g.op("Softmax", x, axis=self.axis())

    def softsign(self, x: str) -> str:
        return self.g.op("Div", x, self.g.op("Add", self.g.op("Abs", x), self.number(1.0)))

    def hard_swish(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))

    def mish(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("Tanh", self.g.op("Softplus", x)))

    def celu(self, x: str) -> str:
        alpha = self.number(self.attrs["alpha"])
        return self.g.op("Mul", self.g.op("Elu", self.g.op("Div", x, alpha), alpha=1.0), alpha)

    def gelu(self, x: str) -> str:
        g = self.g
        if self.attrs["approximate"] == "tanh":
            cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), self.number(0.044715))
            inner = g.op("Mul", g.op("Add", x, cube), self.number(math.sqrt(2 / math.pi)))
            gate = g.op("Tanh", inner)
        else:
            gate = g.op("Erf", g.op("Mul", x, self.number(math.sqrt(0.5))))
        gate = g.op("Mul", g.op("Add", gate, self.number(1.0)), self.number(0.5))
        return g.op("Mul", x, gate)

    def clip(self, x: str) -> str:
        low, high = (
            "" if bound is None else self.number(bound)
            for bound in (self.attrs["low"], self.attrs["high"])
        )
        return self.g.op("Clip", x, low, high)
