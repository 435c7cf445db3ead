"""Rewrites of a foreign graph that make it faster and leave its result what it was.

Two patterns cost most of the time of an exported detector: a running median written as stacked,
shifted copies that are sorted, and a DFT written as a convolution or a matrix product. Both are
recognised by what they compute, on numbers, whatever operators spell them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from artifactnet_jax.convert.graph import Graph, Node
from artifactnet_jax.convert.operators import evaluate, x64
from artifactnet_jax.convert.operators_signal import DFT, MEDIAN

# Operators that only move samples about; the first input is the data (of Concat, all are).
MOVES = {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"}
MOVES |= {"Squeeze", "Transpose", "Unsqueeze"}
# Largest deviation from window times cosine, relative to the window's peak: bases whose angles were
# computed in float32 are off by a few 1e-4.
DFT_TOLERANCE = 1e-3


def simplify(graph: Graph, shape: Sequence[int], *, fft: bool = False) -> Graph:
    """The graph with its sorted medians, and on demand its DFTs, replaced by our operators.

    Args:
        graph: from `read_graph`, of one input.
        shape: of that input, for which the replacements are checked.
        fft: also replace convolutions and matrix products with a DFT basis by a real FFT. The
            medians are exact; this is so to rounding only, and more accurate.

    Returns:
        A graph for `evaluate` and `compile_graph`, not for writing: its new operators are ours.

    Raises:
        ConvertError: as `evaluate`.
    """
    facts: dict[str, Any] = {}
    entry = graph.inputs[0]
    example = jax.ShapeDtypeStruct(tuple(shape), np.dtype(entry.dtype))
    with x64():
        jax.eval_shape(
            lambda x: evaluate(graph, {entry.name: x}, observe=facts.__setitem__), example
        )
    for name, value in facts.items():
        if not isinstance(value, (np.ndarray, list)):
            facts[name] = jax.ShapeDtypeStruct(value.shape, value.dtype)
    facts.update(graph.constants)
    facts[entry.name] = example
    graph = _with_medians(graph, facts)
    return _with_ffts(graph, facts) if fft else graph


def _replaced(graph: Graph, nodes: Mapping[str, Node]) -> Graph:
    """The graph with the nodes that give those outputs replaced, less what nothing reads now."""
    kept: list[Node] = []
    live = {value.name for value in graph.outputs}
    for node in reversed(graph.nodes):
        node = nodes.get(node.outputs[0], node)
        if live.intersection(node.outputs):
            kept.append(node)
            live.update(node.reads())
    constants = {name: array for name, array in graph.constants.items() if name in live}
    return dataclasses.replace(graph, nodes=tuple(reversed(kept)), constants=constants)


def _constant(facts: Mapping[str, Any], name: str) -> np.ndarray | None:
    value = facts.get(name)
    return value if isinstance(value, np.ndarray) else None


# --- Medians ------------------------------------------------------------------------------------


def _with_medians(graph: Graph, facts: Mapping[str, Any]) -> Graph:
    makers = {name: node for node in graph.nodes for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.reads():
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.outputs}
    replaced: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op != "TopK" or node.inputs[0] not in facts or not node.attributes.get("sorted", 1):
            continue
        stack = facts[node.inputs[0]]
        axis = node.attributes.get("axis", -1) % len(stack.shape)
        size = stack.shape[axis]
        values, *others = node.outputs
        found = readers.get(values, [])
        if size < 3 or size % 2 == 0 or outputs.intersection(node.outputs):
            continue
        if any(readers.get(name) for name in others) or not found:
            continue
        kept = [_middle(reader, axis, size, facts, graph.opset) for reader in found]
        if None in kept:
            continue
        source = _windowed(graph, makers, facts, node.inputs[0], axis)
        if source is None:
            continue
        name, along, start, count = source
        for reader, keep in zip(found, kept, strict=True):
            replaced[reader.outputs[0]] = Node(
                MEDIAN,
                reader.name,
                (name,),
                reader.outputs,
                {
                    "axis": along,
                    "size": size,
                    "start": start,
                    "count": count,
                    "keep": axis if keep else -1,
                },
            )
    return _replaced(graph, replaced) if replaced else graph


def _middle(
    reader: Node, axis: int, size: int, facts: Mapping[str, Any], opset: int
) -> bool | None:
    """Whether a reader of sorted values takes the middle one: None, or if it keeps the axis."""
    rank = len(facts[reader.inputs[0]].shape)
    if reader.op == "Gather":
        index = _constant(facts, reader.inputs[1])
        if index is None or index.size != 1 or index.ndim > 1:
            return None
        if reader.attributes.get("axis", 0) % rank != axis or index.item() % size != size // 2:
            return None
        return index.ndim == 1
    if reader.op == "Slice" and reader.outputs[0] in facts:
        # Which sample it takes is read off numbers along the axis.
        shape = facts[reader.inputs[0]].shape
        if facts[reader.outputs[0]].shape != (*shape[:axis], 1, *shape[axis + 1 :]):
            return None
        column = [1] * rank
        column[axis] = shape[axis]
        ramp = np.broadcast_to(np.arange(shape[axis]).reshape(column), shape)
        taken = _moved(reader, {reader.inputs[0]: ramp}, facts, opset)
        return True if taken.size and (taken == size // 2).all() else None
    return None


def _moved(
    node: Node, given: Mapping[str, np.ndarray], facts: Mapping[str, Any], opset: int
) -> np.ndarray:
    """What a node that moves samples makes of other ones, in NumPy."""
    static = {key: facts[key] for key in node.inputs if isinstance(facts.get(key), np.ndarray)}
    graph = Graph((node,), {**static, **given}, (), (), opset)
    return np.asarray(evaluate(graph, {}, [node.outputs[0]])[node.outputs[0]])


def _windowed(
    graph: Graph, makers: Mapping[str, Node], facts: Mapping[str, Any], stack: str, axis: int
) -> tuple[str, int, int, int] | None:
    """The tensor of which `stack` holds all windows, if one does.

    Returns:
        Its name, its axis along which the windows run, the first window's start, their number.
    """
    order = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
    shape = facts[stack].shape
    size, rest = shape[axis], shape[:axis] + shape[axis + 1 :]
    frontier, nodes = {stack}, []
    while True:
        last = max(frontier, key=lambda name: order.get(name, -1))
        maker = makers.get(last)
        if maker is None or maker.op not in MOVES:
            return None
        nodes.append(maker)
        frontier -= set(maker.outputs)
        frontier.update(maker.inputs if maker.op == "Concat" else maker.inputs[:1])
        if len(frontier) > 1:
            continue
        (name,) = frontier
        if name not in facts or isinstance(facts[name], np.ndarray):
            return None
        source = facts[name].shape
        changed = [i for i, (n, m) in enumerate(zip(source, rest, strict=False)) if n != m]
        if len(source) != len(rest) or len(changed) != 1:
            continue
        along = changed[0]
        if source[along] < rest[along] + size - 1:
            continue
        start = _start(graph, nodes, facts, name, stack, axis, along)
        if start is not None:
            return name, along, start, rest[along]


def _start(
    graph: Graph,
    nodes: Sequence[Node],
    facts: Mapping[str, Any],
    source: str,
    stack: str,
    axis: int,
    along: int,
) -> int | None:
    """Where the windows start, if sample k of window i is sample start + i + k everywhere."""
    static = {
        name: facts[name]
        for node in nodes
        for name in node.inputs
        if isinstance(facts.get(name), np.ndarray)
    }
    shape = facts[source].shape
    numbers = np.arange(np.prod(shape), dtype=np.int64 if np.prod(shape) > 2**31 else np.int32)
    numbers = numbers.reshape(shape)
    part = Graph(tuple(reversed(nodes)), {**static, source: numbers}, (), (), graph.opset)
    top = nodes[0]
    if top.op == "Concat" and top.attributes["axis"] % len(facts[stack].shape) == axis:
        # Its inputs are views; the stack would be many times the source.
        names = list(top.inputs)
        found = evaluate(part, {}, dict.fromkeys(names))
        planes = [plane for name in names for plane in np.moveaxis(found[name], axis, 0)]
    else:
        planes = list(np.moveaxis(evaluate(part, {}, [stack])[stack], axis, 0))
    count = int(planes[0].shape[along])
    step = int(np.prod(shape[along + 1 :]))
    start: int = (int(planes[0].flat[0]) // step) % shape[along]
    for k, plane in enumerate(planes):
        index = (slice(None),) * along + (slice(start + k, start + k + count),)
        if not np.array_equal(plane, numbers[index]):
            return None
    return start


# --- DFTs ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Basis:
    """Rows of a matrix as window times cosines and sines."""

    layout: str  # "real", "imag", "real imag", "imag real", "interleaved"
    sign: int  # of the sine rows: +1 for sin, -1 for -sin
    window: np.ndarray


def _with_ffts(graph: Graph, facts: Mapping[str, Any]) -> Graph:
    constants = dict(graph.constants)
    replaced: dict[str, Node] = {}
    windows: dict[tuple[str, int], tuple[np.ndarray, str]] = {}  # by signal and size
    candidates = [(node, *parts) for node in graph.nodes if (parts := _matrix(node, facts))]
    for wanted in (True, False):  # sines alone do not tell the whole window: cosines first
        for node, data, matrix, form in candidates:
            size = matrix.shape[1]
            if (node.outputs[0] in replaced) or (wanted and not _cosines(matrix)):
                continue
            known = windows.get((data, size))
            basis = _basis(matrix, known[0] if known else None)
            if basis is None:
                continue
            if known and np.array_equal(known[0], basis.window):
                name = known[1]
            else:
                name = f"artifactnet.window.{len(replaced)}"
                constants[name] = basis.window.astype(facts[data].dtype)
                windows.setdefault((data, size), (basis.window, name))
            strides = node.attributes.get("strides", (1,)) if form == "frames" else (1,)
            replaced[node.outputs[0]] = Node(
                DFT,
                node.name,
                (data, name),
                node.outputs,
                {
                    "form": form,
                    "hop": strides[-1],
                    "rows": matrix.shape[0],
                    "layout": basis.layout,
                    "sign": basis.sign,
                },
            )
    if not replaced:
        return graph
    return _replaced(dataclasses.replace(graph, constants=constants), replaced)


def _matrix(node: Node, facts: Mapping[str, Any]) -> tuple[str, np.ndarray, str] | None:
    """Data, [rows, samples] matrix and form of a node that could be a DFT."""
    if node.op == "Conv" and node.outputs[0] in facts:
        kernel = _constant(facts, node.inputs[1])
        get = node.attributes.get
        if kernel is None or kernel.size != kernel.shape[0] * kernel.shape[-1]:
            return None
        rank = kernel.ndim - 2
        if (
            get("group", 1) != 1
            or any(get("pads", ()))
            or any(n != 1 for n in get("dilations", ()))
        ):
            return None
        if get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or rank > 2:
            return None
        if any(n != 1 for n in facts[node.inputs[0]].shape[1:-1]):
            return None
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = _constant(facts, node.inputs[2])
            if bias is None or bias.any():
                return None
        name, matrix, form = node.inputs[0], kernel.reshape(kernel.shape[0], -1), "frames"
    elif node.op == "MatMul" and node.outputs[0] in facts:
        left, right = (_constant(facts, name) for name in node.inputs)
        if left is None and right is not None and right.ndim == 2:
            name, matrix, form = node.inputs[0], right.T, "last"
        elif right is None and left is not None and left.ndim == 2:
            name, matrix, form = node.inputs[1], left, "first"
        else:
            return None
    else:
        return None
    if name not in facts or isinstance(facts[name], np.ndarray) or len(facts[name].shape) < 2:
        return None
    return (name, matrix, form) if matrix.shape[1] >= 16 and len(matrix) >= 2 else None


def _cosines(matrix: np.ndarray) -> bool:
    """Whether a DFT's matrix has its cosine of frequency 0: the window itself."""
    return bool(np.abs(matrix[0]).max() > DFT_TOLERANCE * np.abs(matrix).max())


def _basis(matrix: np.ndarray, known: np.ndarray | None) -> _Basis | None:
    """The matrix as a windowed DFT of its frequencies from 0 up; None where it is none."""
    rows, size = matrix.shape
    matrix = matrix.astype(np.float64)
    bins = size // 2 + 1
    if rows <= bins:
        for layout in ("real", "imag"):
            if found := _block(matrix, layout == "imag", known):
                return _Basis(layout, found[1], found[0])
    if rows % 2 or rows // 2 > bins:
        return None
    half = rows // 2
    for layout, cosines, sines in (
        ("real imag", matrix[:half], matrix[half:]),
        ("imag real", matrix[half:], matrix[:half]),
        ("interleaved", matrix[::2], matrix[1::2]),
    ):
        if (real := _block(cosines, False, known)) and (imag := _block(sines, True, real[0])):
            return _Basis(layout, imag[1], real[0])
    return None


def _block(
    block: np.ndarray, sine: bool, known: np.ndarray | None
) -> tuple[np.ndarray, int] | None:
    """Window and sign of rows of windowed cosines, or sines."""
    rows, size = block.shape
    # Whole turns are taken off in integers: the angles stay exact.
    angles = 2 * np.pi / size * (np.outer(np.arange(rows), np.arange(size)) % size)
    waves = np.sin(angles) if sine else np.cos(angles)
    weight = (waves * waves).sum(0)
    window = (block * waves).sum(0) / np.where(weight > 1e-9, weight, 1.0)
    sign = -1 if sine and window.sum() < 0 else 1
    window = window * sign
    peak = np.abs(window).max()
    if not sine and np.abs(block[0]).max() > 0:
        window = block[0]
    options = [window] if known is None else [known, window]
    for option in options:
        if peak > 0 and np.abs(block - sign * option * waves).max() <= DFT_TOLERANCE * peak:
            return option, sign
    return None
