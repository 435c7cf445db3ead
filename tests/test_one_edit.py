"""A network is a list: a layer that is added there runs, trains, is stored and is exported."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from artifactnet_jax import presets
from artifactnet_jax.layers import Layer
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.passes import folded
from artifactnet_jax.weights import Weights, load_weights, random_tensors, save_weights
from tiny_model import TINY

jax = pytest.importorskip("jax")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("optax")
from artifactnet_jax.backends.xla import build_model  # noqa: E402
from artifactnet_jax.convert.export import build_onnx  # noqa: E402
from artifactnet_jax.train.loop import Trainer  # noqa: E402
from artifactnet_jax.train.phases import PHASES  # noqa: E402

ADDED = "cnn.extra.kernel"


@pytest.fixture
def edited(monkeypatch):
    """The classifier with one more block before its mean."""
    drawn = presets.cnn_layers

    def cnn_layers(*sizes: object) -> presets.Layers:
        layers = list(drawn(*sizes))
        where = [x.name for x in layers].index("mean")
        figure = presets.Figure()
        figure.layers = layers[:where]
        figure.conv("extra", 8, 8, (3, 1), bias=False)
        figure.norm("extra_norm", 8)
        figure.add("relu", "extra_relu")
        rest = [dataclasses.replace(x, inputs=(figure.last,)) for x in layers[where : where + 1]]
        return (*figure.layers, *rest, *layers[where + 1 :])

    monkeypatch.setattr(presets, "cnn_layers", cnn_layers)


def test_one_edit_reaches_every_reader(edited, tmp_path):
    assert presets.parameter_shapes(TINY)[ADDED] == (3, 1, 8, 8)
    tensors = random_tensors(TINY, 1)
    facts = {"name": "edited", "licence": "none", "provenance": {}}
    save_weights(tmp_path / "edited.safetensors", TINY, tensors, **facts)
    weights = load_weights(tmp_path / "edited.safetensors")
    assert isinstance(weights, Weights)
    run: tuple[Layer, ...] = folded(TINY)[0]["cnn"]
    assert [x.op for x in run if x.name.startswith("extra")] == ["conv", "relu"]

    rng = np.random.default_rng(0)
    audio = (0.1 * rng.standard_normal((1, TINY.front_end.segment_samples))).astype(np.float32)
    exact = NumpyNetwork(TINY, weights.tensors, np.float64).logit(audio[0].astype(np.float64))
    np.testing.assert_allclose(
        NumpyNetwork(TINY, weights.tensors).logit(audio[0]), exact, atol=1e-4
    )
    model = build_model(weights)
    np.testing.assert_allclose(jax.jit(lambda a: model.logit(a))(audio), [exact], atol=1e-4)
    graph = build_onnx(weights, form="network").SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"audio": audio})[0], [exact], atol=1e-4)

    settings = dataclasses.replace(PHASES["cnn"], batch=2, seconds=0.25, steps=2, ema=0.0)
    trainer = Trainer(TINY, weights.tensors, settings)
    batch = {
        "audio": (0.1 * rng.standard_normal((2, 1, trainer.samples))).astype(np.float32),
        "label": np.float32([0, 1]),
    }
    state, metrics = trainer.step(trainer.initial(), batch)
    assert np.isfinite(float(metrics["loss"]))
    written = trainer.tensors(state)
    for name in (ADDED, "cnn.extra_norm.scale", "cnn.extra_norm.mean"):
        assert (written[name] != tensors[name]).any(), name
