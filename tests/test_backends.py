"""Backends: one score per segment, whatever the batch; both against each other."""

import dataclasses
import importlib.util
import sys

import numpy as np
import pytest

from artifactnet_jax import forward, models
from artifactnet_jax.backends import BACKENDS, BackendError
from artifactnet_jax.config import CNN, Config, FrontEnd, UNet
from artifactnet_jax.dsp_numpy import sigmoid
from artifactnet_jax.models import load_backend, why_unavailable
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.report import look
from artifactnet_jax.weights import Engine, ForeignGraph, Weights, random_tensors

WEIGHTS = Weights("random", Config.edge(), random_tensors(Config.edge()), "", "", {})
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("flax") is None, reason="needs artifactnet-jax[cpu]"
)
needs_ort = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="needs artifactnet-jax[ort] and onnx",
)
NAMES = ["numpy", pytest.param("xla", marks=needs_jax)]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def segments(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((n, 176_400)) * rng.uniform(0.001, 0.3, (n, 1))
    return np.clip(noise, -1, 1).astype(np.float32)


@pytest.fixture(scope="module", params=[*NAMES, pytest.param("onnxruntime", marks=needs_ort)])
def backend(request):
    return load_backend(request.param, WEIGHTS)


def test_a_score_does_not_depend_on_batch_or_order(backend):
    audio = segments(5)
    together = backend(audio)
    assert together.dtype == np.float32
    assert together.shape == (5,)
    assert len(set(together.tolist())) == 5
    alone = np.concatenate([backend(audio[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(backend(audio[::-1])[::-1], together)
    np.testing.assert_array_equal(backend(audio[1:4]), together[1:4])


def test_scores_are_finite_and_in_range(backend):
    audio = np.zeros((3, 176_400), np.float32)
    audio[1, 1000] = 1.0
    audio[2] = np.sign(np.sin(np.arange(176_400)))
    scores = backend(audio)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()


@needs_jax
def test_xla_and_numpy_agree():
    audio = segments(3)
    np.testing.assert_allclose(
        load_backend("xla", WEIGHTS)(audio), load_backend("numpy", WEIGHTS)(audio), atol=1e-5
    )


SONG = Config(
    "song",
    FrontEnd(
        segment_samples=4_096,
        n_fft=256,
        hop=128,
        stft_pad=128,
        n_mels=16,
        hpss_width=5,
        percussive_width=5,
        top_db=10.0,
    ),
    UNet(widths=(4,), bottleneck=6),
    CNN(widths=(4, 6), hidden=5),
)


def song(joint: str, n: int = 3) -> tuple[Weights, np.ndarray]:
    """Weights with that joint rule, and segments of ever lower level."""
    front_end = dataclasses.replace(SONG.front_end, joint=joint)
    config = dataclasses.replace(SONG, front_end=front_end)
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((n, 4_096)) * 0.3 ** np.arange(n)[:, None]
    tensors = random_tensors(config)
    tensors["cnn.out.kernel"] *= 0.1  # scores well inside (0, 1)
    return Weights(joint, config, tensors, "", "", {}), audio.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("joint", ["segment", "view", "song", "song_view"])
def test_the_joint_rule_of_a_song_by_hand(name, joint):
    weights, audio = song(joint)
    network = NumpyNetwork(weights.config, weights.tensors, np.float64)
    magnitudes = map(network.magnitude, audio.astype(np.float64))
    views = np.stack([network.segment_db(each) for each in magnitudes])
    axes = {"segment": (1, 2, 3), "view": (2, 3), "song": (0, 1, 2, 3), "song_view": (0, 2, 3)}
    clamped = np.maximum(views, views.max(axis=axes[joint], keepdims=True) - 10)
    expected = []
    for res, h, p in clamped:
        d = np.diff(res, axis=1, prepend=res[:, :1])
        channels = np.stack([res, h, p, d, np.diff(d, axis=1, prepend=0), h - p, np.abs(d)])
        expected.append(sigmoid(network.classify(channels)))
    backend = load_backend(name, weights)
    scores = backend.song(audio)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    alone = backend(audio)
    if joint in ("segment", "view"):
        np.testing.assert_array_equal(scores, alone)
    else:
        assert np.abs(scores - alone).max() > 0.01
        np.testing.assert_array_equal(backend.song(audio[:1]), alone[:1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("joint", ["segment", "song_view"])
def test_stages_are_those_of_scoring(name, joint):
    weights, audio = song(joint, 1)
    backend = load_backend(name, weights)
    stages = backend.stages(audio[0])
    exact = load_backend("numpy", weights).stages(audio[0].astype(np.float64))
    shapes = dict.fromkeys(("magnitude", "mask", "residual", "H", "P"), (129, 33))
    shapes |= {"views": (3, 16, 33), "channels": (7, 16, 33)}
    shapes |= dict.fromkeys(("network_logit", "texture_logit", "logit", "score"), ())
    assert {key: value.shape for key, value in stages.items()} == shapes
    for key, value in stages.items():
        np.testing.assert_allclose(value, exact[key], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stages["residual"], stages["mask"] * stages["magnitude"], rtol=1e-6)
    np.testing.assert_allclose(stages["score"], backend(audio)[0], atol=1e-6)


def test_stages_take_two_medians(monkeypatch):
    """HPSS is computed once, for the parts and for what is made of them."""
    taken = []
    median = forward.median_filter

    def counted(x: np.ndarray, size: int, axis: int) -> np.ndarray:
        taken.append((size, axis))
        return median(x, size, axis=axis)

    monkeypatch.setattr(forward, "median_filter", counted)
    weights, audio = song("segment", 1)
    load_backend("numpy", weights).stages(audio[0])
    fe = weights.config.front_end
    assert taken == [(fe.hpss_width, 1), (fe.percussive_width, 0)]
    taken.clear()
    look(audio[0], 0.0, fe, NumpyNetwork(weights.config, weights.tensors))
    assert len(taken) == 2


@needs_jax
def test_compiled_programs_are_kept_where_the_user_has_not_said(monkeypatch, tmp_path):
    import jax

    from artifactnet_jax.backends.xla import _keep_compiled

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        for said, found in (("elsewhere", "elsewhere"), (None, f"{tmp_path}/artifactnet-jax/xla")):
            jax.config.update("jax_compilation_cache_dir", said)
            _keep_compiled()
            assert jax.config.jax_compilation_cache_dir == found
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        jax.config.update("jax_compilation_cache_dir", None)
        _keep_compiled()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@needs_jax
def test_xla_compiles_once_whatever_the_batch():
    import jax

    backend = load_backend("xla", WEIGHTS)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(
            jax.stages.Lowered, "compile", lambda *a, **k: compiled.append(1), raising=True
        )
        for n in (1, 2, 3, 7):
            assert backend(segments(n)).shape == (n,)
    assert compiled == []


def test_unknown_names_and_dtypes():
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        load_backend("tpu", WEIGHTS)
    with pytest.raises(ValueError, match="float32"):
        load_backend("numpy", WEIGHTS, dtype="bfloat16")


def test_a_missing_extra_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert why_unavailable("xla") == (
        "backend 'xla' needs jax and flax: pip install 'artifactnet-jax[cpu]'"
    )
    assert why_unavailable("numpy") == ""
    with pytest.raises(BackendError, match="pip install"):
        load_backend("xla", WEIGHTS)
    assert load_backend("auto", WEIGHTS).name == "numpy"


@needs_jax
def test_auto_takes_what_was_measured_as_fastest(monkeypatch):
    heavy = Weights("random", Config.v94(), {}, "", "", {})
    joint = dataclasses.replace(FrontEnd(), joint="song")
    here = {"jax", "flax", "onnx", "onnxruntime"}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: find("json") if name in here else None
    )
    assert models.pick(WEIGHTS) == models.pick(heavy) == "onnxruntime"
    song = dataclasses.replace(heavy, config=dataclasses.replace(heavy.config, front_end=joint))
    assert models.pick(song) == "xla"
    assert models.pick(ForeignGraph("g", heavy.config, {}, "", "", {}, {})) == "xla"
    assert models.pick(Engine("e", WEIGHTS.config, "", "", {}, "x.onnx")) == "onnxruntime"
    here.add("jax_cuda12_plugin")
    assert models.pick(WEIGHTS) == models.pick(heavy) == "xla"
    here -= {"onnx", "jax_cuda12_plugin"}
    assert models.pick(heavy) == "xla"
    assert models.pick(WEIGHTS) == "numpy"
    here -= {"jax", "flax"}
    assert models.pick(heavy) == "numpy"
    monkeypatch.undo()
    assert load_backend("auto", WEIGHTS, dtype="bfloat16").name == "xla"


def test_an_old_python_is_said_so(monkeypatch):
    monkeypatch.setattr(models.sys, "version_info", (3, 10, 12))
    assert "3.11" in why_unavailable("xla")
    assert why_unavailable("numpy") == ""


@pytest.mark.parametrize("name", BACKENDS)
def test_every_entry_of_the_table_has_its_class(name):
    for package in BACKENDS[name].packages:
        pytest.importorskip(package)
    assert models._maker(name, WEIGHTS).name == name


def test_which_backend_runs_which_model():
    config = WEIGHTS.config
    assert models.backends_of(WEIGHTS) == tuple(BACKENDS)
    assert models.backends_of(ForeignGraph("g", config, {}, "", "", {}, {})) == ("xla",)
    exported = models.backends_of(Engine("e", config, "", "", {}, "x.onnx"))
    assert exported == ("onnxruntime", "onnxruntime-cuda", "tensorrt")
    assert models.backends_of(Engine("e", config, "", "", {}, "x.engine")) == ("tensorrt",)


# --- onnxruntime ----------------------------------------------------------------------------------


@needs_ort
def test_onnxruntime_and_numpy_agree():
    audio = segments(3)
    np.testing.assert_allclose(
        load_backend("onnxruntime", WEIGHTS)(audio),
        load_backend("numpy", WEIGHTS)(audio),
        atol=1e-5,
    )


@needs_ort
def test_a_graph_is_exported_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights, audio = song("segment")
    scores = load_backend("onnxruntime", weights)(audio)
    (path,) = tmp_path.glob("artifactnet-jax/exported/*.onnx")
    written = path.stat().st_mtime_ns
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnx", None)
        np.testing.assert_array_equal(load_backend("onnxruntime", weights)(audio), scores)
        assert path.stat().st_mtime_ns == written
        other = dataclasses.replace(weights, tensors=random_tensors(weights.config, 1))
        with pytest.raises(BackendError, match="needs onnx once: pip install onnx, or export"):
            load_backend("onnxruntime", other)
    path.write_bytes(b"damaged")
    np.testing.assert_array_equal(load_backend("onnxruntime", weights)(audio), scores)
    assert path.read_bytes() != b"damaged"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    np.testing.assert_array_equal(load_backend("onnxruntime", weights)(audio), scores)
    assert "not cached" in capsys.readouterr().err


@needs_ort
def test_an_exported_graph_stands_for_its_weights(tmp_path):
    from artifactnet_jax.convert.export import export
    from artifactnet_jax.convert.export_cache import read_exported
    from artifactnet_jax.weights import WeightsError

    weights, audio = song("segment")
    weights = dataclasses.replace(weights, licence="CC0", sha256="1" * 64)
    export(weights, tmp_path / "lean.onnx")
    taken = read_exported(tmp_path / "lean.onnx")
    assert (taken.name, taken.licence, taken.config) == ("segment", "CC0", weights.config)
    assert (taken.sha256, taken.provenance) == (weights.sha256, {"precision": "fp32"})
    np.testing.assert_array_equal(
        load_backend("auto", taken)(audio), load_backend("onnxruntime", weights)(audio)
    )
    with pytest.raises(
        ValueError, match=r"lean\.onnx is an exported graph, which numpy cannot run"
    ):
        load_backend("numpy", taken)

    export(weights, tmp_path / "song.onnx", form="song")
    with pytest.raises(WeightsError, match="whole songs: export the weights with --form segment"):
        read_exported(tmp_path / "song.onnx")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_exported(tmp_path / "none.onnx")
    for foreign in (b"", b"\x08", b"\x72\xff", b"RIFF" * 9):
        (tmp_path / "foreign.onnx").write_bytes(foreign)
        assert read_exported(tmp_path / "foreign.onnx") is None
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "lean.onnx").read_bytes()[:-40])
    torn = dataclasses.replace(taken, file=str(tmp_path / "cut.onnx"))
    with pytest.raises(BackendError, match=r"cut\.onnx: .*: export it again"):
        load_backend("onnxruntime", torn)


@needs_ort
def test_what_onnxruntime_does_not_do(monkeypatch):
    with pytest.raises(ValueError, match="computes in float32, not bfloat16"):
        load_backend("onnxruntime", WEIGHTS, dtype="bfloat16")
    with pytest.raises(ValueError, match="one by one: use --backend numpy or xla"):
        load_backend("onnxruntime", song("song")[0])
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="CUDA provider: pip install onnxruntime-gpu"):
        load_backend("onnxruntime-cuda", WEIGHTS)


@needs_ort
def test_batches_of_one_shape_are_filled_up(monkeypatch):
    """As on a GPU, which takes several segments at a time."""
    from artifactnet_jax.backends import onnxruntime as module

    weights, audio = song("segment", 5)
    one_by_one = load_backend("onnxruntime", weights)(audio)

    class Several(module.OnnxruntimeBackend):
        def __init__(self, *args):
            super().__init__(*args)
            self._segments = 3

    scores = Several(weights)(audio)
    np.testing.assert_allclose(scores, one_by_one, atol=1e-6)
    np.testing.assert_array_equal(Several(weights)(audio[3:4]), scores[3:4])
