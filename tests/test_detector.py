"""The detector: verdicts, order, failures, threads, and the same bits whatever the company."""

from __future__ import annotations

import importlib.util
import io
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifactnet_jax import detector as module
from artifactnet_jax import read_ahead
from artifactnet_jax.audio import AudioError, SegmentReader
from artifactnet_jax.decision import around, decide, decided
from artifactnet_jax.detector import Detector
from artifactnet_jax.results import Failure, SegmentScore, Verdict, aggregate
from artifactnet_jax.weights import load_weights
from audio_files import encode, noise, write

RATE, SIZE = 44_100, 176_400
needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("flax") is None, reason="needs artifactnet-jax[cpu]"
)


class First:
    """A backend whose score of a segment is its first sample, so that tests choose it."""

    name, dtype = "first", "float32"

    def __init__(self, batch_size: int = 2):
        self.batch_size = batch_size
        self.batches: list[int] = []

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        assert audio.dtype == np.float32
        assert audio.shape[1:] == (SIZE,)
        assert 1 <= len(audio) <= self.batch_size
        self.batches.append(len(audio))
        return audio[:, 0].copy()


def scripted(*scores: float, level: float = 0.1) -> tuple[np.ndarray, int]:
    """A source of which `First` makes these scores."""
    samples = np.full((len(scores), SIZE), level, np.float32)
    samples[:, 0] = scores
    return samples.reshape(-1), RATE


Make = Callable[..., Detector]


@pytest.fixture
def make(weights_path: Path) -> Make:
    """Builds detectors on `First`, or on the given backend."""
    weights = load_weights(weights_path)

    def build(backend: Any = None, **options: Any) -> Detector:
        built = Detector(weights, "numpy", **options)
        built.backend = backend or First()
        return built

    return build


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = {t for t in threading.enumerate() if t.name == read_ahead.THREAD_NAME} - before
    assert not left


def decoding() -> int:
    return sum(thread.name == read_ahead.THREAD_NAME for thread in threading.enumerate())


# --- Verdicts -------------------------------------------------------------------------------------


def test_a_verdict_and_all_it_says(detector, tracks):
    verdict = detector.score(tracks / "c.flac")
    reader = SegmentReader(tracks / "c.flac", *front_end_and_verdict(detector))
    segments = list(reader)
    expected = [float(detector.backend(s.samples[None])[0]) for s in segments]
    assert verdict.segments == tuple(map(SegmentScore, [0.0, 4.0], expected))
    assert expected[0] != expected[1]
    assert verdict.score == (expected[0] + expected[1]) / 2
    assert 0.01 < verdict.score < 0.99
    assert verdict.verdict == ("ai" if verdict.score >= 0.5 else "real")
    assert (verdict.path, verdict.threshold) == (str(tracks / "c.flac"), 0.5)
    assert (verdict.duration_s, verdict.sample_rate, verdict.channels) == (7.0, RATE, 1)
    assert (verdict.backend, verdict.dtype) == ("numpy", "float32")
    assert (verdict.aggregate, verdict.plan) == ("median", "all")
    assert verdict.weights == detector.weights.summary()
    assert verdict.weights["name"] == "random"
    assert set(verdict.timings) == {"decode_s", "compute_s"}


def front_end_and_verdict(detector):
    return detector.weights.config.front_end, detector.weights.config.verdict


def test_sources_of_the_same_samples_score_the_same(detector, tmp_path):
    pcm = noise(6, seed=5)
    path = write(tmp_path, "x.wav", pcm)
    verdict = detector.score(path)
    with path.open("rb") as file:
        others = [
            detector.score(str(path)),
            detector.score(bytes(path)),
            detector.score(file),
            detector.score(io.BytesIO(encode(pcm, "flac"))),
            detector.score(pcm, RATE),
            detector.score((pcm / 32768).tolist(), RATE),
        ]
    assert [other.segments for other in others] == [verdict.segments] * 6
    names = [other.path for other in others]
    assert names == [str(path)] * 3 + ["<stream>", "<array>", "<array>"]


@pytest.mark.parametrize(
    ("scores", "verdict", "score"),
    [
        ((0.5,), "ai", 0.5),  # equality is "ai"
        ((np.nextafter(np.float32(0.5), np.float32(0)),), "real", None),
        ((0.25, 1.0, 0.5), "ai", 0.5),
        ((0.75, 0.125), "real", 0.4375),
        ((0.75, 0.25), "ai", 0.5),
    ],
)
def test_median_and_threshold(make, scores, verdict, score):
    result = make().score(*scripted(*scores))
    assert result.verdict == verdict
    assert result.score == (scores[0] if score is None else score)
    assert [s.score for s in result.segments] == [float(s) for s in scores]
    assert [s.start_s for s in result.segments] == [4.0 * i for i in range(len(scores))]


def test_threshold_of_the_caller(make):
    assert make(threshold=0.25).score(*scripted(0.25)).verdict == "ai"
    assert make(threshold=0.25).score(*scripted(0.25)).threshold == 0.25
    assert make(threshold=0.0).score(*scripted(0.0)).verdict == "ai"
    assert make(threshold=1.0).score(*scripted(0.99)).verdict == "real"


def test_rms_weights_come_from_the_audio(make):
    loud, soft = scripted(0.75, level=0.5), scripted(0.25, level=0.125)
    result = make(aggregate_rule="rms").score(np.concatenate([loud[0], soft[0]]), RATE)
    rms = [np.sqrt(np.mean(np.square(x[0].astype(np.float64)))) for x in (loud, soft)]
    expected = (0.75 * rms[0] + 0.25 * rms[1]) / (rms[0] + rms[1] + 1e-9)
    assert result.score == pytest.approx(expected, rel=1e-6)
    assert 0.64 < expected < 0.66
    assert (result.aggregate, result.verdict) == ("rms", "ai")
    assert make().score(np.concatenate([loud[0], soft[0]]), RATE).score == 0.5


def test_plans(make):
    source = scripted(*np.linspace(0.1, 0.9, 17))
    assert len(make().score(*source).segments) == 17
    first = make(segments="first60").score(*source)
    assert (len(first.segments), first.duration_s, first.plan) == (15, 68.0, "first60")
    seven = make(segments=7).score(*source)
    assert (len(seven.segments), seven.plan) == (7, 7)
    assert seven.segments[-1] == SegmentScore(64.0, float(np.float32(0.9)))


def test_silence_is_undecided(make):
    result = make().score(np.zeros(9 * RATE, np.float32), RATE)
    assert (result.verdict, result.score, result.segments) == ("undecided", None, ())
    assert "silent" in result.warnings
    half = make().score(np.concatenate([np.zeros(SIZE, np.float32), scripted(0.5)[0]]), RATE)
    assert half.segments == (SegmentScore(4.0, 0.5),)
    assert half.warnings[0] == "silent-segments"


# --- Bad input ------------------------------------------------------------------------------------


def test_bad_input_raises_from_score_and_names_the_source(detector, tmp_path):
    with pytest.raises(AudioError, match=r"gone\.wav: .*check the path") as caught:
        detector.score(tmp_path / "gone.wav")
    assert caught.value.kind == "not-found"
    with pytest.raises(AudioError, match=r"^<stream>: ") as caught:
        detector.score(io.BytesIO())
    assert caught.value.kind == "empty"
    with pytest.raises(AudioError, match=r"^<array>: ") as caught:
        detector.score(np.full(SIZE, np.nan, np.float32), RATE)
    assert caught.value.kind == "non-finite"


def test_mistakes_of_the_caller_are_python_errors(detector, weights_path):
    with pytest.raises(ValueError, match="sample_rate"):
        detector.score(np.zeros(SIZE, np.float32))
    with pytest.raises(TypeError):
        detector.score("song.wav", RATE)
    with pytest.raises(TypeError):
        list(detector.score_many(None))
    for options, words in (
        ({"jobs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"threshold": 1.5}, r"1\.5 is not in \[0, 1\]"),
        ({"threshold": float("nan")}, "nan is not in"),
        ({"aggregate_rule": "max"}, "'median', 'rms' or 'mean'"),
        ({"segments": 0}, "not 'all'"),
        ({"segments": True}, "not 'all'"),
        ({"segments": "some"}, "not 'all'"),
        ({"dtype": "float16"}, "float16"),
    ):
        with pytest.raises(ValueError, match=words):
            Detector(weights_path, "numpy", **options)
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        Detector(weights_path, "abacus")


def test_bad_input_never_stops_the_others(make, tmp_path):
    pytest.importorskip("av")  # without it nobody can tell that a file is no audio
    nan = scripted(0.5, 0.5)
    nan[0][-1] = np.nan  # found after the first segment has been put in a batch
    sources = ["gone.wav", scripted(0.25), nan, scripted(0.75), io.BytesIO(b"x"), scripted(0.5)]
    found = dict(make(First(5)).score_many(sources))
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    kinds = {i: r.kind for i, r in found.items() if isinstance(r, Failure)}
    assert kinds == {0: "not-found", 2: "non-finite", 4: "unsupported"}
    assert [found[i].score for i in (1, 3, 5)] == [0.25, 0.75, 0.5]


def test_a_bug_in_a_decoder_fails_one_track(make, monkeypatch, caplog):
    def reader(source, *rest, **options):
        if source != "two\nlines":
            return SegmentReader(source, *rest, **options)
        return (1 / 0 for _ in "x")

    monkeypatch.setattr(module, "SegmentReader", reader)
    caplog.set_level("DEBUG", "artifactnet_jax")
    found = dict(make().score_many(["two\nlines", scripted(0.5)]))
    assert found[1].score == 0.5
    assert found[0].kind == "internal"
    assert found[0].message.startswith("two\\nlines: ZeroDivisionError in the decoder: ")
    assert caplog.records[0].exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("score", [np.nan, np.inf, -0.5, 1.5])
def test_a_score_out_of_range_is_a_failure_not_a_verdict(make, score):
    class Broken(First):
        def __call__(self, audio):
            return np.where(audio[:, 0] == 0.5, np.float32(score), audio[:, 0])

    found = dict(make(Broken(3)).score_many([scripted(0.25, 0.5), scripted(0.75)]))
    assert (found[0].kind, found[0].path) == ("model", "<array>")
    assert found[1].score == 0.75


# --- Order, batches, threads ----------------------------------------------------------------------


def test_segments_of_several_tracks_share_batches(make):
    backend = First(4)
    sources = [scripted(*np.linspace(0.1, 0.9, n)) for n in (1, 2, 5, 3, 9)]
    found = dict(make(backend, jobs=1).score_many(sources))
    assert sum(backend.batches) == 20
    for index, n in enumerate((1, 2, 5, 3, 9)):
        expected = np.linspace(0.1, 0.9, n).astype(np.float32).tolist()
        assert [s.score for s in found[index].segments] == expected


def test_no_source_no_result(make):
    assert list(make().score_many([])) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_closing_early_stops_the_threads(make, jobs):
    taken: list[int] = []

    def endless() -> Iterator[Any]:
        while True:
            taken.append(1)
            yield scripted(0.25, 0.5, 0.75)

    results = make(jobs=jobs).score_many(endless())
    assert decoding() == 0  # nothing runs before the first result is asked for
    next(results)
    next(results)
    assert decoding() == jobs
    results.close()
    assert decoding() == 0
    assert len(taken) < 20
    assert list(results) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_the_iterable_raises_is_raised(make, jobs):
    def sources() -> Iterator[Any]:
        yield scripted(0.5)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(make(jobs=jobs).score_many(sources()))
    assert decoding() == 0


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_the_backend_raises_is_raised(make, jobs):
    class Broken(First):
        def __call__(self, audio):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(make(Broken(), jobs=jobs).score_many([scripted(*[0.5] * 50)] * 50))
    assert decoding() == 0


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sources_may_wait_for_results(make, jobs, batch_size):
    answers: queue.Queue[float] = queue.Queue()

    def conversation() -> Iterator[Any]:
        yield scripted(0.125)
        for _ in range(4):
            yield scripted(min(1.0, answers.get(timeout=30) + 0.125))

    scores = []
    for _, result in make(First(batch_size), jobs=jobs).score_many(conversation()):
        scores.append(result.score)
        answers.put(result.score)
    assert scores == [0.125, 0.25, 0.375, 0.5, 0.625]


def test_closing_does_not_wait_for_a_source_that_never_comes(make, monkeypatch):
    monkeypatch.setattr(read_ahead, "STOP_S", 0.05)
    more: queue.Queue[Any] = queue.Queue()
    for _ in range(2):
        more.put(scripted(0.5))
    results = make(jobs=2).score_many(iter(more.get, None))
    assert [next(results)[1].score for _ in range(2)] == [0.5, 0.5]
    time.sleep(0.05)  # for one thread to wait for an item, and the other for its turn
    results.close()
    left = [t for t in threading.enumerate() if t.name == read_ahead.THREAD_NAME]
    assert 1 <= len(left) <= 2
    for _ in range(2):
        more.put("never scored")
    for thread in left:
        thread.join(30)
    assert decoding() == 0
    assert more.qsize() == 1  # the second one is left to the caller


def endless(segment: Any, read: list[int]) -> Iterator[Any]:
    """Stands in for the SegmentReader of a recording without end; counts what is read of it."""
    while True:
        read.append(1)
        yield segment


@pytest.mark.parametrize("jobs", [1, 4])
def test_decoding_runs_ahead_by_a_bounded_number_of_segments(make, monkeypatch, jobs):
    read: list[int] = []
    excess: list[int] = []

    class Slow(First):
        def __call__(self, audio):
            if len(excess) == 20:
                raise InterruptedError  # enough seen
            time.sleep(0.01)  # let the threads fill whatever they can
            excess.append(len(read) - sum(self.batches))
            return super().__call__(audio)

    built = make(Slow(3), jobs=jobs)
    (segment,) = SegmentReader(scripted(0.5), *front_end_and_verdict(built))
    monkeypatch.setattr(module, "SegmentReader", lambda *_, **__: endless(segment, read))
    with pytest.raises(InterruptedError):
        list(built.score_many(["x"] * 100))
    # The queue, the batch in hand, and one segment in the hand of each thread.
    assert 3 < max(excess) <= (2 * 3 + jobs) + 3 + jobs


def test_closing_stops_threads_that_read_endless_silence(make, monkeypatch):
    built = make(jobs=2)
    settings = front_end_and_verdict(built)
    hiss = np.full(SIZE, settings[1].silence_peak / 2, np.float32)
    (segment,) = SegmentReader((hiss, RATE), *settings)

    def reader(source: Any, *rest: Any, **options: Any) -> Any:
        if source == "silence":
            return endless(segment, [])
        return SegmentReader(source, *rest, **options)

    monkeypatch.setattr(module, "SegmentReader", reader)
    results = built.score_many([scripted(0.5), "silence", "silence"])
    assert next(results)[1].score == 0.5
    results.close()
    assert decoding() == 0


def test_a_thread_that_does_not_start_stops_the_others(make, monkeypatch):
    real, started = threading.Thread.start, []

    def start(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        list(make(jobs=4).score_many([scripted(0.5)] * 20))
    assert len(started) == 2
    assert decoding() == 0


# --- The same bits --------------------------------------------------------------------------------


def bits(result: Any) -> Any:
    assert isinstance(result, Verdict)
    return result.score, result.segments, result.verdict


@pytest.mark.parametrize(
    "backend", ["numpy", pytest.param("xla", marks=[needs_jax, pytest.mark.slow])]
)
def test_a_score_depends_on_nothing_but_the_input(weights_path, tracks, backend):
    built = Detector(weights_path, backend)
    assert built.backend.name == backend
    paths = sorted(tracks.iterdir())
    alone = [bits(built.score(path)) for path in paths]
    assert len({score for score, _, _ in alone}) == 3
    own = built.backend.batch_size
    for batch_size, jobs, order in (
        (own, 3, (2, 1, 0)),
        (1, 1, (0, 1, 2)),
        (2, 2, (1, 0, 2, 1)),
        (5, 1, (2, 0, 1)),
        (5, 4, (0, 0, 1, 2, 2)),
    ):
        built.backend.batch_size, built.jobs = batch_size, jobs
        found = dict(built.score_many([paths[i] for i in order]))
        assert [bits(found[i]) for i in range(len(order))] == [alone[i] for i in order]


def test_batch_size_is_the_backends(weights_path, tracks, detector):
    built = Detector(weights_path, "numpy", batch_size=5)
    assert built.backend.batch_size == 5
    assert bits(built.score(tracks / "b.wav")) == bits(detector.score(tracks / "b.wav"))


# --- Until decided --------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.8])
def test_decided_is_when_no_further_scores_change_the_verdict(margin):
    """Every completion with values on both sides of every border, and at the ends, by force."""
    grid = (0.0, 0.3, 0.4999, 0.5, 0.6, 1.0)
    early = 0
    for count in range(5):
        for scores in itertools.combinations_with_replacement(grid, count):
            for rest in range(1, 4):
                rests = itertools.chain.from_iterable(
                    itertools.combinations_with_replacement(grid, n) for n in range(rest + 1)
                )
                said = {
                    decide(aggregate([*scores, *more], [], "median", 0.0), *around(0.5, margin))
                    for more in rests
                    if (*scores, *more)
                }
                assert decided(list(scores), rest, *around(0.5, margin)) == (len(said) == 1)
                early += len(said) == 1
    assert early > 20


unit = st.floats(0, 1, width=32)


@given(
    st.lists(
        st.lists(st.one_of(unit, st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=9), max_size=3
    ),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 1.1]),
    st.integers(1, 4),
)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_until_decided_says_what_all_segments_say(make, scores, threshold, margin, batch_size):
    options = {"threshold": threshold, "margin": margin, "jobs": 2}
    sources = [scripted(*row) for row in scores if row]
    everything = dict(make(First(batch_size), **options).score_many(sources))
    backend = First(batch_size)
    found = dict(make(backend, until_decided=True, **options).score_many(sources))
    for index, whole in everything.items():
        part = found[index]
        assert part.verdict == whole.verdict
        n = len(part.segments)
        assert part.segments == whole.segments[:n]
        assert part.skipped == len(whole.segments) - n
        # A median is not known from fewer; at threshold 0 everything is AI.
        assert n >= (len(whole.segments) + 1) // 2 or threshold == 0
        assert part.score == aggregate([s.score for s in part.segments], [], "median", 0.0)
        assert decide(part.score, *around(threshold, margin)) == part.verdict
        assert (part.duration_s, part.warnings) == (whole.duration_s, whole.warnings)
    assert sum(backend.batches) == sum(len(part.segments) for part in found.values())


def test_half_of_a_clear_track_is_left_out(make):
    backend = First(1)
    built = make(backend, until_decided=True)
    result = built.score(*scripted(*[0.9] * 21))
    assert (result.verdict, result.score) == ("ai", pytest.approx(0.9))
    assert (len(result.segments), result.skipped) == (11, 10)
    assert result.to_dict()["skipped"] == 10
    assert "skipped" not in make().score(*scripted(0.5)).to_dict()


def test_silence_and_errors_after_the_decision_are_still_seen(make):
    backend = First(1)
    loud = scripted(*[0.9] * 6)[0]
    quiet = np.concatenate([loud, np.zeros(SIZE, np.float32)])
    result = make(backend, until_decided=True, jobs=1).score(quiet, RATE)
    assert "silent-segments" in result.warnings
    assert len(result.segments) + result.skipped == 6
    broken = quiet.copy()
    broken[-1] = np.nan
    with pytest.raises(AudioError, match="NaN or infinite"):
        make(backend, until_decided=True).score(broken, RATE)


def test_a_header_that_declares_too_little_is_no_verdict(make, monkeypatch):
    monkeypatch.setattr(SegmentReader, "_at_most", lambda self, limit: 2)
    found = dict(make(until_decided=True).score_many([scripted(0.9, 0.9, 0.1)]))
    assert found[0].kind == "internal"
    assert "more than 2 segments" in found[0].message


def test_only_a_median_of_segments_is_decided_early(weights_path):
    with pytest.raises(ValueError, match="decided early: use --aggregate median"):
        Detector(weights_path, "numpy", until_decided=True, aggregate_rule="mean")
