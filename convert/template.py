"""Tuned weights in the ONNX file that they came from: its initialisers change, nothing else does.

The file is edited as protobuf wire format, field by field, so that whatever is not a changed value
keeps its very bytes: names, order, metadata, opset, and what the onnx package does not know.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from artifactnet_jax.convert.graph import read_graph
from artifactnet_jax.files import replace_file
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import Weights

# From our axes to the file's: see "initialisers" in the provenance of converted weights.
_TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda x: x,
    "reshape": lambda x: x,
    "OIHW": lambda x: x.transpose(3, 2, 0, 1),
    "IOHW": lambda x: x.transpose(2, 3, 0, 1),
    "transpose": lambda x: x.T,
    "CHW": lambda x: x.transpose(2, 0, 1),
}

# Field numbers of onnx.proto: of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto.
_GRAPH = 7
_NODE, _INITIALISER = 1, 5
_NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 2, 4, 5
_ATTRIBUTE_TENSOR = 5
_TYPE, _NAME, _EXTERNAL = 2, 8, 13
_FLOATS, _INTS, _RAW, _DOUBLES = 4, 5, 9, 10
_DTYPES = {1: "<f4", 10: "<f2", 11: "<f8"}  # of TensorProto.DataType


def fill_template(
    weights: Weights, template: str | os.PathLike[str], path: str | os.PathLike[str]
) -> None:
    """Write the ONNX file `template` with its initialisers set to the values of `weights`.

    Each initialiser keeps its type and place; a value that equals the file's in float32 keeps its
    bytes, so untouched weights give an identical file. External data is written under its own
    name beside `path`; the template's files are never overwritten. Each file is replaced whole.

    Raises:
        ConvertError: the template cannot be read (see `read_graph`).
        ValueError: weights that do not come from an ONNX file, or from another one; weights with a
            texture head; one initialiser that would need two values; a tuned tensor that the file
            does not hold as it is; an output that would overwrite the template. One line, with the
            cure.
        OSError: the output cannot be written.
    """
    where, source = os.fspath(template), Path(template)
    entries = weights.provenance.get("initialisers")
    if not entries:
        raise ValueError(
            f"{where}: weights {weights.name!r} hold no map back to an ONNX file; "
            "leave the template out, or convert its file first"
        )
    if read_graph(template).sha256 != weights.provenance.get("source_sha256"):
        raise ValueError(
            f"{where}: not the file that weights {weights.name!r} were converted from; name that "
            "file, or leave the template out"
        )
    if weights.config.texture is not None:
        raise ValueError(
            f"{where}: it has no place for the texture head of weights {weights.name!r}; "
            "leave the template out"
        )
    if os.path.realpath(path) == os.path.realpath(template):
        raise ValueError(f"{os.fspath(path)}: this is the template; write to another file")

    own = folded(weights.config, weights.tensors)[1] if weights.graph is None else {}
    tensors = {**weights.tensors, **own}  # of a preset: as the file has them, batch norms folded
    editor = _Editor(where, source, _values(where, entries, tensors))
    data = editor.model(source.read_bytes())
    if missing := sorted(set(editor.values) - editor.found):
        raise ValueError(f"{where}: no initialiser {missing[0]!r}; convert the file again")
    mapped = {entry["tensor"] for entry in entries}
    fixed = weights.provenance.get("fixed", {})
    lost = [n for n in sorted(set(own) - mapped) if array_digest(own[n]) != fixed.get(n)]
    if lost:
        raise ValueError(
            f"{where}: tensor {lost[0]!r} is computed in this file, not stored, so its tuned value "
            "would be lost; leave the template out"
        )

    folder = Path(path).parent
    for location, (origin, _) in editor.files.items():
        target = folder / location
        if os.path.realpath(target) == os.path.realpath(origin):
            raise ValueError(
                f"{os.fspath(path)}: its external data {location} would overwrite the template's; "
                "write to another folder"
            )
    for location, (_, content) in editor.files.items():
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / location, bytes(content))
    replace_file(path, data)


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of the float32 values of a tensor, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()


def _values(
    where: str, entries: Any, tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, np.ndarray]]:
    """Initialiser -> our tensor's name and its values in the file's order."""
    values: dict[str, tuple[str, np.ndarray]] = {}
    for entry in entries:
        name, tensor = entry["name"], entry["tensor"]
        value = _TRANSFORMS[entry["transform"]](np.asarray(tensors[tensor], np.float32)).ravel()
        if name in values and not np.array_equal(values[name][1], value):
            raise ValueError(
                f"{where}: initialiser {name!r} serves both {values[name][0]!r} and {tensor!r}, "
                "whose values now differ; leave the template out"
            )
        values.setdefault(name, (tensor, value))
    return values


class _Editor:
    """Sets initialisers, by name, in the bytes of a model and of its external data."""

    def __init__(self, where: str, source: Path, values: dict[str, tuple[str, np.ndarray]]):
        self.where, self.source, self.values = where, source, values
        self.found: set[str] = set()
        self.changed = False
        self.files: dict[str, tuple[Path, bytearray]] = {}  # by location: origin, new content

    def model(self, data: bytes) -> bytes:
        return _rewritten(memoryview(data), {_GRAPH: self._graph})

    def _graph(self, graph: memoryview) -> bytes:
        return _rewritten(graph, {_NODE: self._node, _INITIALISER: self._initialiser})

    def _node(self, node: memoryview) -> bytes:
        """A Constant node holds a tensor under the name of its output."""
        fields = dict(_payloads(node))
        if bytes(fields.get(_NODE_OP, b"")) != b"Constant":
            return bytes(node)
        name = bytes(fields[_NODE_OUTPUT]).decode()

        def attribute(payload: memoryview) -> bytes:
            return _rewritten(payload, {_ATTRIBUTE_TENSOR: lambda t: self._tensor(name, t)})

        return _rewritten(node, {_NODE_ATTRIBUTE: attribute})

    def _initialiser(self, tensor: memoryview) -> bytes:
        name = bytes(dict(_payloads(tensor)).get(_NAME, b"")).decode()
        return self._tensor(name, tensor)

    def _tensor(self, name: str, tensor: memoryview) -> bytes:
        entries = [dict(_payloads(p)) for number, p in _payloads(tensor) if number == _EXTERNAL]
        place = None
        if entries:  # each file is copied, whether or not a value in it changes
            place = self._place({bytes(e[1]).decode(): bytes(e[2]).decode() for e in entries})
        if name not in self.values:
            return bytes(tensor)
        self.found.add(name)
        kind, data = 0, b""
        for number, _, _, at, end in _fields(tensor):
            if number == _TYPE:
                kind, _ = _varint(tensor, at)
            elif number in (_FLOATS, _RAW, _DOUBLES):
                data += tensor[at:end]
            elif number == _INTS:  # the bits of a float16, one per integer
                bits = [v & 0xFFFF for v in _varints(tensor, at, end)]
                data += np.array(bits, "<u2").tobytes()
        if place is not None:
            content, start, stop = place
            content[start:stop] = self._new(name, kind, bytes(content[start:stop]))
            return bytes(tensor)
        return _refilled(tensor, self._new(name, kind, data))

    def _place(self, external: Mapping[str, str]) -> tuple[bytearray, int, int]:
        """The new content of a tensor's file, and where in it the tensor lies."""
        location = external["location"]
        if location not in self.files:
            folders = (self.source.parent, self.source.resolve().parent)
            origin = next(p for f in folders if (p := f / location).exists())
            self.files[location] = origin, bytearray(origin.read_bytes())
        content = self.files[location][1]
        start = int(external.get("offset", 0))
        return content, start, start + int(external.get("length", len(content) - start))

    def _new(self, name: str, kind: int, old: bytes) -> bytes:
        """New bytes of a tensor: of the same type and number as the old ones."""
        ours, value = self.values[name]
        if kind not in _DTYPES:
            raise ValueError(f"{self.where}: initialiser {name!r} is not floating-point")
        stored = np.frombuffer(old, _DTYPES[kind])
        if stored.size != value.size:
            raise ValueError(
                f"{self.where}: initialiser {name!r} has {stored.size} values, tensor {ours!r} "
                f"{value.size}; convert the file again"
            )
        same = stored.astype(np.float32) == value
        if same.all():
            return old
        self.changed = True
        with np.errstate(over="ignore"):
            new = np.where(same, stored, value.astype(stored.dtype))
        if not np.isfinite(new).all():
            raise ValueError(
                f"{self.where}: tensor {ours!r} leaves the range of float16, which initialiser "
                f"{name!r} has; leave the template out"
            )
        return new.tobytes()


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Fields of a message: number, wire type, where the field, its payload and its end lie."""
    start = 0
    while start < len(message):
        key, at = _varint(message, start)
        wire = key & 7
        if wire == 2:
            size, at = _varint(message, at)
            end = at + size
        elif wire == 0:
            end = _varint(message, at)[1]
        else:
            end = at + {1: 8, 5: 4}[wire]
        yield key >> 3, wire, start, at, end
        start = end


def _payloads(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and payload of the fields that have a length."""
    return ((n, message[at:end]) for n, wire, _, at, end in _fields(message) if wire == 2)


def _varints(message: memoryview, at: int, end: int) -> Iterator[int]:
    """Integers of a repeated field, packed or not."""
    while at < end:
        value, at = _varint(message, at)
        yield value


def _rewritten(message: memoryview, edits: Mapping[int, Callable[[memoryview], bytes]]) -> bytes:
    """A message with the payloads of some fields replaced; all else keeps its bytes."""
    parts: list[bytes | memoryview] = []
    for number, wire, start, at, end in _fields(message):
        if wire != 2 or number not in edits:
            parts.append(message[start:end])
            continue
        payload = edits[number](message[at:end])
        if len(payload) == end - at:
            parts += [message[start:at], payload]
        else:
            key = _varint(message, start)[1]
            parts += [message[start:key], _encoded(len(payload)), payload]
    return b"".join(parts)


def _refilled(tensor: memoryview, data: bytes) -> bytes:
    """A TensorProto whose values, stored in whichever field, are `data`, in the same fields."""
    parts: list[bytes | memoryview] = []
    used = 0
    for number, wire, start, at, end in _fields(tensor):
        if number in (_FLOATS, _RAW, _DOUBLES):
            parts += [tensor[start:at], data[used : used + end - at]]
            used += end - at
        elif number == _INTS:
            count = sum(1 for _ in _varints(tensor, at, end))
            halves = np.frombuffer(data[used : used + 2 * count], "<u2")
            payload = b"".join(_encoded(int(half)) for half in halves)
            key = _varint(tensor, start)[1]
            parts += [tensor[start:key], _encoded(len(payload)) if wire == 2 else b"", payload]
            used += 2 * count
        else:
            parts.append(tensor[start:end])
    return b"".join(parts)
