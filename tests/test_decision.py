"""The decision: one probability of what the witnesses say, words for it, stretches of a track.

Numbers are worked by hand, or by scipy and an exhaustive search. The Detector is asked with tiny
weights to which a fusion is given.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from artifactnet_jax import decision
from artifactnet_jax.config import Decision, Fusion
from artifactnet_jax.decision import Heard, Span
from artifactnet_jax.decoders import Match, Outcome
from artifactnet_jax.detector import Detector
from artifactnet_jax.weights import default_path, load_weights, random_tensors, save_weights
from audio_files import carrying, noise
from tiny_model import SMALL

RATE = 44_100
# Classes 0 to 8 s, 8 to 30 s, from 30 s on, and without a logit of the fine spectrum.
FUSION = Fusion(
    lengths_s=(0.0, 8.0, 30.0),
    bias=(-1.0, -0.5, 0.25, 0.5),
    segments=(0.5, 0.75, 1.0, 2.0),
    fine=(0.25, 0.5, 1.0, 0.0),
    decoder=(1.0, 1.0, 2.0, 0.5),
    span_segments=1.0,
    span_fine=0.5,
    span_bias=-0.5,
)


def nearest(p: float, found: bool) -> Outcome:
    """What a bank says: the nearest decoder at p, as a match or not."""
    match = Match("Suno", 5.0, p, 1.0, (5e3, 16e3), (), ())
    return Outcome(match if found else None, None if found else "like real music", match)


# --- One probability ------------------------------------------------------------------------------


def test_by_hand():
    """A track of 20 s: -0.5 + 0.75 * 2 + 0.5 * -1 + log10(0.1 / 0.01), and the prior 0.01."""
    said = decision.judge(Heard(2.0, -1.0, nearest(0.01, False), 20.0), FUSION, 0.01)
    assert said.evidence == pytest.approx(
        {"base": -0.5, "segments": 1.5, "fine": -0.5, "decoder": 1.0, "prior": math.log(1 / 99)}
    )
    assert said.score == pytest.approx(expit(1.5 - math.log(99)), rel=1e-12)


@pytest.mark.parametrize(
    ("length_s", "fine", "expected"),
    [
        (7.9, 2.0, -1 + 0.5 + 0.5),
        (8.0, 2.0, -0.5 + 0.75 + 1),
        (29.9, 2.0, -0.5 + 0.75 + 1),
        (30.0, 2.0, 0.25 + 1 + 2),
        (7.9, None, 0.5 + 2),
        (math.inf, None, 0.5 + 2),
        (30.0, 100.0, 0.25 + 1 + 6),  # clipped at 6
        (30.0, -100.0, 0.25 + 1 - 6),
    ],
)
def test_weights_go_by_length_and_by_what_was_heard(length_s, fine, expected):
    said = decision.judge(Heard(1.0, fine, None, length_s), FUSION)
    assert float(logit(said.score)) == pytest.approx(expected, rel=1e-9)
    assert ("fine" in said.evidence) == (fine is not None)
    assert said.evidence["decoder"] == said.evidence["prior"] == 0.0


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (None, 0.0),
        (Outcome(None, "too short", None), 0.0),
        (nearest(0.1, False), 0.0),
        (nearest(0.5, False), 0.0),  # never against AI: a decoder may be in no bank
        (nearest(0.01, False), 1.0),
        (nearest(5e-4, True), math.log10(200)),
        (nearest(1e-4, False), 3.0),
        (nearest(1e-5, False), 0.0),  # so sure, and yet refused: nothing
        (nearest(1e-9, True), 3.0),  # three powers of ten at most
    ],
)
def test_what_lines_weigh(outcome, expected):
    assert decision.lines(outcome, FUSION) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("segments", [-6.0, 0.0, 6.0])
def test_a_sure_match_decides_by_itself(segments):
    """At p below 1e-4 the log-odds are 4.6 at least, whatever the others say."""
    heard = Heard(segments, -6.0, nearest(9e-5, True), 60.0)
    said = decision.judge(heard, FUSION)
    rest = 0.25 + segments - 6 + 2 * 3
    assert float(logit(said.score)) == pytest.approx(max(4.6, rest), rel=1e-9)
    assert decision.sure(heard.decoder, FUSION)
    unsure = dataclasses.replace(heard, decoder=nearest(1.1e-4, True))
    assert not decision.sure(unsure.decoder, FUSION)
    assert not decision.sure(nearest(1e-9, False), FUSION)
    # And a prior counts all the same.
    rare = decision.judge(heard, FUSION, 0.01)
    assert float(logit(rare.score)) == pytest.approx(
        float(logit(said.score)) - math.log(99), rel=1e-9
    )


def test_the_example_of_the_documents():
    """0.9 in a collection half of which is AI is 0.083 where 1 % is."""
    even = decision.judge(Heard(math.log(9)), Fusion())
    assert even.score == pytest.approx(0.9, rel=1e-9)
    rare = decision.judge(Heard(math.log(9)), Fusion(), 0.01)
    assert rare.score == pytest.approx(0.9 * 0.01 / (0.9 * 0.01 + 0.1 * 0.99), rel=1e-9)
    assert round(rare.score, 3) == 0.083


logits = st.floats(-12, 12)
powers = st.floats(-12, 0)  # of p
heards = st.builds(
    lambda segments, fine, power, found, length: Heard(
        segments, fine, None if power is None else nearest(10**power, found), length
    ),
    *(logits, st.none() | logits, st.none() | powers, st.booleans(), st.floats(0, 1000)),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(heards, st.floats(1e-6, 1 - 1e-6))
def test_evidence_adds_up_to_the_score(heard, prior):
    said = decision.judge(heard, FUSION, prior)
    assert 0.0 <= said.score <= 1.0
    assert set(said.evidence) <= set(decision.WITNESSES)
    assert expit(sum(said.evidence.values())) == pytest.approx(said.score, rel=1e-9, abs=1e-12)
    even = decision.judge(heard, FUSION)
    without = {k: v for k, v in said.evidence.items() if k != "prior"}
    assert without == {k: v for k, v in even.evidence.items() if k != "prior"}
    assert said.evidence["prior"] == pytest.approx(float(logit(prior)), abs=1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(heards, logits, powers)
def test_rising_in_every_witness(heard, other, power):
    def score(**changes: Any) -> float:
        return decision.judge(dataclasses.replace(heard, **changes), FUSION).score

    a, b = sorted((heard.segments, other))
    assert score(segments=a) <= score(segments=b)
    if heard.fine is not None:
        a, b = sorted((heard.fine, other))
        assert score(fine=a) <= score(fine=b)
    near, far = sorted((10**power, 10 ** (other / 2 - 6)))
    assert score(decoder=nearest(far, True)) <= score(decoder=nearest(near, True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0, 1))
def test_log_odds_and_back(p):
    assert decision.probability(float(decision.log_odds(p))) == pytest.approx(p, abs=2e-9)
    assert math.isfinite(decision.log_odds(p))


# --- Words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "word"),
    [(0.0, "real"), (0.2999, "real"), (0.3, "unclear"), (0.6999, "unclear"), (0.7, "ai")],
)
def test_words_of_a_band(score, word):
    assert decision.decide(score, 0.3, 0.7) == word


@pytest.mark.parametrize(
    ("duration_s", "end_hz", "expected"),
    [
        (3.89, None, "too short: 3.9 s, 4 s are needed"),
        (3.9, None, None),
        (60.0, 3_500.0, "nothing above 3.5 kHz: 4 kHz are needed"),
        (60.0, 4_000.0, None),
        (1.0, 3_500.0, "too short: 1.0 s, 4 s are needed"),
    ],
)
def test_too_little(duration_s, end_hz, expected):
    assert decision.too_little(duration_s, end_hz) == expected


# --- Stretches ------------------------------------------------------------------------------------


def largest(values: list[float]) -> tuple[float, int, int]:
    """The stretch with the largest sum, by trying all of them."""
    spans = itertools.combinations(range(len(values) + 1), 2)
    return max(((math.fsum(values[a:b]), -a, b) for a, b in spans), default=(0.0, 0, 0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-6, 6), max_size=24))
def test_stretches_against_an_exhaustive_search(values):
    fusion = dataclasses.replace(FUSION, span_least=6.0, span_shortest=3)
    found = decision.stretches(values, fusion)
    best = largest(values)[0]
    long = [(b - a) for a, b in itertools.combinations(range(len(values) + 1), 2)]
    assert bool(found) <= (best >= 6.0 and max(long, default=0) >= 3)
    assert sum(b - a for a, b, _ in found) <= len(values)
    assert all(b <= c for (_, b, _), (c, _, _) in itertools.pairwise(found))
    for a, b, mean in found:
        part = values[a:b]
        assert b - a >= 3
        assert sum(part) >= 6
        assert mean == pytest.approx(sum(part) / len(part))
        # Nothing that could be left out at an end speaks for AI less than not at all.
        assert all(total > 0 for total in itertools.accumulate(part))
        assert all(total > 0 for total in itertools.accumulate(reversed(part)))
    if found and best == max(sum(values[a:b]) for a, b, _ in found):
        assert best >= 6.0


def test_a_short_burst_hides_no_stretch():
    """4 segments that sum up to 12 are too short; 8 of them elsewhere that sum up to 8 are not."""
    values = [-3.0, *[3.0] * 4, -12.0, *[1.0] * 8, -3.0]
    assert decision.stretches(values, FUSION) == [(6, 14, 1.0)]
    assert decision.stretches(values[:6], FUSION) == []


def test_two_stretches_and_none():
    values = [*[-2.0] * 3, *[2.0] * 5, *[-4.0] * 3, *[3.0] * 6, -1.0]
    assert decision.stretches(values, FUSION) == [(3, 8, 2.0), (11, 17, 3.0)]
    assert decision.stretches([-1.0] * 50, FUSION) == []
    assert decision.stretches([], FUSION) == []


def scored(values: list[float], segment_s: float = 4.0) -> list[tuple[float, float]]:
    """Consecutive segments with these log-odds."""
    return [(k * segment_s, float(expit(value))) for k, value in enumerate(values)]


def spliced(before: int, ai: int, after: int) -> list[tuple[float, float]]:
    return scored([*[-3.0] * before, *[3.0] * ai, *[-3.0] * after])


@pytest.mark.parametrize("verdict", ["real", "unclear", "ai"])
def test_a_spliced_track_is_ai_in_part_with_the_right_edges(verdict):
    word, spans, share = decision.parts(verdict, spliced(8, 8, 4), [], 4.0, 79.5, FUSION)
    assert word == "partly-ai"
    assert spans == (Span(32.0, 64.0, pytest.approx(expit(2.5), abs=1e-4)),)
    assert share == pytest.approx(32 / 79.5, abs=1e-4)


def test_the_end_of_a_track_ends_a_span():
    _, spans, share = decision.parts("real", spliced(8, 8, 0), [], 4.0, 62.5, FUSION)
    assert [(span.start_s, span.end_s) for span in spans] == [(32.0, 62.5)]
    assert share == pytest.approx(30.5 / 62.5, abs=1e-4)


def test_the_fine_spectrum_around_a_segment_counts():
    """Segments alone say -0.25 - 0.5; with 4 of the fine spectrum around them +1.25."""
    segments = scored([-0.25] * 30)
    near = [(0.0, 40.0, -4.0), (40.0, 80.0, 4.0), (80.0, 120.0, None)]
    word, spans, _ = decision.parts("real", segments, near, 4.0, 120.0, FUSION)
    assert word == "partly-ai"
    assert [(span.start_s, span.end_s) for span in spans] == [(40.0, 80.0)]
    assert decision.parts("real", segments, [], 4.0, 120.0, FUSION) == ("real", (), 0.0)


def test_the_segments_say_where_an_edge_is():
    """AI from 16 to 52 s; the window of the fine spectrum from 40 s on has more of the rest."""
    segments = spliced(4, 9, 7)
    near = [(0.0, 20.0, -4.0), (20.0, 40.0, 6.0), (40.0, 60.0, -6.0), (60.0, 80.0, -6.0)]
    fusion = dataclasses.replace(FUSION, span_drift=0.5)
    word, (span,), share = decision.parts("real", segments, near, 4.0, 80.0, fusion)
    assert (word, span.start_s, span.end_s) == ("partly-ai", 16.0, 52.0)
    assert share == pytest.approx(36 / 80)


def test_stretches_that_meet_are_one_and_no_edge_moves_far():
    assert decision.grown([(0, 5, 1.0), (7, 12, 1.0)], [2.0] * 12 + [-2.0] * 8) == [(0, 12)]
    assert decision.grown([(5, 10, 1.0)], [2.0] * 20) == [(5, 10)]  # nothing tells it from the rest
    logits = [*[2.0] * 30, *[-2.0] * 50]
    assert decision.grown([(10, 16, 1.0)], logits) == [(5, 21)]
    assert decision.grown([(0, 20, 1.0)], [1.0] * 20) == [(0, 20)]
    assert decision.grown([], [1.0, -1.0]) == []


def test_all_of_it_is_one_span():
    word, spans, share = decision.parts("ai", spliced(0, 10, 0), [], 4.0, 40.0, FUSION)
    assert (word, share) == ("ai", 1.0)
    assert spans == (Span(0.0, 40.0, pytest.approx(expit(2.5), abs=1e-4)),)
    # As where something else than the segments says so: nothing in them is surely real.
    word, spans, share = decision.parts("ai", scored([0.5] * 10), [], 4.0, 40.0, FUSION)
    assert (word, share) == ("ai", 1.0)
    assert spans == (Span(0.0, 40.0, 0.5),)


@pytest.mark.parametrize(
    "segments",
    [
        [],
        spliced(0, 4, 0),  # fewer than the shortest stretch
        [(k * 2.0, 0.99) for k in range(10)],  # they overlap
        [(k * 30.0, 0.99) for k in range(10)],  # evenly spaced ones of a long track
    ],
)
def test_where_no_stretch_can_be_told(segments):
    for verdict in ("ai", "unclear", "real"):
        assert decision.parts(verdict, segments, [], 4.0, 300.0, FUSION) == (verdict, (), None)


# --- The Detector ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Path:
    """Weights with a fusion, a threshold of 0.7 and "unclear" from 0.3 on."""
    path: Path = tmp_path_factory.mktemp("fused") / "fused.safetensors"
    verdict = Decision(threshold=0.7, lower=0.3, operating_points=(("fpr1", 0.8),))
    config = dataclasses.replace(SMALL, fusion=FUSION, verdict=verdict)
    tensors = random_tensors(config)
    save_weights(path, config, tensors, name="fused", licence="none", provenance={})
    return path


class Scripted:
    """A backend that gives the scores that it is told, in order."""

    name, dtype, batch_size = "numpy", "float32", 4

    def __init__(self, scores: list[float]):
        self._scores = iter(scores)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return np.array([next(self._scores) for _ in batch])


@pytest.fixture
def saying(fused):
    """A Detector whose segments have these scores, one after the other."""

    def make(scores: list[float], **options: Any) -> Detector:
        detector = Detector(fused, "numpy", **{"banks": (), "jobs": 1} | options)
        detector.backend = Scripted(scores)
        return detector

    return make


def test_the_row_has_what_the_decision_says(saying):
    """12 s without a head for the fine spectrum: 0.5 + 2 * the median's log-odds."""
    verdict = saying([0.6, 0.9, 0.2]).score(noise(12), RATE)
    logodds = 0.5 + 2 * math.log(0.6 / 0.4)
    assert verdict.score == pytest.approx(expit(logodds), rel=1e-6)
    assert verdict.evidence == pytest.approx(
        {"base": 0.5, "segments": 2 * math.log(1.5), "decoder": 0.0, "prior": 0.0}, rel=1e-6
    )
    assert (verdict.verdict, verdict.prior, verdict.reason) == ("ai", 0.5, None)
    assert (verdict.threshold, verdict.band, verdict.spans) == (0.7, (0.3, 0.7), ())
    row = verdict.to_dict()
    assert (row["band"], row["spans"], row["ai_share"]) == ([0.3, 0.7], [], None)


@pytest.mark.parametrize(
    ("median", "word"),
    [(0.3, "real"), (0.4, "unclear"), (0.5, "unclear"), (0.6, "ai")],
)
def test_the_band_of_the_weights(saying, median, word):
    """P is 0.23, 0.42, 0.62 and 0.79."""
    verdict = saying([median] * 3).score(noise(12), RATE)
    assert verdict.verdict == word
    assert (verdict.reason == decision.REASONS["unclear"]) == (word == "unclear")


def test_a_threshold_of_ones_own_has_no_band(saying):
    verdict = saying([0.5] * 3, threshold=0.6).score(noise(12), RATE)
    assert (verdict.verdict, verdict.band) == ("ai", None)
    verdict = saying([0.5] * 3, threshold="fpr1").score(noise(12), RATE)
    assert (verdict.verdict, verdict.band) == ("real", None)
    verdict = saying([0.5] * 3, threshold="fpr1", margin=1.0).score(noise(12), RATE)
    assert verdict.verdict == "unclear"
    assert verdict.band == pytest.approx((expit(math.log(4) - 1), expit(math.log(4) + 1)))


def test_a_prior_moves_the_score_and_what_it_is_called(saying):
    even = saying([0.7] * 3).score(noise(12), RATE)
    rare = saying([0.7] * 3, prior=0.01).score(noise(12), RATE)
    assert (even.verdict, rare.verdict, rare.prior) == ("ai", "real", 0.01)
    assert logit(rare.score) == pytest.approx(logit(even.score) - math.log(99), rel=1e-6)
    assert rare.evidence == even.evidence | {"prior": pytest.approx(-math.log(99))}


def test_ai_in_part_through_the_detector(saying):
    """20 segments, the 6th to the 13th of which sound like AI, and a tail of 3 s."""
    scores = [*[0.05] * 5, *[0.95] * 8, *[0.05] * 7]
    for source in (noise(79, channels=1), (noise(79, channels=1)[:, 0] / 32768).tolist()):
        verdict = saying(scores).score(source, RATE)
        assert verdict.verdict == "partly-ai"
        assert verdict.score < 0.3
        assert [(span.start_s, span.end_s) for span in verdict.spans] == [(20.0, 52.0)]
        assert verdict.ai_share == pytest.approx(32 / 79, abs=1e-4)
        assert verdict.reason is None


def test_too_little_to_judge(saying):
    short = saying([0.9]).score(noise(3.5), RATE)
    assert (short.verdict, short.reason) == ("undecided", "too short: 3.5 s, 4 s are needed")
    assert short.score is not None
    t = np.arange(8 * RATE) / RATE
    dull = (8000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16)[:, None]
    verdict = saying([0.9] * 2).score(dull, RATE)
    assert (verdict.verdict, verdict.reason) == (
        "undecided",
        "nothing above 3.5 kHz: 4 kHz are needed",
    )
    silent = saying([]).score(np.zeros((8 * RATE, 1), np.int16), RATE)
    assert (silent.verdict, silent.score, silent.evidence) == ("undecided", None, None)
    assert silent.reason == "silent: there is nothing to judge"


def test_a_decoder_counts(saying):
    """A track that carries MusicGen's lines, while its segments say that it is real."""
    audio = carrying("MusicGen", 25)
    alone = saying([0.3] * 7).score(audio, RATE)
    named = saying([0.3] * 7, banks=("embedded",)).score(audio, RATE)
    assert alone.decoder is None
    assert alone.verdict == "real"
    assert named.decoder is not None
    lines = 0.5 * min(3.0, math.log10(0.1 / named.decoder.p))
    if named.decoder.p < 1e-4:
        lines = max(lines, 4.6 - named.evidence["base"] - named.evidence["segments"])
    assert named.evidence["decoder"] == pytest.approx(lines)
    assert named.score > alone.score


def test_an_aggregation_that_is_asked_for_is_all_that_counts(saying):
    verdict = saying([0.6, 0.9, 0.2], aggregate_rule="median").score(noise(12), RATE)
    assert (verdict.score, verdict.evidence, verdict.prior) == (0.6, None, None)
    with pytest.raises(ValueError, match="leave --aggregate out"):
        saying([], aggregate_rule="median", prior=0.1)
    with pytest.raises(ValueError, match="use --aggregate median"):
        saying([], until_decided=True)


@pytest.mark.parametrize("prior", [0, 1, -0.1, 1.5, float("nan"), True, "0.5"])
def test_a_prior_is_a_share(saying, prior):
    with pytest.raises(ValueError, match="prior"):
        saying([], prior=prior)


def test_a_prior_needs_weights_that_are_calibrated(weights_path, score, command, tracks, tmp_path):
    with pytest.raises(ValueError, match="score is calibrated: leave --prior out"):
        Detector(weights_path, "numpy", prior=0.1)
    done = score("--prior", "0.1", tracks)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    for verb in (["live"], ["report", "-o", tmp_path / "out"]):
        if verb[0] == "report" and not all(map(find_spec, ("av", "matplotlib"))):
            continue
        done = command(*verb, "--weights", weights_path, "--prior", "0.1", tracks / "a.wav")
        assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
        assert "leave --prior out" in done.err
    for text in ("0", "1", "nan", "x", "1.5"):
        done = score("--prior", text, tracks)
        assert (done.code, done.out) == (2, "")
        assert f"{text!r} is not a share between 0 and 1" in done.err


def test_segments_alone_as_of_a_stream(saying):
    detector = saying([], prior=0.25)
    expected = expit(0.5 + 2 * math.log(1.5) - math.log(3))
    assert detector.alone(0.6) == pytest.approx(expected, rel=1e-9)
    words = {0.3: "real", 0.6: "unclear", 0.8: "ai"}  # P is 0.09, 0.55 and 0.90
    assert {score: detector.word(score) for score in words} == words


def test_a_copy_decides_alike(fused):
    """What was left open is the weights' in a copy too: band, fusion and prior."""
    for options in ({}, {"prior": 0.1}, {"threshold": "fpr1"}, {"aggregate_rule": "median"}):
        ours = Detector(fused, "numpy", banks=(), **options)
        again = pickle.loads(pickle.dumps(ours))
        for name in ("band", "threshold", "operating_point", "prior", "rule", "fusion"):
            assert getattr(again, name) == getattr(ours, name)


def test_the_weights_of_the_test_have_no_head(fused):
    assert load_weights(fused).fine is None


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def asked(command, fused):
    return lambda *args: command("score", "--weights", fused, "--backend", "numpy", *args)


def test_rows_of_schema_1_and_where_they_make_no_sense(asked, tracks, tmp_path):
    out = tmp_path / "rows.jsonl"
    new = asked("--format", "jsonl", tracks / "b.wav").rows
    old = asked("--format", "jsonl", "--schema", "1", tracks / "b.wav").rows
    (new,), (old,) = new.values(), old.values()
    assert (new["schema"][-1], old["schema"][-1]) == ("2", "1")
    extra = {"band", "reason", "prior", "evidence", "spans", "ai_share"}
    assert set(new) - set(old) == extra
    assert set(old) <= set(new)
    assert old["score"] == new["score"]
    assert asked("--format", "csv", "--schema", "1", tracks / "b.wav").out.count("\n") == 2
    assert len(asked("--format", "json", "--schema", "1", tracks / "b.wav").out) > 10
    for args, words in (
        ((), "--schema 1 is for rows that programs read: give --format jsonl"),
        (("--format", "csv", "--prior", "0.1"), "rows of --schema 1 do not tell the --prior"),
        (("--engine", "ray", "-o", tmp_path / "x"), "writes rows of schema 2: leave --schema"),
    ):
        done = asked("--schema", "1", *args, tracks)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
        assert done.err.count("\n") == 1
    # A run goes on in the schema that is asked for, with rows of either.
    grow = ("--format", "jsonl", "-o", out, "--resume")
    assert asked(*grow, tracks / "b.wav").code == 0
    assert asked(*grow, "--schema", "1", tracks).code == 0
    assert {line[:36] for line in out.read_text().splitlines()} == {
        '{"schema": "artifactnet-jax/score/1"'
    }
    assert asked(*grow, tracks).err == "resume: 3 done, 0 to score\n"
    done = asked(*grow, "--prior", "0.1", tracks)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "rows with other prior: " in done.err


def test_the_example_of_both():
    """Two recordings of a person with 30 s of AI between them, from 20 s on: see examples/."""
    weights = load_weights(default_path())
    if weights.config.fusion is None:
        pytest.skip("the default weights have no fusion")
    path = Path(__file__).parent.parent / "examples" / "partly-ai.ogg"
    verdict = Detector(weights, "numpy").score(path)
    assert verdict.verdict == "partly-ai"
    (span,) = verdict.spans
    assert span.start_s == pytest.approx(20, abs=6)
    assert span.end_s == pytest.approx(50, abs=6)


def test_the_table_is_for_people(asked, tracks):
    lines = asked(tracks).out.splitlines()
    assert len(lines) == 4
    for line in lines[1:]:
        assert line.startswith(("AI ", "unclear ", "no sign of AI ", "undecided "))
