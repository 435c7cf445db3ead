"""The original graph in float64: who is right where two implementations in float32 differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from artifactnet_jax.convert.graph import Graph, Node
from artifactnet_jax.convert.operators import evaluate, x64
from artifactnet_jax.convert.simplify import simplify

_FLOAT, _HALF, _DOUBLE = 1, 10, 11  # ONNX's numbers
_TYPES = ("to", "dtype", "output_datatype", "stash_type")  # attributes that hold one

_MADE = ("HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix")
# What an operator gives in float32 where nothing is stated.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ConstantOfShape": {"value": np.zeros(1)},
    "LayerNormalization": {"stash_type": _DOUBLE},
    "RMSNormalization": {"stash_type": _DOUBLE},
    **{name: {"output_datatype": _DOUBLE} for name in _MADE},
}


class Exact:
    """A graph of one input, computed in float64 front to back; its shapes are compiled as met.

    Numbers that the file holds are taken as they are: a weight of float32 is that number.
    """

    def __init__(self, graph: Graph, names: Sequence[str]) -> None:
        self._graph, self._names = widened(graph), list(names)
        self._compiled: dict[tuple[int, ...], Callable[[np.ndarray], Any]] = {}

    def __call__(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of these names for an input, float64. Raises ConvertError."""
        with x64():
            run = self._compiled.get(audio.shape)
            if run is None:
                outputs = self._graph.outputs
                wanted = [dataclasses.replace(outputs[0], name=name) for name in self._names]
                graph = dataclasses.replace(self._graph, outputs=tuple(wanted))
                graph = simplify(graph, audio.shape)
                entry = graph.inputs[0].name
                run = jax.jit(lambda x: evaluate(graph, {entry: x}, self._names))
                self._compiled[audio.shape] = run
            found = run(audio.astype(np.float64))
            return {name: np.asarray(value) for name, value in found.items()}


def widened(graph: Graph) -> Graph:
    """The graph with float64 in the place of float32 and float16."""

    def wide(value: Any, key: str = "") -> Any:
        if isinstance(value, Graph):
            return widened(value)
        if isinstance(value, np.ndarray):
            return value.astype(np.float64) if value.dtype.kind == "f" else value
        return _DOUBLE if key in _TYPES and value in (_FLOAT, _HALF) else value

    def node(one: Node) -> Node:
        attributes = {key: wide(value, key) for key, value in one.attributes.items()}
        return dataclasses.replace(one, attributes=_DEFAULTS.get(one.op, {}) | attributes)

    return dataclasses.replace(
        graph,
        nodes=tuple(map(node, graph.nodes)),
        constants={name: wide(array) for name, array in graph.constants.items()},
        inputs=tuple(
            dataclasses.replace(value, dtype="float64")
            if value.dtype.startswith("float")
            else value
            for value in graph.inputs
        ),
    )
