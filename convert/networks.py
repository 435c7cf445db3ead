"""Part of a graph as a list of `Layer`s: the UNet between magnitude and mask, the CNN at the end.

Exporters write the same layer in many ways, and orders of axes differ. So every tensor is followed
with the roles of its axes ("n" segments, "c", "h", "w"), node by node; what only moves axes about
gives no layer. A node that the layers cannot express raises `Unmapped`: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from artifactnet_jax.convert import read_products, read_shapes
from artifactnet_jax.convert.builder import Builder, Map
from artifactnet_jax.convert.export_network import BINARY, PLAIN
from artifactnet_jax.convert.graph import Node
from artifactnet_jax.convert.trace import Trace, Unmapped
from artifactnet_jax.layers import INPUT, Layer


@dataclasses.dataclass(frozen=True)
class Network:
    """Layers, their tensors by full leaf name ("encoder.0.kernel"), and where those came from."""

    layers: tuple[Layer, ...]
    tensors: dict[str, np.ndarray]
    sources: dict[str, tuple[str, str]]  # tensor -> (name in the graph, transform of `export`)


# Operators that differ from a layer's in name only.
_UNARY = {onnx: op for op, onnx in PLAIN.items()}
_UNARY |= {"Softsign": "softsign", "Mish": "mish", "HardSwish": "hard_swish"}
_BINARY = {**{onnx: op for op, onnx in BINARY.items()}, "Sum": "add"}
# With the defaults of ONNX.
_WITH_ATTRIBUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "Elu": ("elu", {"alpha": 1.0}),
    "Celu": ("celu", {"alpha": 1.0}),
    "Selu": ("selu", {"alpha": 1.6732631921768188, "gamma": 1.0507010221481323}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": 0.2, "beta": 0.5}),
    "Gelu": ("gelu", {"approximate": "none"}),
}
_NOTHING = {"Identity", "Dropout", "Cast", "CastLike"}

_READERS = {**read_products.READERS, **read_shapes.READERS}


def _read(builder: Builder, node: Node, value: Map) -> None:
    op = node.op
    if op in _NOTHING:
        builder.maps[node.outputs[0]] = value
    elif op in _UNARY or op in _WITH_ATTRIBUTES:
        kind, defaults = _WITH_ATTRIBUTES.get(op, (_UNARY.get(op, ""), {}))
        attributes = {key: node.attributes.get(key, number) for key, number in defaults.items()}
        builder.same(kind, value, attributes)
    elif op in _BINARY:
        builder.binary(_BINARY[op])
    elif op in _READERS:
        _READERS[op](builder, node, value)
    else:
        raise builder.fail("no layer does this")


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
    builder = Builder(trace)
    values = {name: Map(INPUT, axes, shape) for name, axes in starts.items()}
    value = builder.walk(values, target, _read)
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


def _pruned(builder: Builder, last: str) -> tuple[Any, Any, Any]:
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
