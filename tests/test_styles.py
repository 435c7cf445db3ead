"""Detectors as people write them: what is left native, what is said of the others.

A member of the family is exported and edited to what an exporter of another style leaves behind;
scores are those of onnxruntime on the edited file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from artifactnet_jax.config import FrontEnd
from artifactnet_jax.convert.describe import describe
from artifactnet_jax.convert.exact import Exact
from artifactnet_jax.convert.export import build_onnx, export
from artifactnet_jax.convert.graph import ConvertError, read_graph
from artifactnet_jax.convert.importer import import_model
from artifactnet_jax.convert.original import session
from artifactnet_jax.models import load_backend
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.weights import load_weights, write_weights
from onnx_audio import segments
from unet_family import SMALL, member

KINDS: dict[str, Any] = {
    **{"input": "magnitude", "widths": (4,), "bottleneck": 8, "size": "pad", "pad": "reflect"},
    **{"block": "plain", "norm": "none", "act": "relu", "down": 2, "gate": False},
    **{"up": "transpose", "skip": "concat", "head": 1},
}
SHORT = dataclasses.replace(SMALL, segment_samples=16_384)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Callable[[FrontEnd], Path]:
    """The export of a member, once for each front end."""
    folder, made = tmp_path_factory.mktemp("styles"), dict[FrontEnd, Path]()

    def file(front_end: FrontEnd = SHORT) -> Path:
        if front_end not in made:
            made[front_end] = folder / f"{len(made)}.onnx"
            export(member(4, KINDS, front_end), made[front_end])
        return made[front_end]

    return file


class Edit:
    """A model whose nodes are added to; names of constants are made up."""

    def __init__(self, path: Path):
        self.model = onnx.load(path)
        del self.model.metadata_props[:]
        self.graph, self.count = self.model.graph, 0
        self.added: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        self.count += 1
        array = numpy_helper.from_array(np.asarray(value, dtype), f"own.{self.count}")
        self.graph.initializer.append(array)
        return array.name

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        self.count += 1
        out = name or f"made.{self.count}"
        self.added.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def save(self, path: Path) -> Path:
        onnx.save(self.model, path)
        return path

    def before(self, make: Callable[[Edit, str], str], path: Path) -> Path:
        """With `make` between the audio and everything that read it."""
        made = make(self, "audio")
        for node in self.graph.node:
            node.input[:] = [made if name == "audio" else name for name in node.input]
        for k, node in enumerate(self.added):
            self.graph.node.insert(k, node)
        return self.save(path)

    def after(self, make: Callable[[Edit, str], None], path: Path, *shape: Any) -> Path:
        """With `make` behind the logit, in the place of its sigmoid."""
        last = self.graph.node.pop()
        assert (last.op_type, last.output[0]) == ("Sigmoid", "p_ai")
        make(self, last.input[0])
        self.graph.node.extend(self.added)
        del self.graph.output[:]
        out = helper.make_tensor_value_info("p_ai", TensorProto.FLOAT, shape or ("batch",))
        self.graph.output.append(out)
        return self.save(path)


def heard() -> np.ndarray:
    """Audio of several levels, silence among them, and one with an offset: [5, N]."""
    audio = segments(2, SHORT.segment_samples)
    quiet = audio[:1] * np.float32(1e-4)
    return np.concatenate([audio, quiet, np.zeros_like(quiet), 0.3 * audio[1:] + np.float32(0.1)])


def expected(path: Path, audio: np.ndarray) -> np.ndarray:
    run = session(str(path))
    return np.concatenate([run.run(None, {"audio": x[None]})[0] for x in audio])


def native(path: Path, audio: np.ndarray, want: np.ndarray | None = None, **how: Any) -> Any:
    """Weights of a file that must convert natively and score as onnxruntime does."""
    weights = import_model(path, **how)
    assert (weights.provenance["route"], weights.provenance["reason"]) == ("native", "")
    want = expected(path, audio) if want is None else want
    got = load_backend("numpy", weights)(audio)
    np.testing.assert_allclose(got, want.reshape(-1), atol=5e-5)
    return weights


# --- the level of the audio ----------------------------------------------------------------------


def level_of(g: Edit, x: str, kind: str) -> str:
    axis = g.constant([-1], np.int64)
    if kind == "peak":
        return g.op("ReduceMax", g.op("Abs", x), axis)
    return g.op("ReduceMean", g.op("Mul", x, x), axis)


def by_peak(g: Edit, x: str) -> str:
    return g.op("Div", x, g.op("Add", level_of(g, x, "peak"), g.constant(1e-6)))


def by_peak_at_least(g: Edit, x: str) -> str:
    level = g.op("Clip", level_of(g, x, "peak"), g.constant(1e-3))
    return g.op("Mul", g.constant(0.95), g.op("Div", x, level))


def by_rms(g: Edit, x: str) -> str:
    return g.op("Div", x, g.op("Add", g.op("Sqrt", level_of(g, x, "rms")), g.constant(1e-5)))


def standardised(g: Edit, x: str) -> str:
    x = g.op("Sub", x, g.op("ReduceMean", x, g.constant([-1], np.int64)))
    level = g.op("Sqrt", g.op("Add", level_of(g, x, "rms"), g.constant(1e-9)))
    return g.op("Div", x, level)


def off_centre(g: Edit, x: str) -> str:
    return g.op("Sub", x, g.op("ReduceMean", x, g.constant([-1], np.int64)))


@pytest.mark.parametrize(
    ("make", "level", "rule", "eps", "centred", "scale"),
    [
        (by_peak, "peak", "add", 1e-6, False, 1),
        (by_peak_at_least, "peak", "max", 1e-3, False, 0.95),
        (by_rms, "rms", "add", 1e-5, False, 1),
        (standardised, "rms", "root", 1e-9, True, 1),
        (off_centre, "none", "add", 0, True, 1),
    ],
)
def test_the_level_of_the_audio_is_recognised(
    files, tmp_path, make, level, rule, eps, centred, scale
):
    path = Edit(files()).before(make, tmp_path / "m.onnx")
    audio = heard()
    weights = native(path, audio)
    fe = weights.config.front_end
    assert (fe.level, fe.level_rule, fe.centred) == (level, rule, centred)
    assert (fe.level_eps, fe.spectrum_scale) == pytest.approx((eps, scale), rel=1e-4)
    rows = [text for _, text in describe(weights)]
    assert any("divided by" in text or "mean is taken off" in text for text in rows)
    # Through a file of weights, and back into ONNX.
    write_weights(weights, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors").config == weights.config
    run = session(build_onnx(weights).SerializeToString())
    got = run.run(None, {"audio": audio})[0]
    np.testing.assert_allclose(got, expected(path, audio), atol=5e-5)


def test_another_rule_for_the_level_is_the_reason(files, tmp_path):
    def all_together(g: Edit, x: str) -> str:
        level = g.op("ReduceMax", g.op("Abs", x), keepdims=0)
        return g.op("Div", x, g.op("Add", level, g.constant(1e-6)))

    def squashed(g: Edit, x: str) -> str:
        return g.op("Div", x, g.op("Sqrt", g.op("Sqrt", level_of(g, x, "rms"))))

    path = Edit(files()).before(squashed, tmp_path / "m.onnx")
    weights = import_model(path)
    assert weights.provenance["route"] == "graph"
    assert "level of its audio is changed by a rule that is not known" in str(describe(weights))
    # One level for all segments of a call: given one at a time, it is that segment's own.
    weights = import_model(Edit(files()).before(all_together, tmp_path / "n.onnx"))
    assert weights.provenance["contract"]["segments"] is None or weights.config.front_end.level


# --- compressions --------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 1000.0])
def test_logarithms_of_one_plus_are_recognised(files, tmp_path, c):
    g = Edit(files(dataclasses.replace(SHORT, top_db=None)))
    log = next(node for node in g.graph.node if node.op_type == "Log")
    floor = next(node for node in g.graph.node if node.output[0] == log.input[0])
    mel = next(name for name in floor.input if not name.startswith("constant"))
    scaled = g.op("Mul", g.constant(c), mel) if c != 1 else mel
    log.input[0] = g.op("Add", scaled, g.constant(1.0))
    place = list(g.graph.node).index(log)
    for node in reversed(g.added):
        g.graph.node.insert(place, node)
    weights = native(g.save(tmp_path / "m.onnx"), heard())
    fe = weights.config.front_end
    assert (fe.amin_rule, fe.top_db) == ("add", None)
    assert fe.amin == pytest.approx(1 / c)


# --- control flow --------------------------------------------------------------------------------


def branch(nodes: list[Any], name: str) -> Any:
    return helper.make_graph(nodes, "b", [], [onnx.ValueInfoProto(name=name)])


def squeezed_if(g: Edit, z: str) -> None:
    """As TorchScript leaves `sigmoid(z).squeeze(-1)` with a dynamic batch."""
    p = g.op("Sigmoid", g.op("Unsqueeze", z, g.constant([1], np.int64)))
    size = g.op("Gather", g.op("Shape", p), g.constant(-1, np.int64), axis=0)
    one = g.op("Equal", size, g.constant(1, np.int64))
    axis = g.constant([1], np.int64)
    then = helper.make_node("Squeeze", [p, axis], ["s"])
    other = helper.make_node("Identity", [p], ["t"])
    g.op("If", one, name="p_ai", then_branch=branch([then], "s"), else_branch=branch([other], "t"))


def nested_if(g: Edit, z: str) -> None:
    """Of two branches one is another If, whose branches read what is around both."""
    p = g.op("Sigmoid", z)
    rank = g.op("Size", g.op("Shape", p))
    one = g.op("Equal", rank, g.constant(1, np.int64))
    same = helper.make_node("Identity", [p], ["s"])
    zero = helper.make_node("Sub", [p, p], ["t"])
    inner = helper.make_node(
        "If", [one], ["u"], then_branch=branch([same], "s"), else_branch=branch([zero], "t")
    )
    far = helper.make_node("Neg", [p], ["v"])
    g.op("If", one, name="p_ai", then_branch=branch([inner], "u"), else_branch=branch([far], "v"))


def value(name: str, kind: int = TensorProto.FLOAT, shape: Any = None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def looped(g: Edit, z: str) -> None:
    """Three steps, each of which adds 0.5 to the logit."""
    steps = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still"]),
            helper.make_node("Add", ["x", g.constant(0.5)], ["y"]),
        ],
        "body",
        [
            *(value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, [])),
            value("x", shape=["n"]),
        ],
        [value("still", TensorProto.BOOL, []), value("y", shape=["n"])],
    )
    count, true = g.constant(3, np.int64), g.constant(True, np.bool_)
    g.op("Sigmoid", g.op("Loop", count, true, z, body=steps), name="p_ai")


def scanned(g: Edit, z: str) -> None:
    """A sum over two rows, of the logit and half of it, from the last to the first."""
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "row"], ["y"]), helper.make_node("Neg", ["row"], ["seen"])],
        "body",
        [value("x", shape=["n"]), value("row", shape=["n"])],
        [value("y", shape=["n"]), value("seen", shape=["n"])],
    )
    axis = g.constant([0], np.int64)
    rows = [g.op("Unsqueeze", x, axis) for x in (z, g.op("Mul", z, g.constant(0.5)))]
    stack = g.op("Concat", *rows, axis=0)
    zero = g.op("Mul", z, g.constant(0.0))
    node = helper.make_node("Scan", [zero, stack], ["sum", "rows"], body=body, num_scan_inputs=1)
    node.attribute.append(helper.make_attribute("scan_input_directions", [1]))
    g.added.append(node)
    g.op("Sigmoid", "sum", name="p_ai")


@pytest.mark.parametrize("make", [squeezed_if, nested_if, looped])
def test_control_flow_that_shapes_decide_is_inlined(files, tmp_path, make):
    native(Edit(files()).after(make, tmp_path / "m.onnx"), heard())


def test_a_scan_runs_and_is_the_reason(files, tmp_path):
    """Its steps are inlined; that they stack segments behind another axis no layer does."""
    path = Edit(files()).after(scanned, tmp_path / "m.onnx")
    weights = import_model(path)
    audio = heard()
    backend = load_backend("numpy" if weights.provenance["route"] == "native" else "xla", weights)
    np.testing.assert_allclose(backend(audio), expected(path, audio), atol=5e-5)
    assert "sigmoid" not in weights.provenance["reason"]


def test_names_of_one_value_and_casts_to_the_same_type_do_not_hide_a_network(files, tmp_path):
    g = Edit(files())
    for k, node in enumerate(list(g.graph.node)):
        if node.op_type in ("Mul", "Log", "Conv", "MatMul", "ReduceMax") and len(node.output) == 1:
            out, node.output[0] = node.output[0], f"{node.output[0]}/first"
            places = [i for i, other in enumerate(g.graph.node) if other is node]
            at = places[0] if places else list(g.graph.node).index(node)
            chain = [
                helper.make_node("Identity", [f"{out}/first"], [f"{out}/second"]),
                helper.make_node("Cast", [f"{out}/second"], [f"{out}/third"], to=1),
                helper.make_node("Dropout", [f"{out}/third"], [out], name=f"drop {k}"),
            ]
            for step, added in enumerate(chain):
                g.graph.node.insert(at + 1 + step, added)
    native(g.save(tmp_path / "m.onnx"), heard())


# --- outputs -------------------------------------------------------------------------------------


def pair(g: Edit, z: str, scale: float = 1.0) -> str:
    """Two logits whose difference is the logit: [n, 2]."""
    z = g.op("Unsqueeze", z, g.constant([1], np.int64))
    return g.op("Gemm", z, g.constant([[-0.5 * scale, 0.5 * scale]]))


def two_columns(g: Edit, z: str) -> None:
    g.op("Softmax", pair(g, z), name="p_ai", axis=-1)


def two_logits(g: Edit, z: str) -> None:
    g.op("Identity", pair(g, z, 3.0), name="p_ai")


def one_logit(g: Edit, z: str) -> None:
    g.op("Mul", z, g.constant(50.0), name="p_ai")


def test_a_column_may_be_the_score(command, files, tmp_path):
    path = Edit(files()).after(two_columns, tmp_path / "m.onnx", "batch", 2)
    with pytest.raises(ConvertError, match=r"2 values .* AI with --score-output p_ai:0 or p_ai:1$"):
        import_model(path)
    audio = heard()
    columns = expected(path, audio)
    for column in (0, 1):
        native(path, audio, columns[:, column], output=f"p_ai:{column}")
    with pytest.raises(ConvertError, match="p_ai:2: this output has 2 columns"):
        import_model(path, output="p_ai:2")
    with pytest.raises(ConvertError, match="no output 'q:1': it has p_ai"):
        import_model(path, output="q:1")
    with pytest.raises(ConvertError, match="--logit: p_ai is no logit: it is the output of Softma"):
        import_model(path, output="p_ai:1", logit=True)
    out = tmp_path / "w.safetensors"
    done = command("convert", path, "-o", out, "--score-output", "p_ai:1")
    assert done.code == 0, done.err
    assert "p_ai:1: a score for each segment" in done.out
    verified = command("verify", path, out, "--backends", "numpy")
    assert verified.code == 0, verified.out
    assert command("verify", path, "--backends", "numpy").code == 2


def test_logits_are_named_and_become_scores(command, files, tmp_path):
    path = Edit(files()).after(one_logit, tmp_path / "m.onnx")
    with pytest.raises(
        ConvertError, match=r"not a probability; if it is a logit, convert .*--logit"
    ):
        import_model(path)
    audio = heard()
    native(path, audio, 1 / (1 + np.exp(-expected(path, audio).astype(float))), logit=True)
    done = command("convert", path, "-o", tmp_path / "w.safetensors", "--logit")
    assert done.code == 0, done.err
    verified = command("verify", path, tmp_path / "w.safetensors", "--backends", "numpy")
    assert verified.code == 0, verified.out


def test_columns_of_logits_become_scores_by_their_softmax(files, tmp_path):
    path = Edit(files()).after(two_logits, tmp_path / "m.onnx", "batch", 2)
    with pytest.raises(ConvertError, match="p_ai:0 or p_ai:1; with --logit, where they are logits"):
        import_model(path)
    audio = heard()
    z = expected(path, audio).astype(float)
    native(path, audio, np.exp(z[:, 1]) / np.exp(z).sum(1), output="p_ai:1", logit=True)


def test_logits_that_happen_to_lie_in_the_unit_interval_are_no_scores(files, tmp_path):
    """By other audio: loud, quiet, silent; and by the layer that they come from."""

    def linear(g: Edit, z: str) -> None:
        z = g.op("Unsqueeze", z, g.constant([1], np.int64))
        weight, bias = g.constant([[-1e-4]]), g.constant([0.5])
        g.op("Reshape", g.op("Gemm", z, weight, bias), g.constant([-1], np.int64), name="p_ai")

    def loud(g: Edit, z: str) -> None:
        """0.5, and more than 1 for what is as loud as full-scale noise alone."""
        mean = g.op("ReduceMean", g.op("Abs", "audio"), g.constant([1], np.int64), keepdims=0)
        over = g.op("Relu", g.op("Sub", mean, g.constant(0.4)))
        g.op("Add", g.op("Mul", g.constant(100.0), over), g.op("Sigmoid", z), name="p_ai")

    path = Edit(files()).after(linear, tmp_path / "m.onnx")
    with pytest.raises(
        ConvertError, match=r"linear layer \(Gemm node .*: not a probability; .*--lo"
    ):
        import_model(path)
    path = Edit(files()).after(loud, tmp_path / "m.onnx")
    with pytest.raises(
        ConvertError, match=r"on a probe on .*full-scale noise.*: not a probability"
    ):
        import_model(path)


# --- float64 -------------------------------------------------------------------------------------


def test_the_graph_in_float64(files):
    """As the network that it was exported from, computed in float64 by NumPy."""
    original = member(4, KINDS, SHORT)
    network = NumpyNetwork(original.config, original.tensors, np.float64)
    audio = heard()[:3]
    want = [float(network(x.astype(np.float64))) for x in audio]
    exact = Exact(read_graph(files()), ["p_ai"])
    found = np.concatenate([exact(x[None])["p_ai"] for x in audio])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_verify_exact_says_who_is_nearer(command, files, tmp_path):
    """Tuned weights lie farther from the file in float64 than the file in onnxruntime."""
    args = ("verify", files(), "--exact", "--backends", "numpy")
    done = command(*args, "--json")
    report = json.loads(done.out)
    assert (done.code, report["against"]) == (0, "float64")
    assert list(report["backends"]) == ["file", "numpy"]
    assert report["backends"]["file"]["track_dp"] < 1e-4
    assert not report["backends"]["file"]["counted"]
    weights = import_model(files())
    tensors = {k: v * np.float32(1.01) for k, v in weights.tensors.items() if "unet" in k}
    tuned = dataclasses.replace(weights, tensors={**weights.tensors, **tensors})
    write_weights(tuned, tmp_path / "w.safetensors")
    done = command("verify", files(), tmp_path / "w.safetensors", *args[2:])
    assert "nearer to float64: onnxruntime, they part at: mask" in " ".join(done.out.split())
    assert "error against float64" in done.out


def test_sensitive_networks_are_warned_of(files):
    weights = import_model(files())
    assert weights.provenance["quiet_difference"] < 1e-4
    assert "WARNING" not in str(describe(weights))
    provenance = {**weights.provenance, "quiet_difference": 3e-4}
    table = str(describe(dataclasses.replace(weights, provenance=provenance)))
    assert "WARNING: |dp| 3.0e-04 on quiet and sparse audio" in table


# --- reasons -------------------------------------------------------------------------------------


def test_a_recurrent_layer_is_the_reason(files, tmp_path):
    g = Edit(files())
    hidden = next(node for node in g.graph.node if node.op_type == "Gemm")
    x = g.op("Unsqueeze", hidden.input[0], g.constant([0], np.int64))
    weight = next(w for w in g.graph.initializer if w.name == hidden.input[1])
    transposed = any(a.name == "transB" and a.i for a in hidden.attribute)
    features = weight.dims[1 if transposed else 0]
    rng = np.random.default_rng(0)
    w = g.constant(rng.standard_normal((1, 3 * features, features)) * 0.1)
    r = g.constant(rng.standard_normal((1, 3 * features, features)) * 0.1)
    node = helper.make_node("GRU", [x, w, r], ["", "last"], name="gru", hidden_size=features)
    g.added.append(node)
    hidden.input[0] = g.op("Squeeze", "last", g.constant([0], np.int64))
    place = list(g.graph.node).index(hidden)
    for added in reversed(g.added):
        g.graph.node.insert(place, added)
    weights = import_model(g.save(tmp_path / "m.onnx"))
    assert (
        weights.provenance["reason"] == "GRU node 'gru': a recurrent layer, which no layer here is"
    )


def test_a_score_that_is_no_sigmoid_says_what_it_is(files, tmp_path):
    def clipped(g: Edit, z: str) -> None:
        half = g.op("Add", g.op("Mul", z, g.constant(0.1)), g.constant(0.5))
        g.op("Clip", half, g.constant(0.0), g.constant(1.0), name="p_ai")

    weights = import_model(Edit(files()).after(clipped, tmp_path / "m.onnx"))
    assert weights.provenance["route"] == "graph"
    assert "is made by Add node" in weights.provenance["reason"]


def test_half_precision_is_said(tmp_path):
    """A graph of halves runs as it is, spectrum included, and the table says what it is."""
    nodes = [
        helper.make_node("STFT", ["audio", "hop", "window"], ["spectrum"], onesided=1),
        helper.make_node("Mul", ["spectrum", "spectrum"], ["power"]),
        helper.make_node("ReduceMean", ["power"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Log", ["mean"], ["log"]),
        helper.make_node("Sigmoid", ["log"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT16, (1, 8192))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, (1,))],
        [
            numpy_helper.from_array(np.asarray(64, np.int64), "hop"),
            numpy_helper.from_array(np.hanning(128).astype(np.float16), "window"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "half.onnx")
    weights = import_model(tmp_path / "half.onnx")
    assert weights.provenance["route"] == "graph"
    assert "float16" in weights.provenance["reason"]
    assert ("precision", "the network is half precision: its tensors are float16") in describe(
        weights
    )
    audio = segments(1, 8192)
    frames = np.lib.stride_tricks.sliding_window_view(audio[0].astype(np.float16), 128)[::64]
    spectrum = np.fft.rfft(frames.astype(float) * np.hanning(128))
    power = np.mean(np.stack([spectrum.real, spectrum.imag]) ** 2)
    assert load_backend("xla", weights)(audio)[0] == pytest.approx(power / (1 + power), abs=3e-3)
