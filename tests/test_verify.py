"""The verb `verify`: an ONNX model in onnxruntime against the backends."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from artifactnet_jax.audio import Segment
from artifactnet_jax.config import Config, Decision
from artifactnet_jax.convert import verify
from artifactnet_jax.convert.contract import Contract
from artifactnet_jax.convert.graph import ConvertError
from artifactnet_jax.convert.import_cache import load_onnx
from artifactnet_jax.convert.parity import BACKENDS, STAGES, Candidate, Comparison, Errors, aligned
from artifactnet_jax.convert.verify import short
from artifactnet_jax.presets import parameter_shapes
from artifactnet_jax.weights import Weights, write_weights
from audio_files import write
from onnx_audio import segments

MODELS = Path(__file__).parent / "onnx"
SEGMENT, SONG, FOREIGN = (MODELS / f"{name}.onnx" for name in ("no_eps", "song", "attention"))
SAMPLES = 176_400
FULL_PROBE = verify.probe(SAMPLES)
PROBE = {k: FULL_PROBE[k] for k in ("music 1", "digital silence", "full-scale noise")}


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory):
    """Each model is converted once for all tests, and the built-in probe is shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(verify, "probe", lambda samples: PROBE)
        yield


def scores_of(path: Path, audio: np.ndarray) -> np.ndarray:
    """What onnxruntime says of audio [n, samples], one call per segment unless it is a song."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [audio] if path == SONG else [audio[i : i + 1] for i in range(len(audio))]
    return np.concatenate([session.run(None, {name: batch})[0].reshape(-1) for batch in batches])


def recording(folder: Path) -> tuple[Path, np.ndarray]:
    """A file of three segments, and these as float32 [3, samples]."""
    pcm = np.round(segments(3) * 32_767).astype(np.int16)
    return write(folder, "x.wav", pcm.reshape(-1, 1)), pcm / np.float32(32_768)


# --- The command ----------------------------------------------------------------------------------


def test_segment_model_equals_its_conversion_where_it_is_finite(command):
    expected_scores = dict(
        zip(PROBE, scores_of(SEGMENT, np.stack(list(PROBE.values()))), strict=True)
    )
    done = command("verify", SEGMENT, "--json", "--backends", "numpy,xla,onnx")
    report = json.loads(done.out)
    assert done.code == 0
    assert report["ok"]
    assert report["schema"] == "artifactnet-jax/verify/1"
    assert report["model"]["form"] == "segment"
    assert report["weights"]["route"] == "native"
    assert list(report["backends"]) == ["numpy", "xla", "onnx"]
    assert (report["left_out"], report["notes"]) == ({}, [])
    for row in report["backends"].values():
        assert row["counted"]
        assert (row["flips"], row["not_finite"]) == (0, 0)
        assert {"magnitude", "mask", "residual", "channels", "logit", "score"} <= set(row["stages"])
        assert list(row["stages"]) == [stage for stage in STAGES if stage in row["stages"]]
        for errors in row["stages"].values():
            assert 0 <= errors["p999"] <= errors["max"] < errors["scale"]
        assert row["track_dp"] <= row["segment_dp"] <= 1e-4

    tracks = {row["path"]: row for row in report["tracks"]}
    assert list(tracks) == list(expected_scores)
    for name, expected in expected_scores.items():
        if np.isfinite(expected):
            assert tracks[name]["score"] == pytest.approx(float(expected), abs=1e-6)
        else:
            assert tracks[name]["score"] is None
    lacking = {name for name, score in expected_scores.items() if not np.isfinite(score)}
    assert "digital silence" in lacking
    assert "full-scale noise" not in lacking
    assert {row["path"] for row in report["not_finite"]} == lacking
    for row in report["not_finite"]:
        assert row["start_s"] == 0
        assert all(0 < score < 1 for score in row["backends"].values())


def test_report_is_printable(command):
    done = command("verify", SEGMENT, "--backends", "numpy,onnx-fp16")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("model     no_eps.onnx, scores each segment")
    assert lines[-1].startswith("verified")
    assert any("onnx-fp16*" in line and "beside" in line for line in lines)
    assert any("digital silence" in line for line in lines)
    stages = [line.split()[0] for line in lines if line.split() and line.split()[0] in STAGES]
    assert stages == [stage for stage in STAGES if stage in stages]


def test_tracks_are_aggregated_and_unreadable_ones_are_rows(command, tmp_path):
    (path, audio), gone = recording(tmp_path), tmp_path / "gone.wav"
    done = command("verify", SEGMENT, "--backends", "numpy", "--json", "--audio", gone, path)
    report = json.loads(done.out)
    assert done.code == 1
    assert not report["ok"]
    assert report["backends"]["numpy"]["ok"]
    missing, row = report["tracks"]
    assert missing == {"path": str(gone), "error": missing["error"]}
    assert missing["error"]["kind"] == "not-found"
    assert (row["path"], row["n_segments"]) == (str(path), 3)
    assert row["score"] == pytest.approx(float(np.median(scores_of(SEGMENT, audio))), abs=1e-6)
    alone = command("verify", SEGMENT, "--backends", "numpy", "--audio", path)
    assert alone.code == 0


def test_song_model_is_never_split(command, tmp_path):
    path, audio = recording(tmp_path)
    done = command("verify", SONG, "--backends", "numpy,onnx", "--json", "--audio", path)
    report = json.loads(done.out)
    assert (done.code, report["aggregate"]) == (0, "graph")
    (row,) = report["tracks"]
    together = scores_of(SONG, audio)
    assert together.shape == (1,)
    assert row["score"] == pytest.approx(float(together[0]), abs=1e-6)
    assert {name: cell["flip"] for name, cell in row["backends"].items()} == {
        "numpy": False,
        "onnx": False,
    }
    assert all(cell["dp"] <= 1e-4 for cell in row["backends"].values())
    # With a maximum over the song only the graph itself shows what follows it.
    assert "channels" in report["backends"]["onnx"]["stages"]
    assert "channels" not in report["backends"]["numpy"]["stages"]
    assert report["backends"]["numpy"]["stages"]["score"]["max"] <= 1e-4


def test_foreign_graph_runs_in_xla_alone(command):
    done = command("verify", FOREIGN, "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert report["weights"]["route"] == "graph"
    assert report["weights"]["reason"]
    assert set(report["backends"]) == {"xla"}
    assert set(report["left_out"]) == set(BACKENDS) - {"xla"}
    assert list(report["backends"]["xla"]["stages"]) == ["score"]
    assert report["backends"]["xla"]["track_dp"] <= 1e-4
    refused = command("verify", FOREIGN, "--backends", "numpy")
    assert (refused.code, refused.out) == (3, "")
    assert "--backends numpy: a graph" in refused.err


@pytest.mark.parametrize(("part", "departs"), [("unet", "mask"), ("cnn", "logit")])
def test_other_weights_fail_at_the_stage_that_departs(command, tmp_path, part, departs):
    weights = load_onnx(SEGMENT)
    names = [n for n in parameter_shapes(weights.config) if n.startswith(f"{part}.")]
    name = [n for n in names if n.endswith(".kernel")][-1]
    tensors = {**weights.tensors, name: -3 * weights.tensors[name]}
    tuned = dataclasses.replace(weights, name="tuned", tensors=tensors)
    write_weights(tuned, tmp_path / "tuned.safetensors")
    path = write(tmp_path, "x.wav", np.round(segments(1).T * 32_767).astype(np.int16))
    args = ("verify", SEGMENT, tmp_path / "tuned.safetensors", "--backends", "numpy")
    args = (*args, "--audio", path)
    done = command(*args, "--json")
    report = json.loads(done.out)
    (row,) = report["backends"].values()
    assert (done.code, report["ok"], row["ok"], row["departs"]) == (1, False, False, departs)
    assert row["track_dp"] > 1e-4
    assert "differences are expected" in report["notes"][0]
    assert report["weights"]["source_sha256"] == report["model"]["sha256"]
    text = command(*args)
    assert text.code == 1
    assert f"FAILS, departs first at: {departs}" in text.out
    assert text.out.splitlines()[-1].startswith("NOT VERIFIED")
    if row["flips"] == 0:
        assert command(*args, "--tolerance", "1").code == 0


def test_probe_is_audio():
    found = {name: audio.astype(np.float64) for name, audio in FULL_PROBE.items()}
    assert len(found) == 8
    assert all(audio.shape == (SAMPLES,) for audio in found.values())
    assert all(np.abs(audio).max() <= 1 for audio in found.values())
    assert not found["digital silence"].any()
    assert np.count_nonzero(found["clicks in silence"]) == 4
    assert np.abs(found["music at -60 dB"]).max() == pytest.approx(8e-4, rel=0.5)


def test_weights_know_which_of_several_outputs_is_the_score(command, monkeypatch):
    weights = load_onnx(SEGMENT)

    def refuse(path: Any) -> Any:
        raise ConvertError("choose one output")

    monkeypatch.setattr("artifactnet_jax.convert.import_cache.load_onnx", refuse)
    assert verify._converted(str(SEGMENT), weights) is weights
    for path, given in ((SEGMENT, None), (SONG, weights)):
        with pytest.raises(ConvertError, match="choose one output"):
            verify._converted(str(path), given)
    one_line(command("verify", SEGMENT), 2, "choose one output")


def one_line(done: Any, code: int, *texts: str) -> None:
    assert (done.code, done.out) == (code, "")
    assert done.err.count("\n") == 1
    assert all(text in done.err for text in texts), done.err


def test_usage(command, tmp_path, monkeypatch):
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    one_line(command("verify", text), 2, str(text), "text")
    one_line(command("verify", tmp_path / "gone.onnx"), 2, "gone.onnx")
    one_line(command("verify", SEGMENT, tmp_path / "gone.safetensors"), 2, "gone.safetensors")
    one_line(command("verify", SEGMENT, "--backends", "numpy,tpu"), 2, "unknown backend 'tpu'")
    listed = f"@{tmp_path / 'gone.txt'}"
    one_line(command("verify", SEGMENT, "--audio", listed), 2, "gone.txt")
    assert command("verify", SEGMENT, "--tolerance", "-1").code == 2
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    cure = "pip install 'artifactnet-jax[convert]'"
    one_line(command("verify", SEGMENT), 3, "onnxruntime", cure)


def test_model_that_is_no_detector(command):
    done = command("verify", MODELS / "image_classifier.onnx")
    assert (done.code, done.out) == (2, "")
    assert "image_classifier.onnx" in done.err.splitlines()[-1]


# --- Tracks, by hand ------------------------------------------------------------------------------


class Said:
    """An original, or a candidate's backend, whose scores are the first sample of each segment."""

    def __init__(self, contract: Contract, shift: float = 0.0):
        self.contract, self.shift = contract, shift
        self.sizes: list[int] = []

    def __call__(self, audio: np.ndarray) -> Any:
        self.sizes.append(len(audio))
        scores = audio[:, 0] + np.float32(self.shift)
        if self.contract.song:
            return {}, scores, float(scores.mean(dtype=np.float64))
        return {}, scores, None


def compare(scores: list[float], contract: Contract, shift: float, **rules: Any) -> Comparison:
    """A comparison of one track with these scores; the candidate's lie `shift` higher."""
    verdict = Decision(**rules)
    config = Config(preset="converted", verdict=verdict)
    weights = Weights("x", config, {}, "", "none", {})
    candidate = Candidate("numpy", Said(contract, shift))
    comparison: Any = Comparison(Said(contract), weights, [candidate])  # type: ignore[arg-type]
    pieces = []
    for i, score in enumerate(scores):
        samples = np.full(contract.samples, score, np.float32)
        # A score below 0 marks a silent segment.
        pieces.append(Segment(4.0 * i, samples, 0.0 if score < 0 else 0.5, 0.1))
    comparison.track("x.wav", pieces)
    return comparison


def by(n: int | None, song: bool = False) -> Contract:
    return Contract("audio", "float32", ("n", "samples"), 8, n, "p", song)


def test_median_of_what_is_audible_and_finite():
    nan = float("nan")
    found = compare([0.2, -1.0, nan, 0.4, 0.9], by(1), 0.25)
    (row,) = found.rows
    (candidate,) = found.found
    assert row["score"] == pytest.approx(0.4)
    assert row["backends"]["numpy"] == {
        "score": pytest.approx(0.65),
        "dp": pytest.approx(0.25),
        "segment_dp": pytest.approx(0.25),
        "flip": True,
    }
    assert (candidate.flips, candidate.not_finite) == (1, 1)  # ours has no score where it must
    assert found.not_finite == [{"path": "x.wav", "start_s": 8.0, "backends": {"numpy": None}}]
    json.dumps(found.rows + found.not_finite, allow_nan=False)


def test_score_at_the_threshold_is_ai_on_both_sides():
    assert compare([0.5], by(1), 0.25).found[0].flips == 0
    assert compare([0.75], by(1), -0.25).found[0].flips == 0
    assert compare([0.5], by(1), -0.25).found[0].flips == 1
    assert compare([0.5], by(1), 0.0, threshold=0.75).found[0].flips == 0


def test_fixed_batch_is_filled_up_and_a_short_song_refused():
    found = compare([0.1, 0.2, 0.3], by(2), 0.0)
    assert found.original.sizes == [2, 2]  # type: ignore[attr-defined]
    assert found.rows[0]["n_segments"] == 3
    assert found.rows[0]["score"] == pytest.approx(0.2)
    with pytest.raises(ConvertError, match=r"x\.wav: 3 segments, and the graph takes 4"):
        compare([0.1, 0.2, 0.3], by(4, song=True), 0.0)


def test_song_is_one_call_and_its_own_score():
    found = compare([0.1, 0.2, 0.6], by(None, song=True), 0.0)
    assert found.original.sizes == [3]  # type: ignore[attr-defined]
    assert found.rows[0]["score"] == pytest.approx(0.3)
    assert found.found[0].track_dp == 0


def test_song_without_weight_has_no_score_of_ours():
    silent = Segment(0.0, np.zeros(8, np.float32), 0.0, 0.0)
    config = Config(preset="converted", verdict=Decision(aggregate="rms", rms_eps=0.0))
    weights = Weights("x", config, {}, "", "none", {})
    candidate = Candidate("numpy", lambda audio: ({}, audio[:, 0], None))
    comparison: Any = Comparison(Said(by(None, song=True)), weights, [candidate])  # type: ignore[arg-type]
    comparison.track("x.wav", [silent])
    assert candidate.not_finite == 1
    assert comparison.rows[0]["backends"]["numpy"]["score"] is None


# --- Statistics -----------------------------------------------------------------------------------


def test_errors_are_those_of_all_values():
    rng = np.random.default_rng(0)
    parts = [10 ** rng.uniform(-7, 1, (3, 50, 20)) for _ in range(4)]
    errors = Errors()
    for part in parts:
        errors.add(np.zeros_like(part), part * rng.choice([-1, 1], part.shape))
    everything = np.concatenate(parts).reshape(-1)
    assert errors.largest == everything.max()
    for share in (0.5, 0.9, 0.999):
        exact = np.quantile(everything, share, method="inverted_cdf")
        assert exact <= errors.quantile(share) <= 1.048 * exact
    assert errors.scale == 0


def test_errors_leave_out_what_the_original_lacks():
    errors = Errors()
    errors.add(np.array([np.nan, np.inf, -2.0]), np.array([1.0, 1.0, -2.0]))
    assert (errors.scale, errors.largest, errors.quantile(), errors.counts.sum()) == (2, 0, 0, 1)
    errors.add(np.full(3, np.nan), np.zeros(3))
    assert errors.counts.sum() == 1
    errors.add(np.zeros(2), np.array([0.0, np.nan]))
    assert errors.largest == np.inf


def test_tensors_are_aligned_by_their_axes():
    ours = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    for theirs in (
        ours,
        ours[:, None],
        ours.transpose(0, 2, 1)[..., None],
        ours.transpose(1, 2, 0)[None],
    ):
        found = aligned(theirs, ours)
        assert found is not None
        np.testing.assert_array_equal(found, ours)
    assert aligned(ours[:, :4], ours) is None
    assert aligned(np.stack([ours, ours]), ours) is None
    square = ours[:, :5, :5]
    theirs = square.transpose(0, 2, 1) + np.float32(1e-3)
    np.testing.assert_allclose(aligned(theirs, square), square, atol=2e-3)
    one = aligned(np.full((1, 1), 3.0), np.full(1, 2.0))
    assert one is not None
    assert one.shape == (1,)


def test_numbers_are_short():
    assert [short(x) for x in (None, 0.0, 1e-30, 1.23e-7, 3.5, 2e10)] == [
        *("inf", "0", "<1e-9", "1.2e-7", "3.5e0", "2.0e10")
    ]
