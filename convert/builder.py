"""Layers in the making: what every node's reader needs of the graph and of the network so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from artifactnet_jax.convert.graph import Node
from artifactnet_jax.convert.trace import Trace, Unmapped, decimal
from artifactnet_jax.layers import Layer, layer

SPATIAL = ("n", "c", "h", "w")

# Appends the layers that a node is, from the map that is its first input.
Reader = Callable[["Builder", Node, "Map"], None]


@dataclasses.dataclass(frozen=True)
class Map:
    """A tensor of the graph as the output of a layer.

    `roles` names the axes of the graph's tensor; an axis of the layer's map that the tensor lacks
    has size 1. `spread` are shapes of a reshaped tensor on its way to a known pattern.
    """

    name: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]  # of the map (C, H, W), or of the vector (C,)
    spread: tuple[Any, ...] = ()


_RECURRENT = ("GRU", "LSTM", "RNN", "Loop", "Scan")
_CONSTANT = Map("", (), ())  # stands for an input that is no map


class Builder:
    """Follows the nodes of one network, and keeps the layers that they are."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.layers: list[Layer] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.sources: dict[str, tuple[str, str]] = {}
        self.maps: dict[str, Map] = {}
        self.node: Node | None = None
        self._counts: dict[str, int] = {}
        self._turned: dict[str, str] = {}

    def fail(self, reason: str) -> Unmapped:
        """The error that says so of the node being read."""
        assert self.node is not None
        return Unmapped(f"{self.node.op} node {self.node.name or self.node.outputs[0]!r}: {reason}")

    def emit(
        self,
        op: str,
        inputs: Iterable[str],
        attributes: dict[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> str:
        """Append a layer; its name."""
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
        if name in self.trace.stored:
            self.sources[tensor] = (name, transform)

    def static(self, name: str) -> np.ndarray:
        """A tensor that must not depend on the audio."""
        if name not in self.trace.static:
            raise self.fail(f"its operand {name!r} is computed from the audio")
        return self.trace.static[name]

    def is_static(self, name: str) -> bool:
        """Whether a tensor does not depend on the audio."""
        return name in self.trace.static

    def size(self, value: Map, role: str) -> int:
        """Size of an axis: of the map, of the segments, or 1."""
        if role in "n1":
            return self.trace.segments if role == "n" else 1
        return value.shape["chw".index(role)]

    def upright(self, value: Map) -> Map:
        """The value with axes n, c, h, w in this order, turned if H and W are the other way."""
        if value.spread or len(value.shape) != 3:
            raise self.fail("its input is not a feature map")
        if value.roles == SPATIAL:
            return value
        if value.roles != ("n", "c", "w", "h"):
            raise self.fail(f"its input has axes {value.roles}")
        if value.name not in self._turned:
            self._turned[value.name] = self.emit("transpose_hw", [value.name])
        c, h, w = value.shape
        return Map(self._turned[value.name], SPATIAL, (c, w, h))

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
        self.maps[tensor] = Map(name, roles, shape)

    def walk(self, starts: Mapping[str, Map], target: str, read: Reader) -> Map:
        """Read the nodes between starts and target in order; the map that the target is."""
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
        nodes = [x for x in self.trace.graph.nodes if any(out in stop for out in x.outputs)]
        for self.node in nodes:
            if self.node.op in _RECURRENT:  # and not the node that prepares its input
                raise self.fail("a recurrent layer, which no layer here is")
        for self.node in nodes:
            read(self, self.node, self.maps.get(self.node.inputs[0], _CONSTANT))
        return self.maps[target]

    def same(
        self,
        kind: str,
        value: Map,
        attributes: dict[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> str:
        """An elementwise layer: roles and shape stay."""
        if value.spread:
            raise self.fail("it acts on a reshaped feature map")
        name = self.emit(kind, [value.name], attributes, tensors)
        self.out(name, value.roles, value.shape)
        return name

    def constant(self, array: np.ndarray, value: Map) -> np.ndarray:
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
        """Read an arithmetic node: with a number, with a constant tensor, or of several maps."""
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
            self.with_constant(kind, node, statics.index(True))
            return
        self.maps[node.outputs[0]] = self.pair(
            kind, self.maps[node.inputs[0]], self.maps[node.inputs[1]]
        )

    def with_constant(self, kind: str, node: Node, index: int) -> None:
        """Read an arithmetic node of two inputs, of which the one at `index` is constant."""
        value, array = self.maps[node.inputs[1 - index]], self.static(node.inputs[index])
        if value.spread:
            raise self.fail("it acts on a reshaped feature map")
        reverse = index == 0 and kind in ("sub", "div", "pow")
        if array.size == 1:
            both = np.broadcast_shapes(array.shape, self.trace.shapes[node.outputs[0]])
            if len(both) > len(value.roles):
                raise self.fail("a constant adds axes")
            self.same(kind, value, {"value": decimal(array), "reverse": reverse})
            return
        constant = self.constant(array, value)
        if np.broadcast_shapes(constant.shape, value.shape) != value.shape:
            raise self.fail("a constant enlarges the feature map")
        name = self.same(kind, value, {"reverse": reverse}, {"value": constant})
        self.source(f"{name}.value", node.inputs[index], "CHW" if constant.size > 1 else "same")

    def pair(self, kind: str, a: Map, b: Map) -> Map:
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
            sizes = self.size(first, one), self.size(second, two)
            # An axis of size 1 broadcasts whatever its name; but a role may not change its place.
            if sizes[0] == 1 and two not in roles:
                roles[at] = two
            elif sizes[1] != 1:
                raise self.fail(f"axes {first.roles} meet {second.roles}")
        if len(set(roles) - {"1"}) != len([role for role in roles if role != "1"]):
            raise self.fail(f"axes {first.roles} meet {second.roles}")
        shape = np.broadcast_shapes(a.shape, b.shape)
        return Map(self.emit(kind, [a.name, b.name]), tuple(roles), shape)
