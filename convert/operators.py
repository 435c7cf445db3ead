"""ONNX operators in JAX: runs a `Graph`, whole or in part, eagerly or under `jax.jit`.

A value that depends on constants and on shapes only is *static*: a NumPy array, computed by NumPy,
so that whatever chain of Shape, Gather, Concat, If ... an exporter leaves behind ends in plain
numbers. Every other value is a JAX array. Operators take the dtypes that the graph states; 64-bit
ones are real, because `evaluate` runs under JAX's x64 mode. Convolutions and matrix products state
`Precision.HIGHEST`.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from artifactnet_jax.convert import (
    operators_arithmetic,
    operators_network,
    operators_shape,
    operators_signal,
)
from artifactnet_jax.convert.graph import ConvertError, Graph, Node
from artifactnet_jax.convert.node_call import Call, is_static, scan_axes, shape_of, written

# On NumPy's arrays or JAX's, and on JAX's only.
_ANYWHERE = {
    **operators_arithmetic.ANYWHERE,
    **operators_shape.ANYWHERE,
    **operators_signal.ANYWHERE,
}
_DEVICE = {
    **operators_arithmetic.DEVICE,
    **operators_shape.DEVICE,
    **operators_network.DEVICE,
    **operators_signal.DEVICE,
}

# What is computed in float32 where the graph has float16, and rounded once: sums and products leave
# the range of a half long before the result does, and JAX has no Fourier transform of halves.
_WIDENED = {
    *(op for op in _DEVICE if not op.startswith("Scatter")),
    *(op for op in _ANYWHERE if op.startswith("Reduce") and op not in ("ReduceMax", "ReduceMin")),
}

STEPS = 512  # of a loop at most, each of which is compiled by itself
_UNLOOP = "export the recurrence as an LSTM, GRU or RNN, or as a convolution"
ARGUMENT_SIZE = 256  # elements; larger constants are arguments of a compiled graph, not literals


def x64() -> Any:
    """Context in which JAX has 64-bit types; to trace, compile and call a graph's function in."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # JAX 0.7


def evaluate(
    graph: Graph,
    feeds: Mapping[str, Any],
    fetch: Iterable[str] | None = None,
    observe: Callable[[str, Any], None] | None = None,
) -> dict[str, Any]:
    """Run a graph, or the part of it between given and wanted tensors.

    A caller that jits this does so, and calls the result, within `x64()`.

    Args:
        graph: from `read_graph`.
        feeds: name -> array of the graph's inputs; also of any other tensor, which then is not
            computed. They become JAX arrays, static values do not depend on them.
        fetch: names of the tensors wanted, by default the graph's outputs. Only what these need
            is run.
        observe: called with the name and value of every tensor that is computed, in order;
            optional outputs that nothing reads, such as the indices of a TopK, may be left out.

    Returns:
        name -> jax.Array, or numpy.ndarray where static.

    Raises:
        ConvertError: naming the node, for an operator that is not supported or that fails, a
            missing input, or a shape that depends on data.
    """
    wanted = tuple(value.name for value in graph.outputs) if fetch is None else tuple(fetch)
    with x64():
        given = {name: jnp.asarray(value) for name, value in feeds.items()}
        return _run(graph, given, wanted, observe, jnp.asarray)


def compile_graph(
    graph: Graph, shape: Sequence[int], fetch: str | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Compile a graph of one input for one shape of it.

    Args:
        graph: from `read_graph`, or from `simplify`.
        shape: of the input; symbols of the graph's own input shape are filled in here.
        fetch: the tensor wanted, by default the graph's first output.

    Returns:
        A function from the input (that shape; cast to the graph's dtype) to the wanted tensor.

    Raises:
        ConvertError: as `evaluate`, or where the shape does not fit the graph's input.
    """
    if len(graph.inputs) != 1:
        names = [value.name for value in graph.inputs]
        raise ConvertError(f"the graph has the inputs {names}; one input is supported")
    entry = graph.inputs[0]
    shape = tuple(int(n) for n in shape)
    fixed = [isinstance(n, int) for n in entry.shape]
    if entry.shape and (
        len(entry.shape) != len(shape)
        or any(f and n != m for f, n, m in zip(fixed, entry.shape, shape, strict=True))
    ):
        raise ConvertError(
            f"input {entry.name!r} has shape {written(entry.shape)}, not {written(shape)}"
        )
    wanted = fetch or graph.outputs[0].name

    def trace(x: Any, lift: Callable[[np.ndarray], Any]) -> Any:
        return jnp.asarray(_run(graph, {entry.name: x}, (wanted,), None, lift)[wanted])

    # Traced twice, in the same order: first to collect the large constants that reach the data,
    # whatever static operators they went through, then with those as arguments.
    constants: list[np.ndarray] = []

    def collect(array: np.ndarray) -> Any:
        if array.size > ARGUMENT_SIZE:
            constants.append(array)
        return jnp.asarray(array)

    def function(arguments: list[Any], x: Any) -> Any:
        taken = iter(arguments)
        return trace(x, lambda a: next(taken) if a.size > ARGUMENT_SIZE else jnp.asarray(a))

    with x64():
        example = jax.ShapeDtypeStruct(shape, np.dtype(entry.dtype))
        jax.eval_shape(lambda x: trace(x, collect), example)
        arguments = [jnp.asarray(array) for array in constants]
        compiled = jax.jit(function).lower(arguments, example).compile()

    def run(x: np.ndarray) -> np.ndarray:
        with x64():
            return np.asarray(compiled(arguments, jnp.asarray(x, example.dtype)))

    return run


def supported(graph: Graph) -> list[str]:
    """What of a graph cannot be run, one line for each node concerned; mostly empty."""
    problems = []
    for node in graph.nodes:
        parts = [value for value in node.attributes.values() if isinstance(value, Graph)]
        if node.op not in {**_ANYWHERE, **_DEVICE, **_CONTROL}:
            problems.append(f"node {node.name!r}: operator {node.op} is not supported")
        else:
            for part in parts:
                problems += supported(part)
    return problems


def _run(
    graph: Graph,
    given: Mapping[str, Any],
    wanted: tuple[str, ...],
    observe: Callable[[str, Any], None] | None,
    lift: Callable[[np.ndarray], Any],
) -> dict[str, Any]:
    needed, nodes = set(wanted) - set(given), []
    for node in reversed(graph.nodes):
        if any(name in needed for name in node.outputs):
            nodes.append(node)
            needed.update(name for name in node.reads() if name not in given)
    nodes.reverse()
    made = {name for node in nodes for name in node.outputs}
    for name in needed:
        if name not in made and name not in graph.constants:
            raise ConvertError(f"{name!r} is neither given nor computed by the graph")
    readers = Counter(name for node in nodes for name in node.reads())
    readers.update(wanted)

    values: dict[str, Any] = {**graph.constants, **given}
    for node in nodes:
        inputs = [values[name] if name else None for name in node.inputs]
        used = tuple(name in readers for name in node.outputs)
        try:
            results = _apply(node, graph.opset, inputs, values, used, lift)
        except ConvertError:
            raise
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            shapes = ", ".join(shape_of(value) for value in inputs)
            raise ConvertError(
                f"node {node.name!r} ({node.op}) fails on inputs of shape {shapes}: {line}"
            ) from error
        for name, result in zip(node.outputs, results, strict=False):
            if not name or name in given or result is None:
                continue
            values[name] = result
            if observe:
                observe(name, result)
        for name in node.reads():
            readers[name] -= 1
            if not readers[name]:
                values.pop(name, None)
        for name in node.outputs:
            if not readers[name]:
                values.pop(name, None)
    return {name: values[name] for name in wanted}


def _body(
    op: Call, body: Graph, given: Sequence[Any], values: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The outputs of a graph in an attribute, whose inputs are `given`."""
    around = {name: values[name] for name in body.outer()}
    around |= zip((value.name for value in body.inputs), given, strict=True)
    names = tuple(value.name for value in body.outputs)
    found = _run(body, around, names, None, op.lift)
    return tuple(found[name] for name in names)


def _if(op: Call, inputs: list[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    condition = op.static(inputs[0], "its condition").item()
    return _body(op, op.get("then_branch" if condition else "else_branch"), (), values)


def _loop(op: Call, inputs: list[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    count, condition, *carried = inputs
    body, n = op.get("body"), len(carried)
    most = math.inf if count is None else op.ints(count, "its number of steps")[0]
    on: Any = np.asarray(True) if condition is None else condition
    rows: list[tuple[Any, ...]] = []
    while len(rows) < most and op.static(on, "when it ends").item():
        if len(rows) == STEPS:
            raise op.unsupported(f"a loop of more than {STEPS} steps", _UNLOOP)
        at = np.asarray(len(rows), np.int64)
        on, *made = _body(op, body, (at, np.asarray(True), *carried), values)
        carried, rows = made[:n], [*rows, tuple(made[n:])]
    if not rows and len(body.outputs) > n + 1:
        raise op.unsupported("a loop of no steps that gives rows", _UNLOOP)
    return (*carried, *_stacked(rows, [0] * (len(body.outputs) - 1 - n)))


def _scan(op: Call, inputs: list[Any], values: Mapping[str, Any]) -> tuple[Any, ...]:
    if op.opset < 9:
        raise op.unsupported("Scan of opset 8", "export the model with opset 9 or higher")
    n = len(inputs) - op.get("num_scan_inputs")
    carried, read = inputs[:n], inputs[n:]
    axes, backwards, axes_out, backwards_out = scan_axes(op.node)
    steps = read[0].shape[axes[0]]
    if not 0 < steps <= STEPS:
        raise op.unsupported(f"a scan of {steps} steps, not 1 to {STEPS}", _UNLOOP)
    rows: list[tuple[Any, ...]] = []
    for i in range(steps):
        places = [steps - 1 - i if back else i for back in backwards]
        parts = [
            x[(*(slice(None),) * op.axis(axis, x.ndim), place)]
            for x, axis, place in zip(read, axes, places, strict=True)
        ]
        made = _body(op, op.get("body"), (*carried, *parts), values)
        carried, rows = list(made[:n]), [*rows, made[n:]]
    columns = zip(*rows, strict=True)
    turned = [c[::-1] if back else c for c, back in zip(columns, backwards_out, strict=True)]
    return (*carried, *_stacked(list(zip(*turned, strict=True)), axes_out))


def _stacked(rows: Sequence[tuple[Any, ...]], axes: Sequence[int]) -> list[Any]:
    """What each step gives, along a new axis."""
    columns = zip(*rows, strict=True)
    return [
        np.stack(c, axis) if is_static(list(c)) else jnp.stack(list(map(jnp.asarray, c)), axis)
        for c, axis in zip(columns, axes, strict=False)
    ]


_CONTROL: dict[str, Callable[[Call, list[Any], Mapping[str, Any]], tuple[Any, ...]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
}


def _is(value: Any, dtype: Any) -> bool:
    return bool(getattr(value, "dtype", None) == dtype)


def _apply(
    node: Node,
    opset: int,
    inputs: list[Any],
    values: Mapping[str, Any],
    used: tuple[bool, ...],
    lift: Callable[[np.ndarray], Any],
) -> tuple[Any, ...]:
    """The outputs of one node."""
    # Of what CastLike is to be like, the dtype alone counts.
    of = inputs[:1] if node.op == "CastLike" else inputs
    static = all(is_static(value) for value in of)
    if node.op in operators_network.DEVICE and any(_is(value, jnp.bfloat16) for value in inputs):
        raise Call(node, opset, np, used, lift).narrow("bfloat16")
    if node.op in _WIDENED and any(_is(value, np.float16) for value in inputs):
        wide = [x.astype(np.float32) if _is(x, np.float16) else x for x in inputs]
        found = _apply(node, opset, wide, values, used, lift)
        return tuple(x.astype(np.float16) if _is(x, np.float32) else x for x in found)
    if node.op in _CONTROL:
        return _CONTROL[node.op](Call(node, opset, jnp, used, lift), inputs, values)
    if function := _ANYWHERE.get(node.op):
        call = Call(node, opset, np if static else jnp, used, lift)
        with np.errstate(all="ignore"):
            results = function(call, *inputs)
    elif function := _DEVICE.get(node.op):
        if static:
            with jax.ensure_compile_time_eval():
                results = function(Call(node, opset, jnp, used, jnp.asarray), *inputs)
                results = jax.tree.map(np.asarray, results)
        else:
            results = function(Call(node, opset, jnp, used, lift), *inputs)
    else:
        raise ConvertError(
            f"node {node.name!r}: operator {node.op} is not supported; export the model without it"
        )
    results = results if isinstance(results, tuple) else (results,)
    return tuple(np.asarray(part) if isinstance(part, np.generic) else part for part in results)
