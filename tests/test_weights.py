"""Weights files: strict loading, each fault named."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from artifactnet_jax.config import CNN, Config, FrontEnd, UNet
from artifactnet_jax.presets import parameter_shapes
from artifactnet_jax.weights import (
    WeightsError,
    default_path,
    load_weights,
    random_tensors,
    save_weights,
)

CONFIG = Config("tiny", FrontEnd(), UNet(widths=(2,), bottleneck=3), CNN(widths=(2, 3), hidden=2))


@pytest.fixture
def tensors():
    return random_tensors(CONFIG, 3)


@pytest.fixture
def path(tmp_path, tensors):
    path = tmp_path / "w.safetensors"
    save_weights(
        path, CONFIG, tensors, name="tiny", licence="CC0-1.0", provenance={"status": "test"}
    )
    return path


def rewrite(path, tensors=None, **header):
    """Change tensors or header of a weights file behind its back."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(old if tensors is None else tensors, path, metadata={**metadata, **header})
    return old


def test_round_trip(path, tensors):
    weights = load_weights(path)
    assert weights.config == CONFIG
    assert (weights.name, weights.licence) == ("tiny", "CC0-1.0")
    assert weights.provenance == {"status": "test"}
    assert weights.summary() == {"name": "tiny", "sha256": weights.sha256, "preset": "tiny"}
    for name, shape in parameter_shapes(CONFIG).items():
        assert weights.tensors[name].shape == shape
        np.testing.assert_array_equal(weights.tensors[name], tensors[name])


def test_float16_storage_loads_as_float32_with_another_digest(path, tensors, tmp_path):
    half = tmp_path / "half.safetensors"
    save_weights(half, CONFIG, tensors, name="h", licence="x", provenance={}, dtype=np.float16)
    weights = load_weights(half)
    assert weights.sha256 != load_weights(path).sha256
    for name, tensor in weights.tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float16))


def test_missing_extra_and_misshapen_tensors_are_named(path, tensors):
    old = rewrite(path)
    rewrite(path, {k: v for k, v in old.items() if k != "unet.head.bias"})
    with pytest.raises(WeightsError, match=r"missing unet\.head\.bias"):
        load_weights(path)
    rewrite(path, {**old, "unet.head.extra": np.zeros(1, np.float32)})
    with pytest.raises(WeightsError, match=r"unexpected unet\.head\.extra"):
        load_weights(path)
    rewrite(path, {**old, "unet.head.bias": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError, match=r"unet\.head\.bias has shape \(2,\), not \(1,\)"):
        load_weights(path)
    rewrite(path, {**old, "unet.head.bias": np.zeros(1, np.int32)})
    with pytest.raises(WeightsError, match=r"unet\.head\.bias is int32"):
        load_weights(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_tensors_are_named(path, value):
    old = rewrite(path)
    rewrite(path, {**old, "unet.head.bias": np.full(1, value, np.float32)})
    with pytest.raises(WeightsError, match=r"unet\.head\.bias has non-finite values"):
        load_weights(path)


def test_an_altered_tensor_or_config_fails_the_digest(path):
    old = rewrite(path)
    changed = {**old, "unet.head.bias": old["unet.head.bias"] + 1}
    rewrite(path, changed)
    with pytest.raises(WeightsError, match="digest"):
        load_weights(path)
    config = CONFIG.to_dict()
    config["verdict"]["threshold"] = 0.9
    rewrite(path, old, config=json.dumps(config, sort_keys=True))
    with pytest.raises(WeightsError, match="digest"):
        load_weights(path)


def test_files_that_are_not_weights(tmp_path, path):
    with pytest.raises(WeightsError, match="no such weights file"):
        load_weights(tmp_path / "absent")
    with pytest.raises(WeightsError, match="no such weights file"):
        load_weights(tmp_path)
    for name, content in (("empty", b""), ("text", b"hello, this is text"), ("cut", None)):
        bad = tmp_path / name
        bad.write_bytes(path.read_bytes()[:5000] if content is None else content)
        with pytest.raises(WeightsError, match="not a readable safetensors file"):
            load_weights(bad)
    save_file({"x": np.zeros(1, np.float32)}, path)
    with pytest.raises(WeightsError, match="header is not"):
        load_weights(path)


def test_a_damaged_header_is_one_line(path):
    rewrite(path, config="{}")
    with pytest.raises(WeightsError, match="damaged header") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_saving_refuses_what_loading_would_refuse_and_leaves_no_debris(tmp_path, tensors):
    tensors["unet.head.bias"] = np.full(1, 1e6, np.float32)  # overflows float16
    with pytest.raises(WeightsError, match=r"unet\.head\.bias has non-finite"):
        save_weights(
            tmp_path / "w",
            CONFIG,
            tensors,
            name="x",
            licence="x",
            provenance={},
            dtype=np.float16,
        )
    assert os.listdir(tmp_path) == []


def test_the_embedded_weights_load_and_are_small():
    weights = load_weights()
    assert weights.config.preset == "edge"
    assert weights.config == Config.from_dict(weights.config.to_dict())
    assert default_path().stat().st_size < 10_000_000
    assert weights.licence
    verdict = weights.config.verdict
    points = dict(verdict.operating_points)
    assert verdict.threshold == points["fpr5"]
    assert 0 < points["balanced"] < points["fpr5"] < points["fpr2"] < points["fpr1"] < 1
    assert weights.provenance["history"][-1]["phase"] == "texture"
