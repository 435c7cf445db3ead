"""Models of other exporters, converted: against onnxruntime's scores of the same files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from artifactnet_jax import Detector
from artifactnet_jax.audio import SegmentReader
from artifactnet_jax.config import CNN, Decision, FrontEnd, Imported, UNet
from artifactnet_jax.convert.describe import describe
from artifactnet_jax.convert.export import export
from artifactnet_jax.convert.graph import ConvertError
from artifactnet_jax.convert.import_cache import load_onnx
from artifactnet_jax.convert.importer import import_model
from artifactnet_jax.convert.original import session
from artifactnet_jax.files import cache_folder
from artifactnet_jax.filterbank import mel_filterbank
from artifactnet_jax.models import load_backend
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.weights import (
    Weights,
    WeightsError,
    load_weights,
    random_tensors,
    write_weights,
)
from onnx_audio import RATE, SAMPLES, segments
from unet_family import SMALL, member

FOLDER = Path(__file__).parent / "onnx"
EXAMPLES = Path(__file__).parents[1] / "examples"
NATIVE = sorted(
    path.stem
    for path in FOLDER.glob("*.json")
    if path.stem not in ("attention", "logits")  # an unmappable bottleneck; no score
)
TRUTH = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
CONVENTIONS = (
    *("n_fft", "hop", "stft_edge", "hpss_width", "percussive_width", "hpss_edge", "hpss_power"),
    *("n_mels", "mel_power", "amin", "amin_rule", "top_db", "joint"),
)
ROUNDING = 1e-5
PARITY = 5e-5  # onnxruntime's own sums over a plane are off by as much: see the float64 test


@pytest.fixture(scope="module")
def converted() -> dict[str, Weights]:
    """Every fixture that is a detector, converted once."""
    return {name: import_model(FOLDER / f"{name}.onnx") for name in [*NATIVE, "attention"]}


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return segments(3)


def scores(weights: Weights, backend: str, name: str, audio: np.ndarray) -> list[float]:
    """What the fixture's truth lists: of each segment, or of each song."""
    songs = TRUTH[name]["songs"]
    if songs is None:
        return load_backend(backend, weights)(audio).tolist()
    detector = Detector(weights, backend)
    verdicts = [detector.score(audio[a:b].reshape(-1), RATE) for a, b in songs]
    return [verdict.score for verdict in verdicts]  # type: ignore[misc]


# --- the native route ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("backend", ["numpy", "xla"])
def test_native_scores_are_those_of_the_file(converted, audio, name, backend):
    weights = converted[name]
    assert (weights.provenance["route"], weights.provenance["reason"]) == ("native", "")
    got = scores(weights, backend, name, audio)
    np.testing.assert_allclose(got, TRUTH[name]["scores"], atol=PARITY)


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    """The first segments of the example clips, real and generated music: [4, SAMPLES]."""
    clips = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".opus", ".mp3", ".ogg"))
    clips += sorted(EXAMPLES.glob("*.flac"))
    readers = [SegmentReader(clip, FrontEnd(), Decision(), 1) for clip in clips]
    return np.stack([next(iter(reader)).samples for reader in readers])


@pytest.mark.parametrize("name", NATIVE)
def test_real_music_scores_as_in_onnxruntime(converted, music, name):
    """Scores within 1e-4, and the same verdicts."""
    run = session(str(FOLDER / f"{name}.onnx"))
    given = run.get_inputs()[0].name
    if TRUTH[name]["songs"] is None:
        expected = [float(run.run(None, {given: x[None]})[0].item()) for x in music]
        got = load_backend("numpy", converted[name])(music)
    else:
        expected = [float(run.run(None, {given: music})[0].item())]
        verdict = Detector(converted[name], "numpy").score(music.reshape(-1), RATE)
        got = np.array([verdict.score])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert ((got >= 0.5) == (np.array(expected) >= 0.5)).all()


def test_float64_settles_who_is_right(converted, audio):
    """Where we differ most from onnxruntime, ours is nearer to the same network in float64."""
    weights = converted["instance_gates"]
    exact = NumpyNetwork(weights.config, weights.tensors, np.float64)
    truth = np.array([float(exact(segment.astype(np.float64))) for segment in audio])
    ours = np.abs(load_backend("numpy", weights)(audio) - truth).max()
    theirs = np.abs(np.array(TRUTH["instance_gates"]["scores"]) - truth).max()
    assert ours < theirs


@pytest.mark.parametrize("name", NATIVE)
def test_conventions_are_read_from_the_file(converted, name):
    layout, front_end = TRUTH[name]["layout"], converted[name].config.front_end
    for key in CONVENTIONS:
        assert getattr(front_end, key) == layout[key], key
    # The dynamo exporter drops the addition of so small a number.
    expected = (layout["hpss_eps"], 0.0) if layout["exporter"] == "dynamo" else layout["hpss_eps"]
    assert front_end.hpss_eps == expected or front_end.hpss_eps in np.atleast_1d(expected)
    assert list(front_end.channels) == layout["channels"]
    known = dataclasses.replace(
        front_end, mel_scale=layout["mel_scale"], mel_norm=layout["mel_norm"]
    )
    got = converted[name].tensors["front_end.mel"]
    np.testing.assert_allclose(got, mel_filterbank(known), atol=1e-6)


@pytest.mark.parametrize("name", NATIVE)
def test_every_weight_is_there(converted, name):
    """As many numbers as the network has parameters, less the norms that the exporter folded."""
    weights, truth = converted[name], TRUTH[name]["parameters"]
    for part in ("unet", "cnn"):
        entries = [
            e for e in weights.provenance["initialisers"] if e["tensor"].startswith(f"{part}.")
        ]
        assert len({entry["name"] for entry in entries}) == len(entries)
        counted = sum(
            array.size
            for tensor, array in weights.tensors.items()
            if tensor.startswith(f"{part}.") and tensor.endswith((".kernel", "prelu"))
        )
        assert 0.8 * truth[part] < counted <= truth[part]


def test_the_reference_layout_becomes_the_preset_s_modules(converted):
    config = converted["v94_dynamo"].config
    layout = TRUTH["v94_dynamo"]["layout"]
    assert isinstance(config.unet, UNet)
    assert isinstance(config.cnn, CNN)
    assert config.unet.widths == tuple(layout["widths"])
    assert config.unet.bottleneck == layout["bottleneck"]
    assert config.cnn.widths == tuple(layout["cnn_widths"])
    assert config.unet.mask_max == 0.5
    assert isinstance(converted["glu_dynamo"].config.unet, Imported)


def test_mask_bounds(converted):
    for name in NATIVE:
        unet = converted[name].config.unet
        expected = 1.0 if TRUTH[name]["layout"]["mask"] == "one" else 0.5
        assert unet.mask_max == pytest.approx(expected), name


def test_the_table_names_what_a_reader_looks_for(converted):
    table = dict.fromkeys(label for label, _ in describe(converted["glu_dynamo"]) if label)
    text = "\n".join(found for _, found in describe(converted["glu_dynamo"]))
    assert list(table) == [
        *("source", "licence", "route", "input", "output", "STFT", "HPSS", "mel", "channels"),
        *("UNet", "CNN", "aggregation", "parity"),
    ]
    for words in ("glu", "bilinear", "3x3 stride-2 convolution", "htk scale", "mask at most 0.5"):
        assert words in text
    text = "\n".join(found for _, found in describe(converted["attention"]))
    assert "not native" in text


def test_a_score_does_not_depend_on_the_batch(converted, audio):
    for name in ("plain", "unfolded_gelu"):
        backend = load_backend("xla", converted[name])
        together, alone = backend(audio), [backend(audio[i : i + 1])[0] for i in range(3)]
        assert together.tolist() == alone


def test_silence_is_finite_where_the_original_is_not(converted):
    """Without an epsilon the original divides 0 by 0."""
    silent = np.zeros((1, SAMPLES), np.float32)
    sparse = silent.copy()
    sparse[0, 40_000] = 0.5
    file = session(str(FOLDER / "no_eps.onnx"))
    given = file.get_inputs()[0].name
    for audio in (silent, sparse):
        assert not np.isfinite(file.run(None, {given: audio})[0]).all()
        for backend in ("numpy", "xla"):
            got = load_backend(backend, converted["no_eps"])(audio)
            assert 0 <= got[0] <= 1


def test_weights_survive_the_file(converted, audio, tmp_path):
    for name in ("plain", "song", "attention"):
        write_weights(converted[name], tmp_path / "w.safetensors")
        again = load_weights(tmp_path / "w.safetensors")
        assert again.sha256 == converted[name].sha256
        assert again.config == converted[name].config
        backend = "xla" if name == "attention" else "numpy"
        np.testing.assert_array_equal(
            scores(again, backend, name, audio), scores(converted[name], backend, name, audio)
        )


# --- the graph route -----------------------------------------------------------------------------


def test_an_unknown_bottleneck_takes_the_graph_route(converted, audio):
    weights = converted["attention"]
    assert weights.provenance["route"] == "graph"
    assert "node" in weights.provenance["reason"]  # it says which one it cannot map
    backend = load_backend("auto", weights)
    np.testing.assert_allclose(backend(audio), TRUTH["attention"]["scores"], atol=PARITY)
    assert backend(audio[1:2])[0] == backend(audio)[1]
    with pytest.raises(ValueError, match="use xla"):
        load_backend("numpy", weights)


def as_graph(name: str, converted: dict[str, Weights]) -> Weights:
    """The same file by the graph route."""
    from artifactnet_jax.convert import importer
    from artifactnet_jax.convert.graph import read_graph

    graph = read_graph(FOLDER / f"{name}.onnx")
    graph, contract, _ = importer.examine(graph)
    return importer._graph_weights(name, graph, contract, "", {**converted[name].provenance})


@pytest.mark.parametrize("name", ["song", "plain", "glu_dynamo"])
def test_the_graph_route_gives_the_same(converted, audio, name):
    weights = as_graph(name, converted)
    got = scores(weights, "xla", name, audio)
    np.testing.assert_allclose(got, TRUTH[name]["scores"], atol=PARITY)


def test_a_song_graph_shows_no_segments(converted, audio):
    detector = Detector(as_graph("song", converted))
    verdict = detector.score(audio.reshape(-1), RATE)
    assert (verdict.segments, verdict.aggregate, verdict.plan) == ((), "graph", "first60")
    assert detector.score(np.zeros(SAMPLES, np.float32), RATE).verdict == "undecided"
    with pytest.raises(ValueError, match="leave --aggregate out"):
        Detector(as_graph("song", converted), aggregate_rule="median")


# --- songs ---------------------------------------------------------------------------------------


def test_songs_are_scored_whole(converted, audio):
    """Joint normalisation: a segment's score depends on its song, and a song is never split."""
    weights = converted["song"]
    detector = Detector(weights, "numpy")
    verdict = detector.score(audio.reshape(-1), RATE)
    assert (verdict.aggregate, verdict.plan, len(verdict.segments)) == ("rms", "first60", 3)
    alone = detector.score(audio[2], RATE)
    assert alone.segments[0].score != verdict.segments[2].score
    with pytest.raises(ValueError, match="use --segments first60 or a count"):
        Detector(weights, "numpy", segments="all")


def test_the_tail_rule_of_the_song_graph(converted, audio):
    detector = Detector(converted["song"], "numpy")
    whole = audio.reshape(-1)
    for samples, expected in ((2 * SAMPLES + 88_199, 2), (2 * SAMPLES + 88_200, 3), (1, 1)):
        assert len(detector.score(whole[:samples], RATE).segments) == expected


# --- score, and the cache ------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder("converted")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    """A foreign detector of short segments, which converts in a second."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export(member(4, KINDS, SMALL), path)
    model = onnx.load(path)
    del model.metadata_props[:]
    helper.set_model_props(model, {"licence": "CC0-1.0"})
    onnx.save(model, path)
    return path


def test_score_takes_an_onnx_file(command, own_cache, small_file, tmp_path):
    track = tmp_path / "t.wav"
    audio = segments(1, SMALL.segment_samples)
    soundfile.write(track, audio[0], RATE, subtype="FLOAT")
    arguments = ("score", "--weights", small_file, "--backend", "numpy")
    first = command(*arguments, "--format", "jsonl", track)
    assert first.code == 0
    (row,) = first.rows.values()
    expected = session(str(small_file)).run(None, {"audio": audio})[0][0]
    assert row["score"] == pytest.approx(expected, abs=PARITY)
    assert row["weights"]["name"] == "small"
    assert "route native; licence: CC0-1.0" in first.err
    (entry,) = own_cache.iterdir()
    again = command(*arguments, "--format", "jsonl", "-q", track)
    assert "licence" not in again.err  # from the cache
    assert again.rows[os.fspath(track)]["score"] == row["score"]
    entry.write_bytes(b"damaged")
    assert command(*arguments, "--format", "jsonl", track).code == 0
    assert load_weights(entry).name == "small"


def test_a_converted_model_in_the_cache_does_not_load_jax(own_cache, small_file, tmp_path):
    first = load_onnx(small_file)
    code = f"""
import sys
from artifactnet_jax import Detector
found = Detector({os.fspath(small_file)!r}, "numpy")
assert not {{"jax", "jaxlib", "flax"}} & set(sys.modules)
print(found.weights.sha256)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == first.sha256


@pytest.mark.parametrize("package", ["jax", "onnx"])
def test_a_package_that_converting_needs_is_named(own_cache, monkeypatch, package):
    with_jax = ("importer", "contract", "node_call", "operators", "simplify")
    for name in [name for name in sys.modules if name.startswith("artifactnet_jax.convert.")]:
        if name.rpartition(".")[2].startswith(with_jax):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WeightsError, match=rf"plain.onnx: an ONNX model needs {package}: pip inst"):
        load_onnx(FOLDER / "plain.onnx")


def test_a_cache_that_cannot_be_written_stops_nothing(own_cache, small_file, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file in its place")
    assert load_onnx(small_file).provenance["route"] == "native"
    assert "not cached" in capsys.readouterr().err


def test_the_convert_command(command, tmp_path):
    out = tmp_path / "w.safetensors"
    done = command("convert", FOLDER / "no_eps.onnx", "-o", out, "--licence", "mine")
    assert done.code == 0
    assert "nothing added (0/0 counts as 0 here)" in done.out
    weights = load_weights(out)
    assert (weights.licence, weights.provenance["source"]) == ("mine", "no_eps.onnx")


def test_native_can_be_demanded(command, tmp_path):
    out = tmp_path / "w.safetensors"
    done = command("convert", FOLDER / "attention.onnx", "-o", out, "--route", "native")
    assert (done.code, out.exists()) == (2, False)
    assert "not native: " in done.err


# --- back to ONNX --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE)
def test_round_trip_to_onnxruntime(converted, audio, name, tmp_path):
    """ONNX -> ours -> ONNX -> onnxruntime."""
    weights, truth = converted[name], TRUTH[name]
    path = tmp_path / "lean.onnx"
    form = "segment" if truth["songs"] is None else "song"
    export(weights, path, form=form)
    run = session(str(path))
    given = run.get_inputs()[0].name
    if form == "segment":
        got = run.run(None, {given: audio})[0].tolist()
    else:
        got = [float(run.run(None, {given: audio[a:b]})[0].item()) for a, b in truth["songs"]]
    np.testing.assert_allclose(got, truth["scores"], atol=PARITY)
    np.testing.assert_allclose(got, scores(weights, "numpy", name, audio), atol=ROUNDING)


@pytest.mark.parametrize("name", [*NATIVE, "attention"])
def test_untouched_weights_give_the_original_back(converted, name, tmp_path):
    path = tmp_path / f"{name}.onnx"
    export(converted[name], path, template=FOLDER / f"{name}.onnx")
    assert path.read_bytes() == (FOLDER / f"{name}.onnx").read_bytes()


@pytest.mark.parametrize("name", ["plain", "unfolded_gelu", "v94_dynamo", "group_shuffle"])
def test_tuned_weights_go_back_into_the_original(converted, audio, name, tmp_path):
    weights = converted[name]
    rng = np.random.default_rng(1)
    tuned = dict(weights.tensors)
    for tensor in tuned:
        if tensor.startswith("cnn.") and tensor.endswith(".kernel"):
            tuned[tensor] = tuned[tensor] * rng.uniform(0.8, 1.2, tuned[tensor].shape)
            tuned[tensor] = tuned[tensor].astype(np.float32)
    changed = dataclasses.replace(weights, tensors=tuned)
    path = tmp_path / "out" / "tuned.onnx"
    path.parent.mkdir()
    export(changed, path, template=FOLDER / f"{name}.onnx")
    run = session(str(path))
    given = run.get_inputs()[0].name
    got = np.concatenate(
        [run.run(None, {given: audio[i : i + 1]})[0].reshape(-1) for i in range(3)]
    )
    np.testing.assert_allclose(got, load_backend("numpy", changed)(audio), atol=PARITY)
    assert np.max(np.abs(got - TRUTH[name]["scores"])) > 1e-3


def test_a_graph_goes_back_into_its_file_too(converted, audio, tmp_path):
    weights = converted["attention"]
    tuned = {
        name: array * np.float32(1.1) if array.ndim == 4 and array.dtype == np.float32 else array
        for name, array in weights.tensors.items()
    }
    changed = dataclasses.replace(weights, tensors=tuned)
    path = tmp_path / "tuned.onnx"
    export(changed, path, template=FOLDER / "attention.onnx")
    run = session(str(path))
    got = run.run(None, {run.get_inputs()[0].name: audio})[0].reshape(-1)
    np.testing.assert_allclose(got, load_backend("xla", changed)(audio), atol=PARITY)
    assert np.max(np.abs(got - TRUTH["attention"]["scores"])) > 1e-3
    with pytest.raises(ValueError, match="as template"):
        export(changed, path)


def test_the_export_command(command, converted, tmp_path):
    write_weights(converted["plain"], tmp_path / "w.safetensors")
    out = tmp_path / "m.onnx"
    done = command("export", tmp_path / "w.safetensors", "-o", out, "--precision", "fp16")
    assert done.code == 0
    assert "CC0-1.0" in done.err
    onnx.checker.check_model(str(out))
    template = ("--template", FOLDER / "plain.onnx")
    assert command("export", tmp_path / "w.safetensors", "-o", out, *template).code == 0
    assert out.read_bytes() == (FOLDER / "plain.onnx").read_bytes()
    both = command("export", tmp_path / "w.safetensors", "-o", out, *template, "--form", "song")
    assert both.code == 2
    assert "keeps its own form" in both.err
    other = ("--template", FOLDER / "no_eps.onnx")
    wrong = command("export", tmp_path / "w.safetensors", "-o", out, *other)
    assert (wrong.code, "not the file" in wrong.err) == (2, True)


@pytest.mark.parametrize("head", [True, False], ids=["texture", "bare"])
def test_embedded_weights_export(command, tmp_path, audio, head):
    """With its texture head the graph comes back as a graph: layers have no place for it."""
    from artifactnet_jax.models import open_model

    weights = open_model(None)
    if not head:
        tensors = {n: t for n, t in weights.tensors.items() if not n.startswith("texture.")}
        config = dataclasses.replace(weights.config, texture=None)
        weights = dataclasses.replace(weights, config=config, tensors=tensors)
    write_weights(weights, tmp_path / "w.safetensors")
    assert command("export", tmp_path / "w.safetensors", "-o", tmp_path / "m.onnx").code == 0
    run = session(str(tmp_path / "m.onnx"))
    got = run.run(None, {"audio": audio})[0]
    np.testing.assert_allclose(got, load_backend("numpy", weights)(audio), atol=PARITY)
    again = import_model(tmp_path / "m.onnx")
    assert again.provenance["route"] == ("graph" if head else "native")
    assert again.fine.sha256 == weights.fine.sha256  # beside either, and no part of it
    assert "artifactnet_jax.fine" not in again.provenance["metadata"]
    backend = load_backend("xla" if head else "numpy", again)
    np.testing.assert_allclose(backend(audio), got, atol=PARITY)
    if not head:
        assert isinstance(again.config.unet, UNet)
        assert again.config.unet.patch == (8, 8)


# --- random members of the family ----------------------------------------------------------------

FAMILY = st.fixed_dictionaries(
    {
        "input": st.sampled_from(["magnitude", "log1p", "log", "instance"]),
        "widths": st.sampled_from([(4,), (4, 6), (4, 6, 8), (2, 4, 4, 6)]),
        "bottleneck": st.just(8),
        "size": st.sampled_from(["pad", "match"]),
        "pad": st.sampled_from(["reflect", "constant", "edge"]),
        "block": st.sampled_from(["plain", "residual", "glu"]),
        "norm": st.sampled_from(["batch", "group", "instance", "none"]),
        "act": st.sampled_from(["relu", "silu", "gelu", "leaky_relu", "elu"]),
        "down": st.sampled_from(["max", 2, 3, 4]),
        "gate": st.booleans(),
        "up": st.sampled_from(["transpose", "shuffle", "nearest", "linear"]),
        "skip": st.sampled_from(["concat", "add"]),
        "head": st.sampled_from([1, 3]),
    }
)
FRONT_ENDS = st.fixed_dictionaries(
    {
        "joint": st.sampled_from(["segment", "view"]),
        "hpss_eps": st.sampled_from([0.0, 1e-10]),
        "hpss_edge": st.sampled_from(["reflect", "edge"]),
        "hpss_width": st.sampled_from([9, 17, 31]),
        "top_db": st.sampled_from([80.0, 60.0]),
        "mel_scale": st.sampled_from(["slaney", "htk"]),
        "mel_power": st.sampled_from([1.0, 2.0]),
    }
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a conversion is too slow to shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(0, 2**16), FAMILY, FRONT_ENDS)
def test_random_members_of_the_family_convert_natively(tmp_path, seed, kinds, front_end):
    if kinds["size"] == "match" and kinds["down"] in (3, 4):
        kinds = {**kinds, "down": 2}  # the others round odd sizes up
    original = member(seed, kinds, dataclasses.replace(SMALL, **front_end))
    path = tmp_path / "member.onnx"
    export(original, path)
    weights = import_model(path)
    assert (weights.provenance["route"], weights.provenance["reason"]) == ("native", "")
    got = weights.config.front_end
    for key in ("hpss_eps", "hpss_edge", "hpss_width", "top_db", "mel_power", "n_fft", "hop"):
        assert getattr(got, key) == getattr(original.config.front_end, key), key
    audio = segments(2, SMALL.segment_samples)
    run = session(str(path))
    expected = run.run(None, {"audio": audio})[0]
    np.testing.assert_allclose(load_backend("numpy", weights)(audio), expected, atol=PARITY)


KINDS: dict[str, Any] = {
    **{"input": "magnitude", "widths": (4, 6), "bottleneck": 8, "size": "pad", "pad": "reflect"},
    **{"block": "residual", "norm": "none", "act": "relu", "down": 4, "gate": True},
    **{"up": "transpose", "skip": "concat", "head": 1},
}


def test_the_factor_of_the_mask_may_come_last(tmp_path):
    """0.5 * (sigmoid * magnitude) is the same residual."""
    path = tmp_path / "member.onnx"
    export(member(3, KINDS, SMALL), path)
    model = onnx.load(path)
    nodes = list(model.graph.node)

    def reader(name: str) -> Any:
        return next(node for node in nodes if name in node.input)

    gates = {node.output[0] for node in nodes if node.op_type == "Sigmoid"}
    half = next(n for n in nodes if n.op_type == "Mul" and n.input[0] in gates)
    shaped = reader(half.output[0])
    product = reader(shaped.output[0])
    assert (shaped.op_type, product.op_type) == ("Reshape", "Mul")
    shaped.input[0] = half.input[0]
    last = helper.make_node("Mul", ["whole", half.input[1]], [product.output[0]])
    product.output[0] = "whole"
    model.graph.node.insert(nodes.index(product) + 1, last)
    model.graph.node.remove(half)
    onnx.save(model, path)
    weights = import_model(path)
    assert weights.provenance["route"] == "native", weights.provenance["reason"]
    assert weights.config.unet.mask_max == pytest.approx(0.5)
    audio = segments(2, SMALL.segment_samples)
    expected = session(str(path)).run(None, {"audio": audio})[0]
    np.testing.assert_allclose(load_backend("numpy", weights)(audio), expected, atol=1e-4)


def test_segments_that_share_a_maximum_are_scored_one_by_one(tmp_path):
    """A graph of many segments, clamped below the maximum of all: each must stand by itself."""
    path = tmp_path / "member.onnx"
    export(member(5, KINDS, SMALL), path)
    model = onnx.load(path)
    loudest = next(node for node in model.graph.node if node.op_type == "ReduceMax")
    loudest.input[1] = "all.axes"
    model.graph.initializer.append(numpy_helper.from_array(np.arange(4), "all.axes"))
    onnx.save(model, path)
    weights = import_model(path)
    assert weights.provenance["route"] == "native", weights.provenance["reason"]
    assert (weights.config.front_end.joint, weights.provenance["form"]) == ("segment", "segment")
    audio = segments(2, SMALL.segment_samples) * np.array([[1], [0.001]], np.float32)
    run = session(str(path))
    expected = [run.run(None, {"audio": audio[i : i + 1]})[0][0] for i in range(2)]
    assert abs(run.run(None, {"audio": audio})[0][1] - expected[1]) > 1e-3
    np.testing.assert_allclose(load_backend("numpy", weights)(audio), expected, atol=1e-4)


def test_metadata_may_state_rate_and_licence(tmp_path):
    path = tmp_path / "member.onnx"
    export(member(4, KINDS, SMALL), path)
    model = onnx.load(path)
    del model.metadata_props[:]
    helper.set_model_props(model, {"sample_rate": "22050", "License": "CC BY-NC 4.0"})
    onnx.save(model, path)
    weights = import_model(path)
    assert (weights.config.front_end.sample_rate, weights.licence) == (22_050, "CC BY-NC 4.0")


# --- files that are no detectors -----------------------------------------------------------------


def small_model(path: Path, body: Any, *, inputs=(1, 1024 * 16), outputs=None, extra=()) -> Path:
    """A model of a few nodes, for what is wrong with it."""
    nodes, constants = body
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, inputs), *extra],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def mean_of(op: str | None = None, *, keep: int = 0) -> Any:
    """y = op(mean(audio)), a number for each segment."""
    nodes = [helper.make_node("ReduceMean", ["audio"], ["m"], axes=[1], keepdims=keep)]
    nodes.append(helper.make_node(op or "Identity", ["m"], ["y"], name="last"))
    return nodes, []


def bad_models(folder: Path) -> dict[str, tuple[Path, str]]:
    """name -> (file, what the message must say)."""
    good = (FOLDER / "v94_dynamo.onnx").read_bytes()

    def file(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    noise = numpy_helper.from_array(np.full(3, np.nan, np.float32), "w")
    weighted = [helper.make_node("ReduceMean", ["w"], ["s"], keepdims=0)]
    weighted += [helper.make_node("Add", ["audio", "s"], ["a"])]
    weighted += [helper.make_node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=0)]
    weighted += [helper.make_node("Sigmoid", ["m"], ["y"])]
    second = helper.make_tensor_value_info("more", TensorProto.FLOAT, (1, 4))
    return {
        "absent": (folder / "absent.onnx", "no such file"),
        "folder": (folder, ""),
        "text": (file("text.onnx", b"this is no model, it is a text\n" * 40), "not an ONNX"),
        "empty": (file("empty.onnx", b""), "empty"),
        "truncated": (file("cut.onnx", (FOLDER / "plain.onnx").read_bytes()[:90_000]), "truncated"),
        "no data": (file("alone.onnx", good), "v94_dynamo.onnx.data is missing"),
        "image": (FOLDER / "image_classifier.onnx", "not audio"),
        "logits": (FOLDER / "logits.onnx", "not a score"),
        "nan": (small_model(folder / "nan.onnx", (weighted, [noise])), "non-finite"),
        "operator": (small_model(folder / "op.onnx", mean_of("Det", keep=1)), "Det"),
        "no score": (small_model(folder / "raw.onnx", mean_of("Exp")), "not a probability"),
        "constant": (
            small_model(
                folder / "k.onnx",
                (
                    [helper.make_node("Identity", ["w"], ["y"])],
                    [numpy_helper.from_array(np.full(1, 0.5, np.float32), "w")],
                ),
            ),
            "does not depend on the audio",
        ),
        "inputs": (
            small_model(folder / "two.onnx", mean_of("Sigmoid"), extra=[second]),
            "2 inputs",
        ),
    }


BAD = (
    *("absent", "folder", "text", "empty", "truncated", "no data", "image", "logits", "nan"),
    *("operator", "no score", "constant", "inputs"),
)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_clear_line(command, tmp_path, name):
    path, words = bad_models(tmp_path)[name]
    with pytest.raises(ConvertError) as caught:
        import_model(path)
    assert words in str(caught.value)
    done = command("convert", path, "-o", tmp_path / "w.safetensors")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert os.fspath(path) in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "w.safetensors").exists()


def test_shapes_are_those_of_the_standard(tmp_path, monkeypatch):
    """An operator that gives another shape than ONNX infers must stop, and not score."""
    from artifactnet_jax.convert import operators

    path = small_model(tmp_path / "m.onnx", mean_of("Sigmoid", keep=1))
    assert import_model(path).provenance["route"] == "graph"
    wrong = operators._ANYWHERE["ReduceMean"]
    monkeypatch.setitem(operators._ANYWHERE, "ReduceMean", lambda *x: wrong(*x).reshape(-1))
    with pytest.raises(ConvertError, match=r"\(ReduceMean\) gives \[1\] here, and ONNX.* \[1, 1\]"):
        import_model(path)


def test_external_data_behind_links(converted, audio, tmp_path):
    """As a hub's cache lays a model out: links to blobs with other names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, suffix in enumerate((".onnx", ".onnx.data")):
        shutil.copy(FOLDER / f"v94_dynamo{suffix}", blobs / str(number))
        (snapshot / f"v94_dynamo{suffix}").symlink_to(blobs / str(number))
    weights = import_model(snapshot / "v94_dynamo.onnx")
    assert weights.sha256 == converted["v94_dynamo"].sha256


def test_any_audio_model_runs_as_a_graph(tmp_path, audio):
    """Nothing of ArtifactNet in it, but audio in and a score out."""
    path = small_model(
        tmp_path / "other.onnx", mean_of("Sigmoid"), inputs=("n", SAMPLES), outputs=("n",)
    )
    weights = import_model(path)
    assert weights.provenance["route"] == "graph"
    expected = 1 / (1 + np.exp(-audio.mean(axis=1)))
    np.testing.assert_allclose(load_backend("auto", weights)(audio), expected, atol=1e-6)


def test_random_tensors_cover_imported_networks(converted):
    config = converted["unfolded_gelu"].config
    assert set(random_tensors(config)) == set(converted["unfolded_gelu"].tensors)
