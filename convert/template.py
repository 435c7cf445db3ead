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
from artifactnet_jax.convert.protobuf import Bytes, Field, encoded, fields, varint, varints
from artifactnet_jax.files import replace_file
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import Model, Stored, Weights

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
    weights: Model, template: str | os.PathLike[str], path: str | os.PathLike[str]
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
    if not entries or not isinstance(weights, Stored):
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

    own = folded(weights.config, weights.tensors)[1] if isinstance(weights, Weights) else {}
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

    def _graph(self, graph: Bytes) -> bytes:
        return _rewritten(graph, {_NODE: self._node, _INITIALISER: self._initialiser})

    def _node(self, node: Bytes) -> bytes:
        """A Constant node holds a tensor under the name of its output."""
        parts = dict(_payloads(node))
        if bytes(parts.get(_NODE_OP, b"")) != b"Constant":
            return bytes(node)
        name = bytes(parts[_NODE_OUTPUT]).decode()

        def attribute(payload: Bytes) -> bytes:
            return _rewritten(payload, {_ATTRIBUTE_TENSOR: lambda t: self._tensor(name, t)})

        return _rewritten(node, {_NODE_ATTRIBUTE: attribute})

    def _initialiser(self, tensor: Bytes) -> bytes:
        name = bytes(dict(_payloads(tensor)).get(_NAME, b"")).decode()
        return self._tensor(name, tensor)

    def _tensor(self, name: str, tensor: Bytes) -> bytes:
        entries = [dict(_payloads(p)) for number, p in _payloads(tensor) if number == _EXTERNAL]
        place = None
        if entries:  # each file is copied, whether or not a value in it changes
            place = self._place({bytes(e[1]).decode(): bytes(e[2]).decode() for e in entries})
        if name not in self.values:
            return bytes(tensor)
        self.found.add(name)
        kind, data = 0, b""
        for field in fields(tensor):
            if field.number == _TYPE:
                (kind,) = varints(field)
            elif field.number in (_FLOATS, _RAW, _DOUBLES):
                data += field.payload
            elif field.number == _INTS:  # the bits of a float16, one per integer
                bits = [v & 0xFFFF for v in varints(field)]
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


def _payloads(message: Bytes) -> Iterator[tuple[int, Bytes]]:
    """Number and payload of the fields that have a length."""
    return ((field.number, field.payload) for field in fields(message) if field.sized)


def _rewritten(message: Bytes, edits: Mapping[int, Callable[[Bytes], bytes]]) -> bytes:
    """A message with the payloads of some fields replaced; all else keeps its bytes."""
    parts: list[Bytes] = []
    for field in fields(message):
        if not field.sized or field.number not in edits:
            parts.append(message[field.start : field.end])
            continue
        payload = edits[field.number](field.payload)
        if len(payload) == field.end - field.at:
            parts += [message[field.start : field.at], payload]
        else:
            parts += [_key(field), encoded(len(payload)), payload]
    return b"".join(parts)


def _refilled(tensor: Bytes, data: bytes) -> bytes:
    """A TensorProto whose values, stored in whichever field, are `data`, in the same fields."""
    parts: list[Bytes] = []
    used = 0
    for field in fields(tensor):
        if field.number in (_FLOATS, _RAW, _DOUBLES):
            size = field.end - field.at
            parts += [tensor[field.start : field.at], data[used : used + size]]
            used += size
        elif field.number == _INTS:
            count = sum(1 for _ in varints(field))
            halves = np.frombuffer(data[used : used + 2 * count], "<u2")
            payload = b"".join(encoded(int(half)) for half in halves)
            parts += [_key(field), encoded(len(payload)) if field.sized else b"", payload]
            used += 2 * count
        else:
            parts.append(tensor[field.start : field.end])
    return b"".join(parts)


def _key(field: Field) -> Bytes:
    """The bytes that say which field it is."""
    return field.message[field.start : varint(field.message, field.start)[1]]
