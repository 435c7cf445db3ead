"""ONNX operators that move, cut, pick and make elements: shapes, indices, sequences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from artifactnet_jax.convert.node_call import DTYPES, Call, Operator, cut


def _constant(op: Call) -> Any:
    return op.get("value")


def _shape_of(op: Call, x: Any) -> Any:
    return np.asarray(x.shape[slice(op.get("start", 0), op.get("end"))], np.int64)


def _size(op: Call, x: Any) -> Any:
    return np.asarray(x.size, np.int64)


def _reshape(op: Call, x: Any, shape: Any) -> Any:
    sizes = op.ints(shape, "its shape")
    if not op.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return op.array(x).reshape(sizes)


def _flatten(op: Call, x: Any) -> Any:
    axis = op.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return op.array(x).reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(op: Call, x: Any, axes: Any = None) -> Any:
    given = op.get("axes") if axes is None else axes
    if given is None:
        return op.array(x).reshape([n for n in x.shape if n != 1])
    return op.xp.squeeze(op.array(x), op.axes(given, x.ndim))


def _unsqueeze(op: Call, x: Any, axes: Any = None) -> Any:
    given = op.get("axes") if axes is None else axes
    count = len(given) if isinstance(given, tuple) else given.size
    return op.xp.expand_dims(op.array(x), op.axes(given, x.ndim + count))


def _transpose(op: Call, x: Any) -> Any:
    return op.xp.transpose(op.array(x), op.get("perm"))


def _concat(op: Call, *values: Any) -> Any:
    arrays = [op.array(value) for value in values]
    return op.xp.concatenate(arrays, op.axis(op.get("axis", 1), arrays[0].ndim))


def _split(op: Call, x: Any, sizes: Any = None) -> tuple[Any, ...]:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    total, count = x.shape[axis], len(op.node.outputs)
    parts = op.get("split") if sizes is None else op.ints(sizes, "its split")
    if parts is None:
        part = -(-total // count)
        parts = [max(0, min(part, total - i * part)) for i in range(count)]
    if sum(parts) != total:
        raise op.error(f"parts of {list(parts)} do not make up {total}")
    stops = itertools.accumulate(parts)
    return tuple(cut(x, axis, n - part, n) for part, n in zip(parts, stops, strict=True))


def _slice(
    op: Call, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
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
        x = cut(x, axis, start, stop, step)
    return x


def _positions(op: Call, indices: Any, size: int) -> Any:
    """Indices, negative ones counted from the end, as non-negative ones."""
    if isinstance(indices, np.ndarray):
        if indices.size and not (-size <= indices.min() and indices.max() < size):
            raise op.error(f"an index is out of range for an axis of {size}")
        return np.where(indices < 0, indices + size, indices).astype(np.int64)
    return jnp.where(indices < 0, indices + size, indices).astype(np.int64)


def _gather(op: Call, x: Any, indices: Any) -> Any:
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
            part = cut(x, axis, int(flat[0]), int(flat[-1]) + 1, step)
            return part.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    return jnp.take(x, op.array(places), axis, mode="clip")


def _gather_elements(op: Call, x: Any, indices: Any) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    places = op.array(_positions(op, indices, x.shape[axis]))
    # Along the other axes an index array may be shorter than the data.
    for other in range(x.ndim):
        if other != axis:
            x = cut(x, other, 0, places.shape[other])
    return op.xp.take_along_axis(x, places, axis)


def _gather_nd(op: Call, x: Any, indices: Any) -> Any:
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


def _scatter_nd(op: Call, x: Any, indices: Any, updates: Any) -> Any:
    indices = op.array(indices)
    parts = tuple(_positions(op, indices[..., i], x.shape[i]) for i in range(indices.shape[-1]))
    return _update(op, op.array(x).at[parts], op.array(updates))


def _scatter_elements(op: Call, x: Any, indices: Any, updates: Any) -> Any:
    axis = op.axis(op.get("axis", 0), x.ndim)
    places = op.array(_positions(op, indices, x.shape[axis]))
    index = list(jnp.indices(places.shape))
    index[axis] = places
    return _update(op, op.array(x).at[tuple(index)], op.array(updates))


def _update(op: Call, target: Any, updates: Any) -> Any:
    names = {"none": "set", "add": "add", "mul": "multiply", "max": "max", "min": "min"}
    return getattr(target, names[op.get("reduction", "none")])(updates)


def _expand(op: Call, x: Any, shape: Any) -> Any:
    sizes = op.ints(shape, "its shape")
    x = op.array(x)
    rank = max(x.ndim, len(sizes))
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    sizes = [1] * (rank - len(sizes)) + sizes
    return op.xp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(sizes)))


def _tile(op: Call, x: Any, repeats: Any) -> Any:
    return op.xp.tile(op.array(x), tuple(op.ints(repeats, "its repeats")))


def _pad(op: Call, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    x, mode = op.array(x), op.get("mode", "constant")
    amounts = list(op.get("pads")) if pads is None else op.ints(pads, "its width")
    places = tuple(range(x.ndim)) if axes is None else op.axes(axes, x.ndim)
    count = len(places)
    widths = [(0, 0)] * x.ndim
    for axis, before, after in zip(places, amounts[:count], amounts[count:], strict=True):
        widths[axis] = (before, after)
    for axis, (before, after) in enumerate(widths):  # a negative width crops
        start = max(0, -before)
        x = cut(x, axis, start, max(start, x.shape[axis] + min(0, after)))
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


def _constant_of_shape(op: Call, shape: Any) -> Any:
    value = op.get("value", np.zeros(1, np.float32))
    return np.full(op.ints(shape, "the shape"), value.item(), value.dtype)


def _range(op: Call, start: Any, limit: Any, delta: Any) -> Any:
    bounds = [op.static(value, "its bounds").item() for value in (start, limit, delta)]
    count = max(0, math.ceil((bounds[1] - bounds[0]) / bounds[2]))
    return start.reshape(()) + np.arange(count).astype(start.dtype) * delta.reshape(())


def _one_hot(op: Call, indices: Any, depth: Any, values: Any) -> Any:
    size = op.ints(depth, "the depth")[0]
    values = op.array(values)
    axis = op.axis(op.get("axis", -1), indices.ndim + 1)
    places = op.xp.expand_dims(op.array(indices).astype(np.int64), axis)
    places = op.xp.where(places < 0, places + size, places)
    shape = [1] * places.ndim
    shape[axis] = size
    hot = places == op.xp.arange(size, dtype=np.int64).reshape(shape)
    return op.xp.where(hot, values[1], values[0])


def _trilu(op: Call, x: Any, k: Any = None) -> Any:
    diagonal = 0 if k is None else op.ints(k, "the diagonal")[0]
    rows = np.arange(x.shape[-2])[:, None] + diagonal
    columns = np.arange(x.shape[-1])[None, :]
    keep = columns >= rows if op.get("upper", 1) else columns <= rows
    x, kept = op.aligned(x, keep)
    return op.xp.where(kept, x, op.xp.zeros((), x.dtype))


def _depth_to_space(op: Call, x: Any) -> Any:
    (n, c, h, w), size = x.shape, op.get("blocksize")
    if op.get("mode", "DCR") == "DCR":
        x = op.array(x).reshape(n, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = op.array(x).reshape(n, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // size**2, h * size, w * size)


def _space_to_depth(op: Call, x: Any) -> Any:
    (n, c, h, w), size = x.shape, op.get("blocksize")
    if op.get("mode", "DCR") != "DCR":
        raise op.unsupported(f"mode {op.get('mode')!r}", "export the model with opset 26 or lower")
    x = op.array(x).reshape(n, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * size**2, h // size, w // size)


def _nonzero(op: Call, x: Any) -> Any:
    return np.stack(np.nonzero(op.static(x, "its result's shape"))).astype(np.int64)


def _eye_like(op: Call, x: Any) -> Any:
    dtype = DTYPES[op.get("dtype")] if op.get("dtype") else x.dtype
    rows, columns = x.shape
    return np.eye(rows, columns, op.get("k", 0)).astype(dtype)


def _identity(op: Call, x: Any, *_: Any) -> Any:
    return x


def _dropout(op: Call, x: Any, ratio: Any = None, training: Any = None) -> Any:
    if training is not None and op.static(training, "its mode").item():
        raise op.unsupported("dropout in training mode")
    return x, np.ones(x.shape, np.bool_) if len(op.used) > 1 and op.used[1] else None


def _sequence_at(op: Call, sequence: Any, position: Any) -> Any:
    return sequence[op.ints(position, "the position")[0]]


def _sequence_of(op: Call, *values: Any) -> Any:
    return ([op.array(value) for value in values],)


def _sequence_length(op: Call, sequence: Any) -> Any:
    return np.asarray(len(sequence), np.int64)


def _split_to_sequence(op: Call, x: Any, sizes: Any = None) -> Any:
    x, axis = op.array(x), op.axis(op.get("axis", 0), x.ndim)
    total = x.shape[axis]
    if sizes is not None and sizes.ndim == 0:
        part = op.ints(sizes, "the split")[0]
        parts = [min(part, total - start) for start in range(0, total, part)]
    else:
        parts = [1] * total if sizes is None else op.ints(sizes, "the split")
    stops = itertools.accumulate(parts)
    pieces = [cut(x, axis, n - part, n) for part, n in zip(parts, stops, strict=True)]
    if sizes is None and not op.get("keepdims", 1):
        pieces = [op.xp.squeeze(piece, axis) for piece in pieces]
    return (pieces,)


def _concat_from_sequence(op: Call, sequence: Any) -> Any:
    arrays = [op.array(value) for value in sequence]
    join = op.xp.stack if op.get("new_axis", 0) else op.xp.concatenate
    return join(arrays, op.get("axis"))


# Written against NumPy's and JAX's common interface: static values stay in NumPy.
ANYWHERE: dict[str, Operator] = {
    "Concat": _concat,
    "ConcatFromSequence": _concat_from_sequence,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "NonZero": _nonzero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
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
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

# JAX only.
DEVICE: dict[str, Operator] = {"ScatterElements": _scatter_elements, "ScatterND": _scatter_nd}
