"""int8 graphs in onnxruntime: what is quantised, what it costs, what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from artifactnet_jax.backends import engine
from artifactnet_jax.convert.export import build_onnx
from artifactnet_jax.convert.export_cache import metadata
from artifactnet_jax.convert.quantise import kept_float, quantise
from artifactnet_jax.detector import Detector
from artifactnet_jax.models import load_backend, open_model
from artifactnet_jax.weights import load_weights


@pytest.fixture(scope="module")
def segments(weights_path) -> np.ndarray:
    rng = np.random.default_rng(0)
    samples = load_weights(weights_path).config.front_end.segment_samples
    return (rng.standard_normal((4, samples)) * [[0.01], [0.05], [0.1], [0.2]]).astype(np.float32)


def run(model: onnx.ModelProto, audio: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: audio})[0]


def test_inner_convolutions_are_quantised_and_no_others(weights_path, segments):
    model = build_onnx(load_weights(weights_path))
    before = model.SerializeToString()
    done = quantise(model, segments)
    assert model.SerializeToString() == before  # onnxruntime works on a copy
    onnx.checker.check_model(done, full_check=True)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    first = [node.name for node in convolutions if node.name.startswith("unet/")]
    kept = set(kept_float(model))
    # Nothing stands before the first convolution of either network, nor behind the UNet's last.
    assert {first[0], first[-1]} < kept
    assert next(node.name for node in convolutions if node.name.startswith("cnn/")) in kept
    made_by = {name: node.op_type for node in done.graph.node for name in node.output}
    for node in done.graph.node:
        if node.op_type == "Conv":
            inputs = [made_by.get(name) for name in node.input[:2]]
            quantised = inputs == ["DequantizeLinear"] * 2
            assert quantised == (node.name not in kept), node.name
    assert len(kept) < len(convolutions)
    weights = [entry for entry in done.graph.initializer if entry.name.endswith("_quantized")]
    low, high = zip(
        *[
            (a.min(), a.max())
            for a in map(onnx.numpy_helper.to_array, weights)
            if a.dtype == np.int8
        ],
        strict=True,
    )
    assert -64 <= min(low) < 0 < max(high) <= 64  # 7 bits


def test_scores_are_near_those_of_float32_and_do_not_depend_on_the_batch(
    weights_path, segments, tmp_path
):
    model, out = build_onnx(load_weights(weights_path)), tmp_path / "int8.onnx"
    onnx.save(quantise(model, segments), out)
    backend = load_backend("onnxruntime", open_model(out, "onnxruntime"))
    expected, found = run(model, segments), backend(segments)
    assert not np.array_equal(expected, found)
    np.testing.assert_allclose(found, expected, atol=0.1)  # random weights magnify rounding
    alone = np.concatenate([backend(segment[None]) for segment in segments])
    assert alone.tobytes() == found.tobytes()


def test_the_verb_writes_a_graph_that_scores_and_says_what_it_costs(
    weights_path, tracks, command, tmp_path
):
    out = tmp_path / "int8.onnx"
    done = command("export", weights_path, "-o", out, "--precision", "int8", "--calibrate", tracks)
    assert (done.code, done.err.count("wrote")) == (0, 1)
    # Of three tracks the first and the third give ranges.
    assert done.out.startswith("int8 against fp32, 1 tracks that gave no ranges: ")
    notes = metadata(out.read_bytes())
    assert (notes["precision"], notes["form"]) == ("int8", "segment")
    assert notes["weights_sha256"] == load_weights(weights_path).sha256
    row, plain = (
        json.loads(
            command(
                *("score", tracks / "b.wav", "--weights", file, "--backend", "onnxruntime"),
                *("--format", "jsonl", "--segments", 7),
            ).out
        )
        for file in (out, weights_path)
    )
    moved = abs(row["score"] - plain["score"])
    assert 0 < moved < 0.1
    assert f"{moved:.4f} in the median, {moved:.4f} at most" in done.out


def test_tracks_that_cannot_be_read_are_named_and_do_not_stop_the_others(
    weights_path, tracks, command, tmp_path
):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    names = [tracks / "a.wav", tracks / "b.wav", broken, tracks / "c.flac"]
    done = command(
        *("export", weights_path, "-o", tmp_path / "m.onnx"),
        *("--precision", "int8", "--calibrate", *names),
    )
    assert done.code == 1
    assert "broken.wav" in done.err
    assert "2 tracks that gave no ranges" in done.out
    assert metadata((tmp_path / "m.onnx").read_bytes())["precision"] == "int8"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--precision", "int8"], "name music to take ranges from with --calibrate"),
        (["--precision", "int8", "--form", "song", "--calibrate", "a.wav"], "use --form segment"),
        (["--precision", "fp16", "--calibrate", "a.wav"], "--calibrate is for --precision int8"),
        (["--precision", "int8", "--calibrate", "a.wav"], "name two or more that can be read"),
        (["--precision", "int8", "--calibrate", "none.wav", "a.wav"], "none.wav"),
        (["--precision", "int8", "--calibrate", "a.wav", "none.wav"], "nothing is left to compare"),
    ],
)
def test_what_is_refused(weights_path, tracks, command, tmp_path, monkeypatch, options, cause):
    monkeypatch.chdir(tracks)
    done = command("export", weights_path, "-o", tmp_path / "m.onnx", *options)
    assert done.code == 2
    assert cause in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "m.onnx").exists()


def test_such_a_graph_runs_in_onnxruntime_alone(weights_path, tracks, command, segments, tmp_path):
    out = tmp_path / "int8.onnx"
    onnx.save(quantise(build_onnx(load_weights(weights_path)), segments), out)
    # It cannot be converted back, so "auto" takes it as it is.
    detector = Detector(out)
    assert detector.backend.name == "onnxruntime"
    assert detector.score(tracks / "a.wav").score is not None
    done = command("score", tracks, "--weights", out, "--backend", "numpy")
    assert done.code == 2
    assert "an exported graph, which numpy cannot run: use --backend onnxruntime" in done.err
    with pytest.raises(ValueError, match="is int8, for onnxruntime on a CPU: export it again"):
        engine.recipe_for(open_model(out), "tensorrt", "no matter which", precision="int8")
