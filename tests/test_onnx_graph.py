"""Reading ONNX files: what is read, and what is said of files that cannot be."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load, save

from artifactnet_jax.convert.graph import (
    ConvertError,
    Graph,
    Node,
    graph_from_dict,
    graph_to_dict,
    read_graph,
)

F32 = np.float32


def value(name: str, shape: Any = (None, 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def small(
    *nodes: onnx.NodeProto,
    weights: np.ndarray | None = None,
    opset: int = 17,
    domain: str = "",
    **fields: Any,
) -> onnx.ModelProto:
    """x [n, 4] -> x @ weights -> y, or the given nodes."""
    if not nodes:
        nodes = (helper.make_node("MatMul", ["x", "weights"], ["y"], name="product"),)
    weights = np.arange(8, dtype=F32).reshape(4, 2) if weights is None else weights
    graph = helper.make_graph(
        nodes,
        "small",
        fields.pop("inputs", [value("x", ("n", 4))]),
        fields.pop("outputs", [value("y", ("n", 2))]),
        [numpy_helper.from_array(weights, "weights")],
    )
    imports = [helper.make_opsetid(domain, opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **fields)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    def write(model: onnx.ModelProto) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


Written = Callable[[onnx.ModelProto], Path]


def test_reads_a_graph(written: Written) -> None:
    model = small(producer_name="maker", producer_version="1.2")
    model.metadata_props.add(key="license", value="CC BY-NC 4.0")
    model.graph.input.append(value("weights", (4, 2)))  # as old files list initialisers
    graph = read_graph(written(model))
    assert [(v.name, v.dtype, v.shape) for v in graph.inputs] == [("x", "float32", ("n", 4))]
    assert [(v.name, v.dtype, v.shape) for v in graph.outputs] == [("y", "float32", ("n", 2))]
    (node,) = graph.nodes
    assert (node.op, node.name, node.inputs, node.outputs) == (
        "MatMul",
        "product",
        ("x", "weights"),
        ("y",),
    )
    np.testing.assert_array_equal(graph.constants["weights"], np.arange(8).reshape(4, 2))
    assert (graph.opset, graph.producer) == (17, "maker 1.2")
    assert graph.metadata == {"license": "CC BY-NC 4.0"}
    assert len(graph.sha256) == 64


def test_attributes(written: Written) -> None:
    nodes = (
        helper.make_node("Constant", [], ["a"], value_floats=[0.5, 1.5]),
        helper.make_node("Constant", [], ["b"], value_int=3),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.eye(2))),
        helper.make_node("Pad", ["x", "b"], ["p"], mode="edge"),
        helper.make_node("LeakyRelu", ["p"], ["q"], alpha=0.25),
        helper.make_node("Transpose", ["q"], ["y"], perm=[1, 0]),
    )
    a, b, c, p, q, y = (node.attributes for node in read_graph(written(small(*nodes))).nodes)
    assert a["value"].dtype == np.float32
    assert a["value"].tolist() == [0.5, 1.5]
    assert b["value"].dtype == np.int64
    assert b["value"].shape == ()
    assert c["value"].dtype == np.float64
    assert (p, q, y) == ({"mode": "edge"}, {"alpha": 0.25}, {"perm": (1, 0)})


def test_nodes_come_in_order_of_computation(written: Written) -> None:
    nodes = (
        helper.make_node("Relu", ["b"], ["y"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Neg", ["x"], ["a"]),
    )
    assert [node.op for node in read_graph(written(small(*nodes))).nodes] == ["Neg", "Exp", "Relu"]


def branching() -> onnx.ModelProto:
    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, ["x"], ["z"])], op, [], [value("z")])

    choice = {"then_branch": branch("Exp"), "else_branch": branch("Neg")}
    return small(
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.asarray(True))),
        helper.make_node("If", ["c"], ["y"], name="choice", **choice),
    )


def test_branches_are_graphs(written: Written) -> None:
    choice = read_graph(written(branching())).nodes[1]
    assert choice.reads() == ("c", "x")
    branch = choice.attributes["then_branch"]
    assert isinstance(branch, Graph)
    assert branch.outer() == ("x",)
    assert [node.op for node in branch.nodes] == ["Exp"]


def test_local_functions_are_inlined(written: Written) -> None:
    function = helper.make_function(
        "local",
        "Double",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )
    model = small(helper.make_node("Double", ["x"], ["y"], domain="local"), opset=18)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(function)
    assert [(n.op, n.inputs) for n in read_graph(written(model)).nodes] == [("Add", ("x", "x"))]


# --- External data ------------------------------------------------------------------------------


def external(folder: Path, location: str = "model.onnx.data", **entries: int) -> Path:
    """A model whose weights lie in another file, after 8 other bytes."""
    model = small()
    (tensor,) = model.graph.initializer
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    fields = {"location": location, "offset": 8, "length": len(data), **entries}
    for key, entry in fields.items():
        tensor.external_data.add(key=key, value=str(entry))
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "model.onnx.data").write_bytes(bytes(8) + data)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weights_of(path: Path) -> list[float]:
    return read_graph(path).constants["weights"].ravel().tolist()


def test_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    assert weights_of(path) == [*range(8)]
    before = read_graph(path).sha256
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[0] = 1  # not even of a tensor
    (tmp_path / "model.onnx.data").write_bytes(data)
    assert read_graph(path).sha256 != before


def test_external_data_behind_links(tmp_path: Path) -> None:
    """As in a cache of downloads: links in one folder, to files under other names in another."""
    path, blobs = external(tmp_path / "made"), tmp_path / "blobs"
    blobs.mkdir()
    snapshot = tmp_path / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "made" / name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-{name}")
    assert not path.exists()
    assert weights_of(snapshot / "model.onnx") == [*range(8)]


def test_external_data_beside_the_target_of_a_link(tmp_path: Path) -> None:
    path = external(tmp_path / "real")
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    assert weights_of(link) == [*range(8)]


def test_missing_external_data(tmp_path: Path) -> None:
    path = external(tmp_path / "real")
    (tmp_path / "real" / "model.onnx.data").unlink()
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    with pytest.raises(ConvertError, match=r"model\.onnx\.data is missing") as caught:
        read_graph(link)
    assert f"looked for in {tmp_path} and {tmp_path / 'real'}" in str(caught.value)


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../model.onnx.data", "a/../../b", "C:\\data", "..\\b", ""]
)
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    with pytest.raises(ConvertError, match="outside the model's folder"):
        read_graph(external(tmp_path, location))


@pytest.mark.parametrize("entries", [{"length": 1000}, {"offset": 1000}, {"offset": -8}])
def test_short_external_data(tmp_path: Path, entries: dict[str, int]) -> None:
    with pytest.raises(ConvertError, match=r"model\.onnx\.data is too short.*'weights'"):
        read_graph(external(tmp_path, **entries))


def test_external_data_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="initialiser 'weights' is damaged"):
        read_graph(external(tmp_path, length=16))


# --- What cannot be read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"just some words\n", "it is text"),
        (b"<!DOCTYPE html><html>", "it is text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(50), "zip archive"),
        (save({"a": np.zeros(3, F32)}), "safetensors"),
        (bytes(range(255, 0, -1)) * 9, "not an ONNX file"),
        (np.random.default_rng(0).bytes(5000), "not an ONNX file"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "RIFF"),
    ],
)
def test_not_an_onnx_file(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ConvertError, match=said) as caught:
        read_graph(path)
    assert str(caught.value).startswith(f"{path}: not an ONNX file")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"none\.onnx: no such file"):
        read_graph(tmp_path / "none.onnx")
    with pytest.raises(ConvertError, match="is a folder"):
        read_graph(tmp_path)


def test_truncated_anywhere(written: Written) -> None:
    path = written(small())
    data = path.read_bytes()
    for stop in range(1, len(data), 7):
        path.write_bytes(data[:stop])
        with pytest.raises(ConvertError) as caught:
            read_graph(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConvertError, match=r"truncated, \d+ bytes are missing"):
        read_graph(path)


def test_altered_anywhere(written: Written) -> None:
    """A damaged file is read, or refused; nothing else."""
    path = written(branching())
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        altered = bytearray(data)
        altered[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(altered)
        with contextlib.suppress(ConvertError):
            read_graph(path)


@pytest.mark.parametrize("opset", [6, 27, 99])
def test_opset(written: Written, opset: int) -> None:
    with pytest.raises(ConvertError, match=f"opset {opset}; export the model with opset 7 to 26"):
        read_graph(written(small(opset=opset)))


def test_other_domain(written: Written) -> None:
    node = helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft", name="fused")
    model = small(node)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ConvertError, match=r"node 'fused' is com\.microsoft\.FusedConv"):
        read_graph(written(model))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(written: Written, bad: float) -> None:
    weights = np.zeros((4, 2), F32)
    weights[1:3, 0] = bad
    with pytest.raises(ConvertError, match="'weights' holds 2 non-finite values of 8"):
        read_graph(written(small(weights=weights)))


def test_an_infinite_bound_is_no_weight(written: Written) -> None:
    node = helper.make_node("Max", ["x", "weights"], ["y"])
    graph = read_graph(written(small(node, weights=np.asarray(-np.inf, F32))))
    assert graph.constants["weights"] == -np.inf


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (small(inputs=[]), "reads 'x', which nothing defines"),
        (small(outputs=[]), "has no output"),
        (small(outputs=[value("z")]), "nothing defines the output 'z'"),
        (
            small(helper.make_node("Constant", [], ["y"], value_float=1.0), inputs=[]),
            "has no input",
        ),
        (
            small(
                helper.make_node("Add", ["x", "b"], ["a"], name="one"),
                helper.make_node("Add", ["x", "a"], ["b"]),
                helper.make_node("Relu", ["a"], ["y"]),
            ),
            "node 'one' .* depends on its own output",
        ),
        (
            small(helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Exp", ["x"], ["y"])),
            "'y' is defined twice",
        ),
    ],
)
def test_broken_graphs(written: Written, model: onnx.ModelProto, said: str) -> None:
    with pytest.raises(ConvertError, match=said):
        read_graph(written(model))


def test_type_that_is_not_supported(written: Written) -> None:
    model = small()
    tensor = model.graph.initializer[0]
    tensor.data_type, tensor.raw_data = TensorProto.BFLOAT16, bytes(16)
    with pytest.raises(ConvertError, match=r"'weights' is of type bfloat16; save .* in float32"):
        read_graph(written(model))


# --- As plain data ------------------------------------------------------------------------------


def same(a: Any, b: Any) -> None:
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, Graph):
        assert (a.inputs, a.outputs, a.opset, a.producer, a.metadata, a.sha256) == (
            b.inputs,
            b.outputs,
            b.opset,
            b.producer,
            b.metadata,
            b.sha256,
        )
        assert list(a.constants) == list(b.constants)
        for name in a.constants:
            same(a.constants[name], b.constants[name])
        assert len(a.nodes) == len(b.nodes)
        for one, other in zip(a.nodes, b.nodes, strict=True):
            assert (one.op, one.name, one.inputs, one.outputs) == (
                other.op,
                other.name,
                other.inputs,
                other.outputs,
            )
            assert list(one.attributes) == list(other.attributes)
            for key in one.attributes:
                same(one.attributes[key], other.attributes[key])
    else:
        assert type(a) is type(b)
        assert a == b


def test_a_graph_survives_json_and_safetensors(written: Written) -> None:
    graph = read_graph(written(branching()))
    nodes = (
        *graph.nodes,
        Node("Constant", "empty", (), ("e",), {"value": np.zeros((0, 3), np.int64)}),
        Node("Elu", "elu", ("y",), ("f",), {"alpha": float("inf"), "beta": 1.0, "axes": (1, 2)}),
        Node("X", "x", ("f",), ("g",), {"names": ("a", "b"), "scales": (0.5, 2.0), "one": 1}),
    )
    graph.nodes = nodes
    for dtype in (np.bool_, np.uint8, np.int32, np.float16, np.float64):
        graph.constants[f"odd name/{dtype.__name__}"] = np.ones((), dtype)
    data, tensors = graph_to_dict(graph)
    text = json.dumps(data, allow_nan=False)
    same(graph, graph_from_dict(json.loads(text), load(save(tensors))))


@pytest.mark.slow
def test_module_needs_no_onnx() -> None:
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "import artifactnet_jax.convert.graph, artifactnet_jax.convert.operators"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
