"""A graph without control flow: what a run on known shapes takes, and no name twice for one value.

Exporters leave branches and loops behind that depend on shapes alone: TorchScript writes
`squeeze(-1)` with a dynamic batch as an If of a Squeeze and an Identity. `inlined` puts the branch
that is taken, or the steps of a loop, in their place. `aliased` drops the nodes that give their
input again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from artifactnet_jax.convert.graph import ConvertError, Graph, Node
from artifactnet_jax.convert.node_call import scan_axes
from artifactnet_jax.convert.operators import evaluate

UNROLLED = 64  # steps of a loop at most: each is a copy of its body


def inlined(
    graph: Graph, static: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> Graph:
    """The graph with every If, Loop and Scan replaced that `static` values and shapes decide.

    What is inside a branch may become known only then: call it again until it returns `graph`
    itself. A loop of more than `UNROLLED` steps, or whose end depends on the data, stays.
    """
    nodes: list[Node] = []
    constants = dict(graph.constants)
    changed = False
    for node in graph.nodes:
        found = None
        if node.op == "If" and node.inputs[0] in static:
            taken = "then_branch" if static[node.inputs[0]].item() else "else_branch"
            found = _Copy(node, constants).of(node.attributes[taken], (), node.outputs, "")
        elif node.op == "Loop":
            found = _loop(node, static, constants)
        elif node.op == "Scan":
            found = _scan(node, graph.opset, shapes, constants)
        nodes += [node] if found is None else found
        changed |= found is not None
    if not changed:
        return graph
    return dataclasses.replace(graph, nodes=tuple(nodes), constants=constants)


class _Copy:
    """Copies of the graph in a node's attribute, as nodes of the graph around it."""

    def __init__(self, node: Node, constants: dict[str, np.ndarray]) -> None:
        self.node, self.constants = node, constants
        self.base = node.outputs[0] or node.name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Name of a new constant."""
        self.constants[f"{self.base}/{name}"] = value
        return f"{self.base}/{name}"

    def of(self, body: Graph, given: Sequence[str], wanted: Sequence[str], tag: str) -> list[Node]:
        """The nodes of `body` with its inputs `given`, and its outputs under the names `wanted`."""
        prefix = f"{self.base}/{tag}"
        names = dict(zip((value.name for value in body.inputs), given, strict=True))
        for name, array in body.constants.items():
            names[name] = f"{prefix}{name}"
            self.constants[names[name]] = array
        for node in body.nodes:
            names.update((name, f"{prefix}{name}") for name in node.outputs if name)
        nodes = [_renamed(node, names) for node in body.nodes]
        for value, name in zip(body.outputs, wanted, strict=True):
            if name:
                source = names.get(value.name, value.name)
                nodes.append(Node("Identity", self.node.name, (source,), (name,), {}))
        return nodes


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    def graph(part: Graph) -> Graph:
        own = {*part.constants, *(value.name for value in part.inputs)}
        own.update(name for inner in part.nodes for name in inner.outputs)
        seen = {name: new for name, new in names.items() if name not in own}
        outputs = tuple(
            dataclasses.replace(value, name=seen.get(value.name, value.name))
            for value in part.outputs
        )
        nodes = tuple(_renamed(inner, seen) for inner in part.nodes)
        return dataclasses.replace(part, nodes=nodes, outputs=outputs)

    attributes = {k: graph(v) if isinstance(v, Graph) else v for k, v in node.attributes.items()}
    inputs = tuple(names.get(name, name) for name in node.inputs)
    outputs = tuple(names.get(name, name) for name in node.outputs)
    return Node(node.op, node.name, inputs, outputs, attributes)


def _loop(
    node: Node, static: Mapping[str, np.ndarray], constants: dict[str, np.ndarray]
) -> list[Node] | None:
    """The steps of a Loop, where their number is a known small one."""
    body: Graph = node.attributes["body"]
    count, condition, *carried = node.inputs
    if count not in static or (condition and condition not in static):
        return None
    steps = int(static[count].item())
    if condition and not static[condition].item():
        steps = 0
    if not 0 < steps <= UNROLLED or not _goes_on(body, static):
        return None
    copy = _Copy(node, constants)
    true = copy.constant("true", np.asarray(True))
    n, nodes, rows = len(carried), list[Node](), list[tuple[str, ...]]()
    for i in range(steps):
        at = copy.constant(f"{i}", np.asarray(i, np.int64))
        made = tuple(f"{copy.base}/{i}:{k}" for k in range(len(body.outputs) - 1))
        nodes += copy.of(body, (at, true, *carried), ("", *made), f"{i}/")
        carried, rows = list(made[:n]), [*rows, made[n:]]
    nodes += _ends(node, carried, node.outputs[:n])
    return nodes + _stacked(copy, rows, node.outputs[n:], [0] * len(rows[0]), body.opset)


def _goes_on(body: Graph, static: Mapping[str, np.ndarray]) -> bool:
    """Whether a Loop's condition stays true whatever it computes."""
    at, condition = (value.name for value in body.inputs[:2])
    if body.outputs[0].name == condition:
        return True
    around = {name: static[name] for name in body.outer() if name in static}
    known = {**around, at: np.asarray(0, np.int64), condition: np.asarray(True)}
    part = dataclasses.replace(body, constants={**body.constants, **known}, inputs=())
    try:
        value = evaluate(part, {}, [body.outputs[0].name])[body.outputs[0].name]
    except ConvertError:
        return False
    read, todo = set(), [body.outputs[0].name]
    makers = {name: inner for inner in body.nodes for name in inner.outputs}
    while todo:
        name = todo.pop()
        read.add(name)
        todo += makers[name].reads() if name in makers else ()
    return bool(value) and at not in read


def _scan(
    node: Node, opset: int, shapes: Mapping[str, tuple[int, ...]], constants: dict[str, np.ndarray]
) -> list[Node] | None:
    """The steps of a Scan, where they are few."""
    body: Graph = node.attributes["body"]
    count = node.attributes["num_scan_inputs"]
    n = len(node.inputs) - count
    read = node.inputs[n:]
    if opset < 9 or any(name not in shapes for name in read):
        return None
    axes, backwards, axes_out, backwards_out = scan_axes(node)
    steps = shapes[read[0]][axes[0]]
    if not 0 < steps <= UNROLLED:
        return None
    copy = _Copy(node, constants)
    carried, nodes, rows = list(node.inputs[:n]), list[Node](), list[tuple[str, ...]]()
    for i in range(steps):
        parts = []
        for name, axis, back in zip(read, axes, backwards, strict=True):
            at = copy.constant(f"{i}{back}", np.asarray(steps - 1 - i if back else i, np.int64))
            parts.append(f"{copy.base}/{name}:{i}")
            nodes.append(Node("Gather", node.name, (name, at), (parts[-1],), {"axis": axis}))
        made = tuple(f"{copy.base}/{i}:{k}" for k in range(len(body.outputs)))
        nodes += copy.of(body, (*carried, *parts), made, f"{i}/")
        carried, rows = list(made[:n]), [*rows, made[n:]]
    nodes += _ends(node, carried, node.outputs[:n])
    ordered = list(zip(*rows, strict=True))
    turned = [p[::-1] if b else p for p, b in zip(ordered, backwards_out, strict=True)]
    columns = list(zip(*turned, strict=True))
    return nodes + _stacked(copy, columns, node.outputs[n:], axes_out, opset)


def _ends(node: Node, values: Sequence[str], names: Sequence[str]) -> list[Node]:
    """The values under the names of a loop's outputs."""
    pairs = zip(values, names, strict=False)
    return [Node("Identity", node.name, (value,), (name,), {}) for value, name in pairs if name]


def _stacked(
    copy: _Copy,
    rows: Sequence[tuple[str, ...]],
    outputs: Sequence[str],
    axes: Sequence[int],
    opset: int,
) -> list[Node]:
    """What each step gives, along a new axis of each output."""
    nodes = []
    for k, (name, axis) in enumerate(zip(outputs, axes, strict=False)):
        parts = []
        for row in rows:
            parts.append(f"{row[k]}/row")
            inputs: tuple[str, ...] = (row[k],)
            attributes: dict[str, Any] = {}
            if opset >= 13:
                inputs = (row[k], copy.constant(f"axis{axis}", np.asarray([axis], np.int64)))
            else:
                attributes = {"axes": (axis,)}
            nodes.append(Node("Unsqueeze", copy.node.name, inputs, (parts[-1],), attributes))
        nodes.append(Node("Concat", copy.node.name, tuple(parts), (name,), {"axis": axis}))
    return [node for node in nodes if node.outputs[0]]


def aliased(graph: Graph, dtypes: Mapping[str, Any]) -> Graph:
    """The graph without nodes that give their input again: Identity, Dropout, a Cast to its type.

    One that gives an output of the graph stays.
    """
    ends = {value.name for value in graph.outputs}
    names: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        node = _renamed(node, names)
        source = node.inputs[0] if node.inputs else ""
        same = node.op in ("Identity", "Dropout")
        if node.op in ("Cast", "CastLike") and node.outputs[0] in dtypes:
            same = source in dtypes and dtypes[source] == dtypes[node.outputs[0]]
        if same and not ends.intersection(node.outputs) and not any(node.outputs[1:]):
            names[node.outputs[0]] = source
        else:
            nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes))
