"""ONNX nodes as layers: pooling, resizing, padding, cutting, and what only moves elements."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from artifactnet_jax.convert.builder import SPATIAL, Builder, Map, Reader
from artifactnet_jax.convert.graph import Node
from artifactnet_jax.convert.read_products import geometry
from artifactnet_jax.convert.trace import decimal

_POOLED = {"GlobalAveragePool": "mean", "GlobalMaxPool": "max"}
_REDUCED = {"ReduceMean": "mean", "ReduceMax": "max", "ReduceSum": "sum"}


def _pool(b: Builder, node: Node, value: Map, kind: str, **more: Any) -> None:
    value = b.upright(value)
    window = tuple(node.attributes["kernel_shape"])
    places = geometry(b, node, value, window)
    if places.pop("dilations") != (1, 1) or len(window) != 2:
        raise b.fail("a dilated pooling, or one that is not two-dimensional")
    got = b.trace.shapes[node.outputs[0]][2:]
    padding = [list(sides) for sides in places["padding"]]
    if not any(map(any, padding)) and kind == "avg_pool":
        more["count_include_pad"] = False  # there is none, and what lies past the end is none
    for axis in (0, 1):  # ceil_mode reads past the end
        s, k = places["strides"][axis], window[axis]
        reach = (got[axis] - 1) * s + k - value.shape[1 + axis] - padding[axis][0]
        if node.attributes.get("ceil_mode", 0) and reach > padding[axis][1]:
            if kind == "avg_pool" and more["count_include_pad"]:
                raise b.fail("average pooling past its padding")
            padding[axis][1] = reach
    attributes = {"kernel": window, **places, "padding": padding, **more}
    name = b.emit(kind, [value.name], attributes)
    b.out(name, SPATIAL, (value.shape[0], *got))


def _max_pool(b: Builder, node: Node, value: Map) -> None:
    if node.outputs[1:2] not in ((), ("",)):
        raise b.fail("its indices are used")
    _pool(b, node, value, "max_pool")


def _average_pool(b: Builder, node: Node, value: Map) -> None:
    counted = bool(node.attributes.get("count_include_pad", 0))
    _pool(b, node, value, "avg_pool", count_include_pad=counted)


def _global_pool(b: Builder, node: Node, value: Map) -> None:
    if value.spread or value.roles[:2] != ("n", "c"):
        raise b.fail(f"its input has axes {value.roles}")
    name = b.emit(_POOLED[node.op], [value.name], {"axes": "hw"})
    b.out(name, value.roles, (value.shape[0], 1, 1))


def _reduced(b: Builder, kind: str, name: str, letters: str) -> str:
    """A reduction; one over several axes may have been written axis by axis."""
    before = next((x for x in b.layers if x.name == name), None)
    if before is not None and before.op == kind:
        letters = "".join(sorted({*letters, *before.attrs["axes"]}))
        name = before.inputs[0]
    return b.emit(kind, [name], {"axes": letters})


def _reduce(b: Builder, node: Node, value: Map) -> None:
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1]:
        axes = b.static(node.inputs[1]).reshape(-1).tolist()
    if axes is None or value.spread:
        raise b.fail("it reduces over all axes, segments included")
    places = {int(axis) % len(value.roles) for axis in axes}
    reduced = [value.roles[axis] for axis in sorted(places)]
    if "n" in reduced and b.trace.segments > 1:
        raise b.fail("it reduces over segments")
    letters = "".join(sorted(role for role in reduced if role not in "n1"))
    if len(value.shape) == 1:
        raise b.fail("it reduces a vector")
    name = _reduced(b, _REDUCED[node.op], value.name, letters) if letters else value.name
    shape = tuple(
        1 if role in letters else size for role, size in zip("chw", value.shape, strict=True)
    )
    keep = bool(node.attributes.get("keepdims", 1))
    roles = tuple(r for k, r in enumerate(value.roles) if keep or k not in places)
    if "n" in reduced and not keep:
        raise b.fail("it drops the axis of segments")
    b.out(name, roles, shape)


def _resize(b: Builder, node: Node, value: Map) -> None:
    value = b.upright(value)
    got = b.trace.shapes[node.outputs[0]][2:]
    mode = node.attributes.get("mode", "nearest")
    coordinates = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    supported = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    if mode not in ("nearest", "linear") or coordinates not in supported:
        raise b.fail(f"resizing by {mode} with {coordinates} coordinates")
    if node.attributes.get("antialias", 0) or "axes" in node.attributes:
        raise b.fail("resizing with antialias, or along chosen axes")
    if node.op == "Upsample":
        coordinates = "asymmetric"
    scales = [g / s for g, s in zip(got, value.shape[1:], strict=True)]
    given = node.inputs[1 if node.op == "Upsample" else 2 : 3]
    if given and given[0] and b.static(given[0]).size == 4:
        scales = [float(s) for s in b.static(given[0])[2:]]
    attributes = {
        "size": got,
        "scales": tuple(scales),
        "mode": mode,
        "coordinates": coordinates,
        "rounding": node.attributes.get("nearest_mode", "round_prefer_floor")
        if node.op == "Resize"
        else "floor",
    }
    name = b.emit("resize", [value.name], attributes)
    b.out(name, SPATIAL, (value.shape[0], *got))


def _pad(b: Builder, node: Node, value: Map) -> None:
    pads = node.attributes.get("pads")
    if pads is None:
        pads = b.static(node.inputs[1]).reshape(-1)
    pads = [int(p) for p in pads]
    number = 0.0 if len(node.inputs) < 3 or not node.inputs[2] else b.static(node.inputs[2])
    number = node.attributes.get("value", float(np.reshape(number, ())))
    places = list(range(len(value.roles)))
    if len(node.inputs) > 3 and node.inputs[3]:
        places = [int(a) % len(value.roles) for a in b.static(node.inputs[3]).reshape(-1)]
    mode = node.attributes.get("mode", "constant")
    half = len(pads) // 2
    sides = {value.roles[a]: (pads[k], pads[k + half]) for k, a in enumerate(places)}
    moved = {role for role, pair in sides.items() if pair != (0, 0)}
    if value.spread or not moved <= {"h", "w"} or mode not in ("constant", "reflect", "edge"):
        raise b.fail(f"padding of axes {sorted(moved)} by {mode}")
    padding = tuple(sides.get(role, (0, 0)) for role in "hw")
    c, h, w = value.shape
    shape = (c, h + sum(padding[0]), w + sum(padding[1]))
    name = value.name
    if min(min(padding[0]), min(padding[1])) < 0:  # PyTorch crops by negative padding
        for axis, (begin, end), size in zip("hw", padding, (h, w), strict=True):
            if begin < 0 or end < 0:
                attributes = {"axis": axis, "start": max(-begin, 0)}
                attributes |= {"stop": size - max(-end, 0), "step": 1}
                name = b.emit("slice", [name], attributes)
        padding = tuple((max(a, 0), max(b, 0)) for a, b in padding)
    if padding != ((0, 0), (0, 0)):
        attributes = {"padding": padding, "mode": mode, "value": number}
        name = b.emit("pad", [name], attributes)
    b.out(name, value.roles, shape)


def _cut(b: Builder, value: Map, role: str, start: int, stop: int, step: int = 1) -> Map:
    """Part of one axis of a map."""
    where = "chw".index(role) if role in "chw" else -1
    if value.spread:
        raise b.fail("it acts on a reshaped feature map")
    if where < 0 or where >= len(value.shape) or step < 1:
        raise b.fail(f"a cut along axis {role!r} with step {step}")
    size = value.shape[where]
    if (start, stop, step) == (0, size, 1):
        return value
    attributes = {"axis": role, "start": start, "stop": stop, "step": step}
    shape = list(value.shape)
    shape[where] = len(range(start, stop, step))
    return Map(b.emit("slice", [value.name], attributes), value.roles, tuple(shape))


def _slice(b: Builder, node: Node, value: Map) -> None:
    if len(node.inputs) > 1:
        given = [b.static(name).reshape(-1).tolist() if name else None for name in node.inputs[1:]]
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
        size = b.size(value, role)
        begin, end, stride = slice(int(start), int(stop), int(step)).indices(size)
        if role in "n1":
            if (begin, end, stride) != (0, size, 1):
                raise b.fail("a choice of segments")
            continue
        value = _cut(b, value, role, begin, end, stride)
    b.out(value.name, value.roles, value.shape)


def _split(b: Builder, node: Node, value: Map) -> None:
    axis = int(node.attributes.get("axis", 0)) % len(value.roles)
    start = 0
    for index, tensor in enumerate(node.outputs):
        if not tensor or tensor not in b.trace.shapes:
            raise b.fail("an output that is not computed")
        stop = start + b.trace.shapes[tensor][axis]
        part = _cut(b, value, value.roles[axis], start, stop)
        b.out(part.name, part.roles, part.shape, index)
        start = stop


def _gather(b: Builder, node: Node, value: Map) -> None:
    index = b.static(node.inputs[1])
    axis = int(node.attributes.get("axis", 0)) % len(value.roles)
    role = value.roles[axis]
    if value.spread or role in "n1" or index.ndim > 1:
        raise b.fail(f"a choice along axis {role!r}")
    numbers = np.atleast_1d(index) % b.size(value, role)
    step = int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
    if step < 1 or np.any(np.diff(numbers) != step):
        raise b.fail("a choice that is no range")
    part = _cut(b, value, role, int(numbers[0]), int(numbers[-1]) + 1, step)
    roles = part.roles if index.ndim else tuple(r for k, r in enumerate(part.roles) if k != axis)
    b.out(part.name, roles, part.shape)


def _concat(b: Builder, node: Node, _: Map) -> None:
    if any(b.is_static(name) for name in node.inputs):
        raise b.fail("a constant beside feature maps")
    values = [b.maps[name] for name in node.inputs]
    roles = values[0].roles
    role = roles[int(node.attributes["axis"]) % len(roles)]
    if any(v.spread or v.roles != roles for v in values) or role in "n":
        raise b.fail(f"axes {[v.roles for v in values]} along {role!r}")
    if role == "1":  # [n, 1, h, w] whose features axis was dropped before
        free = [r for r in "chw"[: len(values[0].shape)] if r not in roles]
        if not free:
            raise b.fail("its axis is not one of the feature map")
        role = free[0]
        axis = int(node.attributes["axis"]) % len(roles)
        roles = (*roles[:axis], role, *roles[axis + 1 :])
    where = "chw".index(role)
    shape = list(values[0].shape)
    shape[where] = sum(v.shape[where] for v in values)
    name = b.emit("concat", [v.name for v in values], {"axis": role})
    b.out(name, roles, tuple(shape))


def _softmax(b: Builder, node: Node, value: Map) -> None:
    axis = node.attributes.get("axis", -1 if b.trace.graph.opset >= 13 else 1)
    axis = int(axis) % len(value.roles)
    if b.trace.graph.opset < 13 and axis != len(value.roles) - 1:
        raise b.fail("a softmax over several axes")
    if value.spread or value.roles[axis] in "n1":
        raise b.fail(f"a softmax along axis {value.roles[axis]!r}")
    b.same("softmax", value, {"axis": value.roles[axis]})


def _clip(b: Builder, node: Node, value: Map) -> None:
    limits: list[float | None] = []
    for index, key in ((1, "min"), (2, "max")):
        if len(node.inputs) > index and node.inputs[index]:
            limits.append(decimal(b.static(node.inputs[index])))
        else:
            limits.append(node.attributes.get(key))
    # The largest float of the type stands for no limit.
    low, high = (None if x is None or abs(x) > 3e38 else float(x) for x in limits)
    b.same("clip", value, {"low": low, "high": high})


def _transpose(b: Builder, node: Node, value: Map) -> None:
    rank = len(b.trace.shapes[node.inputs[0]])
    perm = tuple(node.attributes.get("perm", range(rank)[::-1]))
    if value.spread:
        if value.spread[0] != "shuffle" or perm != value.spread[2]:
            raise b.fail("it moves axes of a reshaped feature map")
        b.maps[node.outputs[0]] = dataclasses.replace(value, spread=("shuffled", *value.spread[1:]))
        return
    b.maps[node.outputs[0]] = dataclasses.replace(
        value, roles=tuple(value.roles[axis] for axis in perm)
    )


def _expand(b: Builder, node: Node, value: Map) -> None:
    # What follows broadcasts all the same.
    rank = len(b.trace.shapes[node.outputs[0]])
    roles = ("1",) * (rank - len(value.roles)) + value.roles
    b.maps[node.outputs[0]] = dataclasses.replace(value, roles=roles)


def _reshape(b: Builder, node: Node, value: Map) -> None:
    """Reshape, Flatten, Squeeze and Unsqueeze: by the shapes before and after."""
    old, new = b.trace.shapes[node.inputs[0]], b.trace.shapes[node.outputs[0]]
    n = b.trace.segments
    if value.spread:
        kind = value.spread[0]
        c, h, w = value.shape
        if kind == "groups" and new == (n, c, h, w):
            b.out(value.name, SPATIAL, value.shape)
        elif kind == "shuffled":
            _, (rows, cols), _, order = value.spread
            shape = (c // rows // cols, h * rows, w * cols)
            if new != (n, *shape):
                raise b.fail(f"{new} after a pixel shuffle")
            attributes = {"rows": rows, "cols": cols, "order": order}
            b.out(b.emit("depth_to_space", [value.name], attributes), SPATIAL, shape)
        else:
            raise b.fail(f"{old} to {new}")
        return
    if (roles := _regrouped(b, value, old, new)) is not None:
        b.out(value.name, roles, value.shape)
        return
    if len(value.shape) == 3 and value.roles in (SPATIAL, ("n", "c", "w", "h")):
        value = b.upright(value)
        c, h, w = value.shape
        if new == (n, c * h * w) or (n == 1 and new == (c * h * w,)):
            roles = ("n", "c") if len(new) == 2 else ("c",)
            b.out(b.emit("flatten", [value.name]), roles, (c * h * w,))
            return
        if len(new) >= 3 and new[0] == n and c % new[1] == 0 and math.prod(new) == math.prod(old):
            if len(new) == 3 or (new[2:] == (c // new[1] * h * w,)):
                spread: tuple[Any, ...] = ("groups", new[1])
                b.maps[node.outputs[0]] = dataclasses.replace(value, spread=spread)
                return
            if len(new) == 6 and new[4:] == (h, w):
                # CRD: [n, C, r, s, h, w], as PyTorch's pixel shuffle; DCR: [n, r, s, C, h, w].
                for order, sizes, perm in (
                    ("CRD", new[2:4], (0, 1, 4, 2, 5, 3)),
                    ("DCR", new[1:3], (0, 3, 4, 1, 5, 2)),
                ):
                    following = [
                        other
                        for other in b.trace.graph.nodes
                        if node.outputs[0] in other.inputs and other.op == "Transpose"
                    ]
                    if following and tuple(following[0].attributes["perm"]) == perm:
                        spread = ("shuffle", sizes, perm, order)
                        b.maps[node.outputs[0]] = dataclasses.replace(value, spread=spread)
                        return
    raise b.fail(f"{old} to {new}")


def _regrouped(
    b: Builder, value: Map, old: tuple[int, ...], new: tuple[int, ...]
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
    if len(new) == 4 and all(r in ("1", s) for r, s in zip(roles, SPATIAL, strict=True)):
        return tuple(SPATIAL) if len(value.shape) == 3 else None
    names = [role for role in small if role != "1"]
    names += [role for role in free if role not in names]
    names.sort(key=lambda role: role != "n")
    for axis, role in enumerate(roles):
        if role == "1" and names and not (names[0] == "n" and axis > 0):
            roles[axis] = names.pop(0)
    if roles[0] == "1" or ("n" not in roles and b.trace.segments > 1):
        return None
    return tuple(roles)


def _depth_to_space(b: Builder, node: Node, value: Map) -> None:
    value = b.upright(value)
    block, (c, h, w) = int(node.attributes["blocksize"]), value.shape
    order = node.attributes.get("mode", "DCR")
    name = b.emit("depth_to_space", [value.name], {"rows": block, "cols": block, "order": order})
    b.out(name, SPATIAL, (c // block**2, h * block, w * block))


def _space_to_depth(b: Builder, node: Node, value: Map) -> None:
    value = b.upright(value)
    block, (c, h, w) = int(node.attributes["blocksize"]), value.shape
    name = b.emit("space_to_depth", [value.name], {"rows": block, "cols": block, "order": "DCR"})
    b.out(name, SPATIAL, (c * block**2, h // block, w // block))


READERS: dict[str, Reader] = {
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Softmax": _softmax,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Upsample": _resize,
    **dict.fromkeys(_POOLED, _global_pool),
    **dict.fromkeys(_REDUCED, _reduce),
}
