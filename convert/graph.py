"""An ONNX file as plain data: nodes in order, constants, inputs and outputs.

Only `read_graph` needs the `onnx` package; a graph that a weights file carries is rebuilt by
`graph_from_dict` without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from artifactnet_jax.convert.protobuf import fields
from artifactnet_jax.weights import WeightsError

OPSETS = range(7, 27)
CURE = "export the model again, or fetch the file again"


class ConvertError(WeightsError):
    """A model cannot be converted; the message names the file, the cause and the cure."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: str
    dtype: str  # NumPy's name; "" where an output does not state it
    shape: tuple[int | str | None, ...]  # a number, a symbol's name, or unknown


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operator; attributes are int, float, str, tuples of these, arrays, or graphs.

    A Constant has the one attribute `value`, an array, whatever form the file has.
    """

    op: str
    name: str
    inputs: tuple[str, ...]  # "" where an optional one is left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def reads(self) -> tuple[str, ...]:
        """Names of the tensors it needs, those of the graphs in its attributes included."""
        names = {name: None for name in self.inputs if name}
        for value in self.attributes.values():
            if isinstance(value, Graph):
                names.update(dict.fromkeys(value.outer()))
        return tuple(names)


@dataclasses.dataclass(eq=False)
class Graph:
    """A graph of the standard domain, functions inlined, nodes in order of computation."""

    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]  # the initialisers
    inputs: tuple[Value, ...]  # initialisers not among them
    outputs: tuple[Value, ...]
    opset: int
    producer: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sha256: str = ""  # of the file and its external data

    def outer(self) -> tuple[str, ...]:
        """Names that it reads but does not define: those of the graph around it."""
        available = {*self.constants, *(value.name for value in self.inputs)}
        available.update(name for node in self.nodes for name in node.outputs)
        wanted = [name for node in self.nodes for name in node.reads()]
        wanted += [value.name for value in self.outputs]
        return tuple(dict.fromkeys(name for name in wanted if name not in available))


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Read an ONNX file, external data included.

    External data is looked for next to `path`, then, where `path` is a symbolic link (a cache of
    downloads), next to the file that it points to; a location outside that folder is refused.

    Raises:
        ConvertError: one line that names the file, what is wrong with it, and the cure.
        ImportError: if the `onnx` package is not installed.
    """
    name = os.fspath(path)
    data, model = _model(name)
    opset = _opset(model, name)
    if model.functions:
        from onnx import inliner

        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:
            raise ConvertError(
                f"{name}: its functions cannot be inlined: {_line(error)}; {CURE}"
            ) from error
    external = _External(Path(path))
    try:
        graph = _graph(model.graph, opset, external, name, frozenset())
    except ConvertError:
        raise
    except Exception as error:  # what protobuf fields can hold is not bounded by the standard
        raise ConvertError(f"{name}: damaged: {_line(error)}; {CURE}") from error
    if not graph.inputs:
        raise ConvertError(f"{name}: the graph has no input; a detector takes audio")
    if not graph.outputs:
        raise ConvertError(f"{name}: the graph has no output; a detector gives a score")
    graph.producer = f"{model.producer_name} {model.producer_version}".strip()
    graph.metadata = {entry.key: entry.value for entry in model.metadata_props}
    if model.doc_string:
        graph.metadata = {"doc_string": model.doc_string, **graph.metadata}
    digest = hashlib.sha256(data)
    for location in sorted(external.files):
        digest.update(external.files[location])
    graph.sha256 = digest.hexdigest()
    return graph


def _model(name: str) -> tuple[bytes, Any]:
    """Bytes of an ONNX file, and its ModelProto, which holds a graph."""
    import onnx

    try:
        data = Path(name).read_bytes()
    except FileNotFoundError:
        raise ConvertError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise ConvertError(f"{name} is a folder; name the .onnx file in it") from None
    except OSError as error:
        raise ConvertError(f"{name}: cannot be read: {error.strerror}; check the file") from None
    if problem := _foreign(data):
        raise ConvertError(f"{name}: not an ONNX file: {problem}; name the model's .onnx file")
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:  # protobuf's own
        problem = "not an ONNX file, or a damaged one; name the model's .onnx file"
        if missing := _truncated(data):
            problem = f"truncated, {missing} bytes are missing; fetch the file again"
        raise ConvertError(f"{name}: {problem}") from None
    if not model.HasField("graph") or not model.graph.node:
        raise ConvertError(f"{name}: not an ONNX file: it holds no graph; {CURE}")
    return data, model


def _opset(model: Any, name: str) -> int:
    """Version of the standard operators."""
    if not model.opset_import:
        raise ConvertError(f"{name}: states no opset, so it may be truncated; {CURE}")
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = int(opsets[0]) if opsets else 0
    if opset not in OPSETS:
        said = f"opset {opset}" if opset else "no opset of the standard domain"
        raise ConvertError(
            f"{name}: {said}; export the model with opset {OPSETS[0]} to {OPSETS[-1]}"
        )
    return opset


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")


def _foreign(data: bytes) -> str:
    """What a file that is plainly no ONNX file is, or ""."""
    if not data:
        return "it is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer (run git lfs pull)"
    for magic, kind in (
        (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint, or a package)"),
        (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint)"),
        (b"\x89HDF", "an HDF5 file"),
        (b"RIFF", "a RIFF file such as audio"),
        (b"fLaC", "audio"),
        (b"ID3", "audio"),
        (b"\x1f\x8b", "gzip-compressed"),
    ):
        if data.startswith(magic):
            return f"it is {kind}" if kind[:2] in ("a ", "an") else f"it is {kind} data"
    if data[4:8] == b"TFL3":
        return "it is a TensorFlow Lite model"
    if len(data) > 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return "it is a safetensors file"
    if all(byte in b"\t\n\f\r" or 32 <= byte < 127 for byte in data[:256]):
        return "it is text"
    return ""


def _truncated(data: bytes) -> int:
    """Bytes by which the last top-level field of a protobuf message overruns the data."""
    with contextlib.suppress(ValueError):
        for field in fields(data):
            if not 1 <= field.number <= 64:
                return 0
            if field.sized and field.end > len(data):
                # Graph, the one large field; in a random file any field would do.
                return field.end - len(data) if field.number == 7 else 0
    return 0


class _External:
    """Files of external data, each read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folders = list(dict.fromkeys((path.parent, path.resolve().parent)))
        self.files: dict[str, bytes] = {}

    def read(self, tensor: Any) -> bytes:
        """The bytes of a tensor whose data lies outside the file."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in self.files:
            self.files[location] = self._load(location, tensor.name)
        data = self.files[location]
        start = int(entries.get("offset", 0))
        stop = start + int(entries["length"]) if "length" in entries else len(data)
        if not 0 <= start <= stop <= len(data):
            raise ConvertError(
                f"{self.path}: its external data {location} is too short, or of another model: "
                f"{len(data)} bytes, {stop} needed for {tensor.name!r}; fetch both files again"
            )
        return data[start:stop]

    def _load(self, location: str, tensor: str) -> bytes:
        parts = PurePosixPath(location.replace("\\", "/")).parts
        if (
            not parts
            or ".." in parts
            or PurePosixPath(location).is_absolute()
            or PureWindowsPath(location).anchor
        ):
            raise ConvertError(
                f"{self.path}: tensor {tensor!r} has its data at {location!r}, outside the model's "
                "folder; save the model again with its data beside it"
            )
        for folder in self.folders:
            try:
                return folder.joinpath(*parts).read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConvertError(
                    f"{self.path}: its external data {location} cannot be read: {error.strerror}; "
                    "check that file"
                ) from None
        places = " and ".join(str(folder) for folder in self.folders)
        raise ConvertError(
            f"{self.path}: its external data {location} is missing, looked for in {places}; put "
            "that file next to the model"
        )


def _graph(proto: Any, opset: int, external: _External, path: str, around: frozenset[str]) -> Graph:
    """A graph, or the graph in a node's attribute; `around` are the names it may read."""
    constants: dict[str, np.ndarray] = {}
    for tensor in proto.initializer:
        constants[tensor.name] = _array(tensor, external, path, f"initialiser {tensor.name!r}")
    if proto.sparse_initializer:
        raise ConvertError(f"{path}: sparse initialisers are not supported; save them as dense")
    inputs = tuple(
        _value(entry, path, required=True) for entry in proto.input if entry.name not in constants
    )
    outputs = tuple(_value(entry, path, required=False) for entry in proto.output)

    available = {*constants, *(value.name for value in inputs)}
    scope = frozenset(around | available | {name for node in proto.node for name in node.output})
    nodes = [_node(node, opset, external, path, scope) for node in proto.node]
    made = Counter(name for node in nodes for name in node.outputs if name)
    if twice := [name for name in made if made[name] > 1 or name in available]:
        raise ConvertError(f"{path}: {twice[0]!r} is defined twice; {CURE}")
    return Graph(
        _ordered(nodes, available | around, made, outputs, path), constants, inputs, outputs, opset
    )


def _ordered(
    nodes: list[Node],
    available: frozenset[str] | set[str],
    made: Mapping[str, int],
    outputs: tuple[Value, ...],
    path: str,
) -> tuple[Node, ...]:
    """The nodes in order of computation, as near to the file's order as that allows."""
    for node in nodes:
        for name in node.reads():
            if name not in available and name not in made:
                raise ConvertError(
                    f"{path}: node {node.name!r} ({node.op}) reads {name!r}, which nothing "
                    f"defines; {CURE}"
                )
    for value in outputs:
        if value.name not in available and value.name not in made:
            raise ConvertError(f"{path}: nothing defines the output {value.name!r}; {CURE}")
    ordered: list[Node] = []
    computed = set(available)
    waiting = nodes
    while waiting:
        blocked = []
        for node in waiting:
            if all(name in computed for name in node.reads()):
                ordered.append(node)
                computed.update(node.outputs)
            else:
                blocked.append(node)
        if len(blocked) == len(waiting):
            node = blocked[0]
            raise ConvertError(
                f"{path}: node {node.name!r} ({node.op}) depends on its own output; {CURE}"
            )
        waiting = blocked
    return tuple(ordered)


def _value(entry: Any, path: str, required: bool) -> Value:
    import onnx

    kind = entry.type.WhichOneof("value")
    if kind != "tensor_type":
        if required:
            raise ConvertError(f"{path}: input {entry.name!r} is not a tensor; {CURE}")
        return Value(entry.name, "", ())
    tensor = entry.type.tensor_type
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        field = dim.WhichOneof("value")
        dims.append(getattr(dim, field) if field else None)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else ""
    return Value(entry.name, str(dtype), tuple(dims))


def _array(tensor: Any, external: _External, path: str, what: str) -> np.ndarray:
    """A tensor as an array, checked."""
    import onnx

    kinds = onnx.TensorProto
    plain = {kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16, kinds.BOOL, kinds.INT8, kinds.INT16}
    plain |= {kinds.INT32, kinds.INT64, kinds.UINT8, kinds.UINT16, kinds.UINT32, kinds.UINT64}
    if tensor.data_type not in plain:
        kind = kinds.DataType.Name(tensor.data_type).lower()
        raise ConvertError(f"{path}: {what} is of type {kind}; save the model in float32")
    if tensor.data_location == kinds.EXTERNAL:
        data = external.read(tensor)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = data
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{path}: {what} is damaged: {_line(error)}; {CURE}") from error
    array = np.array(array)  # own, aligned, writeable memory
    if array.dtype.kind == "f":
        # A single infinity is a bound, such as that of a clip; it is no weight.
        bad = np.isnan(array) if array.size == 1 else ~np.isfinite(array)
        if bad.any():
            raise ConvertError(
                f"{path}: {what} holds {int(bad.sum())} non-finite values of {array.size}; fetch "
                "or train the model again"
            )
    return array


def _node(proto: Any, opset: int, external: _External, path: str, scope: frozenset[str]) -> Node:
    import onnx

    outputs = tuple(proto.output)
    name = proto.name or next(filter(None, outputs), "")
    if proto.domain not in ("", "ai.onnx"):
        raise ConvertError(
            f"{path}: node {name!r} is {proto.domain}.{proto.op_type}, which is no standard "
            "operator; export the model with standard operators only"
        )
    attributes: dict[str, Any] = {}
    kinds = onnx.AttributeProto
    for attribute in proto.attribute:
        kind, what = attribute.type, f"attribute {attribute.name!r} of node {name!r}"
        if kind in (kinds.FLOAT, kinds.INT):
            value = attribute.f if kind == kinds.FLOAT else attribute.i
        elif kind == kinds.STRING:
            value = attribute.s.decode(errors="replace")
        elif kind == kinds.FLOATS:
            value = tuple(attribute.floats)
        elif kind == kinds.INTS:
            value = tuple(attribute.ints)
        elif kind == kinds.STRINGS:
            value = tuple(text.decode(errors="replace") for text in attribute.strings)
        elif kind == kinds.TENSOR:
            value = _array(attribute.t, external, path, what)
        elif kind == kinds.GRAPH:
            value = _graph(attribute.g, opset, external, path, scope)
        else:
            raise ConvertError(f"{path}: {what} is of a kind that is not supported; {CURE}")
        attributes[attribute.name] = value
    if proto.op_type == "Constant":
        form, value = next(iter(attributes.items()), ("", None))
        if form in ("value_float", "value_floats"):
            value = np.asarray(value, np.float32)
        elif form in ("value_int", "value_ints"):
            value = np.asarray(value, np.int64)
        elif form != "value":
            raise ConvertError(
                f"{path}: node {name!r} is a Constant without a numeric value; {CURE}"
            )
        attributes = {"value": value}
    return Node(proto.op_type, name, tuple(proto.input), outputs, attributes)


def graph_to_dict(graph: Graph) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The graph as plain JSON data, and its arrays (constants, array attributes) by name.

    The names start with "constants." or "nodes."; `graph_from_dict` is the inverse.
    """
    tensors: dict[str, np.ndarray] = {}
    return _pack(graph, "", tensors), tensors


def _pack(graph: Graph, prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    for name, array in graph.constants.items():
        tensors[f"{prefix}constants.{name}"] = array

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, np.ndarray):
            tensors[key] = value
            return {"tensor": key}
        if isinstance(value, Graph):
            return {"graph": _pack(value, f"{key}.", tensors)}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}  # which JSON has no number for
        return [plain(part, "") for part in value] if isinstance(value, tuple) else value

    return {
        "nodes": [
            [
                node.op,
                node.name,
                list(node.inputs),
                list(node.outputs),
                {key: plain(v, f"{prefix}nodes.{i}.{key}") for key, v in node.attributes.items()},
            ]
            for i, node in enumerate(graph.nodes)
        ],
        "constants": list(graph.constants),
        "inputs": [[value.name, value.dtype, list(value.shape)] for value in graph.inputs],
        "outputs": [[value.name, value.dtype, list(value.shape)] for value in graph.outputs],
        "opset": graph.opset,
        "producer": graph.producer,
        "metadata": dict(graph.metadata),
        "sha256": graph.sha256,
    }


def graph_from_dict(data: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Graph:
    """Inverse of `graph_to_dict`, also after JSON has turned tuples into lists."""
    return _unpack(data, "", tensors)


def _unpack(data: Mapping[str, Any], prefix: str, tensors: Mapping[str, np.ndarray]) -> Graph:
    def rich(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return (
                _unpack(value["graph"], f"{key}.", tensors)
                if "graph" in value
                else float(value["float"])
            )
        return tuple(rich(part, "") for part in value) if isinstance(value, list) else value

    def values(rows: list[Any]) -> Iterator[Value]:
        return (Value(name, dtype, tuple(shape)) for name, dtype, shape in rows)

    return Graph(
        tuple(
            Node(
                op,
                name,
                tuple(inputs),
                tuple(outputs),
                {key: rich(v, f"{prefix}nodes.{i}.{key}") for key, v in attributes.items()},
            )
            for i, (op, name, inputs, outputs, attributes) in enumerate(data["nodes"])
        ),
        {name: tensors[f"{prefix}constants.{name}"] for name in data["constants"]},
        tuple(values(data["inputs"])),
        tuple(values(data["outputs"])),
        data["opset"],
        data["producer"],
        dict(data["metadata"]),
        data["sha256"],
    )
