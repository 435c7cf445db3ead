"""Part of a graph as a list of `Layer`s: the UNet between magnitude and mask, the CNN at the end.

Exporters write the same layer in many ways, and orders of axes differ. So every tensor is followed
with the roles of its axes ("n" segments, "c", "h", "w"), node by node; what only moves axes about
gives no layer. A node that the layers cannot express raises `Unmapped`: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from artifactnet_jax.convert.graph import Graph, Node
from artifactnet_jax.layers import INPUT, Layer, layer


def decimal(number: np.ndarray) -> float:
    """A single number as it was written: 1e-10, not the float32 next to it."""
    return float(str(np.reshape(number, ())[()]))


class Unmapped(Exception):
    """These nodes are no network of `Layer`s; the message names the node and the reason."""


@dataclasses.dataclass(eq=False)
class Trace:
    """What one run of a graph on a probe has shown.

    A tensor is static when it does not depend on the audio; of the others the shapes are kept, and
    the values of those that are not large.
    """

    graph: Graph
    segments: int  # of the probe
    static: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        self.producer = {out: node for node in self.graph.nodes for out in node.outputs if out}
        self.order = {out: k for k, node in enumerate(self.graph.nodes) for out in node.outputs}

    def inputs(self) -> list[str]:
        """The graph's inputs."""
        return [value.name for value in self.graph.inputs]

    def before(self, name: str) -> set[str]:
        """The tensors that a tensor is computed from, itself included."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            tensor = todo.pop()
            if tensor and tensor not in seen and tensor not in self.static:
                seen.add(tensor)
                todo += self.producer[tensor].inputs if tensor in self.producer else ()
        return seen

    def cuts(self, source: set[str], tensor: str, target: str) -> bool:
        """Whether every way from any of `source` to `target` passes through `tensor`."""
        seen: set[str] = set()
        todo = [target]
        while todo:
            name = todo.pop()
            if not name or name in seen or name in self.static or name == tensor:
                continue
            if name in source:
                return False
            seen.add(name)
            todo += self.producer[name].inputs if name in self.producer else ()
        return True


@dataclasses.dataclass(frozen=True)
class _Map:
    """A tensor of the graph as the output of a layer.

    `roles` names the axes of the graph's tensor; an axis of the layer's map that the tensor lacks
    has size 1. `spread` are shapes of a reshaped tensor on its way to a known pattern.
    """

    name: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]  # of the map (C, H, W), or of the vector (C,)
    spread: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Network:
    """Layers, their tensors by full leaf name ("encoder.0.kernel"), and where those came from."""

    layers: tuple[Layer, ...]
    tensors: dict[str, np.ndarray]
    sources: dict[str, tuple[str, str]]  # tensor -> (name in the graph, transform of `export`)


_UNARY = {
    **{op: op.lower() for op in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Mish")},
    **{op: op.lower() for op in ("Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg", "Erf")},
    "HardSwish": "hard_swish",
}
# With the defaults of ONNX.
_WITH_ATTRIBUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "Elu": ("elu", {"alpha": 1.0}),
    "Celu": ("celu", {"alpha": 1.0}),
    "Selu": ("selu", {"alpha": 1.6732631921768188, "gamma": 1.0507010221481323}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": 0.2, "beta": 0.5}),
    "Gelu": ("gelu", {"approximate": "none"}),
}
_BINARY = {
    **{"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow"},
    **{"Max": "maximum", "Min": "minimum", "Sum": "add"},
}
_POOLED = {"GlobalAveragePool": "mean", "GlobalMaxPool": "max"}
_REDUCED = {"ReduceMean": "mean", "ReduceMax": "max", "ReduceSum": "sum"}
_NOTHING = {"Identity", "Dropout", "Cast", "CastLike"}
_SPATIAL = ("n", "c", "h", "w")


class _Builder:
    """Follows the nodes of one network; one method for each kind of node."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.layers: list[Layer] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.sources: dict[str, tuple[str, str]] = {}
        self.maps: dict[str, _Map] = {}
        self.node: Node | None = None
        self._counts: dict[str, int] = {}
        self._turned: dict[str, str] = {}

    # --- small helpers -------------------------------------------------------------------------

    def fail(self, reason: str) -> Unmapped:
        assert self.node is not None
        return Unmapped(f"{self.node.op} node {self.node.name or self.node.outputs[0]!r}: {reason}")

    def emit(
        self,
        op: str,
        inputs: Iterable[str],
        attributes: dict[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> str:
        kind = op.split("_")[0]
        number = self._counts[kind] = self._counts.get(kind, -1) + 1
        name = f"{kind}.{number}"
        shapes = {leaf: tensor.shape for leaf, tensor in (tensors or {}).items()}
        for leaf, tensor in (tensors or {}).items():
            self.tensors[f"{name}.{leaf}"] = np.ascontiguousarray(tensor, np.float32)
        self.layers.append(layer(name, op, inputs, attributes, shapes))
        return name

    def source(self, tensor: str, name: str, transform: str) -> None:
        """Note which initialiser a tensor was, seen through nodes that only move elements."""
        while name not in self.trace.graph.constants:
            node = self.trace.producer.get(name)
            if node is None or node.op == "Constant":
                break
            if node.op in ("Identity", "Cast"):
                name = node.inputs[0]
            elif node.op in ("Reshape", "Unsqueeze", "Squeeze", "Flatten"):
                name = node.inputs[0]
                if transform == "same":
                    transform = "reshape"
                elif transform not in ("reshape", "CHW"):
                    return
            elif node.op == "Transpose" and transform in ("same", "transpose"):
                if len(self.trace.static[name].shape) != 2:
                    return
                name = node.inputs[0]
                transform = "transpose" if transform == "same" else "same"
            else:
                return  # computed: it cannot be written back
        self.sources[tensor] = (name, transform)

    def static(self, name: str) -> np.ndarray:
        if name not in self.trace.static:
            raise self.fail(f"its operand {name!r} is computed from the audio")
        return self.trace.static[name]

    def is_static(self, name: str) -> bool:
        return name in self.trace.static

    def size(self, value: _Map, role: str) -> int:
        return value.shape["chw".index(role)]

    def upright(self, value: _Map) -> _Map:
        """The value with axes n, c, h, w in this order, turned if H and W are the other way."""
        if value.spread or len(value.shape) != 3:
            raise self.fail("its input is not a feature map")
        if value.roles == _SPATIAL:
            return value
        if value.roles != ("n", "c", "w", "h"):
            raise self.fail(f"its input has axes {value.roles}")
        if value.name not in self._turned:
            self._turned[value.name] = self.emit("transpose_hw", [value.name])
        c, h, w = value.shape
        return _Map(self._turned[value.name], _SPATIAL, (c, w, h))

    def out(
        self, name: str, roles: tuple[str, ...], shape: tuple[int, ...], index: int = 0
    ) -> None:
        """Register an output and compare its size with what the graph computed."""
        assert self.node is not None
        tensor = self.node.outputs[index]
        sizes = {"n": self.trace.segments, **dict(zip("chw", shape, strict=False))}
        expected = tuple(sizes[role] if role != "1" else 1 for role in roles)
        got = self.trace.shapes[tensor]
        if expected != got and self.node.op != "Expand":
            raise self.fail(f"gives {got}, expected {expected}")
        self.maps[tensor] = _Map(name, roles, shape)

    # --- the walk ------------------------------------------------------------------------------

    def walk(self, starts: Mapping[str, _Map], target: str) -> _Map:
        self.maps.update(starts)
        needed = self.trace.before(target)
        stop: set[str] = set()
        todo = [target]
        while todo:  # what lies between starts and target
            name = todo.pop()
            if name in stop or name in starts or name not in needed:
                continue
            stop.add(name)
            if name not in self.trace.producer:
                raise Unmapped(f"{target!r} depends on {name!r} past the network's input")
            todo += self.trace.producer[name].inputs
        for node in self.trace.graph.nodes:
            if any(out in stop for out in node.outputs):
                self.node = node
                self.visit(node)
        return self.maps[target]

    def visit(self, node: Node) -> None:
        op = node.op
        if op in _NOTHING:
            self.maps[node.outputs[0]] = self.maps[node.inputs[0]]
        elif op in _UNARY or op in _WITH_ATTRIBUTES:
            kind, defaults = _WITH_ATTRIBUTES.get(op, (_UNARY.get(op, ""), {}))
            attributes = {key: node.attributes.get(key, value) for key, value in defaults.items()}
            self.same(kind, self.maps[node.inputs[0]], attributes)
        elif op in _BINARY:
            self.binary(_BINARY[op])
        else:
            method: Callable[[Node], None] | None = getattr(self, f"on_{op}", None)
            if op in _POOLED:
                method = self.on_global
            elif op in _REDUCED:
                method = self.on_reduce
            if method is None:
                raise self.fail("no layer does this")
            method(node)

    def same(
        self,
        kind: str,
        value: _Map,
        attributes: dict[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> str:
        """An elementwise layer: roles and shape stay."""
        if value.spread:
            raise self.fail("it acts on a reshaped feature map")
        name = self.emit(kind, [value.name], attributes, tensors)
        self.out(name, value.roles, value.shape)
        return name

    def constant(self, array: np.ndarray, value: _Map) -> np.ndarray:
        """A constant that broadcasts against a graph tensor, in the order (C, H, W) or (C,)."""
        rank = len(value.roles)
        if array.ndim > rank:
            if array.shape[: array.ndim - rank] != (1,) * (array.ndim - rank):
                raise self.fail("a constant adds axes")
            array = array.reshape(array.shape[array.ndim - rank :])
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
        ordered = np.ones((1,) * len(value.shape), array.dtype)
        axes = {role: axis for axis, role in enumerate(value.roles) if role != "1"}
        if any(array.shape[axis] != 1 for axis, role in enumerate(value.roles) if role in "n1"):
            raise self.fail("a constant that differs between segments")
        names = "chw"[: len(value.shape)]
        present = [role for role in names if role in axes]
        moved = array.transpose(
            [axes[role] for role in present]
            + [axis for axis in range(rank) if value.roles[axis] in "n1"]
        )
        sizes = dict(zip(present, moved.shape, strict=False))
        return ordered * moved.reshape([sizes.get(role, 1) for role in names])

    def binary(self, kind: str) -> None:
        node = self.node
        assert node is not None
        if len(node.inputs) == 1:
            self.maps[node.outputs[0]] = self.maps[node.inputs[0]]
            return
        statics = [self.is_static(name) for name in node.inputs]
        if len(node.inputs) > 2:
            if any(statics):
                raise self.fail("several operands of which one is constant")
            value = self.maps[node.inputs[0]]
            for other in node.inputs[1:]:
                value = self.pair(kind, value, self.maps[other])
            self.maps[node.outputs[0]] = value
            return
        if any(statics):
            index = statics.index(True)
            value, array = self.maps[node.inputs[1 - index]], self.static(node.inputs[index])
            if value.spread:
                raise self.fail("it acts on a reshaped feature map")
            reverse = index == 0 and kind in ("sub", "div", "pow")
            if array.size == 1:
                attributes = {"value": decimal(array), "reverse": reverse}
                if len(np.broadcast_shapes(array.shape, self.trace.shapes[node.outputs[0]])) > len(
                    value.roles
                ):
                    raise self.fail("a constant adds axes")
                self.same(kind, value, attributes)
                return
            constant = self.constant(array, value)
            shape = np.broadcast_shapes(constant.shape, value.shape)
            if shape != value.shape:
                raise self.fail("a constant enlarges the feature map")
            name = self.same(kind, value, {"reverse": reverse}, {"value": constant})
            self.source(f"{name}.value", node.inputs[index], "CHW" if constant.size > 1 else "same")
            return
        self.maps[node.outputs[0]] = self.pair(
            kind, self.maps[node.inputs[0]], self.maps[node.inputs[1]]
        )

    def pair(self, kind: str, a: _Map, b: _Map) -> _Map:
        """A layer of two maps, whose axes are aligned from the right as in the graph."""
        if a.spread or b.spread or len(a.shape) != len(b.shape):
            raise self.fail("its inputs are not both feature maps")
        first, second = (a, b) if len(a.roles) >= len(b.roles) else (b, a)
        roles = list(first.roles)
        tail = roles[len(roles) - len(second.roles) :]
        for axis, (one, two) in enumerate(zip(tail, second.roles, strict=True)):
            if one == two:
                continue
            at = len(roles) - len(second.roles) + axis
            sizes = [
                1 if role == "1" else self.trace.segments if role == "n" else self.size(value, role)
                for role, value in ((one, first), (two, second))
            ]
            # An axis of size 1 broadcasts whatever its name; but a role may not change its place.
            if sizes[0] == 1 and two not in roles:
                roles[at] = two
            elif sizes[1] != 1:
                raise self.fail(f"axes {first.roles} meet {second.roles}")
        if len(set(roles) - {"1"}) != len([role for role in roles if role != "1"]):
            raise self.fail(f"axes {first.roles} meet {second.roles}")
        shape = np.broadcast_shapes(a.shape, b.shape)
        return _Map(self.emit(kind, [a.name, b.name]), tuple(roles), shape)

    # --- convolutions and linear layers --------------------------------------------------------

    def geometry(self, node: Node, value: _Map, window: tuple[int, int]) -> dict[str, Any]:
        """strides, padding and dilations of a convolution or pooling, auto_pad resolved."""
        strides = tuple(node.attributes.get("strides", (1, 1)))
        dilations = tuple(node.attributes.get("dilations", (1, 1)))
        pads = tuple(node.attributes.get("pads", (0, 0, 0, 0)))
        auto = node.attributes.get("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = []
            for size, k, s, d in zip(value.shape[1:], window, strides, dilations, strict=True):
                total.append(max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size))
            small = [t // 2 for t in total]
            large = [t - t // 2 for t in total]
            begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
            pads = (*begin, *end)
        elif auto == "VALID":
            pads = (0, 0, 0, 0)
        padding = ((pads[0], pads[2]), (pads[1], pads[3]))
        return {"strides": strides, "padding": padding, "dilations": dilations}

    def on_Conv(self, node: Node) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        weight = self.static(node.inputs[1])
        if weight.ndim != 4:
            raise self.fail("a convolution that is not two-dimensional")
        groups = int(node.attributes.get("group", 1))
        attributes = {**self.geometry(node, value, weight.shape[2:]), "groups": groups}
        tensors = {"kernel": weight.transpose(2, 3, 1, 0)}
        if len(node.inputs) > 2 and node.inputs[2]:
            tensors["bias"] = self.static(node.inputs[2])
        name = self.emit("conv", [value.name], attributes, tensors)
        self.source(f"{name}.kernel", node.inputs[1], "OIHW")
        if "bias" in tensors:
            self.source(f"{name}.bias", node.inputs[2], "same")
        self.out(name, _SPATIAL, (weight.shape[0], *self.trace.shapes[node.outputs[0]][2:]))

    def on_ConvTranspose(self, node: Node) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        weight = self.static(node.inputs[1])
        if weight.ndim != 4 or int(node.attributes.get("group", 1)) != 1:
            raise self.fail("a transposed convolution in groups, or not two-dimensional")
        if tuple(node.attributes.get("dilations", (1, 1))) != (1, 1):
            raise self.fail("a dilated transposed convolution")
        strides = tuple(node.attributes.get("strides", (1, 1)))
        pads = list(node.attributes.get("pads", (0, 0, 0, 0)))
        extra = list(node.attributes.get("output_padding", (0, 0)))
        got = self.trace.shapes[node.outputs[0]][2:]
        full = [
            (size - 1) * s + k
            for size, s, k in zip(value.shape[1:], strides, weight.shape[2:], strict=True)
        ]
        auto = node.attributes.get("auto_pad", "NOTSET")
        if auto != "NOTSET" or "output_shape" in node.attributes:
            for axis in (0, 1):
                total = full[axis] + extra[axis] - got[axis]
                if total < 0:
                    extra[axis] -= total
                    total = 0
                less, more = total // 2, total - total // 2
                begin, end = (less, more) if auto == "SAME_UPPER" else (more, less)
                if auto == "NOTSET":
                    begin, end = less, more
                pads[axis], pads[axis + 2] = begin, end
        attributes = {
            "strides": strides,
            "padding": ((pads[0], pads[2]), (pads[1], pads[3])),
            "output_padding": tuple(extra),
        }
        tensors = {"kernel": weight.transpose(2, 3, 0, 1)}
        if len(node.inputs) > 2 and node.inputs[2]:
            tensors["bias"] = self.static(node.inputs[2])
        name = self.emit("conv_transpose", [value.name], attributes, tensors)
        self.source(f"{name}.kernel", node.inputs[1], "IOHW")
        if "bias" in tensors:
            self.source(f"{name}.bias", node.inputs[2], "same")
        self.out(name, _SPATIAL, (weight.shape[1], *got))

    def dense(self, value: _Map, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """Linear layer on a vector, or on the features of every position of a map."""
        tensors = {"kernel": weight} if len(value.shape) == 1 else {"kernel": weight[None, None]}
        if bias is not None:
            tensors["bias"] = bias
        if len(value.shape) == 1:
            return self.emit("linear", [value.name], {}, tensors)
        attributes = {
            "strides": (1, 1),
            "padding": ((0, 0), (0, 0)),
            "dilations": (1, 1),
            "groups": 1,
        }
        return self.emit("conv", [value.name], attributes, tensors)

    def on_Gemm(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        if value.spread or value.roles != ("n", "c") or node.attributes.get("transA", 0):
            raise self.fail(f"its input has axes {value.roles}")
        weight = self.static(node.inputs[1])
        transposed = bool(node.attributes.get("transB", 0))
        alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
        bias = None
        if len(node.inputs) > 2 and node.inputs[2]:
            array = self.static(node.inputs[2])
            outputs = weight.shape[0] if transposed else weight.shape[1]
            bias = np.broadcast_to(array.reshape(-1) * beta, (outputs,))
        kernel = weight.T if transposed else weight
        name = self.dense(value, kernel * alpha, bias)
        if alpha == 1:
            like = "transpose" if transposed else "same"
            shape = "reshape" if like == "same" else "transpose"
            self.source(f"{name}.kernel", node.inputs[1], shape if len(value.shape) == 3 else like)
        if bias is not None and beta == 1 and array.size == bias.size:
            self.source(f"{name}.bias", node.inputs[2], "same" if array.ndim == 1 else "reshape")
        rest = (1, 1) if len(value.shape) == 3 else ()
        self.out(name, ("n", "c"), (kernel.shape[1], *rest))

    def on_MatMul(self, node: Node) -> None:
        if self.is_static(node.inputs[0]) or not self.is_static(node.inputs[1]):
            raise self.fail("a product of two computed tensors, or along another axis")
        value, weight = self.maps[node.inputs[0]], self.static(node.inputs[1])
        if value.spread or value.roles[-1] != "c" or weight.ndim != 2:
            raise self.fail(f"a product along axes {value.roles}")
        name = self.dense(value, weight, None)
        self.source(
            f"{name}.kernel", node.inputs[1], "same" if len(value.shape) == 1 else "reshape"
        )
        self.out(name, value.roles, (weight.shape[1], *value.shape[1:]))

    # --- norms ---------------------------------------------------------------------------------

    def affine(self, name: str, node: Node, leaves: Mapping[str, int]) -> None:
        for leaf, index in leaves.items():
            self.source(f"{name}.{leaf}", node.inputs[index], "same")

    def on_BatchNormalization(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        if value.spread or value.roles[:2] != ("n", "c"):
            raise self.fail(f"its input has axes {value.roles}")
        leaves = {"scale": 1, "bias": 2, "mean": 3, "var": 4}
        tensors = {leaf: self.static(node.inputs[index]) for leaf, index in leaves.items()}
        epsilon = float(node.attributes.get("epsilon", 1e-5))
        name = self.same("batch_norm", value, {"epsilon": epsilon}, tensors)
        self.affine(name, node, leaves)

    def on_InstanceNormalization(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        epsilon = float(node.attributes.get("epsilon", 1e-5))
        scale, bias = self.static(node.inputs[1]), self.static(node.inputs[2])
        if value.spread and value.spread[0] == "groups":
            # A group norm: [n, C, H, W] as [n, groups, everything else]; its affine part follows.
            if np.any(scale != 1) or np.any(bias != 0):
                raise self.fail("a group norm with a scale for each group")
            name = self.emit(
                "group_norm", [value.name], {"groups": value.spread[1], "epsilon": epsilon}
            )
            self.maps[node.outputs[0]] = dataclasses.replace(value, name=name)
            return
        value = self.upright(value)
        attributes = {"groups": value.shape[0], "epsilon": epsilon}
        name = self.emit("group_norm", [value.name], attributes, {"scale": scale, "bias": bias})
        self.affine(name, node, {"scale": 1, "bias": 2})
        self.out(name, value.roles, value.shape)

    def on_GroupNormalization(self, node: Node) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        groups = int(node.attributes["num_groups"])
        attributes = {"groups": groups, "epsilon": float(node.attributes.get("epsilon", 1e-5))}
        scale, bias = self.static(node.inputs[1]), self.static(node.inputs[2])
        by_group = len(scale) == groups != value.shape[0]  # before opset 21
        if by_group:
            scale, bias = (np.repeat(x, value.shape[0] // groups) for x in (scale, bias))
        name = self.emit("group_norm", [value.name], attributes, {"scale": scale, "bias": bias})
        if not by_group:
            self.affine(name, node, {"scale": 1, "bias": 2})
        self.out(name, value.roles, value.shape)

    def on_LayerNormalization(self, node: Node) -> None:
        # Over all of (C, H, W), or over C where that is the last axis.
        value = self.maps[node.inputs[0]]
        axis = int(node.attributes.get("axis", -1)) % len(value.roles)
        axes = "".join(role for role in value.roles[axis:] if role != "1")
        if value.spread or "n" in axes or not axes or node.outputs[1:2] not in ((), ("",)):
            raise self.fail(f"a norm over axes {value.roles[axis:]}")
        axes = "".join(sorted(axes))
        epsilon = float(node.attributes.get("epsilon", 1e-5))
        mean = self.emit("mean", [value.name], {"axes": axes})
        centred = self.emit("sub", [value.name, mean])
        square = self.emit("mul", [centred, centred])
        variance = self.emit("mean", [square], {"axes": axes})
        shifted = self.emit("add", [variance], {"value": epsilon, "reverse": False})
        deviation = self.emit("sqrt", [shifted])
        name = self.emit("div", [centred, deviation])
        for kind, index in (("mul", 1), ("add", 2)):
            if len(node.inputs) > index and node.inputs[index]:
                array = self.constant(self.static(node.inputs[index]), value)
                name = self.emit(kind, [name], {"reverse": False}, {"value": array})
                self.source(f"{name}.value", node.inputs[index], "CHW")
        self.out(name, value.roles, value.shape)

    def on_PRelu(self, node: Node) -> None:
        value, slope = self.maps[node.inputs[0]], self.static(node.inputs[1])
        array = self.constant(slope, value)
        if array.size not in (1, value.shape[0]) or array.shape[0] != array.size:
            raise self.fail("a slope that is not one for each feature")
        name = self.same("prelu", value, {}, {"slope": array.reshape(-1)})
        self.source(f"{name}.slope", node.inputs[1], "same" if slope.ndim == 1 else "reshape")

    # --- pooling, resizing, padding, cutting ---------------------------------------------------

    def pool(self, node: Node, kind: str, **more: Any) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        window = tuple(node.attributes["kernel_shape"])
        geometry = self.geometry(node, value, window)
        if geometry.pop("dilations") != (1, 1) or len(window) != 2:
            raise self.fail("a dilated pooling, or one that is not two-dimensional")
        got = self.trace.shapes[node.outputs[0]][2:]
        padding = [list(sides) for sides in geometry["padding"]]
        if not any(map(any, padding)) and kind == "avg_pool":
            more["count_include_pad"] = False  # there is none, and what lies past the end is none
        for axis in (0, 1):  # ceil_mode reads past the end
            s, k = geometry["strides"][axis], window[axis]
            reach = (got[axis] - 1) * s + k - value.shape[1 + axis] - padding[axis][0]
            if node.attributes.get("ceil_mode", 0) and reach > padding[axis][1]:
                if kind == "avg_pool" and more["count_include_pad"]:
                    raise self.fail("average pooling past its padding")
                padding[axis][1] = reach
        attributes = {"kernel": window, **geometry, "padding": padding, **more}
        name = self.emit(kind, [value.name], attributes)
        self.out(name, _SPATIAL, (value.shape[0], *got))

    def on_MaxPool(self, node: Node) -> None:
        if node.outputs[1:2] not in ((), ("",)):
            raise self.fail("its indices are used")
        self.pool(node, "max_pool")

    def on_AveragePool(self, node: Node) -> None:
        self.pool(
            node, "avg_pool", count_include_pad=bool(node.attributes.get("count_include_pad", 0))
        )

    def on_global(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        if value.spread or value.roles[:2] != ("n", "c"):
            raise self.fail(f"its input has axes {value.roles}")
        name = self.emit(_POOLED[node.op], [value.name], {"axes": "hw"})
        self.out(name, value.roles, (value.shape[0], 1, 1))

    def reduced(self, kind: str, name: str, letters: str) -> str:
        """A reduction; one over several axes may have been written axis by axis."""
        before = next((x for x in self.layers if x.name == name), None)
        if before is not None and before.op == kind:
            letters = "".join(sorted({*letters, *before.attrs["axes"]}))
            name = before.inputs[0]
        return self.emit(kind, [name], {"axes": letters})

    def on_reduce(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        axes = node.attributes.get("axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1]:
            axes = self.static(node.inputs[1]).reshape(-1).tolist()
        if axes is None or value.spread:
            raise self.fail("it reduces over all axes, segments included")
        places = {int(axis) % len(value.roles) for axis in axes}
        reduced = [value.roles[axis] for axis in sorted(places)]
        if "n" in reduced and self.trace.segments > 1:
            raise self.fail("it reduces over segments")
        letters = "".join(sorted(role for role in reduced if role not in "n1"))
        if len(value.shape) == 1:
            raise self.fail("it reduces a vector")
        name = self.reduced(_REDUCED[node.op], value.name, letters) if letters else value.name
        shape = tuple(
            1 if role in letters else size for role, size in zip("chw", value.shape, strict=True)
        )
        keep = bool(node.attributes.get("keepdims", 1))
        roles = tuple(r for k, r in enumerate(value.roles) if keep or k not in places)
        if "n" in reduced and not keep:
            raise self.fail("it drops the axis of segments")
        self.out(name, roles, shape)

    def on_Resize(self, node: Node) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        got = self.trace.shapes[node.outputs[0]][2:]
        mode = node.attributes.get("mode", "nearest")
        coordinates = node.attributes.get("coordinate_transformation_mode", "half_pixel")
        known = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
        if mode not in ("nearest", "linear") or coordinates not in known:
            raise self.fail(f"resizing by {mode} with {coordinates} coordinates")
        if node.attributes.get("antialias", 0) or "axes" in node.attributes:
            raise self.fail("resizing with antialias, or along chosen axes")
        if node.op == "Upsample":
            coordinates = "asymmetric"
        scales = [g / s for g, s in zip(got, value.shape[1:], strict=True)]
        given = node.inputs[1 if node.op == "Upsample" else 2 : 3]
        if given and given[0] and self.static(given[0]).size == 4:
            scales = [float(s) for s in self.static(given[0])[2:]]
        attributes = {
            "size": got,
            "scales": tuple(scales),
            "mode": mode,
            "coordinates": coordinates,
            "rounding": node.attributes.get("nearest_mode", "round_prefer_floor")
            if node.op == "Resize"
            else "floor",
        }
        name = self.emit("resize", [value.name], attributes)
        self.out(name, _SPATIAL, (value.shape[0], *got))

    on_Upsample = on_Resize

    def on_Pad(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        pads = node.attributes.get("pads")
        if pads is None:
            pads = self.static(node.inputs[1]).reshape(-1)
        pads = [int(p) for p in pads]
        number = 0.0 if len(node.inputs) < 3 or not node.inputs[2] else self.static(node.inputs[2])
        number = node.attributes.get("value", float(np.reshape(number, ())))
        places = list(range(len(value.roles)))
        if len(node.inputs) > 3 and node.inputs[3]:
            places = [int(a) % len(value.roles) for a in self.static(node.inputs[3]).reshape(-1)]
        mode = node.attributes.get("mode", "constant")
        half = len(pads) // 2
        sides = {value.roles[a]: (pads[k], pads[k + half]) for k, a in enumerate(places)}
        moved = {role for role, pair in sides.items() if pair != (0, 0)}
        if value.spread or not moved <= {"h", "w"} or mode not in ("constant", "reflect", "edge"):
            raise self.fail(f"padding of axes {sorted(moved)} by {mode}")
        padding = tuple(sides.get(role, (0, 0)) for role in "hw")
        c, h, w = value.shape
        shape = (c, h + sum(padding[0]), w + sum(padding[1]))
        name = value.name
        if min(min(padding[0]), min(padding[1])) < 0:  # PyTorch crops by negative padding
            for axis, (begin, end), size in zip("hw", padding, (h, w), strict=True):
                if begin < 0 or end < 0:
                    attributes = {"axis": axis, "start": max(-begin, 0)}
                    attributes |= {"stop": size - max(-end, 0), "step": 1}
                    name = self.emit("slice", [name], attributes)
            padding = tuple((max(a, 0), max(b, 0)) for a, b in padding)
        if padding != ((0, 0), (0, 0)):
            attributes = {"padding": padding, "mode": mode, "value": number}
            name = self.emit("pad", [name], attributes)
        self.out(name, value.roles, shape)

    def cut(self, value: _Map, role: str, start: int, stop: int, step: int = 1) -> _Map:
        """Part of one axis of a map."""
        where = "chw".index(role) if role in "chw" else -1
        if value.spread:
            raise self.fail("it acts on a reshaped feature map")
        if where < 0 or where >= len(value.shape) or step < 1:
            raise self.fail(f"a cut along axis {role!r} with step {step}")
        size = value.shape[where]
        if (start, stop, step) == (0, size, 1):
            return value
        attributes = {"axis": role, "start": start, "stop": stop, "step": step}
        shape = list(value.shape)
        shape[where] = len(range(start, stop, step))
        return _Map(self.emit("slice", [value.name], attributes), value.roles, tuple(shape))

    def on_Slice(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        if len(node.inputs) > 1:
            given = [
                self.static(name).reshape(-1).tolist() if name else None for name in node.inputs[1:]
            ]
            starts, stops, axes, steps = (*given, None, None)[:4]
        else:
            starts, stops = node.attributes["starts"], node.attributes["ends"]
            axes, steps = node.attributes.get("axes"), None
        assert starts is not None
        assert stops is not None
        axes = list(range(len(starts))) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
            role = value.roles[int(axis) % len(value.roles)]
            size = (
                1 if role == "1" else self.trace.segments if role == "n" else self.size(value, role)
            )
            begin, end, stride = slice(int(start), int(stop), int(step)).indices(size)
            if role in "n1":
                if (begin, end, stride) != (0, size, 1):
                    raise self.fail("a choice of segments")
                continue
            value = self.cut(value, role, begin, end, stride)
        self.out(value.name, value.roles, value.shape)

    def on_Split(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        axis = int(node.attributes.get("axis", 0)) % len(value.roles)
        start = 0
        for index, tensor in enumerate(node.outputs):
            if not tensor or tensor not in self.trace.shapes:
                raise self.fail("an output that is not computed")
            stop = start + self.trace.shapes[tensor][axis]
            part = self.cut(value, value.roles[axis], start, stop)
            self.out(part.name, part.roles, part.shape, index)
            start = stop

    def on_Gather(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        index = self.static(node.inputs[1])
        axis = int(node.attributes.get("axis", 0)) % len(value.roles)
        role = value.roles[axis]
        if value.spread or role in "n1" or index.ndim > 1:
            raise self.fail(f"a choice along axis {role!r}")
        numbers = np.atleast_1d(index) % self.size(value, role)
        step = int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
        if step < 1 or np.any(np.diff(numbers) != step):
            raise self.fail("a choice that is no range")
        part = self.cut(value, role, int(numbers[0]), int(numbers[-1]) + 1, step)
        roles = (
            part.roles if index.ndim else tuple(r for k, r in enumerate(part.roles) if k != axis)
        )
        self.out(part.name, roles, part.shape)

    def on_Concat(self, node: Node) -> None:
        if any(self.is_static(name) for name in node.inputs):
            raise self.fail("a constant beside feature maps")
        values = [self.maps[name] for name in node.inputs]
        roles = values[0].roles
        role = roles[int(node.attributes["axis"]) % len(roles)]
        if any(v.spread or v.roles != roles for v in values) or role in "n":
            raise self.fail(f"axes {[v.roles for v in values]} along {role!r}")
        if role == "1":  # [n, 1, h, w] whose features axis was dropped before
            free = [r for r in "chw"[: len(values[0].shape)] if r not in roles]
            if not free:
                raise self.fail("its axis is not one of the feature map")
            role = free[0]
            axis = int(node.attributes["axis"]) % len(roles)
            roles = (*roles[:axis], role, *roles[axis + 1 :])
        where = "chw".index(role)
        shape = list(values[0].shape)
        shape[where] = sum(v.shape[where] for v in values)
        name = self.emit("concat", [v.name for v in values], {"axis": role})
        self.out(name, roles, tuple(shape))

    def on_Softmax(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        axis = node.attributes.get("axis", -1 if self.trace.graph.opset >= 13 else 1)
        axis = int(axis) % len(value.roles)
        if self.trace.graph.opset < 13 and axis != len(value.roles) - 1:
            raise self.fail("a softmax over several axes")
        if value.spread or value.roles[axis] in "n1":
            raise self.fail(f"a softmax along axis {value.roles[axis]!r}")
        self.same("softmax", value, {"axis": value.roles[axis]})

    def on_Clip(self, node: Node) -> None:
        limits: list[float | None] = []
        for index, key in ((1, "min"), (2, "max")):
            if len(node.inputs) > index and node.inputs[index]:
                limits.append(decimal(self.static(node.inputs[index])))
            else:
                limits.append(node.attributes.get(key))
        # The largest float of the type stands for no limit.
        low, high = (None if x is None or abs(x) > 3e38 else float(x) for x in limits)
        self.same("clip", self.maps[node.inputs[0]], {"low": low, "high": high})

    # --- what only moves axes ------------------------------------------------------------------

    def on_Transpose(self, node: Node) -> None:
        value = self.maps[node.inputs[0]]
        rank = len(self.trace.shapes[node.inputs[0]])
        perm = tuple(node.attributes.get("perm", range(rank)[::-1]))
        if value.spread:
            if value.spread[0] != "shuffle" or perm != value.spread[2]:
                raise self.fail("it moves axes of a reshaped feature map")
            self.maps[node.outputs[0]] = dataclasses.replace(
                value, spread=("shuffled", *value.spread[1:])
            )
            return
        self.maps[node.outputs[0]] = dataclasses.replace(
            value, roles=tuple(value.roles[axis] for axis in perm)
        )

    def on_Expand(self, node: Node) -> None:
        # What follows broadcasts all the same.
        value = self.maps[node.inputs[0]]
        rank = len(self.trace.shapes[node.outputs[0]])
        roles = ("1",) * (rank - len(value.roles)) + value.roles
        self.maps[node.outputs[0]] = dataclasses.replace(value, roles=roles)

    def reshaped(self, node: Node) -> None:
        """Reshape, Flatten, Squeeze and Unsqueeze: by the shapes before and after."""
        value = self.maps[node.inputs[0]]
        old, new = self.trace.shapes[node.inputs[0]], self.trace.shapes[node.outputs[0]]
        n = self.trace.segments
        if value.spread:
            kind = value.spread[0]
            c, h, w = value.shape
            if kind == "groups" and new == (n, c, h, w):
                self.out(value.name, _SPATIAL, value.shape)
            elif kind == "shuffled":
                _, (rows, cols), _, order = value.spread
                shape = (c // rows // cols, h * rows, w * cols)
                if new != (n, *shape):
                    raise self.fail(f"{new} after a pixel shuffle")
                attributes = {"rows": rows, "cols": cols, "order": order}
                self.out(self.emit("depth_to_space", [value.name], attributes), _SPATIAL, shape)
            else:
                raise self.fail(f"{old} to {new}")
            return
        if (roles := self.regrouped(value, old, new)) is not None:
            self.out(value.name, roles, value.shape)
            return
        if len(value.shape) == 3 and value.roles in (_SPATIAL, ("n", "c", "w", "h")):
            value = self.upright(value)
            c, h, w = value.shape
            if new == (n, c * h * w) or (n == 1 and new == (c * h * w,)):
                roles = ("n", "c") if len(new) == 2 else ("c",)
                self.out(self.emit("flatten", [value.name]), roles, (c * h * w,))
                return
            if (
                len(new) >= 3
                and new[0] == n
                and c % new[1] == 0
                and math.prod(new) == math.prod(old)
            ):
                if len(new) == 3 or (new[2:] == (c // new[1] * h * w,)):
                    spread: tuple[Any, ...] = ("groups", new[1])
                    self.maps[node.outputs[0]] = dataclasses.replace(value, spread=spread)
                    return
                if len(new) == 6 and new[4:] == (h, w):
                    # CRD: [n, C, r, s, h, w], as PyTorch's pixel shuffle; DCR: [n, r, s, C, h, w].
                    for order, sizes, perm in (
                        ("CRD", new[2:4], (0, 1, 4, 2, 5, 3)),
                        ("DCR", new[1:3], (0, 3, 4, 1, 5, 2)),
                    ):
                        following = [
                            other
                            for other in self.trace.graph.nodes
                            if node.outputs[0] in other.inputs and other.op == "Transpose"
                        ]
                        if following and tuple(following[0].attributes["perm"]) == perm:
                            spread = ("shuffle", sizes, perm, order)
                            self.maps[node.outputs[0]] = dataclasses.replace(value, spread=spread)
                            return
        raise self.fail(f"{old} to {new}")

    on_Reshape = on_Flatten = on_Squeeze = on_Unsqueeze = reshaped

    def regrouped(
        self, value: _Map, old: tuple[int, ...], new: tuple[int, ...]
    ) -> tuple[str, ...] | None:
        """Roles after a reshape that only drops or adds axes of size 1; None if it does more."""
        if [s for s in old if s != 1] != [s for s in new if s != 1]:
            return None
        if new == old:
            return value.roles
        large = [role for role, size in zip(value.roles, old, strict=True) if size != 1]
        small = [role for role, size in zip(value.roles, old, strict=True) if size == 1]
        # Segments stay in front. Other axes of size 1 are named by where they stand: in a new
        # shape of four axes as in (n, c, h, w) if the large ones agree, else in their old order.
        roles: list[str] = []
        left = list(large)
        for size in new:
            roles.append(left.pop(0) if size != 1 else "1")
        free = [role for role in ("n", *"chw"[: len(value.shape)]) if role not in large]
        if len(new) == 4 and all(r in ("1", s) for r, s in zip(roles, _SPATIAL, strict=True)):
            return tuple(_SPATIAL) if len(value.shape) == 3 else None
        names = [role for role in small if role != "1"]
        names += [role for role in free if role not in names]
        names.sort(key=lambda role: role != "n")
        for axis, role in enumerate(roles):
            if role == "1" and names and not (names[0] == "n" and axis > 0):
                roles[axis] = names.pop(0)
        if roles[0] == "1" or ("n" not in roles and self.trace.segments > 1):
            return None
        return tuple(roles)

    def on_DepthToSpace(self, node: Node) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        block, (c, h, w) = int(node.attributes["blocksize"]), value.shape
        order = node.attributes.get("mode", "DCR")
        name = self.emit(
            "depth_to_space", [value.name], {"rows": block, "cols": block, "order": order}
        )
        self.out(name, _SPATIAL, (c // block**2, h * block, w * block))

    def on_SpaceToDepth(self, node: Node) -> None:
        value = self.upright(self.maps[node.inputs[0]])
        block, (c, h, w) = int(node.attributes["blocksize"]), value.shape
        name = self.emit(
            "space_to_depth", [value.name], {"rows": block, "cols": block, "order": "DCR"}
        )
        self.out(name, _SPATIAL, (c * block**2, h // block, w // block))


def extract(
    trace: Trace,
    starts: Mapping[str, tuple[str, ...]],
    shape: tuple[int, int, int],
    target: str,
    roles: tuple[str, ...] | None,
    *,
    two_class: int | None = None,
) -> Network:
    """The nodes between `starts` and `target` as layers.

    starts: graph tensors that all hold the network's input, with the roles of their axes ("n", "c",
    "h", "w", or "1" for a further axis of size 1). shape: (C, H, W) of that input. target: the
    graph tensor that the layers end in; `roles` are those of its axes, None if it is one number
    for each segment. With `two_class` the target is a pair of logits of which that one, less the
    other, is the output. Raises Unmapped.
    """
    builder = _Builder(trace)
    values = {name: _Map(INPUT, axes, shape) for name, axes in starts.items()}
    value = builder.walk(values, target)
    if value.spread:
        raise Unmapped(f"{target!r} is left reshaped")
    name = value.name
    if two_class is not None:
        pair = [
            builder.emit("slice", [name], {"axis": "c", "start": k, "stop": k + 1, "step": 1})
            for k in (two_class, 1 - two_class)
        ]
        if value.shape[0] != 2 or math.prod(value.shape) != 2:
            raise Unmapped(f"{target!r} is no pair of logits")
        name = builder.emit("sub", pair)
    elif roles is None:
        if math.prod(value.shape) != 1:
            raise Unmapped(f"{target!r} has {value.shape} values for each segment")
    else:
        at = {role: k for k, role in enumerate(value.roles)}
        if "h" in at and "w" in at and (at["h"] < at["w"]) != (roles.index("h") < roles.index("w")):
            name = builder.emit("transpose_hw", [name])
        elif "h" not in at or "w" not in at:
            raise Unmapped(f"{target!r} has axes {value.roles}")
    if not builder.layers:
        raise Unmapped(f"{target!r} is its own input")
    return Network(*_pruned(builder, name))


def _pruned(builder: _Builder, last: str) -> tuple[Any, Any, Any]:
    """Layers that the output needs."""
    by_name = {layer.name: layer for layer in builder.layers}
    needed, todo = set(), [last]
    while todo:
        name = todo.pop()
        if name != INPUT and name not in needed:
            needed.add(name)
            todo += by_name[name].inputs
    layers = tuple(layer for layer in builder.layers if layer.name in needed)
    kept = {f"{layer.name}.{leaf}" for layer in layers for leaf, _ in layer.tensors}
    tensors = {name: array for name, array in builder.tensors.items() if name in kept}
    sources = {name: pair for name, pair in builder.sources.items() if name in kept}
    return layers, tensors, sources
