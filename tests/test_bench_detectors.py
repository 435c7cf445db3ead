"""Adapters: each against its own definition, and what becomes of a score that is none."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
import scipy.interpolate
import scipy.signal

from artifactnet_jax.bench.adapter import (
    RATE,
    Adapter,
    DetectorError,
    Scored,
    at_rate,
    run_batch,
)
from artifactnet_jax.bench.baselines import Clam, Fakeprint, Separation, SpecTTTra, centred
from artifactnet_jax.bench.detectors import Tiered, open_detector, trained_parts
from artifactnet_jax.detector import Detector
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError
from artifactnet_jax.weights import parameter_counts

ONNX = Path(__file__).parent / "onnx"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


class Says(Adapter):
    """Gives what it was told to give, whatever it hears."""

    def __init__(self, *answers: object, name: str = "says") -> None:
        self.name, self._answers, self.heard = name, list(answers), []

    def score(self, audio):
        self.heard.append(audio)
        answer = self._answers[(len(self.heard) - 1) % len(self._answers)]
        if isinstance(answer, Exception):
            raise answer
        return answer


# --- the adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (1.2, "score"),
        (-0.001, "score"),
        (math.nan, "score"),
        (math.inf, "score"),
        (Scored(1.5, (0.4,)), "score"),
        (None, "score"),
        ("much", "score"),
        (KeyError("bug"), "detector"),
        (DetectorError("silent", "it is silent"), "silent"),
    ],
)
def test_no_score_outside_the_unit_interval(answer, kind):
    (result,) = run_batch(Says(answer), [noise(0.1)])
    assert isinstance(result, DetectorError)
    assert result.kind == kind


def test_good_scores_of_any_type():
    answers = (0, 1, 0.25, np.float32(0.5), np.array(0.75), Scored(0.1, (0.0, 0.2), 1))
    results = run_batch(Says(*answers), [noise(0.1)] * 6)
    assert [result.score for result in results] == [0, 1, 0.25, 0.5, 0.75, 0.1]
    assert results[-1] == Scored(0.1, (0.0, 0.2), 1)


def test_a_batch_that_breaks_is_taken_one_by_one():
    class Breaks(Says):
        def batch(self, audio):
            raise MemoryError

    results = run_batch(Breaks(0.5, ValueError("no")), [noise(0.1)] * 3)
    assert [getattr(result, "score", None) for result in results] == [0.5, None, 0.5]
    assert results[1].kind == "detector"


def test_a_batch_of_the_wrong_length_fails_all():
    class Short(Says):
        def batch(self, audio):
            return [0.5]

    results = run_batch(Short(0.5), [noise(0.1)] * 2)
    assert all(isinstance(result, DetectorError) for result in results)


def test_audio_comes_at_the_rate_that_is_asked_for():
    says = Says(0.5)
    says.input_rate = 16_000
    t = np.arange(RATE) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32)
    run_batch(says, [tone])
    (heard,) = says.heard
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert len(heard) == 16_000
    np.testing.assert_allclose(heard[500:-500], expected[500:-500], atol=1e-3)
    assert at_rate(tone, RATE) is tone


# --- ours, and ONNX ---------------------------------------------------------------------------


def test_ours_says_what_the_detector_says(weights_path, detector: Detector):
    ours = open_detector(f"artifactnet:{weights_path}")
    ours.load("cpu")
    tracks = [noise(9, 1), noise(4, 2), np.zeros(RATE, np.float32)]
    first, second, silent = run_batch(ours, tracks)
    for result, audio in ((first, tracks[0]), (second, tracks[1])):
        verdict = detector.score(audio, RATE)
        assert (result.score, result.verdict) == (verdict.score, verdict.verdict)
        assert result.segments == tuple(segment.score for segment in verdict.segments)
    assert silent.kind == "silent"
    assert run_batch(ours, tracks[1:2])[0] == second  # whatever the company
    assert ours.name == "artifactnet:random"
    assert ours.params == parameter_counts(detector.weights.config)["total"]
    assert detector.weights.sha256 in ours.identity


def ort_scores(path: Path, segments: np.ndarray) -> list[float]:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [float(session.run(None, {name: s[None]})[0].reshape(-1)[0]) for s in segments]


@pytest.mark.slow
def test_onnx_as_the_public_runner_runs_it():
    onnx = open_detector(f"onnx:{ONNX / 'plain.onnx'}")
    onnx.load("cpu")
    assert onnx.name == "onnx:plain"
    size = onnx._front_end.segment_samples
    for n in (3 * size + 1234, size, size // 3):
        audio = np.resize(noise(2, 3), n)
        starts = np.linspace(0, max(n - size, 0), 7).astype(np.int64)
        padded = np.pad(audio, (0, max(0, size - n)))
        expected = ort_scores(ONNX / "plain.onnx", np.stack([padded[s : s + size] for s in starts]))
        (result,) = run_batch(onnx, [audio])
        assert result.score == pytest.approx(float(np.median(expected)), abs=1e-6)
        assert len(result.segments) == (7 if n > size else 1)  # seven copies of one are one


@pytest.mark.slow
def test_onnx_of_a_whole_song():
    ort = pytest.importorskip("onnxruntime")
    onnx = open_detector(f"onnx:{ONNX / 'song.onnx'}")
    onnx.load("cpu")
    assert onnx.song
    size = onnx._front_end.segment_samples
    audio = np.resize(noise(2, 4), 2 * size + size // 4)
    session = ort.InferenceSession(str(ONNX / "song.onnx"), providers=["CPUExecutionProvider"])
    tail = [] if size / 4 < 2 * RATE else [np.pad(audio[2 * size :], (0, size - size // 4))]
    segments = np.stack([audio[:size], audio[size : 2 * size], *tail])
    (expected,) = session.run(None, {session.get_inputs()[0].name: segments})
    (result,) = run_batch(onnx, [audio])
    assert result.score == pytest.approx(float(expected[0]), abs=1e-6)


def test_a_segment_that_is_not_finite_fails_the_track_and_shows():
    onnx = open_detector(f"onnx:{ONNX / 'plain.onnx'}")
    onnx.load("cpu")
    values = iter([0.1, math.nan, 0.3, 0.4, 0.5, 0.6, 0.7])
    onnx._run = lambda segments: next(values)
    size = onnx._front_end.segment_samples
    (result,) = run_batch(onnx, [np.resize(noise(1), 4 * size)])
    assert result.kind == "score"
    assert result.segments == (0.1, None, 0.3, 0.4, 0.5, 0.6, 0.7)


@pytest.mark.parametrize("file", ["gone.onnx", "text.onnx", "image_classifier.onnx"])
def test_onnx_that_cannot_be_used(tmp_path, file):
    (tmp_path / "text.onnx").write_text("no model")
    folder = ONNX if file == "image_classifier.onnx" else tmp_path
    with pytest.raises(CommandError, match=f"onnx:.*{file}"):
        open_detector(f"onnx:{folder / file}").load("cpu")


# --- baselines -------------------------------------------------------------------------------


def test_fakeprint_by_scipy():
    audio = at_rate(noise(7, 5), 16_000)
    _, _, spectrum = scipy.signal.stft(
        audio.astype(np.float64),
        nperseg=8192,
        noverlap=4096,
        boundary=None,
        padded=False,
        scaling="spectrum",
    )
    power = np.abs(spectrum * scipy.signal.get_window("hann", 8192).sum()) ** 2
    mean = (10 * np.log10(power)).mean(axis=1)[512:4097]
    lowest = [s + int(np.argmin(mean[s : s + 10])) for s in range(0, 3585, 10)]
    hull = scipy.interpolate.interp1d(
        lowest, mean[lowest], kind="quadratic", fill_value="extrapolate"
    )(np.arange(3585))
    peaks = np.clip(mean - np.maximum(hull, -45), 0, 5)
    found = Fakeprint().features(audio)
    assert found.shape == (3585,)
    np.testing.assert_allclose(found, peaks / peaks.max(), atol=1e-3)
    short = Fakeprint().features(audio[:100])
    assert np.isfinite(short).all()


def combed(seed: int) -> np.ndarray:
    """Noise with weak tones at fixed frequencies, as some decoders leave them."""
    t = np.arange(15 * 16_000) / 16_000
    tones = sum(np.sin(2 * np.pi * f * t) for f in range(1500, 7500, 500))
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(len(t)) + 0.004 * tones).astype(np.float32)


def test_fakeprint_learns_peaks_and_keeps_what_it_learnt(tmp_path):
    def plain(seed: int) -> np.ndarray:
        return (0.1 * np.random.default_rng(seed).standard_normal(240_000)).astype(np.float32)

    examples = [(combed(s), 1) for s in range(8)] + [(plain(s), 0) for s in range(20, 28)]
    fitted = Fakeprint()
    assert not fitted.fitted
    fitted.fit([*examples, (np.zeros(16_000, np.float32), 0)])  # silence is passed over
    assert fitted.params == 3586
    assert min(fitted.score(combed(s)).score for s in range(40, 44)) > 0.5
    assert max(fitted.score(plain(s)).score for s in range(50, 54)) < 0.5
    path = tmp_path / "f.json"
    path.write_text(json.dumps(fitted.state))
    again = open_detector(f"fakeprint:{path}")
    assert again.score(combed(40)) == fitted.score(combed(40))
    assert again.identity == fitted.identity
    with pytest.raises(ValueError, match="not of both classes"):
        Fakeprint().fit(examples[:8])
    path.write_text('{"kind": "separation", "weights": [1], "bias": 0}')
    with pytest.raises(CommandError, match="not a fitted fakeprint"):
        open_detector(f"fakeprint:{path}")


class Halves:
    """A teacher that explains half of every sample."""

    name, digest, note, parallel = "halves", "h", "", False

    def residual(self, audio):
        yield audio.mean(axis=1) / 2


def test_separation_measures_the_residual():
    separation = Separation()
    separation._teacher = Halves()
    np.testing.assert_allclose(separation.features(noise(1)), [10 * math.log10(0.25)], atol=1e-5)
    with pytest.raises(DetectorError):
        separation.features(np.zeros(100, np.float32))
    assert open_detector("separation").name == "separation"


# --- tiers -----------------------------------------------------------------------------------


def test_the_second_tier_hears_only_what_the_first_is_unsure_of():
    fast = Says(0.1, 0.5, 0.2, 0.8, 0.79, ValueError("no"))
    second = Says(0.9, DetectorError("silent", "silent"))
    second.input_rate = 22_050
    tiered = Tiered(fast, second, (0.2, 0.8))
    fast.gflops, second.gflops, fast.params, second.params = 2.0, 10.0, 3, 4
    results = run_batch(tiered, [noise(0.1, seed) for seed in range(6)])
    assert [getattr(r, "score", None) for r in results] == [0.1, 0.9, 0.2, 0.8, None, None]
    assert [getattr(r, "tier", None) for r in results] == [1, 2, 1, 1, None, None]
    assert [r.kind for r in results[4:]] == ["silent", "detector"]
    assert len(second.heard) == 2
    assert tiered.params == 7
    cost = tiered.cost([1, 2, 1, 1, None])
    assert cost == {"second_share": 0.25, "gflops": 2 + 0.25 * 10, "band": [0.2, 0.8]}
    assert tiered.cost([])["gflops"] is None


def test_tiered_specifications():
    tiered = open_detector("tiered:fakeprint+artifactnet@0.3-0.6")
    assert (tiered.band, tiered.name) == ((0.3, 0.6), "tiered:fakeprint+artifactnet@0.3-0.6")
    assert trained_parts(tiered) == [tiered.fast]
    for bad in ("fakeprint", "fakeprint+", "a+b@1", "fakeprint+fakeprint@0.9-0.1"):
        with pytest.raises(CommandError, match="tiered"):
            open_detector(f"tiered:{bad}")


# --- others' ---------------------------------------------------------------------------------


def test_a_class_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "bench_theirs.py").write_text(
        "import numpy as np\n"
        "class Loud:\n"
        "    name, params, input_rate = 'loud', 1, 22_050\n"
        "    def load(self, device): self.scale = 1.0\n"
        "    def score(self, audio): return self.scale * float(np.abs(audio).max())\n"
        "class Public:\n"
        "    name, params, input_sr = 'public', 2, 16_000\n"
        "    def forward(self, audio): return len(audio) / 1e6\n"
        "class Nothing: pass\n"
    )
    monkeypatch.chdir(tmp_path)
    loud, public = open_detector("bench_theirs:Loud"), open_detector("x=bench_theirs:Public")
    loud.load("cpu")
    public.load("cpu")
    assert (loud.name, loud.params, loud.input_rate) == ("loud", 1, 22_050)
    assert (public.name, public.input_rate) == ("x", RATE)  # its `forward` takes 44.1 kHz
    assert run_batch(public, [noise(1)])[0].score == 0.0441
    audio = np.full(RATE, 0.5, np.float32)
    assert run_batch(loud, [audio])[0].score == pytest.approx(0.5, abs=0.1)
    for spec in ("bench_theirs:Nothing", "bench_theirs:Gone", "bench_gone:X"):
        with pytest.raises(CommandError) as caught:
            open_detector(spec)
        assert caught.value.code == USAGE
    assert str(tmp_path) not in sys.path


def test_a_command(tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import sys, soundfile\n"
        "x, rate = soundfile.read(sys.argv[1])\n"
        "if len(x) < 100: sys.exit('too short')\n"
        "print('score', len(x) / rate if x.ndim == 1 else 9)\n"
    )
    command = open_detector(f"mine={sys.executable} {script} {{}}")
    assert command.name == "mine"
    good, short = run_batch(command, [noise(0.5), noise(0.001)])
    assert good.score == 0.5
    assert short.kind == "command"
    assert "too short" in str(short)
    (nothing,) = run_batch(open_detector("true"), [noise(0.1)])
    assert "printed nothing" in str(nothing)


def test_published_baselines_say_where_their_weights_come_from(tmp_path):
    for spec in ("spectttra", "clam", f"spectttra:{tmp_path}", f"clam:{tmp_path}"):
        with pytest.raises(CommandError) as caught:
            open_detector(spec).load("cpu")
        assert caught.value.code == USAGE
        assert "huggingface.co" in str(caught.value)
    with pytest.raises(CommandError, match="no such detector"):
        open_detector("no-such-detector-anywhere")
    with pytest.raises(CommandError, match="onnx:FILE"):
        open_detector("onnx")


def test_spectttra_without_its_packages(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "sonics", None)
    with pytest.raises(CommandError, match="pip install git") as caught:
        SpecTTTra(str(tmp_path)).load("cpu")
    assert caught.value.code == NO_BACKEND


def test_clam_without_its_parts(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "clam.py").write_text("")
    with pytest.raises(CommandError, match=r"best_model_triplet.* is not there"):
        Clam(str(tmp_path)).load("cpu")


def test_the_middle_of_a_track():
    x = np.arange(10.0)
    assert centred(x, 4).tolist() == [3, 4, 5, 6]
    assert centred(x, 12).tolist() == [*range(10), 0, 0]


# --- decoders' lines ------------------------------------------------------------------------------


def test_a_fingerprint_is_a_half_where_a_decoder_is_named(monkeypatch, tmp_path):
    from artifactnet_jax import decoders
    from artifactnet_jax.bench import detectors
    from made_decoder import coloured

    detector = open_detector("fingerprint")
    detector.load("cpu")
    assert (detector.name, detector.identity) == ("fingerprint", decoders.load().digest)
    real = detector.score(coloured(3, 5))
    assert 0 <= real.score < 0.5
    with pytest.raises(DetectorError, match="too short"):
        detector.score(coloured(3, 2))
    # By hand: L = 6 gives 6 / 9, L = 3 a half, and a p that rounds to 0 no more than 1.
    for p, score in ((1e-6, 2 / 3), (1e-3, 0.5), (1.0, 0.0), (0.1, 0.25)):
        assert detectors.surprise(p) == pytest.approx(score)
    assert 0.98 < detectors.surprise(0.0) < 1
    # Where a comb explains a low p nothing is named, and the score stays below a half.
    low = decoders.Match("X", 9.0, 1e-8, 1.0, (5e3, 16e3), ())
    for match, above in ((low, True), (None, False)):
        outcome = decoders.Outcome(match, None if match else "a steady tone", low)
        monkeypatch.setattr(decoders, "match", lambda spectrum, bank, o=outcome: o)
        assert (detector.score(coloured(3, 5)).score >= 0.5) == above
    (tmp_path / "b.npz").write_bytes(b"")
    with pytest.raises(CommandError, match="not a bank of decoders"):
        open_detector(f"fingerprint:{tmp_path}/b.npz").load("cpu")
