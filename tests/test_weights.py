"""Weights files: strict loading, each fault named."""

import dataclasses
import hashlib
import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from artifactnet_jax.config import CNN, Config, Decision, FrontEnd, Imported, Texture, UNet
from artifactnet_jax.layers import layer
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
    assert 0 < points["fpr5"] < points["fpr2"] < points["fpr1"] <= verdict.threshold < 1
    assert 0 < points["balanced"] < points["fpr2"]
    assert verdict.lower is not None
    assert 0 < verdict.lower < verdict.threshold
    assert [entry["phase"] for entry in weights.provenance["history"]][-2:] == ["texture", "fusion"]


# --- any single corrupted value ----------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
CHOICES = {  # the texts that may stand in the config, by their keys
    **{key: {"reflect", "edge", "constant"} for key in ("stft_edge", "hpss_edge")},
    **{"window": {"hann", "given"}, "mel_scale": {"slaney", "htk", "given"}},
    **{"mel_norm": {"slaney", "none"}, "amin_rule": {"max", "add"}},
    **{"joint": {"segment", "view", "song", "song_view"}, "input_scale": {"magnitude", "log"}},
    **{"aggregate": {"median", "rms", "mean"}, "segments": {"all", "first60"}},
    "channels": {"mel_res", "mel_H", "mel_P", "delta", "delta2", "ratio", "flux"},
}
OPTIONAL = {"top_db", "texture", "mask_max"}  # may be null


def values_of(data, path=()):
    """Paths of all values of a JSON document, tables and lists included."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from values_of(value, (*path, key))


def at(data, path):
    for key in path:
        data = data[key]
    return data


def allowed(old, new, key):
    """Whether a value may stand in the place of another, by its kind and by `CHOICES`."""
    if new is None or old is None:
        return new is None and key in OPTIONAL
    if isinstance(old, float) and type(new) is int:
        return abs(new) < 10**308
    if type(new) is not type(old):
        return False
    if isinstance(new, (list, tuple)):
        return all(allowed(each, other, key) for each in old[:1] for other in new)
    if isinstance(new, dict):
        return True  # its values are judged where they stand
    return new in CHOICES.get(key, {new}) and not (isinstance(new, float) and abs(new) == math.inf)


def converted():
    """A model whose networks are lists of layers."""
    front_end = FrontEnd(segment_samples=512, n_fft=30, hop=64, stft_pad=15, n_mels=8)
    pad = {"padding": ((1, 1), (1, 1)), "strides": (1, 1)}
    conv = layer("in", "conv", ["input"], pad, {"kernel": (3, 3, 1, 1), "bias": (1,)})
    tail = [layer("e", "elu", ["in"], {"alpha": 1.0}), layer("s", "sigmoid", ["e"])]
    head = [layer("pool", "mean", ["input"], {"axes": "hw"}), layer("flat", "flatten", ["pool"])]
    out = layer("out", "linear", ["flat"], {}, {"kernel": (7, 1)})
    texture = Texture(resolutions=((64, 16),), edges=(100.0, 900.0), lags=((0, 1),), hidden=(2,))
    unet, cnn = Imported((conv, *tail), 1.0), Imported((*head, out))
    return Config("converted", front_end, unet, cnn, Decision(), texture)


@pytest.fixture(scope="module", params=["preset", "converted"])
def stored(request, tmp_path_factory):
    """Path of a weights file, its tensors, and its header."""
    path = tmp_path_factory.mktemp("stored") / "w.safetensors"
    points = Decision(operating_points=(("fpr1", 0.9),))
    config = dataclasses.replace(CONFIG, verdict=points)
    config = config if request.param == "preset" else converted()
    facts = {"name": "n", "licence": "CC0-1.0", "provenance": {"status": "test"}}
    save_weights(path, config, random_tensors(config, 3), **facts)
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return path, tensors, file.metadata()


def loaded(path):
    """Weights, or None and why there are none."""
    try:
        return load_weights(path), ""
    except WeightsError as error:
        return None, str(error)


def sealed(text, tensors):
    """The digest that belongs to a changed config."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha.update(f"\0{name}\0{tensors[name].dtype}\0{tensors[name].shape}\0".encode())
        sha.update(tensors[name].tobytes())
    return sha.hexdigest()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_corrupted_value_of_the_config_is_refused_by_name_or_taken_as_it_is(stored, data):
    path, tensors, header = stored
    config = json.loads(header["config"])
    where = data.draw(st.sampled_from(list(values_of(config))), label="where")
    old = at(config, where)
    near = [str(old), [old], True]
    if isinstance(old, (int, float)):
        near += [-old, 0, float(old), old + 0.5, old + 1, 1000 * old, 10**400]
    new = data.draw(st.sampled_from(near) | JSON, label="new")
    at(config, where[:-1])[where[-1]] = new
    text = json.dumps(config, sort_keys=True)
    key = next(part for part in reversed(where) if isinstance(part, str))

    # With the digest of before, nothing but the same config is read.
    save_file(tensors, path, metadata={**header, "config": text})
    if text != header["config"]:
        with pytest.raises(WeightsError):
            load_weights(path)
    # With a digest to match, a value is refused by name, or is the config's from now on.
    save_file(tensors, path, metadata={**header, "config": text, "sha256": sealed(text, tensors)})
    read, error = loaded(path)
    if read is None:
        key = "layers" if "layers" in where else key
        # Or what no longer fits the value is named: a tensor, a layer of a converted network.
        shape = r"(missing|unexpected) \w+\.|tensor [\w.]+ has shape|(unet|cnn)\.layers: "
        assert re.search(rf"\b{key}\b|{shape}", error), error
        assert "\n" not in error
    else:
        again = json.loads(json.dumps(read.config.to_dict()))
        same = again == json.loads(header["config"])
        got = at(again, where)
        if isinstance(new, dict):  # the keys that it lacks have their defaults, as in older files
            got = {name: got[name] for name in new}
        assert same or (got == new and allowed(old, new, key)), (where, old, new)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_corrupted_field_of_the_header_is_refused_by_name_or_is_only_a_text(stored, data):
    path, tensors, header = stored
    key = data.draw(st.sampled_from(sorted(header)), label="field")
    new = data.draw(st.sampled_from(["", "{}", "[]", "null", "1", "{"]) | st.text(max_size=9))
    save_file(tensors, path, metadata={**header, key: new})
    read, error = loaded(path)
    if read is None:
        assert {"sha256": "digest", "format": "header is not"}.get(key, key) in error
    else:
        assert key in ("name", "licence", "preset", "provenance") or new == header[key]
        assert json.dumps(read.config.to_dict(), sort_keys=True) == header["config"]
        assert isinstance(read.provenance, dict)
