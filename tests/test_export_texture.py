"""ONNX out with a texture head: the lean graph in onnxruntime against NumPy in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from artifactnet_jax import config as cfg
from artifactnet_jax import dsp_numpy
from artifactnet_jax.convert.contract import Contract
from artifactnet_jax.convert.describe import describe
from artifactnet_jax.convert.export import build_onnx, export
from artifactnet_jax.convert.graph import read_graph
from artifactnet_jax.convert.importer import import_model
from artifactnet_jax.convert.verify import candidates
from artifactnet_jax.forward import texture_statistics
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.texture import texture_shapes
from artifactnet_jax.weights import Weights, parameter_counts, random_tensors
from onnx_audio import segment
from tiny_model import TINY

SAMPLES = TINY.front_end.segment_samples
TEXTURE = cfg.Texture(
    resolutions=((512, 128), (2048, 512), (8192, 2048)),
    edges=(200.0, 1000.0, 3000.0, 8000.0, 16_000.0),
    lags=((0, 1), (0, 8), (8, 0), (1, 2), (2, -2)),
    hidden=(16, 8),
)
ONE = dataclasses.replace(TEXTURE, resolutions=((512, 128),))
OTHER = dataclasses.replace(TINY.front_end, spectrum_power=2.0)  # its magnitude is of no use


def make(texture: cfg.Texture = TEXTURE, seed: int = 1, **changes: Any) -> Weights:
    """Random weights, the mean and spread of the statistics those of some music and noise."""
    config = dataclasses.replace(TINY, texture=texture, **changes)
    tensors = random_tensors(config, seed)
    found = np.stack([statistics(config, row) for row in music()[:2]])
    tensors["texture.mean"] = found.mean(axis=0).astype(np.float32)
    tensors["texture.spread"] = (found.std(axis=0) + 0.1).astype(np.float32)
    tensors["texture.out.kernel"] *= 10  # an error of the head is seen in the score
    tensors["texture.out.bias"] += 5
    tensors["cnn.out.kernel"] *= 0.1
    return Weights("test", config, tensors, "0" * 64, "CC0", {})


def music() -> np.ndarray:
    """Noise, tones with a gap of digital silence, digital silence: [3, samples]."""
    noise = np.random.default_rng(2).standard_normal(SAMPLES) * 0.1
    notes = segment(0, SAMPLES).astype(np.float64)
    notes[SAMPLES // 3 : SAMPLES // 2] = 0
    return np.stack([noise, notes, np.zeros(SAMPLES)]).astype(np.float32)


def faint() -> np.ndarray:
    """Tones that come and go, far below any level of music: [samples]."""
    gate = np.where(np.arange(SAMPLES) // 1500 % 3 > 0, 1e-6, 3e-10)
    return (segment(1, SAMPLES) * gate).astype(np.float32)


def statistics(config: cfg.Config, audio: np.ndarray) -> np.ndarray:
    audio = audio.astype(np.float64)
    magnitude = dsp_numpy.stft_magnitude(audio, config.front_end)
    return texture_statistics(audio, magnitude, config, dsp_numpy)


def truth(weights: Weights, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and what the texture head adds to them, in float64."""
    network = NumpyNetwork(weights.config, weights.tensors, np.float64)
    logits, heads = [], []
    for row in audio.astype(np.float64):
        magnitude = network.magnitude(row)
        heads.append(network.texture_logit(row, magnitude))
        logits.append(network.logit_of_db(network.segment_db(magnitude)) + heads[-1])
    return np.array(logits), np.array(heads)


def run(model: Any, audio: np.ndarray, *outputs: str) -> list[np.ndarray]:
    """Outputs of a model, which is checked."""
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()
    return session.run(outputs or None, {entry.name: audio})


def without(weights: Weights) -> Weights:
    tensors = {k: v for k, v in weights.tensors.items() if not k.startswith("texture.")}
    config = dataclasses.replace(weights.config, texture=None)
    return dataclasses.replace(weights, config=config, tensors=tensors)


@pytest.mark.parametrize("front_end", [TINY.front_end, OTHER], ids=["shared", "own"])
def test_every_statistic_equals_the_numpy_pipeline(front_end: cfg.FrontEnd) -> None:
    """A head that is linear and clips nothing, with other factors each time, hides no error."""
    texture = dataclasses.replace(TEXTURE, hidden=(), limit=1e6)
    weights, audio = make(texture, front_end=front_end), np.stack([*music(), faint()])
    rng = np.random.default_rng(0)
    kernel = weights.tensors["texture.out.kernel"]
    for _ in range(4):
        kernel[:] = rng.choice([-0.5, 0.5], kernel.shape)
        logits, heads = truth(weights, audio)
        assert (np.abs(heads) > 0.1).all()
        (got,) = run(build_onnx(weights, stages=True), audio, "logit")
        np.testing.assert_allclose(got, logits, atol=5e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_segments_equal_the_numpy_pipeline(precision: Any) -> None:
    weights, audio = make(), music()
    logits, heads = truth(weights, audio)
    assert np.ptp(heads) > 1
    score, logit = run(
        build_onnx(weights, precision=precision, stages=True), audio, "p_ai", "logit"
    )
    assert score.dtype == logit.dtype == np.float32
    atol = 1e-4 if precision == "fp32" else 5e-3
    np.testing.assert_allclose(logit, logits, atol=atol)
    np.testing.assert_allclose(score, dsp_numpy.sigmoid(logits), atol=atol)
    # The head itself is float32 in both: without it float16 is as far off.
    rest = build_onnx(without(weights), precision=precision, stages=True)
    np.testing.assert_allclose(logit - run(rest, audio, "logit")[0], heads, atol=1e-4)
    (alone,) = run(build_onnx(weights, precision=precision), audio[1:2])
    np.testing.assert_allclose(alone, score[1:2], atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("aggregate", ["median", "rms"])
def test_songs_equal_the_numpy_pipeline(aggregate: Any, precision: Any) -> None:
    weights, audio = make(verdict=cfg.Decision(aggregate=aggregate)), music()
    scores = dsp_numpy.sigmoid(truth(weights, audio)[0])
    rms = np.sqrt(np.mean(audio**2, axis=1, dtype=np.float64))
    expected = {"median": np.median(scores), "rms": scores @ rms / rms.sum()}[aggregate]
    (score,) = run(build_onnx(weights, form="song", precision=precision), audio)
    np.testing.assert_allclose(score, [expected], atol=3e-5 if precision == "fp32" else 2e-3)


def test_the_preset_equals_the_numpy_pipeline() -> None:
    """All resolutions of 4 s at full size; its DFTs are small constants."""
    config = cfg.Config.edge()
    weights = Weights("edge", config, random_tensors(config), "0" * 64, "CC0", {})
    model, audio = build_onnx(weights, stages=True), segment(3)[None]
    rest = build_onnx(without(weights), stages=True)
    added = run(model, audio, "logit")[0] - run(rest, audio, "logit")[0]
    network = NumpyNetwork(config, weights.tensors, np.float64)
    wide = audio[0].astype(np.float64)
    expected = network.texture_logit(wide, network.magnitude(wide))
    np.testing.assert_allclose(added, [expected], atol=5e-5)
    head = 4 * sum(int(np.prod(shape)) for shape in texture_shapes(config).values())
    assert model.ByteSize() - rest.ByteSize() - head < 1e6 * len(cfg.Texture().resolutions)


def test_backends_and_the_lean_graph_agree() -> None:
    """As `verify` compares them: the logit is that of the whole."""
    weights, audio = make(ONE), music()
    contract = Contract("audio", "float32", ("n", "samples"), SAMPLES, None, "p_ai", False)
    found, left_out = candidates(weights, contract, ["numpy", "xla", "onnx", "onnx-fp16"])
    assert not left_out
    logits, _ = truth(weights, audio)
    for candidate in found:
        stages, scores, song = candidate.run(audio)
        assert song is None
        atol = 5e-3 if candidate.name.endswith("16") else 1e-4
        np.testing.assert_allclose(stages["logit"], logits, atol=atol, err_msg=candidate.name)
        np.testing.assert_allclose(scores, dsp_numpy.sigmoid(logits), atol=atol)


def test_an_exported_graph_is_taken_back_as_it_is(tmp_path: Path) -> None:
    """The importer knows of no texture head, so it must not take the rest for the whole."""
    export(make(ONE), tmp_path / "lean.onnx")
    taken = import_model(tmp_path / "lean.onnx")
    assert taken.provenance["route"] == "graph"
    assert taken.config.texture is None


def test_templates_have_no_place_for_the_head(tmp_path: Path) -> None:
    weights, original = make(), tmp_path / "original.onnx"
    bare = without(weights)
    export(bare, original)
    entries = [{"name": "cnn.out.bias", "tensor": "cnn.out.bias", "transform": "same"}]
    known = {"initialisers": entries, "source_sha256": read_graph(original).sha256}
    with pytest.raises(ValueError, match=r"no place for the texture head of weights 'test'"):
        export(
            dataclasses.replace(weights, provenance=known),
            tmp_path / "out.onnx",
            template=original,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["original.onnx"]


def test_the_table_counts_the_head() -> None:
    weights = make()
    contract = {"input": "x", "output": "y", "segments": None, "samples": SAMPLES, "song": False}
    facts = dict.fromkeys(("source", "producer", "opset", "source_sha256"), "")
    found = {**facts, "route": "native", "contract": contract, "probe_difference": 0.0}
    tensors = {**weights.tensors, "front_end.mel": np.zeros((32, 1025), np.float32)}
    table = dict(describe(dataclasses.replace(weights, provenance=found, tensors=tensors)))
    assert table["texture head"] == f"{parameter_counts(weights.config)['texture']:,} parameters"


def test_the_form_without_the_head_gives_the_logit_of_the_network():
    weights, audio = make(), music()[:2]
    session = onnxruntime.InferenceSession(build_onnx(weights, form="network").SerializeToString())
    assert [value.name for value in session.get_outputs()] == ["logit"]
    exact = NumpyNetwork(weights.config, weights.tensors, np.float64)
    expected = []
    for row in audio.astype(np.float64):
        expected.append(exact.logit_of_db(exact.segment_db(exact.magnitude(row))))
    (found,) = session.run(None, {"audio": audio})
    np.testing.assert_allclose(found, expected, atol=1e-4)
