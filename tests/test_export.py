"""ONNX out: the lean graph in onnxruntime against the NumPy pipeline, and files written back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from artifactnet_jax import config as cfg
from artifactnet_jax.convert.export import STAGES, build_onnx, export
from artifactnet_jax.convert.graph import read_graph
from artifactnet_jax.layers import layer, shapes
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import ForeignGraph, Weights, random_tensors
from onnx_audio import segment

TOLERANCE = 1e-5  # of a score
SMALL = cfg.FrontEnd(
    segment_samples=8000,
    n_fft=256,
    hop=128,
    stft_pad=128,
    hpss_width=7,
    percussive_width=9,
    n_mels=24,
)
V94 = cfg.UNet(widths=(4, 6), bottleneck=8)
EDGE = cfg.UNet(patch=(4, 4), stem=8, widths=(4,), bottleneck=8, input_scale="log")
CNN = cfg.CNN(widths=(4, 6, 8), hidden=5)


def make(front_end: cfg.FrontEnd = SMALL, unet: Any = V94, cnn: Any = CNN, **verdict: Any) -> Any:
    """Random weights whose scores of music lie well inside (0, 1)."""
    config = cfg.Config("test", front_end, unet, cnn, cfg.Decision(**verdict))
    tensors = random_tensors(config, seed=1)
    if isinstance(cnn, cfg.CNN):
        audio = music(front_end.segment_samples)[0]
        tensors["cnn.out.kernel"] *= 0.1
        score = NumpyNetwork(config, tensors)(audio)
        tensors["cnn.out.bias"] -= np.log(score / (1 - score)) - 0.3
    return Weights("test", config, tensors, "0" * 64, "CC0", {})


def music(samples: int) -> np.ndarray:
    """Music, noise and digital silence: [3, samples]."""
    noise = np.random.default_rng(2).standard_normal(samples) * 0.1
    notes = segment(0, max(samples, 8000))[:samples]
    return np.stack([notes, noise, np.zeros(samples)]).astype(np.float32)


def load(model: Any) -> Callable[..., list[np.ndarray]]:
    """A model, which is checked, or a file, as a function of audio and the outputs wanted."""
    source = model
    if not isinstance(model, str):
        onnx.checker.check_model(model, full_check=True)
        source = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda audio, *outputs: session.run(outputs or None, {entry.name: audio})


def run(model: Any, audio: np.ndarray, *outputs: str) -> list[np.ndarray]:
    return load(model)(audio, *outputs)


def expected(weights: Weights, audio: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    network = NumpyNetwork(weights.config, weights.tensors, dtype)
    return np.array([network(row.astype(dtype)) for row in audio])


# --- the lean graph ------------------------------------------------------------------------------


@pytest.mark.parametrize("unet", [V94, EDGE], ids=["v94", "edge"])
def test_segment_graph_equals_the_numpy_pipeline(unet: cfg.UNet) -> None:
    weights, audio = make(unet=unet), music(SMALL.segment_samples)
    score_of = load(build_onnx(weights))
    (scores,) = score_of(audio)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected(weights, audio), atol=TOLERANCE)
    assert scores.min() > 0.001
    assert scores.max() < 0.999
    for row, score in zip(audio, scores, strict=True):
        np.testing.assert_allclose(score_of(row[None]), [[score]], atol=1e-6)


def test_a_large_front_end_equals_the_numpy_pipeline() -> None:
    weights = make(cfg.FrontEnd(), unet=cfg.UNet(widths=(2,), bottleneck=2, patch=(8, 8), stem=2))
    audio = music(176_400)[:1]
    np.testing.assert_allclose(
        run(build_onnx(weights), audio)[0], expected(weights, audio), atol=TOLERANCE
    )


def test_stages_equal_the_numpy_pipeline_in_float64() -> None:
    weights, audio = make(), music(SMALL.segment_samples)[0]
    network = NumpyNetwork(weights.config, weights.tensors, np.float64)
    truth = network.stages(audio.astype(np.float64))
    stages = run(build_onnx(weights, stages=True), audio[None], *STAGES)
    for name, stage in zip(STAGES, stages, strict=True):
        value = truth[name]
        assert stage.shape == (1, *value.shape), name
        # Quiet bands lie near float32's rounding of the loud ones, 100 dB above.
        atol = {"views": 1e-2, "channels": 3e-3}.get(name, 3e-5)
        np.testing.assert_allclose(stage[0], value, atol=atol, err_msg=name)


FRONT_ENDS: dict[str, dict[str, Any]] = {
    "hop does not divide the window": {"n_fft": 240, "hop": 100, "stft_pad": 120},
    "odd prime window, no padding": {"n_fft": 251, "hop": 251, "stft_pad": 0},
    "zeros around": {"stft_edge": "constant", "hpss_edge": "constant"},
    "edges repeated": {"stft_edge": "edge", "hpss_edge": "edge"},
    "power spectrum": {"spectrum_power": 2.0, "spectrum_eps": 1e-8, "spectrum_scale": 0.5},
    "odd power": {"spectrum_power": 1.5, "spectrum_eps": 1e-8, "spectrum_scale": 2.0},
    "soft masks": {"hpss_power": 1.0, "hpss_eps": 1e-3, "hpss_width": 1, "percussive_width": 3},
    "median wider than the plane": {"hop": 800, "hpss_width": 31, "percussive_width": 17},
    "given": {"window": "given", "mel_scale": "given"},
    "htk": {"mel_scale": "htk", "mel_norm": "none", "mel_power": 1.0},
    "decibels": {"amin_rule": "add", "amin": 1e-6, "db_factor": 20.0, "top_db": 60.0},
    "no clamp": {"top_db": None, "channels": ("flux", "mel_P")},
    "each view": {"joint": "view", "top_db": 20.0, "channels": ("delta2", "ratio", "mel_H")},
}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_front_ends(name: str) -> None:
    fe = dataclasses.replace(SMALL, **FRONT_ENDS[name])
    weights, audio = make(fe), music(fe.segment_samples)
    if fe.window == "given":
        weights.tensors["front_end.window"][:] = np.hamming(fe.n_fft)
        weights.tensors["front_end.mel"][:3] += 0.01
    np.testing.assert_allclose(
        run(build_onnx(weights), audio)[0], expected(weights, audio), atol=TOLERANCE
    )


# Operator, attributes, tensors, and whether it takes a vector. The expected values are those of the
# NumPy executor, whose own oracle is onnxruntime's operators (tests/test_layers.py).
C, H, W = 12, 9, 8
MAPS = dataclasses.replace(
    SMALL,
    segment_samples=(W - 1) * 32,
    n_fft=64,
    hop=32,
    stft_pad=32,
    hpss_width=3,
    percussive_width=3,
    n_mels=H,
    channels=(*cfg.CHANNELS, *cfg.CHANNELS)[:C],
)
VECTOR = True
OPERATORS: list[tuple[Any, ...]] = [
    ("conv", {"padding": ((1, 1), (1, 1))}, {"kernel": (3, 3, C, 4), "bias": (4,)}),
    (
        "conv",
        {"strides": (2, 1), "padding": ((0, 2), (1, 0)), "dilations": (1, 2), "groups": 2},
        {"kernel": (4, 2, C // 2, 4)},
    ),
    ("conv_transpose", {"strides": (2, 2)}, {"kernel": (2, 2, C, 3), "bias": (3,)}),
    (
        "conv_transpose",
        {"strides": (2, 3), "padding": ((1, 0), (1, 1)), "output_padding": (1, 0)},
        {"kernel": (3, 4, C, 5)},
    ),
    ("linear", {}, {"kernel": (C, 3), "bias": (3,)}, VECTOR),
    ("linear", {}, {"kernel": (C, 3)}, VECTOR),
    ("batch_norm", {"epsilon": 1e-3}, dict.fromkeys(("scale", "bias", "mean", "var"), (C,))),
    ("batch_norm", {}, dict.fromkeys(("scale", "bias", "mean", "var"), (C,)), VECTOR),
    ("group_norm", {"groups": 3}, {"scale": (C,), "bias": (C,)}),
    ("group_norm", {"groups": C, "epsilon": 0.1}, {}),
    ("group_norm", {"groups": 2}, {"scale": (C,), "bias": (C,)}, VECTOR),
    ("prelu", {}, {"slope": (C,)}),
    ("prelu", {}, {"slope": (1,)}, VECTOR),
    ("max_pool", {"kernel": (3, 2), "strides": (2, 2), "padding": ((1, 1), (0, 1))}, {}),
    ("avg_pool", {"kernel": (2, 2), "strides": (2, 2)}, {}),
    ("avg_pool", {"kernel": (3, 3), "padding": ((1, 1), (1, 1)), "count_include_pad": True}, {}),
    ("mean", {"axes": "hw"}, {}),
    ("mean", {"axes": "c"}, {}, VECTOR),
    ("max", {"axes": "c"}, {}),
    ("sum", {"axes": "cw"}, {}),
    ("pad", {"padding": ((1, 2), (0, 3)), "mode": "reflect"}, {}),
    ("pad", {"padding": ((1, 2), (0, 3)), "mode": "edge"}, {}),
    ("pad", {"padding": ((1, 2), (0, 3)), "mode": "constant", "value": -1.5}, {}),
    ("slice", {"axis": "h", "start": 1, "stop": 8, "step": 3}, {}),
    ("slice", {"axis": "c", "start": 3, "stop": 6}, {}, VECTOR),
    ("transpose_hw", {}, {}),
    ("depth_to_space", {"rows": 3, "cols": 2, "order": "DCR"}, {}),
    ("depth_to_space", {"rows": 2, "cols": 2, "order": "CRD"}, {}),
    ("space_to_depth", {"rows": 3, "cols": 2, "order": "CRD"}, {}),
    ("space_to_depth", {"rows": 3, "cols": 2, "order": "DCR"}, {}),
    ("flatten", {}, {}),
    ("softmax", {"axis": "w"}, {}),
    ("softmax", {"axis": "c"}, {}, VECTOR),
    *((op, {}, {}) for op in ("relu", "sigmoid", "tanh", "softplus", "softsign", "mish")),
    *((op, {}, {}) for op in ("hard_swish", "exp", "log", "sqrt", "reciprocal", "abs", "erf")),
    ("neg", {}, {}, VECTOR),
    ("gelu", {"approximate": "none"}, {}),
    ("gelu", {"approximate": "tanh"}, {}),
    ("leaky_relu", {"alpha": 0.2}, {}),
    ("elu", {"alpha": 0.7}, {}),
    ("celu", {"alpha": 0.7}, {}),
    ("selu", {}, {}),
    ("hard_sigmoid", {"alpha": 0.3, "beta": 0.4}, {}),
    ("clip", {"low": -0.5, "high": None}, {}),
    ("clip", {"low": None, "high": 0.5}, {}),
    ("add", {"value": 0.5}, {}),
    ("sub", {"value": 0.5, "reverse": True}, {}),
    ("div", {"value": 3.0}, {}),
    ("pow", {"value": 1.5}, {}),
    ("mul", {}, {"value": (C, 1, 1)}),
    ("maximum", {}, {"value": (H, W)}),
    ("minimum", {"reverse": True}, {"value": (C,)}, VECTOR),
    *(
        (
            "resize",
            dict(size=size, scales=scales, mode=mode, coordinates=coordinates, rounding=rounding),
            {},
        )
        for size, scales in (
            ((2 * H, 3 * W), (2.0, 3.0)),
            ((13, 11), (13 / H, 11 / W)),
            ((H, 9), (1.0, 1.2)),
        )
        for mode, coordinates, rounding in (
            ("nearest", "asymmetric", "floor"),
            ("nearest", "half_pixel", "round_prefer_ceil"),
            ("linear", "half_pixel", "round_prefer_floor"),
            ("linear", "align_corners", "round_prefer_floor"),
        )
    ),
]
POSITIVE = ("log", "sqrt", "reciprocal", "pow")
PRECISIONS: dict[Any, float] = {"fp32": 1e-4, "fp16": 0.05}
SIGMOID = cfg.Imported((layer("mask", "sigmoid", ("input",)),), 1.0)


def classifier(*ops: tuple[Any, ...]) -> cfg.Imported:
    """Operators in a row between a 1x1 convolution and a linear layer, as a CNN on `MAPS`."""
    layers, last, shape = [], "input", (C, H, W)

    def add(name: str, op: str, attributes: Any = None, tensors: Any = None, *more: str) -> None:
        nonlocal last, shape
        layers.append(layer(name, op, (last, *more), attributes, tensors))
        last, shape = name, shapes(layers, (C, H, W))[name]

    add("scaled", "mul", {"value": 0.05})
    add("mixed", "conv", {}, {"kernel": (1, 1, C, C), "bias": (C,)})
    for k, (op, attributes, tensors, *vector) in enumerate(ops):
        if vector:
            add(f"mean{k}", "mean", {"axes": "hw"})
            add(f"vector{k}", "flatten")
        if op in POSITIVE:
            add(f"abs{k}", "abs")
            add(f"shifted{k}", "add", {"value": 0.5})
        add(f"op{k}", op, attributes, tensors)
    if len(shape) == 3:
        add("vector", "flatten")
    add("out", "linear", {}, {"kernel": (*shape, 1), "bias": (1,)})
    return cfg.Imported(tuple(layers))


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case[0])
def test_operators(case: tuple[Any, ...]) -> None:
    weights, audio = make(MAPS, SIGMOID, classifier(case)), music(MAPS.segment_samples)
    network = NumpyNetwork(weights.config, weights.tensors)
    logits = [network.logit(segment) for segment in audio]
    # The kernels are scaled to keep the spread of their input, so that logits are of order 1.
    for precision, tolerance in PRECISIONS.items():
        model = build_onnx(weights, precision=precision, stages=True)
        got = run(model, audio, "logit")[0]
        np.testing.assert_allclose(got, logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", OPERATORS, ids=lambda case: case[0])
def test_tensorrt_reads_the_operators(case: tuple[Any, ...]) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs artifactnet-jax[rtx]")
    weights, log = make(MAPS, SIGMOID, classifier(case)), trt.Logger(trt.Logger.ERROR)
    for precision in PRECISIONS:
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        read = parser.parse(build_onnx(weights, precision=precision).SerializeToString())
        assert read, parser.get_error(0).desc()


def test_networks_that_branch() -> None:
    """Skips joined by concat and add, a squeeze-excite gate, an output that is a map."""
    layers = (
        layer("a", "conv", ("input",), {"padding": ((1, 1), (1, 1))}, {"kernel": (3, 3, C, 4)}),
        layer("b", "conv", ("a",), {}, {"kernel": (1, 1, 4, 4), "bias": (4,)}),
        layer("sum", "add", ("a", "b")),
        layer("mean", "mean", ("sum",), {"axes": "hw"}),
        layer("gate", "sigmoid", ("mean",)),
        layer("gated", "mul", ("sum", "gate")),
        layer("both", "concat", ("gated", "input"), {"axis": "c"}),
        layer("c", "conv", ("both",), {}, {"kernel": (1, 1, C + 4, 1), "bias": (1,)}),
        layer("out", "mean", ("c",), {"axes": "hw"}),
    )
    weights, audio = make(MAPS, SIGMOID, cfg.Imported(layers)), music(MAPS.segment_samples)
    weights.tensors["cnn.c.kernel"] *= 0.01
    truth = expected(weights, audio)
    np.testing.assert_allclose(run(build_onnx(weights), audio)[0], truth, atol=TOLERANCE)
    half = run(build_onnx(weights, precision="fp16"), audio)[0]
    np.testing.assert_allclose(half, truth, atol=5e-3)


def test_a_tensor_is_no_constant_of_the_graph() -> None:
    """A bias of zeros, once tuned, must not move the zeros that a norm is given."""
    weights = make(MAPS, SIGMOID, classifier(("group_norm", {"groups": C}, {})))
    weights.tensors["cnn.mixed.bias"][:] = 0
    nodes = build_onnx(weights).graph.node
    assert [node.op_type for node in nodes if "cnn.mixed.bias" in node.input] == ["Conv"]


# --- songs, float16, what the file says ----------------------------------------------------------


@pytest.mark.parametrize("joint", ["segment", "song", "song_view"])
@pytest.mark.parametrize("aggregate", ["rms", "mean", "median"])
def test_song_graph(aggregate: str, joint: Any) -> None:
    weights = make(dataclasses.replace(SMALL, joint=joint, top_db=25.0), aggregate=aggregate)
    score_of = load(build_onnx(weights, form="song"))
    network = NumpyNetwork(weights.config, weights.tensors)
    audio = np.stack([music(SMALL.segment_samples)[k % 3] * gain for k, gain in enumerate(GAINS)])
    for count in (1, 2, 5, 6):
        views = np.stack([network.segment_db(network.magnitude(row)) for row in audio[:count]])
        peaks = views.max(axis=(2, 3))
        if joint == "song":
            peaks[:] = peaks.max()
        elif joint == "song_view":
            peaks[:] = peaks.max(axis=0)
        else:
            peaks[:] = peaks.max(axis=1, keepdims=True)
        logits = [network.logit_of_db(*pair) for pair in zip(views, peaks, strict=True)]
        p = 1 / (1 + np.exp(-np.float64(logits)))
        rms = np.sqrt(np.mean(audio[:count] ** 2, axis=1, dtype=np.float64))
        truth = {"rms": p @ (rms / (rms.sum() + 1e-9)), "mean": p.mean(), "median": np.median(p)}
        (score,) = score_of(audio[:count])
        assert score.dtype == np.float64
        assert score.shape == (1,)
        np.testing.assert_allclose(score, truth[aggregate], atol=TOLERANCE)


GAINS = (1.0, 0.3, 0.7, 0.1, 0.9, 0.5)


def test_song_scores_stay_in_range() -> None:
    weights = make(aggregate="rms")
    silence = np.zeros((3, SMALL.segment_samples), np.float32)
    assert run(build_onnx(weights, form="song"), silence)[0] == [0.0]
    weights.tensors["cnn.out.bias"][:] = 100
    (score,) = run(build_onnx(weights, form="song"), music(SMALL.segment_samples))
    assert 1 - 1e-6 <= score[0] <= 1


@pytest.mark.parametrize("form", ["segment", "song"])
@pytest.mark.parametrize("unet", [V94, EDGE], ids=["v94", "edge"])
def test_float16(unet: cfg.UNet, form: Any) -> None:
    weights, audio = make(unet=unet), music(SMALL.segment_samples)
    full = build_onnx(weights, form=form)
    half = build_onnx(weights, form=form, precision="fp16")
    np.testing.assert_allclose(run(half, audio)[0], run(full, audio)[0], atol=5e-3)
    loud = np.sign(np.sin(np.arange(3 * SMALL.segment_samples))).reshape(3, -1)
    assert np.isfinite(run(half, loud.astype(np.float32))[0]).all()
    types = {value.name: value.data_type for value in half.graph.initializer}
    assert types["unet.bottom.conv1.kernel"] == types["cnn.hidden.kernel"] == TensorProto.FLOAT16
    assert types["stft.first"] == types["mel"] == TensorProto.FLOAT
    assert half.ByteSize() < full.ByteSize()


def test_float16_refuses_what_it_cannot_hold() -> None:
    weights = make()
    weights.tensors["cnn.hidden.kernel"][0] = 1e5
    with pytest.raises(ValueError, match=r"tensor cnn\.hidden\.kernel leaves the range of float16"):
        build_onnx(weights, precision="fp16")


def test_the_file_says_what_it_is() -> None:
    weights = dataclasses.replace(make(), provenance={"source_sha256": "abc"})
    model = build_onnx(weights, form="song", precision="fp16")
    assert model.producer_name == "artifactnet-jax"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["licence"] == "CC0"
    assert said["weights"] == "test"
    assert said["source_sha256"] == "abc"
    assert said["config_sha256"] == weights.config.digest()
    stated = cfg.Config.from_dict(json.loads(said["artifactnet_jax.config"]))
    assert stated == weights.config
    assert not model.functions
    assert "STFT" not in {node.op_type for node in model.graph.node}


def test_usage_errors(tmp_path: Path) -> None:
    weights = make()
    with pytest.raises(ValueError, match="unknown form 'track'"):
        build_onnx(weights, form="track")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        build_onnx(weights, precision="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="were not recognised"):
        build_onnx(ForeignGraph("g", weights.config, {}, "", "", {}, {}))
    with pytest.raises(ValueError, match="a template keeps its own form and precision"):
        export(weights, tmp_path / "out.onnx", form="song", template=tmp_path / "in.onnx")
    with pytest.raises(ValueError, match="hold no map back"):
        export(weights, tmp_path / "out.onnx", template=tmp_path / "in.onnx")
    assert not list(tmp_path.iterdir())


def test_export_writes_the_graph(tmp_path: Path) -> None:
    weights, audio = make(), music(SMALL.segment_samples)
    export(weights, tmp_path / "out.onnx", precision="fp16")
    scores = run(str(tmp_path / "out.onnx"), audio)[0]
    assert np.array_equal(scores, run(build_onnx(weights, precision="fp16"), audio)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


# --- written back into the file they came from ---------------------------------------------------


def foreign(folder: Path, storage: str = "raw") -> tuple[Weights, Path]:
    """A file whose initialisers are stored in some way, and weights that come from it."""
    ops = (
        ("conv_transpose", {"strides": (2, 2)}, {"kernel": (2, 2, C, 3), "bias": (3,)}),
        ("prelu", {}, {"slope": (3,)}),
    )
    weights = make(dataclasses.replace(SMALL, **VIEWS), cnn=classifier(*ops))
    model = build_onnx(weights, precision="fp16" if storage in HALVES else "fp32")
    model.doc_string = "of another maker"
    names = [entry.name for entry in model.graph.initializer if "." in entry.name]
    entries = []
    for name in names:
        if name.startswith(("unet.", "cnn.")):
            rank, transform = len(weights_value(weights, name).shape), "same"
            if name.endswith("kernel") and rank == 4:
                transform = "IOHW" if ".up." in name or name == "cnn.op0.kernel" else "OIHW"
            elif name.endswith("slope"):
                transform = "reshape"
            elif name == "cnn.out.kernel":
                transform = "transpose"
            entries.append({"name": name, "tensor": name, "transform": transform})
    node = next(node for node in model.graph.node if "cnn.out.kernel" in node.input)
    node.attribute.append(helper.make_attribute("transB", 1))
    mapped = {entry["name"] for entry in entries}
    for entry in list(model.graph.initializer):
        if entry.name not in mapped:
            continue
        value = numpy_helper.to_array(entry)
        if entry.name == "cnn.out.kernel":
            value = np.ascontiguousarray(value.T)
        if storage in ("floats", "half integers"):
            entry.CopyFrom(
                helper.make_tensor(entry.name, entry.data_type, value.shape, value.ravel())
            )
        elif storage == "doubles":
            # More than float32 holds: a value that is left alone must keep it.
            stored = numpy_helper.from_array(value.astype(np.float64) * (1 + 1e-12), entry.name)
            stored.name = f"{entry.name}.double"
            cast = helper.make_node("Cast", [stored.name], [entry.name], to=TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
            entry.CopyFrom(stored)
        elif storage == "nodes":
            node = helper.make_node("Constant", [], [entry.name])
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(value)))
            model.graph.node.insert(0, node)
            model.graph.initializer.remove(entry)
        else:
            entry.CopyFrom(numpy_helper.from_array(value, entry.name))
    if storage == "doubles":
        entries = [{**entry, "name": f"{entry['name']}.double"} for entry in entries]
    path = folder / "original.onnx"
    folder.mkdir(exist_ok=True)
    external: dict[str, Any] = {}
    if storage == "external":
        # Shapes, which onnxruntime wants in the file, and short biases stay there.
        external = {"location": "original.data", "size_threshold": 128}
        external["save_as_external_data"] = True
    onnx.save(model, path, **external)
    provenance = {"source_sha256": read_graph(path).sha256, "initialisers": entries}
    return dataclasses.replace(weights, provenance=provenance), path


VIEWS: dict[str, Any] = {"n_mels": H, "channels": MAPS.channels, "segment_samples": (W - 1) * 128}


def weights_value(weights: Weights, name: str) -> np.ndarray:
    return folded(weights.config, weights.tensors)[1][name]


def tuned(weights: Weights) -> Weights:
    """A norm, a transposed convolution, a slope and the classifier's output are changed."""
    tensors = {name: tensor.copy() for name, tensor in weights.tensors.items()}
    for name in ("unet.encoder.1.norm1.scale", "unet.up.0.conv.kernel", "cnn.op1.slope"):
        tensors[name] *= 1.25
    tensors["cnn.out.kernel"][1::2] *= 0.75
    return dataclasses.replace(weights, tensors=tensors)


CHANGED = {
    *("unet.encoder.1.conv1.kernel", "unet.encoder.1.conv1.bias", "unet.up.0.kernel"),
    *("cnn.op1.slope", "cnn.out.kernel"),
}
HALVES = ("halves", "half integers")
STORAGES = ("raw", "floats", "halves", "half integers", "doubles", "nodes", "external")


def constants(path: Path) -> dict[str, np.ndarray]:
    """Initialisers and Constant nodes of a file."""
    model = onnx.load(path)
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return {name.removesuffix(".double"): value for name, value in values.items()}


@pytest.mark.parametrize("storage", STORAGES)
def test_template(storage: str, tmp_path: Path) -> None:
    weights, original = foreign(tmp_path / "in", storage)
    out = tmp_path / "out" / "tuned.onnx"
    out.parent.mkdir()
    files = {path.name: path.read_bytes() for path in original.parent.iterdir()}
    written = {"tuned.onnx": "original.onnx", "original.data": "original.data"}

    export(weights, out, template=original)
    for path in out.parent.iterdir():
        assert path.read_bytes() == files[written[path.name]]

    new = tuned(weights)
    export(new, out, template=original)
    assert {path.name: path.read_bytes() for path in original.parent.iterdir()} == files
    before, after = constants(original), constants(out)
    assert list(before) == list(after)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == CHANGED
    model, template = onnx.load(out), onnx.load(original)
    for graph in (model.graph, template.graph):
        del graph.initializer[:]
        for node in graph.node:
            if node.op_type == "Constant":
                del node.attribute[:]
    assert model == template

    audio = music(weights.config.front_end.segment_samples)
    lean = build_onnx(new, precision="fp16" if storage in HALVES else "fp32")
    np.testing.assert_allclose(run(str(out), audio), run(lean, audio), atol=TOLERANCE)


def test_template_errors(tmp_path: Path) -> None:
    weights, original = foreign(tmp_path / "in", "external")
    new, out = tuned(weights), tmp_path / "out.onnx"
    found = dict(weights.provenance)

    def refused(match: str, path: Path = out, **changes: Any) -> None:
        changed = dataclasses.replace(new, provenance=found | changes)
        with pytest.raises(ValueError, match=match) as error:
            export(changed, path, template=original)
        assert "\n" not in str(error.value)

    refused("not the file that weights 'test' were converted from", source_sha256="0" * 64)
    refused("this is the template; write to another file", path=original)
    refused("would overwrite the template's; write to another", path=original.parent / "b.onnx")
    entries = list(found["initialisers"])
    refused(
        "no initialiser 'nowhere'",
        initialisers=[*entries, {**entries[0], "name": "nowhere"}],
    )
    kernels = [entry for entry in entries if entry["name"].endswith("encoder.0.conv2.kernel")]
    refused(
        "serves both 'unet.encoder.0.conv2.kernel' and 'unet.encoder.1.conv2.kernel'",
        initialisers=[*entries, {**kernels[0], "tensor": "unet.encoder.1.conv2.kernel"}],
    )
    refused(
        "initialiser 'unet.head.bias' has 1 values, tensor 'unet.bottom.conv1.bias' 8",
        initialisers=[
            {**entry, "tensor": "unet.bottom.conv1.bias"}
            if entry["name"] == "unet.head.bias"
            else entry
            for entry in entries
        ],
    )
    refused("tensor 'cnn.out.bias' is computed in this file", initialisers=entries[:-1])
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["original.data", "original.onnx"]


def test_template_keeps_float16_in_range(tmp_path: Path) -> None:
    weights, original = foreign(tmp_path / "in", "halves")
    weights.tensors["cnn.out.kernel"][0] = 1e6
    with pytest.raises(ValueError, match=r"'cnn\.out\.kernel' leaves the range of float16"):
        export(weights, tmp_path / "out.onnx", template=original)


def test_template_may_be_a_link(tmp_path: Path) -> None:
    """As a cache of downloads keeps it: a link to a blob, its data a link beside it."""
    weights, original = foreign(tmp_path / "blobs", "external")
    (tmp_path / "snapshot").mkdir()
    for name in ("original.onnx", "original.data"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    out = tmp_path / "out.onnx"
    export(weights, out, template=tmp_path / "snapshot" / "original.onnx")
    assert out.read_bytes() == original.read_bytes()
    assert (tmp_path / "original.data").read_bytes() == (
        tmp_path / "blobs" / "original.data"
    ).read_bytes()
