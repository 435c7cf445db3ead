"""Engines and the backend that runs them.

There is no GPU in tests. TensorRT for RTX builds engines without one, for real; the runner is
tested on a driver and a TensorRT that work on host memory (`fake_nvidia`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_nvidia
from artifactnet_jax import models
from artifactnet_jax.backends import BackendError, cuda, engine
from artifactnet_jax.backends.cuda import Cuda, CudaError, find_device
from artifactnet_jax.config import Config, Decision, Texture
from artifactnet_jax.convert.export import build_onnx, export
from artifactnet_jax.convert.export_cache import metadata, read_exported
from artifactnet_jax.detector import Detector
from artifactnet_jax.models import load_backend, why_unavailable
from artifactnet_jax.weights import (
    ForeignGraph,
    Weights,
    WeightsError,
    load_weights,
    random_tensors,
    save_weights,
)
from tiny_model import TINY, save_tiny

RECIPE = engine.Recipe("a" * 64, "tensorrt", "10.3.0", "Orin sm87", "fp16", (1, 8))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and TensorRT 10.3.0, of the kind that `fake_nvidia` is."""
    driver, load = fake_nvidia.Driver(), cuda.ctypes.CDLL

    def library(name: str, *args: Any, **options: Any) -> Any:
        return driver if name == cuda.LIBRARY else load(name, *args, **options)

    monkeypatch.setattr(cuda.ctypes, "CDLL", library)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_nvidia)
    monkeypatch.setattr(fake_nvidia, "driver", driver)
    monkeypatch.setattr(fake_nvidia, "built", [])
    return driver


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def segments(n: int, samples: int = 44_100) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((n, samples)) * 0.1).astype(np.float32)


# --- TensorRT for RTX, for real ------------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs artifactnet-jax[rtx]")


def parsed(trt: Any, model: bytes) -> Any:
    """The strongly typed network of an ONNX graph; what keeps it alive comes with it."""
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    problems = [] if parser.parse(model) else [parser.get_error(k).desc() for k in range(1)]
    assert problems == []
    return network, parser, builder, log


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("preset", ["edge", "v94"])
def test_tensorrt_reads_the_graphs_of_both_presets(rtx, preset, precision):
    weights = load_weights()
    if preset == "v94":
        weights = Weights("v94", Config.v94(), random_tensors(Config.v94()), "", "", {})
    network, *_alive = parsed(rtx, build_onnx(weights, precision=precision).SerializeToString())
    layers = [network.get_layer(k) for k in range(network.num_layers)]
    float_types = {rtx.DataType.FLOAT: "fp32", rtx.DataType.HALF: "fp16"}
    types: dict[str, set[str]] = {}
    for layer in layers:
        kind = float_types.get(layer.get_output(0).dtype)
        if kind and "/" in layer.name:
            types.setdefault(layer.name.split("/")[0], set()).add(kind)
    single = {"stft", "hpss", "mel", "channels"} | ({"texture"} if preset == "edge" else set())
    assert {part for part, kinds in types.items() if kinds == {"fp32"}} >= single
    convolutions = [
        float_types[layer.get_output(0).dtype]
        for layer in layers
        if layer.type in (rtx.LayerType.CONVOLUTION, rtx.LayerType.DECONVOLUTION)
    ]
    assert len(convolutions) > 20
    # Those that read the spectrum (v94's block reads it twice) or the channels stay single, whose
    # range half does not hold.
    half = len(convolutions) - {"edge": 2, "v94": 3}[preset]
    assert convolutions.count("fp16") == (half if precision == "fp16" else 0)
    shape = tuple(network.get_input(0).shape)
    assert (network.num_inputs, network.get_input(0).name, shape) == (1, "audio", (-1, 176_400))
    assert (network.num_outputs, network.get_output(0).name) == (1, "p_ai")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built_without_a_gpu(rtx, command, tiny, tmp_path, precision):
    config = dataclasses.replace(TINY, texture=Texture(resolutions=((2048, 512),)))
    path, out = tmp_path / "w.safetensors", tmp_path / "w.engine"
    save_weights(path, config, random_tensors(config), name="t", licence="CC0", provenance={})
    arguments = ("--target", "rtx", "--precision", precision, "--batches", "4,1")
    done = command("build", path, "-o", out, *arguments)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert "building an engine of 't'" in done.err
    recipe, weights = engine.read_recipe(out)
    assert recipe == engine.Recipe(
        source=load_weights(path).sha256,
        library="tensorrt_rtx",
        version=rtx.__version__,
        device="sm80 sm86 sm89 sm120",
        precision=precision,
        batches=(1, 4),
        samples=44_100,
    )
    assert (weights.config, weights.licence, weights.file) == (config, "CC0", str(out))
    assert len(engine.read_plan(out)) > 100_000


def test_build_keeps_what_fits_and_says_why_it_builds_again(rtx, command, tiny, tmp_path):
    out = tmp_path / "x.engine"
    first = command("build", tiny, "-o", out, "--target", "rtx", "--batches", "2")
    made = out.read_bytes()
    again = command("build", tiny, "-o", out, "--target", "rtx", "--batches", "2")
    assert (first.code, again.code) == (0, 0)
    assert "is that engine already" in again.err
    assert out.read_bytes() == made
    other = command("build", tiny, "-o", out, "--target", "rtx", "--batches", "3")
    assert "will not do: it has no profile of 3 segments" in other.err
    assert engine.read_recipe(out)[0].batches == (3,)


def test_an_engine_for_rtx_cards_is_built_on_any_machine(rtx, gpu, command, tiny, tmp_path):
    gpu.name, gpu.capability = "NVIDIA H100", (9, 0)
    out = tmp_path / "x.engine"
    assert command("build", tiny, "-o", out, "--target", "rtx", "--batches", "1").code == 0
    done = command("score", "--weights", out, tmp_path)
    assert done.code == 3
    assert "runs on sm80 sm86 sm89 sm120, not on NVIDIA H100 sm90" in done.err


def test_an_exported_file_is_built_without_onnx(rtx, command, tiny, tmp_path, monkeypatch):
    export(load_weights(tiny), tmp_path / "half.onnx", precision="fp16")
    for package in ("onnx", "onnxruntime", "jax", "flax"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "folder").mkdir()
    done = command("build", tmp_path / "half.onnx", "-o", tmp_path / "folder", "--target", "rtx")
    assert done.code == 0, done.err
    (path,) = (tmp_path / "folder").iterdir()
    recipe, weights = engine.read_recipe(path)
    assert (recipe.precision, path.name) == ("fp16", recipe.name())
    assert weights.summary() == load_weights(tiny).summary()
    wrong = command("build", tmp_path / "half.onnx", "--precision", "fp32", "--target", "rtx")
    assert wrong.code == 2
    assert "half.onnx is fp16, not fp32: export it again" in wrong.err


@pytest.mark.parametrize("option", ["--refittable", "--version-compatible"])
def test_what_rtx_does_not_build(rtx, command, tiny, option):
    done = command("build", tiny, "--target", "rtx", option)
    assert done.code == 2
    assert "builds neither version-compatible nor refittable engines" in done.err


def test_a_graph_that_tensorrt_cannot_read(rtx):
    recipe = dataclasses.replace(RECIPE, library=engine.RTX, device="sm80 sm86 sm89 sm120")
    with pytest.raises(BackendError, match="tensorrt_rtx cannot read the graph"):
        engine.build_plan(recipe, b"no graph")


def test_rtx_does_not_run_elsewhere():
    for capability, name in (((8, 7), "Orin"), ((9, 0), "NVIDIA H100")):
        with pytest.raises(BackendError, match=f"runs on sm80 .*, not on {name} sm"):
            engine.device_for(engine.RTX, cuda.Device(name, capability, 0, ""))
    blackwell = cuda.Device("NVIDIA GeForce RTX 5090", (12, 0), 0, "")
    assert engine.device_for(engine.RTX, blackwell) == "sm80 sm86 sm89 sm120"


# --- files and names -----------------------------------------------------------------------------


def test_a_file_keeps_what_it_was_given(tmp_path):
    config = dataclasses.replace(TINY, verdict=Decision(threshold=0.3, aggregate="mean"))
    weights = Weights("w", config, {}, "b" * 64, "CC0", {"source": "x"})
    path = tmp_path / "w.engine"
    engine.write_engine(path, RECIPE, weights, memoryview(b"plan"))
    recipe, read = engine.read_recipe(path)
    assert recipe == RECIPE
    own = {name: value for name, value in vars(weights).items() if name != "tensors"}
    assert vars(read) == {**own, "file": str(path)}
    assert engine.read_plan(path) == b"plan"


def test_files_that_are_no_engines(tmp_path, tiny):
    path = tmp_path / "w.engine"
    with pytest.raises(WeightsError, match=r"no such engine.*artifactnet-jax build"):
        engine.read_recipe(path)
    path.write_bytes(b"plan")
    with pytest.raises(WeightsError, match=r"w\.engine: not a readable engine"):
        engine.read_recipe(path)
    with pytest.raises(WeightsError, match=r"header is not 'artifactnet-jax/engine/1'"):
        engine.read_recipe(tiny)
    engine.write_engine(path, RECIPE, Weights("w", TINY, {}, "", "", {}), b"plan")
    cut = path.read_bytes().replace(b"batches", b"batchez")
    path.write_bytes(cut)
    with pytest.raises(WeightsError, match="build it again with artifactnet-jax build"):
        engine.read_recipe(path)


def test_metadata_are_those_that_onnx_reads(tmp_path, tiny):
    model = build_onnx(load_weights(tiny))
    entry = model.metadata_props.add()
    entry.key, entry.value = "größe", "ein Wert\n" * 40
    expected = {prop.key: prop.value for prop in model.metadata_props}
    assert metadata(model.SerializeToString()) == expected
    assert json.loads(expected["artifactnet_jax.config"]) == json.loads(json.dumps(TINY.to_dict()))
    (tmp_path / "m.onnx").write_bytes(onnx.ModelProto().SerializeToString())
    assert read_exported(tmp_path / "m.onnx") is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=60))
def test_metadata_of_any_bytes(data):
    assert isinstance(metadata(data), dict)


def test_exports_that_are_of_no_use(tmp_path, tiny):
    export(load_weights(tiny), tmp_path / "song.onnx", form="song")
    with pytest.raises(WeightsError, match=r"song\.onnx: a graph of whole songs: export .* --form"):
        read_exported(tmp_path / "song.onnx")
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        read_exported(tmp_path / "none.onnx")
    model = build_onnx(load_weights(tiny))
    for prop in model.metadata_props:
        if prop.key == "artifactnet_jax.config":
            prop.value = "{}"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match="damaged notes"):
        read_exported(tmp_path / "m.onnx")


def test_names_tell_recipes_apart_and_suit_any_file_system():
    others = [
        RECIPE,
        dataclasses.replace(RECIPE, source="b" * 64),
        dataclasses.replace(RECIPE, library="tensorrt_rtx"),
        dataclasses.replace(RECIPE, version="10.7.0"),
        dataclasses.replace(RECIPE, device='NVIDIA "RTX" A/B:C sm86'),
        dataclasses.replace(RECIPE, precision="fp32"),
        dataclasses.replace(RECIPE, batches=(1,)),
        dataclasses.replace(RECIPE, batches=(18,)),
        dataclasses.replace(RECIPE, samples=44_100),
        dataclasses.replace(RECIPE, compatible=True),
        dataclasses.replace(RECIPE, refittable=True),
        dataclasses.replace(RECIPE, revision=99),
    ]
    names = {recipe.name() for recipe in others}
    assert len(names) == len(others)
    assert all(len(name) < 200 and not set(name) & set('/\\:"<>|?* ') for name in names)
    assert all(recipe.misfit(RECIPE) == "" for recipe in (RECIPE, others[9], others[10]))
    reasons = [recipe.misfit(RECIPE) for recipe in others]
    assert reasons[1:4] == [
        f"it is of weights {'b' * 16}, not {'a' * 16}",
        "it is of library tensorrt_rtx, not tensorrt",
        "it is of tensorrt 10.7.0, not 10.3.0",
    ]
    assert all(reasons[k] for k in (4, 5, 6, 7, 8, 11))


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.13.2.6", True),
        ("10.13.2", "10.3.0", False),
        ("10.3.0", "11.0.0", False),
    ],
)
def test_version_compatible_engines_run_in_later_minor_versions(built, here, fits):
    old = dataclasses.replace(RECIPE, version=built, compatible=True)
    assert (old.misfit(dataclasses.replace(RECIPE, version=here)) == "") is fits


# --- the driver ----------------------------------------------------------------------------------


def test_the_driver_describes_its_device(gpu):
    device = find_device()
    assert device == cuda.Device("Orin", (8, 7), 8 << 30, "12.6")
    assert str(device) == "Orin sm87"
    assert gpu.live == {}


def test_memory_goes_there_and_back_and_is_freed(gpu):
    one = Cuda()
    sent, back = one.pinned((3, 5), np.float32), one.pinned((3, 5), np.float32)
    sent[:] = np.arange(15).reshape(3, 5)
    address, event = one.memory(sent.nbytes), one.event()
    one.upload(address, sent)
    one.download(back, address)
    assert not (back == sent).any()  # queued
    one.record(event)
    one.wait(event)
    np.testing.assert_array_equal(back, sent)
    with pytest.raises(CudaError, match=r"cuMemAlloc: out of memory \(2\)"):
        one.memory(1 << 31)
    assert len(gpu.live) == 6
    del sent, back, one
    assert gpu.live == {}


def test_without_driver_gpu_or_tensorrt(gpu, monkeypatch, tiny, command, tracks):
    weights = load_weights(tiny)
    assert why_unavailable("tensorrt") == ""
    gpu.devices = 0
    cause = "backend 'tensorrt': the NVIDIA driver finds no GPU; use --backend numpy"
    assert why_unavailable("tensorrt") == cause
    done = command("build", tiny, "--target", "local")
    assert done.code == 3
    assert "the NVIDIA driver finds no GPU: build on the machine that is to run it" in done.err

    def missing(name: str, *_: Any) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert "there is no NVIDIA driver" in why_unavailable("tensorrt")
    with pytest.raises(BackendError, match="there is no NVIDIA driver"):
        load_backend("tensorrt", weights)
    done = command("score", "--backend", "tensorrt", tracks)
    assert (done.code, done.out) == (3, "")
    assert done.err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert "no Python package tensorrt: install it" in why_unavailable("tensorrt")
    for target, cure in (("rtx", "pip install 'artifactnet-jax[rtx]'"), ("local", "Jetson")):
        done = command("build", tiny, "--target", target)
        assert done.code == 3
        assert cure in done.err


def test_a_tensorrt_that_does_not_load_or_is_too_old(gpu, monkeypatch, command, tiny):
    monkeypatch.setattr(fake_nvidia, "__version__", "8.6.2")
    done = command("build", tiny)
    assert done.code == 3
    assert "tensorrt 8.6.2 is too old: 10 or newer" in done.err

    def broken(name: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(engine.importlib, "import_module", broken)
    with pytest.raises(BackendError, match=r"tensorrt does not load: ImportError: libnvinfer"):
        engine.load_library("tensorrt")


# --- the runner ----------------------------------------------------------------------------------


def test_scores_equal_those_of_numpy_whatever_the_company(gpu, tiny):
    weights, audio = load_weights(tiny), segments(9)
    backend = load_backend("tensorrt", weights, batch_size=2)
    assert (backend.name, backend.dtype, backend.batch_size) == ("tensorrt", "float32", 2)
    scores = backend(audio)
    assert (scores.dtype, scores.shape) == (np.float32, (9,))
    np.testing.assert_allclose(scores, load_backend("numpy", weights)(audio), atol=1e-5)
    assert len(set(scores.tolist())) == 9
    for part in (slice(1), slice(2), slice(3, 8), slice(None, None, -1)):
        np.testing.assert_array_equal(backend(audio[part]), scores[part])
    np.testing.assert_array_equal(backend.song(audio), scores)
    assert backend(audio[:0]).shape == (0,)
    assert fake_nvidia.built[0]["shapes"] == [(2, 44_100)]
    del backend
    assert gpu.live == {}


def test_an_engine_is_built_once_and_then_found(gpu, tiny, capsys, tmp_path):
    weights, folder = load_weights(tiny), tmp_path / "cache" / "artifactnet-jax" / "engines"
    for _ in range(2):
        load_backend("tensorrt", weights)
    assert capsys.readouterr().err.count("building an engine") == 1
    assert [asked["shapes"] for asked in fake_nvidia.built] == [[(8, 44_100)]]
    assert fake_nvidia.built[0]["flags"] == set()  # no TF32
    (path,) = folder.glob("*.engine")
    assert path.name.startswith(weights.sha256[:16])
    assert "10.3.0-Orin_sm87-fp32-8" in path.name
    load_backend("tensorrt", weights, dtype="float16")
    assert "it is of precision fp32, not fp16" in capsys.readouterr().err
    path.write_bytes(b"damaged")
    load_backend("tensorrt", weights)
    assert "building an engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "10.7.0"}, "it is of tensorrt 10.3.0, not 10.7.0"),
        ({"name": "Orin Nano"}, "it is of device Orin sm87, not Orin Nano sm87"),
        ({"capability": (8, 9)}, "it is of device Orin sm87, not Orin sm89"),
        ({"revision": 99}, "it is of revision 1, not 99"),
    ],
)
def test_a_mismatch_builds_again_and_is_said(gpu, tiny, capsys, monkeypatch, change, reason):
    weights = load_weights(tiny)
    load_backend("tensorrt", weights)
    for key, value in change.items():
        target: Any = {"version": fake_nvidia, "revision": engine}.get(key, gpu)
        monkeypatch.setattr(
            target, {"version": "__version__", "revision": "REVISION"}.get(key, key), value
        )
    if "revision" in change:
        monkeypatch.setattr(
            engine, "Recipe", lambda **fields: RECIPE_CLASS(**{"revision": 99, **fields})
        )
    capsys.readouterr()
    load_backend("tensorrt", weights)
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 2
    assert len(fake_nvidia.built) == 2


RECIPE_CLASS = engine.Recipe


def test_other_weights_have_an_engine_of_their_own(gpu, tiny, tmp_path, capsys):
    load_backend("tensorrt", load_weights(tiny))
    other = load_weights(save_tiny(tmp_path / "other.safetensors", seed=1))
    scores = load_backend("tensorrt", other)(segments(1))
    np.testing.assert_allclose(scores, load_backend("numpy", other)(segments(1)), atol=1e-5)


def test_an_engine_of_several_batches_serves_each_of_them(gpu, command, tiny):
    done = command("build", tiny, "--batches", "1,8,3", "--workspace", "512")
    assert done.code == 0
    (asked,) = fake_nvidia.built
    assert asked["shapes"] == [(1, 44_100), (3, 44_100), (8, 44_100)]
    assert asked["workspace"] == 512 << 20
    audio, scores = segments(4), []
    for batch_size in (None, 1, 3):
        backend = load_backend("tensorrt", load_weights(tiny), batch_size=batch_size)
        assert backend.batch_size == (batch_size or 8)
        scores.append(backend(audio))
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])
    assert len(fake_nvidia.built) == 1
    load_backend("tensorrt", load_weights(tiny), batch_size=2)
    assert len(fake_nvidia.built) == 2


def test_an_engine_is_weights(gpu, command, tiny, tmp_path, tracks, capsys):
    out = tmp_path / "own.engine"
    assert command("build", tiny, "-o", out, "--batches", "1,4", "--precision", "fp16").code == 0
    detector = Detector(out)
    backend = detector.backend
    assert (backend.name, backend.dtype, backend.batch_size) == ("tensorrt", "float16", 4)
    assert Detector(out, batch_size=1).backend.batch_size == 1
    assert Detector(out, batch_size=2).backend.batch_size == 4
    verdict = detector.score(tracks / "b.wav")
    expected = Detector(tiny, "numpy").score(tracks / "b.wav")
    assert verdict.weights == expected.weights
    assert verdict.score == pytest.approx(expected.score, abs=0.01)
    assert len(verdict.segments) == len(expected.segments)
    done = command("score", "--weights", out, "--backend", "numpy", tracks)
    assert done.code == 2
    assert "own.engine is an engine, which numpy cannot run" in done.err
    gpu.name = "Thor"
    done = command("score", "--weights", out, tracks)
    assert done.code == 3
    cause = "own.engine does not run here: it is of device Orin sm87, not Thor sm87; build it again"
    assert cause in done.err
    done = command("export", out, "-o", tmp_path / "x.onnx")
    assert done.code == 2
    assert "own.engine has no tensors to export: name the weights file" in done.err
    done = command("build", out)
    assert done.code == 2
    assert "own.engine is an engine already" in done.err


def test_the_way_of_a_board(gpu, command, tiny, tmp_path, tracks, monkeypatch):
    """Exported elsewhere, built and scored where there is neither jax nor onnx."""
    model = tmp_path / "tiny.onnx"
    export(load_weights(tiny), model, precision="fp16")
    expected = Detector(tiny, "numpy").score(tracks / "c.flac").score
    for package in ("onnx", "jax", "flax"):
        monkeypatch.setitem(sys.modules, package, None)
    for _ in range(2):
        done = command(
            *("score", "--backend", "tensorrt", "--weights", model, "--format", "jsonl"), tracks
        )
        assert done.code == 0, done.err
        row = done.rows[str(tracks / "c.flac")]
        assert (row["backend"], row["dtype"]) == ("tensorrt", "float16")
        assert row["weights"] == load_weights(tiny).summary()
        assert row["score"] == pytest.approx(expected, abs=0.01)
    assert done.err == ""  # found again
    done = command("score", "--backend", "tensorrt", "--weights", tiny, tracks)
    assert done.code == 3
    assert "needs onnx: pip install onnx, or export the weights elsewhere" in done.err


def test_timings_of_builds_are_kept(gpu, command, tiny, tmp_path):
    for batch in "123":
        assert command("build", tiny, "--batches", batch).code == 0
    assert [asked["timings"] for asked in fake_nvidia.built] == [
        b"",
        b"timings ",
        b"timings timings ",
    ]
    (path,) = (tmp_path / "cache" / "artifactnet-jax" / "engines").glob("timings-*.bin")
    assert "10.3.0-Orin_sm87" in path.name
    path.write_bytes(b"damaged")
    assert command("build", tiny, "--batches", "4").code == 0
    assert path.read_bytes() == b"timings "


def test_refit(gpu, command, tiny, tmp_path, monkeypatch):
    old, new = tmp_path / "old.engine", tmp_path / "new.engine"
    tuned = save_tiny(tmp_path / "tuned.safetensors", seed=5)
    assert command("build", tiny, "-o", old, "--refittable", "--batches", "2").code == 0
    assert fake_nvidia.built[0]["flags"] == {"REFIT"}
    done = command("build", tuned, "--refit", old, "-o", new)
    assert (done.code, done.out) == (0, f"{new}\n")
    assert len(fake_nvidia.built) == 1
    recipe, weights = engine.read_recipe(new)
    assert weights.summary() == load_weights(tuned).summary()
    assert (recipe.refittable, recipe.batches) == (True, (2,))
    audio = segments(3)
    truth = load_backend("numpy", load_weights(tuned))(audio)
    np.testing.assert_allclose(Detector(new).backend(audio), truth, atol=1e-5)

    monkeypatch.setattr(fake_nvidia, "refuses", "weights of another shape")
    done = command("build", tuned, "--refit", old, "-o", new)
    assert done.code == 3
    assert "weights of another shape" in done.err
    gpu.name = "Thor"
    done = command("build", tuned, "--refit", old, "-o", new)
    assert done.code == 3
    assert "does not run here: it is of device Orin sm87, not Thor sm87" in done.err
    assert engine.read_recipe(new)[0] == recipe


def test_refit_is_refused(gpu, command, tiny, tmp_path):
    old, fixed = tmp_path / "old.engine", tmp_path / "fixed.engine"
    assert command("build", tiny, "-o", fixed, "--batches", "2").code == 0
    assert command("build", tiny, "-o", old, "--batches", "2", "--refittable").code == 0
    wide = dataclasses.replace(TINY, cnn=dataclasses.replace(TINY.cnn, hidden=9))
    other = tmp_path / "wide.safetensors"
    save_weights(other, wide, random_tensors(wide), name="wide", licence="", provenance={})
    for arguments, cause in (
        ((tiny, "--refit", fixed), "takes no other weights: build it with --refittable"),
        ((other, "--refit", old), "is of another network than 'wide'"),
        ((tiny, "--refit", old, "--batches", "2"), "leave --batches out"),
        ((tiny, "--refit", tmp_path / "none.engine"), "no such engine"),
    ):
        done = command("build", *arguments)
        assert done.code == 2
        assert cause in done.err


def test_what_tensorrt_refuses_is_one_line(gpu, command, tiny, tmp_path, tracks, monkeypatch):
    out = tmp_path / "own.engine"
    assert command("build", tiny, "-o", out).code == 0
    monkeypatch.setattr(fake_nvidia, "refuses", "no memory\nat 0x0")
    done = command("score", "--weights", out, tracks)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "tensorrt cannot load the engine: no memory; build it again" in done.err
    done = command("build", tiny, "-o", tmp_path / "other.engine")
    assert done.code == 3
    assert "tensorrt cannot build the engine: no memory; if memory is short" in done.err
    assert not (tmp_path / "other.engine").exists()
    monkeypatch.setattr(fake_nvidia, "refuses", "")
    gpu.limit = 100_000
    done = command("score", "--weights", out, tracks)
    assert done.code == 3
    assert "out of memory" in done.err


def test_weights_and_dtypes_that_it_does_not_take(gpu, tiny, command, tmp_path):
    weights = load_weights(tiny)
    with pytest.raises(ValueError, match="float32 or float16, not bfloat16"):
        load_backend("tensorrt", weights, dtype="bfloat16")
    joint = dataclasses.replace(TINY, front_end=dataclasses.replace(TINY.front_end, joint="song"))
    for other in (
        dataclasses.replace(weights, config=joint),
        ForeignGraph("g", TINY, {}, "", "", {}, {"nodes": []}),
    ):
        with pytest.raises(ValueError, match="TensorRT scores segments one by one"):
            engine.recipe_for(other, "tensorrt", find_device(), precision="fp32")
    for output, cause in (
        ("x.plan", "name a file that ends in .engine"),
        ("none/x.engine", "create it first"),
    ):
        done = command("build", tiny, "-o", tmp_path / output)
        assert done.code == 2
        assert cause in done.err
    (tmp_path / "mine.engine").write_bytes(b"something else")
    done = command("build", tiny, "-o", tmp_path / "mine.engine")
    assert done.code == 2
    assert (tmp_path / "mine.engine").read_bytes() == b"something else"
    assert command("build", tiny, "--batches", "0").code == 2


def test_auto_does_not_take_it_unasked(gpu, tiny):
    assert models.pick(load_weights(tiny)) in ("numpy", "xla", "onnxruntime")


def test_doctor_says_what_a_report_needs(gpu, command, tiny, tmp_path, monkeypatch):
    from artifactnet_jax import doctor

    for name, text in (("model", "NVIDIA Jetson Orin Nano\0"), ("tegra", "# R36, REVISION: 4.0\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor, "BOARD", (str(tmp_path / "model"), str(tmp_path / "tegra")))
    assert command("build", tiny).code == 0
    found = json.loads(command("doctor", "--json").out)
    assert found["backends"]["tensorrt"] == "ok"
    nvidia = found["nvidia"]
    assert (nvidia["gpu"], nvidia["capability"], nvidia["cuda"]) == ("Orin", "8.7", "12.6")
    assert nvidia["tensorrt"] == "10.3.0"
    assert nvidia["board"] == "NVIDIA Jetson Orin Nano"
    assert len(nvidia["engines"]) == 1
    table = command("doctor").out
    for text in ("Orin, compute capability 8.7, 8.0 GiB, driver for CUDA 12.6", "10.3.0"):
        assert text in table
    assert "NVIDIA Jetson Orin Nano; # R36, REVISION: 4.0" in table
    assert nvidia["engines"][0] in table
