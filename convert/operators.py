"""ONNX operators in JAX: runs a `Graph`, whole or in part, eagerly or under `jax.jit`.

A value that depends on constants and on shapes only is *static*: a NumPy array, computed by NumPy,
so that whatever chain of Shape, Gather, Concat, If ... an exporter leaves behind ends in plain
numbers. Every other value is a JAX array. Operators take the dtypes that the graph states; 64-bit
ones are real, because `evaluate` runs under JAX's x64 mode. Convolutions and matrix products state
`Precision.HIGHEST`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.convert.graph import ConvertError, Graph, Node
from artifactnet_jax.kernels import median_filter

HIGHEST = lax.Precision.HIGHEST
MEDIAN, DFT = "artifactnet.Median", "artifactnet.DFT"  # operators that `simplify` puts in
ARGUMENT_SIZE = 256  # elements; larger constants are arguments of a compiled graph, not literals

# ONNX's numbers of the types that JAX has.
_DTYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
    16: jnp.bfloat16,
}


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
            f"input {entry.name!r} has shape {_written(entry.shape)}, not {_written(shape)}"
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
        if node.op not in _ANYWHERE and node.op not in _DEVICE and node.op != "If":
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
            shapes = ", ".join(_shape(value) for value in inputs)
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
    static = all(_is_static(value) for value in of)
    if node.op == "If":
        condition = _Call(node, opset, np, used, lift).static(inputs[0], "its condition")
        branch = node.attributes["then_branch" if condition.item() else "else_branch"]
        names = tuple(value.name for value in branch.outputs)
        around = {name: values[name] for name in branch.outer()}
        found = _run(branch, around, names, None, lift)
        return tuple(found[name] for name in names)
    if function := _ANYWHERE.get(node.op):
        call = _Call(node, opset, np if static else jnp, used, lift)
        with np.errstate(all="ignore"):
            results = function(call, *inputs)
    elif function := _DEVICE.get(node.op):
        if static:
            with jax.ensure_compile_time_eval():
                results = function(_Call(node, opset, jnp, used, jnp.asarray), *inputs)
                results = jax.tree.map(np.asarray, results)
        else:
            results = function(_Call(node, opset, jnp, used, lift), *inputs)
    else:
        raise ConvertError(
            f"node {node.name!r}: operator {node.op} is not supported; export the model without it"
        )
    results = results if isinstance(results, tuple) else (results,)
    return tuple(np.asarray(part) if isinstance(part, np.generic) else part for part in results)


def _is_static(value: Any) -> bool:
    if isinstance(value, list):  # a sequence
        return all(map(_is_static, value))
    return value is None or isinstance(value, np.ndarray)


def _shape(value: Any) -> str:
    return _written(value.shape) if hasattr(value, "shape") else "(none)"


def _written(shape: Sequence[Any]) -> str:
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


class _Call:
    """One node at work."""

    def __init__(
        self,
        node: Node,
        opset: int,
        xp: Any,
        used: tuple[bool, ...],
        lift: Callable[[np.ndarray], Any],
    ) -> None:
        self.node = node
        self.opset = opset
        self.xp = xp  # numpy where all inputs are static, else jax.numpy
        self.used = used  # which outputs anything reads
        self._lift = lift

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.node.attributes.get(name, default)

    def array(self, value: Any) -> Any:
        """A value as an array of `xp`."""
        return self._lift(value) if self.xp is jnp and isinstance(value, np.ndarray) else value

    def aligned(self, *values: Any) -> list[Any]:
        """Values as arrays of `xp` and of one rank, leading axes of size 1 being added."""
        rank = max(value.ndim for value in values)
        arrays = map(self.array, values)
        return [x.reshape((1,) * (rank - x.ndim) + x.shape) for x in arrays]

    def static(self, value: Any, what: str) -> np.ndarray:
        """A value that must not depend on data."""
        if not isinstance(value, np.ndarray):
            raise self.error(f"{what} depends on the data; export the model with fixed shapes")
        return value

    def ints(self, value: Any, what: str) -> list[int]:
        """A static value as a list of integers."""
        return [int(n) for n in self.static(value, what).reshape(-1)]

    def axes(self, value: Any, rank: int) -> tuple[int, ...]:
        """A static value, or an attribute, as axes counted from the front."""
        if value is None:
            return ()
        axes = self.ints(value, "its axes") if not isinstance(value, tuple) else value
        return tuple(self.axis(axis, rank) for axis in axes)

    def axis(self, axis: int, rank: int) -> int:
        """An axis counted from the front."""
        if not -rank <= axis < rank:
            raise self.error(f"axis {axis} is out of range for rank {rank}")
        return int(axis) % rank

    def error(self, text: str) -> ConvertError:
        """The error that says so of this node."""
        return ConvertError(f"node {self.node.name!r} ({self.node.op}): {text}")

    def unsupported(self, what: str) -> ConvertError:
        """The error for a variant of an operator that is not supported."""
        return self.error(f"{what} is not supported; export the model without it")


# --- Elementwise --------------------------------------------------------------------------------


def _unary(name: str) -> Callable[..., Any]:
    return lambda op, x: getattr(op.xp, name)(x)


def _binary(name: str) -> Callable[..., Any]:
    return lambda op, a, b: getattr(op.xp, name)(*op.aligned(a, b))


def _variadic(name: str) -> Callable[..., Any]:
    def fold(op: _Call, *values: Any) -> Any:
        arrays = op.aligned(*values)
        result = arrays[0]
        for array in arrays[1:]:
            result = getattr(op.xp, name)(result, array)
        return result

    return fold


def _mean_of(op: _Call, *values: Any) -> Any:
    return _variadic("add")(op, *values) / len(values)


def _div(op: _Call, a: Any, b: Any) -> Any:
    a, b = op.aligned(a, b)
    if a.dtype.kind not in "iu":
        return op.xp.true_divide(a, b)
    quotient = op.xp.floor_divide(a, b)  # rounds down; ONNX cuts off
    inexact = op.xp.not_equal(quotient * b, a) & ((a < 0) != (b < 0))
    return quotient + inexact.astype(quotient.dtype)


def _mod(op: _Call, a: Any, b: Any) -> Any:
    return (op.xp.fmod if op.get("fmod", 0) else op.xp.mod)(*op.aligned(a, b))


def _pow(op: _Call, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, np.ndarray) and exponent.size == 1 and exponent.ndim <= x.ndim:
        # A product where the exponent allows: exact, and quicker.
        power = exponent.item()
        x = op.array(x)
        if power == 1:
            return x
        if power == 2:
            return x * x
        if power == 3:
            return x * x * x
        if power == 0.5 and x.dtype.kind == "f":
            return op.xp.sqrt(x)
    x, exponent = op.aligned(x, exponent)
    if exponent.dtype != x.dtype:
        both = exponent.dtype if exponent.dtype.kind == "f" and x.dtype.kind != "f" else x.dtype
        return op.xp.power(x.astype(both), exponent.astype(both)).astype(x.dtype)
    return op.xp.power(x, exponent)


def _clip(op: _Call, x: Any, low: Any = None, high: Any = None) -> Any:
    x = op.array(x)
    bounds = []
    for name, bound in (("min", low), ("max", high)):
        if bound is None and name in op.node.attributes:  # up to opset 10
            bound = np.asarray(op.get(name)).astype(x.dtype)
        bounds.append(None if bound is None else op.array(bound).reshape(()))
    if bounds[0] is not None:
        x = op.xp.maximum(x, bounds[0])
    return x if bounds[1] is None else op.xp.minimum(x, bounds[1])


def _where(op: _Call, condition: Any, a: Any, b: Any) -> Any:
    return op.xp.where(*op.aligned(condition, a, b))


def _cast(op: _Call, x: Any) -> Any:
    if op.get("to") not in _DTYPES:
        raise op.unsupported(f"ONNX type {op.get('to')}")
    return op.array(x).astype(_DTYPES[op.get("to")])


def _cast_like(op: _Call, x: Any, like: Any) -> Any:
    return op.array(x).astype(like.dtype)


def _is_inf(op: _Call, x: Any) -> Any:
    up, down = op.get("detect_positive", 1), op.get("detect_negative", 1)
    return op.xp.isinf(x) & (((x > 0) & bool(up)) | ((x < 0) & bool(down)))


def _bit_shift(op: _Call, a: Any, b: Any) -> Any:
    shift = op.xp.left_shift if op.get("direction") == "LEFT" else op.xp.right_shift
    return shift(*op.aligned(a, b))


def _relu(op: _Call, x: Any) -> Any:
    return op.xp.maximum(x, op.xp.zeros((), x.dtype))


def _gelu(op: _Call, x: Any) -> Any:
    return jax.nn.gelu(op.array(x), approximate=op.get("approximate", "none") == "tanh")


def _mish(op: _Call, x: Any) -> Any:
    x = op.array(x)
    return x * jnp.tanh(jax.nn.softplus(x))


def _hard_sigmoid(op: _Call, x: Any) -> Any:
    return jnp.clip(op.array(x) * op.get("alpha", 0.2) + op.get("beta", 0.5), 0.0, 1.0)


def _hard_swish(op: _Call, x: Any) -> Any:
    x = op.array(x)
    return x * jnp.clip(x / 6 + 0.5, 0.0, 1.0)


def _elu(op: _Call, x: Any) -> Any:
    return jax.nn.elu(op.array(x), op.get("alpha", 1.0))


def _celu(op: _Call, x: Any) -> Any:
    return jax.nn.celu(op.array(x), op.get("alpha", 1.0))


def _selu(op: _Call, x: Any) -> Any:
    alpha = op.get("alpha", 1.67326319217681884765625)
    return op.get("gamma", 1.05070102214813232421875) * jax.nn.elu(op.array(x), alpha)


def _leaky_relu(op: _Call, x: Any) -> Any:
    x = op.array(x)
    return jnp.where(x >= 0, x, x * op.get("alpha", 0.01))


def _thresholded_relu(op: _Call, x: Any) -> Any:
    x = op.array(x)
    return jnp.where(x > op.get("alpha", 1.0), x, jnp.zeros_like(x))


def _prelu(op: _Call, x: Any, slope: Any) -> Any:
    x, slope = op.aligned(x, slope)
    return jnp.where(x >= 0, x, x * slope)


def _softsign(op: _Call, x: Any) -> Any:
    x = op.array(x)
    return x / (1 + jnp.abs(x))


def _shrink(op: _Call, x: Any) -> Any:
    x, bias, bound = op.array(x), op.get("bias", 0.0), op.get("lambd", 0.5)
    moved = jnp.where(x > bound, x - bias, jnp.zeros_like(x))
    return jnp.where(x < -bound, x + bias, moved)


def _device(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda op, x: function(op.array(x))


# --- Shapes -------------------------------------------------------------------------------------


def _constant(op: _Call) -> Any:
    return op.get("value")


def _shape_of(op: _Call, x: Any) -> Any:
    return np.asarray(x.shape[slice(op.get("start", 0), op.get("end"))], np.int64)


def _size(op: _Call, x: Any) -> Any:
    return np.asarray(x.size, np.int64)


def _reshape(op: _Call, x: Any, shape: Any) -> Any:
    sizes = op.ints(shape, "its shape")
    if not op.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return op.array(x).reshape(sizes)


def _flatten(op: _Call, x: Any) -> Any:
    axis = op.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return op.array(x).reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(op: _Call, x: Any, axes: Any = None) -> Any:
    given = op.get("axes") if axes is None else axes
    if given is None:
        return op.array(x).reshape([n for n in x.shape if n != 1])
    return op.xp.squeeze(op.array(x), op.axes(given, x.ndim))


def _unsqueeze(op: _Call, x: Any, axes: Any = None) -> Any:
    given = op.get("axes") if axes is None else axes
    count = len(given) if isinstance(given, tuple) else given.size
    return op.xp.expand_dims(op.array(x), op.axes(given, x.ndim + count))


def _transpose(op: _Call, x: Any) -> Any:
    return op.xp.transpose(op.array(x), op.get("perm"))


def _concat(op: _Call, *values: Any) -> Any:
    arrays = [op.array(value) for value in values]
    return op.xp.concatenate(arrays, op.axis(op.get("axis", 1), arrays[0].ndim))


def _split(op: _Call, x: Any, sizes: Any = None) -> tuple[Any, ...]:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    total, count = x.shape[axis], len(op.node.outputs)
    parts = op.get("split") if sizes is None else op.ints(sizes, "its split")
    if parts is None:
        part = -(-total // count)
        parts = [max(0, min(part, total - i * part)) for i in range(count)]
    if sum(parts) != total:
        raise op.error(f"parts of {list(parts)} do not make up {total}")
    stops = itertools.accumulate(parts)
    return tuple(_cut(x, axis, n - part, n) for part, n in zip(parts, stops, strict=True))


def _cut(x: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
    """The samples range(start, stop, step) of an axis."""
    places = range(start, stop, step)
    if isinstance(x, np.ndarray):
        index = slice(start, stop if stop >= 0 else None, step)
        return x[(*(slice(None),) * axis, index if places else slice(0, 0))]
    if not places:
        return lax.slice_in_dim(x, 0, 0, axis=axis)
    low, high = min(places[0], places[-1]), max(places[0], places[-1]) + 1
    if (low, high, step) != (0, x.shape[axis], 1):
        x = lax.slice_in_dim(x, low, high, abs(step), axis)
    return lax.rev(x, (axis,)) if step < 0 else x


def _slice(
    op: _Call, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Any:
    x = op.array(x)
    if starts is None:  # up to opset 9
        firsts, lasts, places = op.get("starts"), op.get("ends"), op.get("axes")
    else:
        firsts, lasts = op.ints(starts, "its start"), op.ints(ends, "its end")
        places = None if axes is None else tuple(op.ints(axes, "axes"))
    places = tuple(range(len(firsts))) if places is None else places
    strides = [1] * len(firsts) if steps is None else op.ints(steps, "its step")
    bounds = zip(op.axes(places, x.ndim), firsts, lasts, strides, strict=True)
    for axis, first, last, step in bounds:
        n = x.shape[axis]
        start, stop, step = slice(first, last, step).indices(n)
        if step < 0 and n:  # unlike Python, ONNX starts within the axis
            start = max(start, 0)
        x = _cut(x, axis, start, stop, step)
    return x


def _positions(op: _Call, indices: Any, size: int) -> Any:
    """Indices, negative ones counted from the end, as non-negative ones."""
    if isinstance(indices, np.ndarray):
        if indices.size and not (-size <= indices.min() and indices.max() < size):
            raise op.error(f"an index is out of range for an axis of {size}")
        return np.where(indices < 0, indices + size, indices).astype(np.int64)
    return jnp.where(indices < 0, indices + size, indices).astype(np.int64)


def _gather(op: _Call, x: Any, indices: Any) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    places = _positions(op, indices, x.shape[axis])
    if op.xp is np:
        return np.take(x, places, axis)
    if isinstance(places, np.ndarray):
        if places.ndim == 0:
            return lax.index_in_dim(x, int(places), axis, keepdims=False)
        flat = places.reshape(-1)
        steps = np.unique(np.diff(flat))
        if flat.size and steps.size <= 1 and (not steps.size or steps[0] > 0):
            step = int(steps[0]) if steps.size else 1
            part = _cut(x, axis, int(flat[0]), int(flat[-1]) + 1, step)
            return part.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    return jnp.take(x, op.array(places), axis, mode="clip")


def _gather_elements(op: _Call, x: Any, indices: Any) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    places = op.array(_positions(op, indices, x.shape[axis]))
    # Along the other axes an index array may be shorter than the data.
    for other in range(x.ndim):
        if other != axis:
            x = _cut(x, other, 0, places.shape[other])
    return op.xp.take_along_axis(x, places, axis)


def _gather_nd(op: _Call, x: Any, indices: Any) -> Any:
    batch = op.get("batch_dims", 0)
    x, indices = op.array(x), op.array(indices)
    parts = tuple(
        _positions(op, indices[..., i], x.shape[batch + i]) for i in range(indices.shape[-1])
    )
    lead = tuple(
        op.xp.arange(n).reshape((1,) * i + (n,) + (1,) * (indices.ndim - 2 - i))
        for i, n in enumerate(x.shape[:batch])
    )
    return x[lead + parts]


def _scatter_nd(op: _Call, x: Any, indices: Any, updates: Any) -> Any:
    indices = op.array(indices)
    parts = tuple(_positions(op, indices[..., i], x.shape[i]) for i in range(indices.shape[-1]))
    return _update(op, op.array(x).at[parts], op.array(updates))


def _scatter_elements(op: _Call, x: Any, indices: Any, updates: Any) -> Any:
    axis = op.axis(op.get("axis", 0), x.ndim)
    places = op.array(_positions(op, indices, x.shape[axis]))
    index = list(jnp.indices(places.shape))
    index[axis] = places
    return _update(op, op.array(x).at[tuple(index)], op.array(updates))


def _update(op: _Call, target: Any, updates: Any) -> Any:
    names = {"none": "set", "add": "add", "mul": "multiply", "max": "max", "min": "min"}
    return getattr(target, names[op.get("reduction", "none")])(updates)


def _expand(op: _Call, x: Any, shape: Any) -> Any:
    sizes = op.ints(shape, "its shape")
    x = op.array(x)
    rank = max(x.ndim, len(sizes))
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    sizes = [1] * (rank - len(sizes)) + sizes
    return op.xp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(sizes)))


def _tile(op: _Call, x: Any, repeats: Any) -> Any:
    return op.xp.tile(op.array(x), tuple(op.ints(repeats, "its repeats")))


def _pad(op: _Call, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    x, mode = op.array(x), op.get("mode", "constant")
    amounts = list(op.get("pads")) if pads is None else op.ints(pads, "its width")
    places = tuple(range(x.ndim)) if axes is None else op.axes(axes, x.ndim)
    count = len(places)
    widths = [(0, 0)] * x.ndim
    for axis, before, after in zip(places, amounts[:count], amounts[count:], strict=True):
        widths[axis] = (before, after)
    for axis, (before, after) in enumerate(widths):  # a negative width crops
        start = max(0, -before)
        x = _cut(x, axis, start, max(start, x.shape[axis] + min(0, after)))
    widths = [(max(0, before), max(0, after)) for before, after in widths]
    if mode == "constant":
        fill = np.asarray(op.get("value", 0.0)).astype(x.dtype) if value is None else value
        if op.xp is np:
            return np.pad(x, widths, constant_values=fill.reshape(()))
        fill = op.array(fill).reshape(())
        return lax.pad(x, fill, [(before, after, 0) for before, after in widths])
    if mode not in ("reflect", "edge", "wrap"):
        raise op.unsupported(f"mode {mode!r}")
    return op.xp.pad(x, widths, mode=mode)


def _constant_of_shape(op: _Call, shape: Any) -> Any:
    value = op.get("value", np.zeros(1, np.float32))
    return np.full(op.ints(shape, "the shape"), value.item(), value.dtype)


def _range(op: _Call, start: Any, limit: Any, delta: Any) -> Any:
    bounds = [op.static(value, "its bounds").item() for value in (start, limit, delta)]
    count = max(0, math.ceil((bounds[1] - bounds[0]) / bounds[2]))
    return start.reshape(()) + np.arange(count).astype(start.dtype) * delta.reshape(())


def _one_hot(op: _Call, indices: Any, depth: Any, values: Any) -> Any:
    size = op.ints(depth, "the depth")[0]
    values = op.array(values)
    axis = op.axis(op.get("axis", -1), indices.ndim + 1)
    places = op.xp.expand_dims(op.array(indices).astype(np.int64), axis)
    places = op.xp.where(places < 0, places + size, places)
    shape = [1] * places.ndim
    shape[axis] = size
    hot = places == op.xp.arange(size, dtype=np.int64).reshape(shape)
    return op.xp.where(hot, values[1], values[0])


def _trilu(op: _Call, x: Any, k: Any = None) -> Any:
    diagonal = 0 if k is None else op.ints(k, "the diagonal")[0]
    rows = np.arange(x.shape[-2])[:, None] + diagonal
    columns = np.arange(x.shape[-1])[None, :]
    keep = columns >= rows if op.get("upper", 1) else columns <= rows
    x, kept = op.aligned(x, keep)
    return op.xp.where(kept, x, op.xp.zeros((), x.dtype))


def _cumsum(op: _Call, x: Any, axis: Any) -> Any:
    x, place = op.array(x), op.axis(op.ints(axis, "the axis")[0], x.ndim)
    if op.get("reverse", 0):
        x = op.xp.flip(x, place)
    total = op.xp.cumsum(x, place, dtype=x.dtype)
    if op.get("exclusive", 0):
        zero = op.xp.zeros_like(_cut(x, place, 0, 1))
        total = op.xp.concatenate([zero, _cut(total, place, 0, x.shape[place] - 1)], place)
    return op.xp.flip(total, place) if op.get("reverse", 0) else total


def _depth_to_space(op: _Call, x: Any) -> Any:
    (n, c, h, w), size = x.shape, op.get("blocksize")
    if op.get("mode", "DCR") == "DCR":
        x = op.array(x).reshape(n, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = op.array(x).reshape(n, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // size**2, h * size, w * size)


def _space_to_depth(op: _Call, x: Any) -> Any:
    (n, c, h, w), size = x.shape, op.get("blocksize")
    x = op.array(x).reshape(n, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * size**2, h // size, w // size)


def _nonzero(op: _Call, x: Any) -> Any:
    return np.stack(np.nonzero(op.static(x, "its result's shape"))).astype(np.int64)


def _eye_like(op: _Call, x: Any) -> Any:
    dtype = _DTYPES[op.get("dtype")] if op.get("dtype") else x.dtype
    rows, columns = x.shape
    return np.eye(rows, columns, op.get("k", 0)).astype(dtype)


def _identity(op: _Call, x: Any, *_: Any) -> Any:
    return x


def _dropout(op: _Call, x: Any, ratio: Any = None, training: Any = None) -> Any:
    if training is not None and op.static(training, "its mode").item():
        raise op.unsupported("dropout in training mode")
    return x, np.ones(x.shape, np.bool_) if len(op.used) > 1 and op.used[1] else None


def _sequence_at(op: _Call, sequence: Any, position: Any) -> Any:
    return sequence[op.ints(position, "the position")[0]]


def _sequence_of(op: _Call, *values: Any) -> Any:
    return ([op.array(value) for value in values],)


def _sequence_length(op: _Call, sequence: Any) -> Any:
    return np.asarray(len(sequence), np.int64)


def _split_to_sequence(op: _Call, x: Any, sizes: Any = None) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    total = x.shape[axis]
    if sizes is not None and sizes.ndim == 0:
        part = op.ints(sizes, "the split")[0]
        parts = [min(part, total - start) for start in range(0, total, part)]
    else:
        parts = [1] * total if sizes is None else op.ints(sizes, "the split")
    stops = itertools.accumulate(parts)
    pieces = [_cut(x, axis, n - part, n) for part, n in zip(parts, stops, strict=True)]
    if sizes is None and not op.get("keepdims", 1):
        pieces = [op.xp.squeeze(piece, axis) for piece in pieces]
    return (pieces,)


def _concat_from_sequence(op: _Call, sequence: Any) -> Any:
    arrays = [op.array(value) for value in sequence]
    join = op.xp.stack if op.get("new_axis", 0) else op.xp.concatenate
    return join(arrays, op.get("axis"))


# --- Reductions ---------------------------------------------------------------------------------


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(op: _Call, x: Any, axes: Any = None) -> Any:
        given = op.get("axes") if axes is None else axes
        places = op.axes(given, x.ndim)
        if not places:
            if op.get("noop_with_empty_axes", 0):
                # The step before and after the reduction is still taken, on single elements.
                return function(op.xp, op.array(x)[None], (0,), False)
            places = tuple(range(x.ndim))
        return function(op.xp, op.array(x), places, bool(op.get("keepdims", 1)))

    return reduce


def _wide(x: Any) -> Any:
    """A type to sum in: XLA adds one by one on a CPU, which costs float32 its last 10 bits."""
    return {2: np.float32, 4: np.float64}.get(x.dtype.itemsize, x.dtype)


def _sum(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    wide = _wide(x) if x.dtype.kind not in "iu" else x.dtype
    return xp.sum(x, axis=axes, keepdims=keep, dtype=wide).astype(x.dtype)


def _mean(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    if x.dtype.kind in "iu":
        count = math.prod(x.shape[axis] for axis in axes)
        total = _sum(xp, x, axes, keep)
        return xp.trunc(total / count).astype(x.dtype)
    return xp.mean(x, axis=axes, keepdims=keep, dtype=_wide(x)).astype(x.dtype)


def _log_sum_exp(xp: Any, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    peak = xp.max(x, axis=axes, keepdims=True)
    total = xp.log(_sum(xp, xp.exp(x - peak), axes, True)) + peak
    return total if keep else xp.squeeze(total, axes)


def _named(name: str) -> Callable[..., Any]:
    return lambda xp, x, axes, keep: getattr(xp, name)(x, axis=axes, keepdims=keep)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _named("max"),
    "ReduceMin": _named("min"),
    "ReduceProd": lambda xp, x, a, k: xp.prod(x, axis=a, keepdims=k, dtype=x.dtype),
    "ReduceL1": lambda xp, x, a, k: _sum(xp, xp.abs(x), a, k),
    "ReduceL2": lambda xp, x, a, k: xp.sqrt(_sum(xp, x * x, a, k)).astype(x.dtype),
    "ReduceSumSquare": lambda xp, x, a, k: _sum(xp, x * x, a, k),
    "ReduceLogSum": lambda xp, x, a, k: xp.log(_sum(xp, x, a, k)).astype(x.dtype),
    "ReduceLogSumExp": _log_sum_exp,
}


def _arg(name: str) -> Callable[..., Any]:
    def arg(op: _Call, x: Any) -> Any:
        x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
        last = op.get("select_last_index", 0)
        found = getattr(op.xp, name)(op.xp.flip(x, axis) if last else x, axis)
        found = found.astype(np.int64)
        found = x.shape[axis] - 1 - found if last else found
        return op.xp.expand_dims(found, axis) if op.get("keepdims", 1) else found

    return arg


def _top_k(op: _Call, x: Any, k: Any = None) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", -1), x.ndim)
    count = op.get("k") if k is None else op.ints(k, "k")[0]
    n, largest = x.shape[axis], op.get("largest", 1)
    if not 0 <= count <= n:
        raise op.error(f"k is {count}, the axis has {n}")
    if len(op.used) < 2 or not op.used[1]:
        ordered = lax.sort(x, dimension=axis, is_stable=False)
        if largest:
            return _cut(ordered, axis, n - 1, n - 1 - count, -1), None
        return _cut(ordered, axis, 0, count), None
    flip = jnp.invert if x.dtype.kind in "iu" else jnp.negative
    places = lax.broadcasted_iota(np.int64, x.shape, axis)
    ordered, places = lax.sort((flip(x) if largest else x, places), dimension=axis, num_keys=1)
    ordered, places = _cut(ordered, axis, 0, count), _cut(places, axis, 0, count)
    return flip(ordered) if largest else ordered, places


# --- Convolution and pooling --------------------------------------------------------------------


def _padding(
    op: _Call, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Samples to add along each spatial axis; `window` is the kernel's extent."""
    rank, auto = len(sizes), op.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * rank
    if auto.startswith("SAME"):
        pairs = []
        for n, size, stride in zip(sizes, window, strides, strict=True):
            total = max(0, (-(-n // stride) - 1) * stride + size - n)
            less, more = total // 2, total - total // 2
            pairs.append((less, more) if auto == "SAME_UPPER" else (more, less))
        return pairs
    pads = op.get("pads", (0,) * 2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _extent(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def _conv(op: _Call, x: Any, w: Any, bias: Any = None) -> Any:
    rank = x.ndim - 2
    strides, dilations = op.get("strides", (1,) * rank), op.get("dilations", (1,) * rank)
    pads = _padding(op, x.shape[2:], _extent(w.shape[2:], dilations), strides)
    y = lax.conv_general_dilated(
        op.array(x),
        op.array(w),
        strides,
        pads,
        rhs_dilation=dilations,
        feature_group_count=op.get("group", 1),
        precision=HIGHEST,
    )
    return _biased(op, y, bias)


def _biased(op: _Call, y: Any, bias: Any) -> Any:
    return y if bias is None else y + op.array(bias).reshape((1, -1) + (1,) * (y.ndim - 2))


def _conv_transpose(op: _Call, x: Any, w: Any, bias: Any = None) -> Any:
    # A convolution for each phase of the output and an interleaving: XLA's own way, a convolution
    # over an input spread with zeros, is many times slower on a CPU.
    rank, groups = x.ndim - 2, op.get("group", 1)
    strides, dilations = op.get("strides", (1,) * rank), op.get("dilations", (1,) * rank)
    more = op.get("output_padding", (0,) * rank)
    window = _extent(w.shape[2:], dilations)
    sizes = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], strides, window, strict=True)]
    pads = _transposed_pads(op, x.shape[2:], sizes, strides, more)

    xp = np if isinstance(w, np.ndarray) else jnp
    _, outs, *_ = w.shape
    taps = [-(-k // s) for k, s in zip(window, strides, strict=True)]
    kernel = xp.zeros((*w.shape[:2], *(t * s for t, s in zip(taps, strides, strict=True))), w.dtype)
    spread = (
        slice(None),
        slice(None),
        *(slice(0, k, d) for k, d in zip(window, dilations, strict=True)),
    )
    if xp is np:
        kernel[spread] = w
    else:
        kernel = kernel.at[spread].set(w)
    split = [n for pair in zip(taps, strides, strict=True) for n in pair]
    kernel = kernel.reshape(groups, -1, outs, *split)
    # (group, in, out, tap, phase, tap, phase, ...) -> (group, phases, out, in, taps)
    phases, steps = range(4, 4 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    kernel = kernel.transpose(0, *phases, 2, 1, *steps)
    kernel = kernel.reshape(groups * math.prod(strides) * outs, -1, *taps)
    kernel = xp.flip(kernel, tuple(range(2, 2 + rank)))
    y = lax.conv_general_dilated(
        op.array(x),
        op.array(np.ascontiguousarray(kernel) if xp is np else kernel),
        (1,) * rank,
        [(t - 1, t - 1) for t in taps],
        feature_group_count=groups,
        precision=HIGHEST,
    )
    n, _, *spatial = y.shape
    y = y.reshape(n, groups, *strides, outs, *spatial)
    order = [
        i
        for pair in zip(range(3 + rank, 3 + 2 * rank), range(2, 2 + rank), strict=True)
        for i in pair
    ]
    y = y.transpose(0, 1, 2 + rank, *order)
    y = y.reshape(n, groups * outs, *(m * s for m, s in zip(spatial, strides, strict=True)))
    for axis, (before, after), size, extra in zip(
        range(2, 2 + rank), pads, sizes, more, strict=True
    ):
        stop = size - after + extra
        if stop > y.shape[axis]:
            widths = [(0, 0, 0)] * y.ndim
            widths[axis] = (0, stop - y.shape[axis], 0)
            y = lax.pad(y, jnp.zeros((), y.dtype), widths)
        y = _cut(y, axis, before, stop)
    return _biased(op, y, bias)


def _transposed_pads(
    op: _Call,
    sizes: Sequence[int],
    full: Sequence[int],
    strides: Sequence[int],
    more: Sequence[int],
) -> list[tuple[int, int]]:
    """Samples that a transposed convolution drops at each side of its full output."""
    auto, wanted = op.get("auto_pad", "NOTSET"), op.get("output_shape")
    if wanted is None and not auto.startswith("SAME"):
        return _padding(op, sizes, sizes, strides)
    wanted = wanted or [n * s for n, s in zip(sizes, strides, strict=True)]
    pairs = []
    for n, extra, target in zip(full, more, wanted[-len(sizes) :], strict=True):
        total = max(0, n + extra - target)
        less, rest = total // 2, total - total // 2
        pairs.append((less, rest) if auto == "SAME_UPPER" else (rest, less))
    return pairs


def _windows(op: _Call, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Kernel, strides, dilations, padding, and the padding with what `ceil_mode` adds."""
    rank = len(sizes)
    kernel = op.get("kernel_shape")
    strides, dilations = op.get("strides", (1,) * rank), op.get("dilations", (1,) * rank)
    window = _extent(kernel, dilations)
    pads = _padding(op, sizes, window, strides)
    ceil = op.get("ceil_mode", 0) and op.get("auto_pad", "NOTSET") == "NOTSET"
    reach = []
    for n, size, stride, (before, after) in zip(sizes, window, strides, pads, strict=True):
        room = n + before + after - size
        count = (-(-room // stride) if ceil else room // stride) + 1
        if ceil and (count - 1) * stride >= n + before:  # it would start in the padding
            count -= 1
        reach.append((before, max(after, (count - 1) * stride + size - n - before)))
    return kernel, strides, dilations, pads, reach


def _pooled(x: Any, start: Any, function: Any, windows: tuple[Any, ...]) -> Any:
    kernel, strides, dilations, _, reach = windows
    return lax.reduce_window(
        x,
        start,
        function,
        (1, 1, *kernel),
        (1, 1, *strides),
        [(0, 0), (0, 0), *reach],
        window_dilation=(1, 1, *dilations),
    )


def _max_pool(op: _Call, x: Any) -> Any:
    if len(op.used) > 1 and op.used[1]:
        raise op.unsupported("the output of indices")
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return _pooled(op.array(x), x.dtype.type(lowest), lax.max, _windows(op, x.shape[2:])), None


def _average_pool(op: _Call, x: Any) -> Any:
    windows = _windows(op, x.shape[2:])
    kernel, strides, dilations, pads, reach = windows
    # What each window holds, as a product over the axes.
    counts = np.ones((1, 1), x.dtype)
    padded = op.get("count_include_pad", 0)
    for n, k, stride, dilation, pad, total in zip(
        x.shape[2:], kernel, strides, dilations, pads, reach, strict=True
    ):
        starts = np.arange(0, n + sum(total) - (k - 1) * dilation, stride) - total[0]
        places = starts[:, None] + dilation * np.arange(k)[None, :]
        low, high = (-pad[0], n + pad[1]) if padded else (0, n)
        held = ((places >= low) & (places < high)).sum(1).astype(x.dtype)
        counts = counts[..., None] * held.reshape((1,) * counts.ndim + (-1,))
    total = _pooled(op.array(x), x.dtype.type(0), lax.add, windows)
    return total / op.array(counts)


def _lp_pool(op: _Call, x: Any) -> Any:
    p, x = op.get("p", 2), op.array(x)
    total = _pooled(jnp.abs(x) ** p, x.dtype.type(0), lax.add, _windows(op, x.shape[2:]))
    return total ** (1 / p)


def _global_average_pool(op: _Call, x: Any) -> Any:
    return _mean(jnp, op.array(x), tuple(range(2, x.ndim)), True)


def _global_max_pool(op: _Call, x: Any) -> Any:
    return jnp.max(op.array(x), tuple(range(2, x.ndim)), keepdims=True)


def _global_lp_pool(op: _Call, x: Any) -> Any:
    p, axes = op.get("p", 2), tuple(range(2, x.ndim))
    return jnp.sum(jnp.abs(op.array(x)) ** p, axes, keepdims=True) ** (1 / p)


# --- Products -----------------------------------------------------------------------------------


def _matmul(op: _Call, a: Any, b: Any) -> Any:
    if min(a.ndim, b.ndim) >= 2:
        a, b = op.aligned(a, b)
    else:
        a, b = op.array(a), op.array(b)
    return jnp.matmul(a, b, precision=HIGHEST)


def _gemm(op: _Call, a: Any, b: Any, c: Any = None) -> Any:
    a, b = op.array(a), op.array(b)
    a = a.T if op.get("transA", 0) else a
    b = b.T if op.get("transB", 0) else b
    y = jnp.matmul(a, b, precision=HIGHEST)
    if op.get("alpha", 1.0) != 1:
        y = y * op.get("alpha")
    if c is None:
        return y
    y, c = op.aligned(y, c)
    return y + (c if op.get("beta", 1.0) == 1 else c * op.get("beta"))


def _einsum(op: _Call, *values: Any) -> Any:
    equation = op.get("equation").replace(" ", "")
    return jnp.einsum(equation, *map(op.array, values), precision=HIGHEST)


# --- Normalisation ------------------------------------------------------------------------------


def _columns(op: _Call, x: Any, *values: Any) -> list[Any]:
    """Vectors over channels, as arrays that broadcast against x."""
    return [op.array(value).reshape((1, -1) + (1,) * (x.ndim - 2)) for value in values]


def _batch_norm(op: _Call, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> tuple[Any, ...]:
    if op.get("training_mode", 0):
        raise op.unsupported("batch normalisation in training mode")
    x = op.array(x)
    scale, bias, mean, var = _columns(op, x, scale, bias, mean, var)
    factor = scale / jnp.sqrt(var + op.get("epsilon", 1e-5))
    return ((x * factor + (bias - mean * factor)).astype(x.dtype),)


def _normalised(x: Any, axes: tuple[int, ...], epsilon: float) -> tuple[Any, Any, Any]:
    mean = _mean(jnp, x, axes, True)
    centred = x - mean
    inverse = 1 / jnp.sqrt(_mean(jnp, centred * centred, axes, True) + epsilon)
    return centred * inverse, mean, inverse


def _instance_norm(op: _Call, x: Any, scale: Any, bias: Any) -> Any:
    x = op.array(x)
    scale, bias = _columns(op, x, scale, bias)
    axes = tuple(range(2, x.ndim))
    return _normalised(x, axes, op.get("epsilon", 1e-5))[0] * scale + bias


def _group_norm(op: _Call, x: Any, scale: Any, bias: Any) -> Any:
    x, groups = op.array(x), op.get("num_groups")
    n, c = x.shape[:2]
    parts = x.reshape(n, groups, -1)
    y = _normalised(parts, (2,), op.get("epsilon", 1e-5))[0].reshape(x.shape)
    scale, bias = op.array(scale), op.array(bias)
    if op.opset < 21:  # one for each group
        scale, bias = jnp.repeat(scale, c // groups), jnp.repeat(bias, c // groups)
    scale, bias = _columns(op, x, scale, bias)
    return y * scale + bias


def _layer_norm(op: _Call, x: Any, scale: Any, bias: Any = None) -> tuple[Any, ...]:
    x = op.array(x)
    axes = tuple(range(op.axis(op.get("axis", -1), x.ndim), x.ndim))
    stash = _DTYPES[op.get("stash_type", 1)]
    y, mean, inverse = _normalised(x.astype(stash), axes, op.get("epsilon", 1e-5))
    y, scale = op.aligned(y.astype(x.dtype), scale)
    y = y * scale
    if bias is not None:
        y, bias = op.aligned(y, bias)
        y = y + bias
    return y, mean, inverse


def _rms_norm(op: _Call, x: Any, scale: Any) -> Any:
    x = op.array(x)
    axes = tuple(range(op.axis(op.get("axis", -1), x.ndim), x.ndim))
    wide = x.astype(_DTYPES[op.get("stash_type", 1)])
    mean = _mean(jnp, wide * wide, axes, True)
    y, scale = op.aligned((wide / jnp.sqrt(mean + op.get("epsilon", 1e-5))).astype(x.dtype), scale)
    return y * scale


def _lp_norm(op: _Call, x: Any) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", -1), x.ndim)
    if op.get("p", 2) == 1:
        norm = jnp.sum(jnp.abs(x), axis, keepdims=True)
    else:
        norm = jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))
    return jnp.where(norm == 0, jnp.zeros_like(x), x / norm)


def _lrn(op: _Call, x: Any) -> Any:
    x, size = op.array(x), op.get("size")
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    total = lax.reduce_window(
        x * x,
        x.dtype.type(0),
        lax.add,
        (1, size) + (1,) * (x.ndim - 2),
        (1,) * x.ndim,
        [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2),
    )
    base = op.get("bias", 1.0) + op.get("alpha", 1e-4) / size * total
    return x / base ** op.get("beta", 0.75)


def _mean_variance_norm(op: _Call, x: Any) -> Any:
    x = op.array(x)
    axes = op.axes(op.get("axes", (0, 2, 3)), x.ndim)
    mean = _mean(jnp, x, axes, True)
    deviation = jnp.sqrt(_mean(jnp, x * x, axes, True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


def _softmax(function: Callable[..., Any]) -> Callable[..., Any]:
    def softmax(op: _Call, x: Any) -> Any:
        x = op.array(x)
        if op.opset >= 13:
            return function(x, op.axis(op.get("axis", -1), x.ndim))
        axis = op.axis(op.get("axis", 1), x.ndim)  # and all axes after it
        flat = x.reshape(*x.shape[:axis], -1)
        return function(flat, axis).reshape(x.shape)

    return softmax


# --- Resizing -----------------------------------------------------------------------------------


def _resize(op: _Call, x: Any, *more: Any) -> Any:
    x = op.array(x)
    roi = sizes = None
    if op.node.op == "Upsample":
        scales = np.asarray(op.get("scales"), np.float32) if not more else more[0]
    elif op.opset < 11:
        scales = more[0]
    else:
        roi, scales, sizes, *_ = (*more, None, None, None)
    if op.get("antialias", 0):
        raise op.unsupported("antialias")
    places = op.axes(op.get("axes", tuple(range(x.ndim))), x.ndim)
    if sizes is not None and sizes.size:
        targets = op.ints(sizes, "its size")
        factors = [np.float32(t / x.shape[a]) for t, a in zip(targets, places, strict=True)]
        policy = op.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = (min if policy == "not_larger" else max)(factors)
            factors = [factor] * len(factors)
            targets = [math.floor(factor * x.shape[a] + 0.5) for a in places]
    else:
        factors = [np.float32(f) for f in op.static(scales, "its scale").reshape(-1)]
        targets = [int(np.float32(x.shape[a]) * f) for a, f in zip(places, factors, strict=True)]
    boxes: list[tuple[float, float]] = [(0.0, 1.0)] * len(places)
    if op.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        corners = op.static(roi, "its region").astype(np.float32).reshape(2, -1)
        boxes = list(zip(corners[0], corners[1], strict=True))
    for axis, target, factor, box in zip(places, targets, factors, boxes, strict=True):
        x = _resize_axis(op, x, axis, target, factor, box)
    return x


def _coordinates(
    op: _Call, size: int, target: int, factor: np.float32, box: tuple[float, float]
) -> np.ndarray:
    """Where each output sample lies on an axis of the input, in float32 as onnxruntime has it."""
    old = op.opset < 11 or op.node.op == "Upsample"
    mode = "asymmetric" if old else op.get("coordinate_transformation_mode", "half_pixel")
    at, half, one = np.arange(target, dtype=np.float32), np.float32(0.5), np.float32(1)
    if mode == "asymmetric":
        return at / factor
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and target > 1):
        return (at + half) / factor - half
    if mode == "pytorch_half_pixel":
        return at * 0
    if mode == "align_corners":
        return at * 0 if target == 1 else at * np.float32(size - 1) / np.float32(target - 1)
    if mode == "tf_half_pixel_for_nn":
        return (at + half) / factor
    if mode == "half_pixel_symmetric":
        adjustment = np.float32(target) / (factor * np.float32(size))
        offset = np.float32(size) * half * (one - adjustment)
        return offset + (at + half) / factor - half
    if mode == "tf_crop_and_resize":
        start, end = np.float32(box[0]), np.float32(box[1])
        if target == 1:
            return at + half * (start + end) * np.float32(size - 1)
        span = (end - start) * np.float32(size - 1)
        return start * np.float32(size - 1) + at * span / np.float32(target - 1)
    raise op.unsupported(f"coordinate_transformation_mode {mode!r}")


def _resize_axis(
    op: _Call, x: Any, axis: int, target: int, factor: np.float32, box: tuple[float, float]
) -> Any:
    size, mode = x.shape[axis], op.get("mode", "nearest")
    if factor == 1 and target == size and box == (0.0, 1.0):
        return x
    at = _coordinates(op, size, target, factor, box)
    cropped = op.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    outside = (at < 0) | (at > size - 1) if cropped else np.zeros(target, bool)
    column = [1] * x.ndim
    column[axis] = target
    taps: list[tuple[np.ndarray, np.ndarray | None]]
    if mode == "nearest":
        taps = [(_nearest(op, at, factor), None)]
    elif mode == "linear":
        at = np.clip(at, 0, size - 1)
        low = np.floor(at).astype(np.int64)
        part = (at - low).astype(np.float32)
        taps = [(low, 1 - part), (low + 1, part)]
    elif mode == "cubic":
        low = np.floor(at).astype(np.int64)
        part = (at - low).astype(np.float32)
        weights = _cubic(part, op.get("cubic_coeff_a", -0.75))
        near = [low - 1 + i for i in range(4)]
        if op.get("exclude_outside", 0):
            inside = [(place >= 0) & (place < size) for place in near]
            weights = [np.where(ok, w, 0) for ok, w in zip(inside, weights, strict=True)]
            total = np.sum(weights, axis=0)
            weights = [w / total for w in weights]
        taps = list(zip(near, weights, strict=True))
    else:
        raise op.unsupported(f"mode {mode!r}")
    result: Any = None
    for places, weight in taps:
        part = _taken(op, x, np.clip(places, 0, size - 1), axis)
        if weight is not None:
            part = part * op.array(weight.astype(x.dtype).reshape(column))
        result = part if result is None else result + part
    if outside.any():
        fill = jnp.full((), op.get("extrapolation_value", 0.0), x.dtype)
        result = jnp.where(op.array(outside.reshape(column)), fill, result)
    return result


def _taken(op: _Call, x: Any, places: np.ndarray, axis: int) -> Any:
    size = x.shape[axis]
    times = len(places) // size
    if times > 1 and np.array_equal(places, np.repeat(np.arange(size), times)):
        shape = (*x.shape[: axis + 1], times, *x.shape[axis + 1 :])
        spread = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
        return spread.reshape(*x.shape[:axis], size * times, *x.shape[axis + 1 :])
    return jnp.take(x, op.array(places), axis, mode="clip")


def _nearest(op: _Call, at: np.ndarray, factor: np.float32) -> np.ndarray:
    if op.opset < 11 or op.node.op == "Upsample":
        rule = "ceil" if factor < 1 else "floor"
    else:
        rule = op.get("nearest_mode", "round_prefer_floor")
    if rule == "round_prefer_floor":
        found = np.ceil(at - np.float32(0.5))
    elif rule == "round_prefer_ceil":
        found = np.floor(at + np.float32(0.5))
    else:
        found = np.floor(at) if rule == "floor" else np.ceil(at)
    return found.astype(np.int64)


def _cubic(part: np.ndarray, a: float) -> list[np.ndarray]:
    """Weights of the four samples around a position, for Keys' kernel."""
    t = part.astype(np.float64)

    def near(d: np.ndarray) -> np.ndarray:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: np.ndarray) -> np.ndarray:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


# --- Spectra ------------------------------------------------------------------------------------


def frames(x: Any, size: int, step: int) -> Any:
    """Overlapping frames: [..., samples] -> [..., frames, size]."""
    count = (x.shape[-1] - size) // step + 1
    if size % step:
        places = np.arange(count)[:, None] * step + np.arange(size)[None, :]
        return jnp.take(x, places, axis=-1, mode="clip")
    # Shifted views of blocks of `step` samples: no gather.
    n_blocks = count - 1 + size // step
    used = lax.slice_in_dim(x, 0, n_blocks * step, axis=x.ndim - 1)
    blocks = used.reshape(*x.shape[:-1], n_blocks, step)
    shifted = [lax.slice_in_dim(blocks, i, i + count, axis=x.ndim - 1) for i in range(size // step)]
    return jnp.concatenate(shifted, axis=-1)


def _pair(spectrum: Any, dtype: Any) -> Any:
    return jnp.stack([spectrum.real, spectrum.imag], -1).astype(dtype)


def _stft(op: _Call, signal: Any, step: Any, window: Any = None, length: Any = None) -> Any:
    x, hop = op.array(signal), op.ints(step, "its hop")[0]
    if length is not None:
        size = op.ints(length, "its frame length")[0]
    elif window is not None:
        size = window.shape[0]
    else:
        raise op.error("it has neither a window nor a frame length")
    complex_input = x.ndim == 3 and x.shape[-1] == 2
    x = lax.complex(x[..., 0], x[..., 1]) if complex_input else x.reshape(x.shape[:2])
    cut = frames(x, size, hop)
    if window is not None:
        if window.shape[0] != size:
            raise op.error(f"its window has {window.shape[0]} samples, its frames have {size}")
        cut = cut * op.array(window).astype(cut.dtype).reshape(1, 1, -1)
    if op.get("onesided", 1) and not complex_input:
        return _pair(jnp.fft.rfft(cut), signal.dtype)
    return _pair(jnp.fft.fft(cut), signal.dtype)


def _dft(op: _Call, x: Any, length: Any = None, axis: Any = None) -> Any:
    if op.opset < 20:
        place = op.get("axis", 1)
    else:
        place = -2 if axis is None else op.ints(axis, "its axis")[0]
    x = op.array(x)
    dtype, place = x.dtype, op.axis(place, x.ndim)
    size = x.shape[place] if length is None else op.ints(length, "its length")[0]
    inverse, half = op.get("inverse", 0), op.get("onesided", 0)
    if inverse and half:
        raise op.unsupported("an inverse of half a spectrum")
    if x.shape[-1] == 1 and not inverse:
        function = jnp.fft.rfft if half else jnp.fft.fft
        return _pair(function(x[..., 0], size, place), dtype)
    whole = lax.complex(x[..., 0], x[..., 1]) if x.shape[-1] == 2 else x[..., 0]
    spectrum = (jnp.fft.ifft if inverse else jnp.fft.fft)(whole, size, place)
    if half:
        spectrum = _cut(spectrum, place, 0, size // 2 + 1)
    return _pair(spectrum, dtype)


def _window(*terms: float) -> Callable[..., Any]:
    def window(op: _Call, size: Any) -> Any:
        n = op.ints(size, "its size")[0]
        phase = 2 * np.pi * np.arange(n) / (n if op.get("periodic", 1) else max(1, n - 1))
        parts = [(-1) ** k * term * np.cos(k * phase) for k, term in enumerate(terms)]
        return np.sum(parts, axis=0).astype(_DTYPES[op.get("output_datatype", 1)])

    return window


def _mel_matrix(op: _Call, *values: Any) -> Any:
    bands, length, rate, low, high = (op.static(v, "its shape").item() for v in values)
    edges = [2595 * math.log10(1 + f / 700) for f in (low, high)]
    step = (edges[1] - edges[0]) / (bands + 2)
    hertz = 700 * (10 ** ((np.arange(bands + 2) * step + edges[0]) / 2595) - 1)
    bins = ((length + 1) * hertz // rate).astype(np.int64)
    matrix = np.zeros((length // 2 + 1, bands))
    for band, (first, centre, last) in enumerate(zip(bins, bins[1:], bins[2:], strict=False)):
        if first == centre:
            matrix[centre, band] = 1
        for k in range(first, centre + 1):
            if centre > first:
                matrix[k, band] = (k - first) / (centre - first)
        for k in range(centre, last):
            matrix[k, band] = (last - k) / (last - centre)
    return matrix.astype(_DTYPES[op.get("output_datatype", 1)])


# --- Recurrent layers ---------------------------------------------------------------------------


def _recurrent(op: _Call, x: Any, w: Any, r: Any, *more: Any) -> tuple[Any, ...]:
    """LSTM, GRU and RNN with their default activations."""
    bias, lengths, first, cell, peepholes, *_ = (*more, None, None, None, None, None)
    defaults = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
    kinds = tuple(kind.lower() for kind in op.get("activations", ()))
    x, w, r = op.array(x), op.array(w), op.array(r)
    directions, hidden = w.shape[0], op.get("hidden_size")
    relu = kinds == ("relu",) * directions and op.node.op == "RNN"
    if kinds not in ((), defaults[op.node.op] * directions) and not relu:
        raise op.unsupported(f"activations {kinds}")
    if peepholes is not None or op.get("clip") or op.get("input_forget", 0):
        raise op.unsupported("a peephole, clip or coupled gate")
    by_batch = op.get("layout", 0)
    x = jnp.swapaxes(x, 0, 1) if by_batch else x
    steps, batch, _ = x.shape
    if lengths is not None and set(op.ints(lengths, "its lengths")) != {steps}:
        raise op.unsupported("sequences of unequal lengths")
    zeros = jnp.zeros((directions, batch, hidden), x.dtype)
    states = [zeros if value is None else op.array(value) for value in (first, cell)]
    if by_batch:
        given = (first, cell)
        states = [
            s if g is None else jnp.swapaxes(s, 0, 1) for s, g in zip(states, given, strict=True)
        ]
    gates = w.shape[1] // hidden
    both = jnp.zeros((directions, 2 * gates * hidden), x.dtype) if bias is None else op.array(bias)
    activate = jax.nn.relu if relu else jnp.tanh
    linear_first = op.get("linear_before_reset", 0)

    def step(d: int, carry: Any, driven: Any) -> Any:
        h, c = carry
        r_bias = both[d, gates * hidden :]
        if op.node.op == "GRU":
            z_r = jnp.matmul(h, r[d, : 2 * hidden].T, precision=HIGHEST)
            z_r = driven[:, : 2 * hidden] + z_r + r_bias[None, : 2 * hidden]
            z, reset = jnp.split(jax.nn.sigmoid(z_r), 2, axis=-1)
            r_h, b_h = r[d, 2 * hidden :].T, r_bias[None, 2 * hidden :]
            if linear_first:
                inner = reset * (jnp.matmul(h, r_h, precision=HIGHEST) + b_h)
            else:
                inner = jnp.matmul(reset * h, r_h, precision=HIGHEST) + b_h
            h = (1 - z) * jnp.tanh(driven[:, 2 * hidden :] + inner) + z * h
            return (h, c), h
        total = driven + jnp.matmul(h, r[d].T, precision=HIGHEST) + r_bias[None]
        if op.node.op == "RNN":
            h = activate(total)
            return (h, c), h
        i, o, f, g = jnp.split(total, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    outputs, lasts, cells = [], [], []
    for d in range(directions):
        backwards = op.get("direction", "forward") == "reverse" or d == 1
        driven = (
            jnp.matmul(x, w[d].T[None], precision=HIGHEST) + both[d, None, None, : gates * hidden]
        )
        (h, c), y = lax.scan(
            functools.partial(step, d),
            (states[0][d], states[1][d]),
            driven,
            reverse=backwards,
        )
        outputs.append(y)
        lasts.append(h)
        cells.append(c)
    y = jnp.stack(outputs, 1)  # steps, directions, batch, hidden
    last, end = jnp.stack(lasts), jnp.stack(cells)
    if by_batch:
        y = y.transpose(2, 0, 1, 3)
        last, end = jnp.swapaxes(last, 0, 1), jnp.swapaxes(end, 0, 1)
    return (y, last, end) if op.node.op == "LSTM" else (y, last)


# --- What `simplify` puts in --------------------------------------------------------------------


def _median(op: _Call, x: Any) -> Any:
    """Medians of `count` windows of `size` along `axis`; `keep` is an axis of size 1 to add."""
    x, size, axis = op.array(x), op.get("size"), op.get("axis")
    start, count, half = op.get("start"), op.get("count"), size // 2
    y = median_filter(_cut(x, axis, start, start + count + size - 1), size, axis)
    y = _cut(y, axis, half, half + count)
    return jnp.expand_dims(y, op.get("keep")) if op.get("keep") >= 0 else y


def _real_fft(op: _Call, x: Any, window: Any) -> Any:
    """A convolution or product with windowed cosines and sines, by an FFT."""
    x, form, size = op.array(x), op.get("form"), window.shape[0]
    if form == "frames":
        cut = frames(x.reshape(x.shape[0], x.shape[-1]), size, op.get("hop"))
    else:
        cut = x if form == "last" else jnp.swapaxes(x, -1, -2)
    window = op.array(window)
    spectrum = jnp.fft.rfft(cut * window.reshape((1,) * (cut.ndim - 1) + (-1,)))
    rows, layout = op.get("rows"), op.get("layout")
    real, imag = spectrum.real, -op.get("sign") * spectrum.imag
    if layout in ("real", "imag"):
        y = (real if layout == "real" else imag)[..., :rows]
    else:
        real, imag = real[..., : rows // 2], imag[..., : rows // 2]
        if layout == "interleaved":
            y = jnp.stack([real, imag], -1).reshape(*real.shape[:-1], rows)
        else:
            y = jnp.concatenate([real, imag] if layout == "real imag" else [imag, real], -1)
    y = y if form == "last" else jnp.swapaxes(y, -1, -2)
    y = y.astype(x.dtype)
    return y.reshape(*y.shape[:2], *x.shape[2:-1], y.shape[-1]) if form == "frames" else y


# --- The table ----------------------------------------------------------------------------------

# Written against NumPy's and JAX's common interface: static values stay in NumPy.
_ANYWHERE: dict[str, Callable[..., Any]] = {
    **{
        op: _unary(name)
        for op, name in {
            "Abs": "abs",
            "Acos": "arccos",
            "Acosh": "arccosh",
            "Asin": "arcsin",
            "Asinh": "arcsinh",
            "Atan": "arctan",
            "Atanh": "arctanh",
            "BitwiseNot": "invert",
            "Ceil": "ceil",
            "Cos": "cos",
            "Cosh": "cosh",
            "Exp": "exp",
            "Floor": "floor",
            "IsNaN": "isnan",
            "Log": "log",
            "Neg": "negative",
            "Not": "logical_not",
            "Reciprocal": "reciprocal",
            "Round": "round",
            "Sign": "sign",
            "Sin": "sin",
            "Sinh": "sinh",
            "Sqrt": "sqrt",
            "Tan": "tan",
            "Tanh": "tanh",
        }.items()
    },
    **{
        op: _binary(name)
        for op, name in {
            "Add": "add",
            "And": "logical_and",
            "BitwiseAnd": "bitwise_and",
            "BitwiseOr": "bitwise_or",
            "BitwiseXor": "bitwise_xor",
            "Equal": "equal",
            "Greater": "greater",
            "GreaterOrEqual": "greater_equal",
            "Less": "less",
            "LessOrEqual": "less_equal",
            "Mul": "multiply",
            "Or": "logical_or",
            "Sub": "subtract",
            "Xor": "logical_xor",
        }.items()
    },
    **{op: _reduce(function) for op, function in _REDUCTIONS.items()},
    "ArgMax": _arg("argmax"),
    "ArgMin": _arg("argmin"),
    "BitShift": _bit_shift,
    "BlackmanWindow": _window(0.42, 0.5, 0.08),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "Concat": _concat,
    "ConcatFromSequence": _concat_from_sequence,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "HammingWindow": _window(25 / 46, 21 / 46),
    "HannWindow": _window(0.5, 0.5),
    "Identity": _identity,
    "IsInf": _is_inf,
    "Max": _variadic("maximum"),
    "Mean": _mean_of,
    "MelWeightMatrix": _mel_matrix,
    "Min": _variadic("minimum"),
    "Mod": _mod,
    "NonZero": _nonzero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Pow": _pow,
    "Range": _range,
    "Relu": _relu,
    "Reshape": _reshape,
    "SequenceAt": _sequence_at,
    "SequenceConstruct": _sequence_of,
    "SequenceLength": _sequence_length,
    "Shape": _shape_of,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Sum": _variadic("add"),
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}

# JAX only.
_DEVICE: dict[str, Callable[..., Any]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Celu": _celu,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DFT": _dft,
    "Einsum": _einsum,
    "Elu": _elu,
    "Erf": _device(jax.scipy.special.erf),
    "GRU": _recurrent,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _softmax(jax.nn.log_softmax),
    "LpNormalization": _lp_norm,
    "LpPool": _lp_pool,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "MeanVarianceNormalization": _mean_variance_norm,
    "Mish": _mish,
    "PRelu": _prelu,
    "RMSNormalization": _rms_norm,
    "RNN": _recurrent,
    "Resize": _resize,
    "STFT": _stft,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _device(jax.nn.sigmoid),
    "Softmax": _softmax(jax.nn.softmax),
    "Softplus": _device(jax.nn.softplus),
    "Softsign": _softsign,
    "ThresholdedRelu": _thresholded_relu,
    "TopK": _top_k,
    "Upsample": _resize,
    DFT: _real_fft,
    MEDIAN: _median,
}
