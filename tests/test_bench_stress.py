"""Stress suites by what they must do to audio, their summaries by hand, sanity and mechanism."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.signal

pytest.importorskip("av")
pytest.importorskip("sklearn")

from artifactnet_jax.bench import mechanism, sanity, stress
from artifactnet_jax.bench.detectors import open_detector
from artifactnet_jax.numpy_network import NumpyNetwork
from artifactnet_jax.text import CommandError

RATE = 44_100


def tone(hz: float, seconds: float = 5.0) -> np.ndarray:
    t = np.arange(round(RATE * seconds)) / RATE
    return (0.3 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def noise(seconds: float = 5.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (0.1 * rng.standard_normal(round(RATE * seconds))).astype(np.float32)


def pitch(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return float(spectrum.argmax()) * RATE / len(audio)


def energy_above(audio: np.ndarray, hz: float) -> float:
    power = np.square(np.abs(np.fft.rfft(audio)))
    bins = np.fft.rfftfreq(len(audio), 1 / RATE)
    return float(power[bins > hz].sum() / power.sum())


def no_teacher():
    raise AssertionError("no separator is needed")


def only(name: str) -> stress.Change:
    (change,) = stress.changes([name], no_teacher).values()
    return change


@pytest.mark.parametrize("name", ["wav", "mp3-128", "aac-128", "opus-128", "vorbis-128"])
def test_codecs_change_little_and_keep_the_place(name):
    audio = tone(440) + 0.1 * noise()
    changed = only(name)(audio, "x")
    assert changed.shape == audio.shape
    lag = np.argmax(np.correlate(changed[20_000:30_000], audio[20_500:29_500], "valid"))
    assert lag == 500
    assert not np.array_equal(changed, audio)


@pytest.mark.parametrize(("name", "hz"), [("low-pass-8k", 8600), ("16khz", 8000)])
def test_the_band_ends_where_it_should(name, hz):
    audio = noise()
    assert energy_above(audio, hz) > 0.5
    assert energy_above(only(name)(audio, "x"), hz) < 1e-4


def test_level_clipping_and_noise():
    audio = tone(440)
    np.testing.assert_allclose(only("20db-quieter")(audio, "x"), audio / 10, atol=1e-6)
    clipped = only("clipped-6db")(audio, "x")
    assert np.abs(clipped).max() == pytest.approx(0.3 * 10 ** (-6 / 20), rel=1e-3)
    noisy = only("noise-20db")
    added = noisy(audio, "x") - audio
    assert 20 * np.log10(added.std() / audio.std()) == pytest.approx(-20, abs=0.1)
    np.testing.assert_array_equal(noisy(audio, "x"), noisy(audio, "x"))
    assert not np.array_equal(noisy(audio, "x"), noisy(audio, "y"))  # each track has its own


@pytest.mark.parametrize(
    ("name", "length", "hz"),
    [
        ("3%-faster", 1 / 1.03, 1.03),
        ("5%-shorter", 0.95, 1.0),
        ("5%-longer", 1.05, 1.0),
        ("1-semitone-up", 1.0, 2 ** (1 / 12)),
        ("1-semitone-down", 1.0, 2 ** (-1 / 12)),
    ],
)
def test_tempo_and_pitch(name, length, hz):
    changed = only(name)(tone(440), "x")
    assert len(changed) == pytest.approx(length * 5 * RATE, rel=0.005)
    assert pitch(changed) == pytest.approx(440 * hz, rel=2e-3)
    assert changed.dtype == np.float32


def test_a_room():
    click = np.zeros(2 * RATE, np.float32)
    click[1000] = 0.5
    heard = only("room")(click, "x")
    assert heard.shape == click.shape
    assert np.argmax(np.abs(heard)) == pytest.approx(1000, abs=60)  # the direct sound comes first
    levels = [np.sqrt(np.mean(heard[1000 + k : 1000 + k + 1764] ** 2)) for k in (2205, 11_025)]
    # By Sabine's rule 60 dB in 0.4 s: 200 ms make 30 dB.
    assert 20 * np.log10(levels[0] / levels[1]) == pytest.approx(30, abs=3)
    music = noise()
    played = only("room")(music, "x")
    assert np.sqrt(np.mean(played**2)) == pytest.approx(np.sqrt(np.mean(music**2)), rel=0.05)
    assert energy_above(played, 18_000) < 0.1 * energy_above(music, 18_000)
    assert np.array_equal(played, only("room")(music, "x"))
    assert not np.array_equal(played, only("room")(music, "y"))
    assert np.abs(only("room")(np.zeros(RATE, np.float32), "x")).max() == 0


@pytest.mark.parametrize("percent", [1, 10])
def test_speeds(percent):
    for name, factor in ((f"{percent}%-faster", 1), (f"{percent}%-slower", -1)):
        speed = 1 + factor * percent / 100
        changed = only(name)(tone(440), "x")
        assert len(changed) == pytest.approx(5 * RATE / speed, abs=2)
        assert pitch(changed) == pytest.approx(440 * speed, rel=2e-3)


def test_removers_change_what_they_say_and_keep_the_length():
    audio = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(4 * RATE) / RATE)).astype(np.float32)
    changes = stress.changes(["remover"], no_teacher)
    made = {name: change(audio, "x") for name, change in changes.items()}
    for name, changed in made.items():
        assert changed.shape == audio.shape, name
        assert changed.dtype == np.float32
        assert np.abs(changed).max() <= 1.01
        np.testing.assert_array_equal(changed, changes[name](audio, "x"))
    # Hearing a 1 kHz tone: its phase tells how late it is; one deviation is 0.05 ms.
    inner = slice(RATE // 2, 3 * RATE)
    phase = np.unwrap(np.angle(scipy.signal.hilbert(made["timing-jitter"])))
    late = (phase - 2 * np.pi * 1000 * np.arange(len(audio)) / RATE)[inner] / (2 * np.pi * 1000)
    assert 1.5e-5 < late.std() < 1e-4
    phase = np.unwrap(np.angle(scipy.signal.hilbert(made["wow"])))
    speed = np.diff(phase[inner][::441]) / 441 * RATE / (2 * np.pi)
    assert 3e-4 < (speed / 1000 - 1).std() < 2e-3
    added = made["music-noise"] - audio
    assert 20 * np.log10(added.std() / audio.std()) == pytest.approx(-60, abs=0.5)
    # Of a tone of 0.5: x^2 gives 0.01 * 0.25 at twice its frequency, x^3 0.01 * 0.125 at thrice.
    bins = np.abs(np.fft.rfft(made["harmonics"])) * 2 / len(audio)
    assert bins[2000 * 4] == pytest.approx(0.01 * 0.25, rel=0.02)
    assert bins[3000 * 4] == pytest.approx(0.01 * 0.125, rel=0.02)
    # Phases of 0.1 radians: the tone stays, what is beside it lies about 20 dB below at most.
    moved = made["phase-jitter"][inner] - audio[inner]
    assert -45 < 20 * np.log10(moved.std() / audio[inner].std()) < -15


def test_positions():
    audio = np.arange(20 * RATE, dtype=np.float32)
    half = 10 * RATE
    places = stress.changes(["position"], no_teacher)
    starts = {name: change(audio, "x")[0] for name, change in places.items()}
    assert starts == {"first-half": 0, "middle-half": half / 2, "last-half": half}
    assert {len(change(audio, "x")) for change in places.values()} == {half}
    short = audio[: 5 * RATE]  # a segment at least
    assert len(places["last-half"](short, "x")) == 4 * RATE
    assert len(places["last-half"](audio[:RATE], "x")) == RATE


class Takes:
    """A separator whose stems sum to `share` of what it hears."""

    name, digest, note, parallel = "takes", "t", "", False

    def residual(self, audio):
        assert audio.ndim == 2
        yield 0.25 * audio.mean(axis=1)


def test_laundering_is_the_sum_of_the_stems_each_time():
    audio = tone(440)
    changes = stress.changes(["laundering"], Takes)
    assert list(changes) == ["laundered-1", "laundered-3"]
    np.testing.assert_allclose(changes["laundered-1"](audio, "x"), 0.75 * audio, atol=1e-6)
    np.testing.assert_allclose(changes["laundered-3"](audio, "x"), 0.75**3 * audio, atol=1e-6)


def test_names_of_changes():
    everything = stress.changes(["all"], no_teacher)
    assert set(sanity.CODEC_PAIR) <= set(everything)
    assert len(everything) == sum(map(len, stress.SUITES.values()))
    with pytest.raises(ValueError, match="no stress suite or change 'mp4'"):
        stress.changes(["codecs", "mp4"], no_teacher)


# --- summaries, by hand ----------------------------------------------------------------------

TRACKS = [{"id": "a", "label": 1}, {"id": "b", "label": 1}, {"id": "c", "label": 0}]


def test_summary_by_hand():
    plain = {"a": 0.9, "b": 0.4, "c": 0.2}
    stressed = {"x": {"a": 0.3, "b": 0.6, "c": None}, "y": {"a": 0.9, "b": 0.4, "c": 0.7}}
    first, second = stress.summarise(TRACKS, plain, stressed, 0.5)
    assert first == {
        **{"stress": "x", "n": 2, "flips": 2, "moved": pytest.approx(0.4)},
        **{"tpr": 0.5, "plain_tpr": 0.5, "mean_ai": pytest.approx(0.45)},
        **{"fpr": None, "plain_fpr": None, "mean_real": None},
    }
    assert (second["n"], second["fpr"], second["plain_fpr"], second["flips"]) == (3, 1.0, 0.0, 1)


def test_cross_codec_delta_by_hand():
    views = {
        "wav": {"a": 0.9, "b": 0.4, "c": 0.1},
        "mp3-128": {"a": 0.7, "b": 0.4, "c": 0.3},
        "aac-128": {"a": 0.8, "b": 0.5, "c": 0.1},
        "opus-128": {"a": 0.9, "b": None, "c": 0.2},
        "opus-64": {"a": 0.0, "b": 0.0, "c": 0.0},  # no part of it
    }
    delta = sanity.codec_delta(TRACKS, views)
    assert delta["ai"]["n"] == delta["real"]["n"] == 1  # b lacks one
    assert delta["all"]["mean"] == pytest.approx(0.2)
    assert delta["all"]["max"] == pytest.approx(0.2)
    # Means: 0.5, 0.5, 0.45, 0.55.
    assert delta["all"]["of_means"] == pytest.approx(0.1)
    assert delta["passed"] is False  # 0.2 > 0.15
    assert sanity.codec_delta(TRACKS, {"wav": views["wav"]}) is None


def test_the_papers_subsets_and_rules():
    assert len(sanity.AI_SUBSETS) == 22
    assert len(set(sanity.PAPER_SUBSETS)) == 28
    rows = [{"source": "mom_yue", "label": 1, "score": s} for s in [0.6] * 9 + [0.4]]
    rows += [{"source": "aime_stable_audio_v1", "label": 1, "score": s} for s in (0.6, 0.6, 0.4)]
    rows += [{"source": "fma_hardneg", "label": 0, "score": s} for s in [0.4] * 19 + [0.6, None]]
    rows += [{"source": "mom_udio", "label": 1, "score": s} for s in [0.6] * 8 + [0.4]]
    table = {row["subset"]: row for row in sanity.evaluate(rows, 0.5, sanity.PAPER_SUBSETS)}
    assert len(table) == 28
    assert table["mom_yue"]["passed"]  # 0.9 is enough
    assert table["aime_stable_audio_v1"]["passed"]  # 0.67 of 0.6
    assert table["fma_hardneg"]["passed"]  # 1 of 20 is 0.05
    assert (table["fma_hardneg"]["n"], table["fma_hardneg"]["scored"]) == (21, 20)
    assert not table["mom_udio"]["passed"]  # 8 of 9
    assert (table["sonics_real"]["rate"], table["sonics_real"]["passed"]) == (None, False)
    own = sanity.evaluate(rows, 0.5)
    assert [row["subset"] for row in own] == sorted({row["source"] for row in rows})


def test_regressions_by_the_public_rule():
    before = {"r": {"fpr": 0.02}, "s": {"fpr": 0.02}, "a": {"tpr": 0.95}, "b": {"tpr": None}}
    after = {"r": {"fpr": 0.051}, "s": {"fpr": 0.05}, "a": {"tpr": 0.89}, "b": {"tpr": 0.1}}
    worse = sanity.regressions(before, after)
    assert [(row["source"], row["rate"]) for row in worse] == [("a", "tpr"), ("r", "fpr")]


# --- mechanism -------------------------------------------------------------------------------


def test_effective_bandwidth_by_hand():
    # Ten bins from 0 to Nyquist: 9 intervals of 2450 Hz.
    energy = np.array([0, 10, 80, 5, 4, 1, 0, 0, 0, 0.0])  # 95 of 100 at bin 3
    assert mechanism.effective_bandwidth(energy, RATE) == 3 * 2450
    energy[3] -= 0.01
    assert mechanism.effective_bandwidth(energy, RATE) == 4 * 2450
    assert mechanism.effective_bandwidth(np.zeros(5), RATE) == 0


def test_energy_of_a_tone_is_where_it_is():
    energy = mechanism.energy_of(tone(4000))
    assert mechanism.effective_bandwidth(energy, RATE) == pytest.approx(4000, abs=45)
    # White noise has 95 % of its energy below 95 % of the band.
    assert mechanism.effective_bandwidth(mechanism.energy_of(noise()), RATE) == pytest.approx(
        0.95 * RATE / 2, rel=0.01
    )
    assert mechanism.energy_of(np.zeros(10, np.float32)).sum() == 0


@pytest.fixture(scope="module")
def looked(weights_path):
    """Our detector, the mechanism's view of it, and of a noise."""
    ours = open_detector(f"artifactnet:{weights_path}")
    ours.load("cpu")
    inside = mechanism.Mechanism(ours, Takes(), [noise(4.0)[::-1].copy()])
    return ours, inside, inside.track(noise(4.0))


def test_figures_of_a_track(looked):
    ours, _, (figures, _) = looked
    audio = noise(4.0)
    stages = ours.detector.backend.stages(audio)
    energy = [
        float(np.square(stages[s], dtype=np.float64).sum()) for s in ("residual", "magnitude")
    ]
    assert figures["residual_energy_fraction"] == pytest.approx(energy[0] / energy[1], rel=1e-5)
    assert 0 < figures["mean_mask"] < 0.5
    assert figures["input_bandwidth_hz"] == pytest.approx(0.95 * RATE / 2, rel=0.02)
    assert figures["teacher_bandwidth_hz"] == pytest.approx(0.95 * RATE / 2, rel=0.02)
    assert figures["cutoff_hz"] > 21_000
    peak, rms = np.abs(audio).max(), audio.std()
    assert figures["crest_db"] == pytest.approx(20 * np.log10(peak / rms), abs=0.01)


def test_ablations_against_a_detector_that_is_built_so(looked):
    ours, _, (_, scores) = looked
    audio = noise(4.0)
    assert scores["none"] == pytest.approx(ours.detector.score(audio, RATE).score, abs=1e-5)
    weights = ours.detector.weights
    unet = dataclasses.replace(weights.config.unet, mask_max=1.0)
    config = dataclasses.replace(weights.config, unet=unet)
    assert scores["mask unbounded"] == pytest.approx(
        float(NumpyNetwork(config, weights.tensors)(audio)), abs=1e-5
    )
    tensors = dict(weights.tensors)
    last = [name for name in tensors if name.startswith("texture.") and "out" in name]
    assert last
    for name in last:
        tensors[name] = np.zeros_like(tensors[name])
    expected = float(NumpyNetwork(weights.config, tensors)(audio))
    assert scores["without the texture head"] == pytest.approx(expected, abs=1e-5)
    names = {f"without {channel}" for channel in weights.config.front_end.channels}
    assert names < set(scores)


def test_a_channel_that_is_its_own_mean_is_not_missed(looked):
    _, inside, _ = looked
    stages = {"channels": np.broadcast_to(inside._means[:, :, None], (*inside._means.shape, 345))}
    own = float(inside._network.classify(stages["channels"]))
    stages |= {"network_logit": own, "texture_logit": 0.3 - own}
    stages["mask"] = np.full((1025, 345), 0.1, np.float32)
    stages["magnitude"] = np.ones((1025, 345), np.float32)
    scores = dict(inside._ablated(stages))
    without = [score for name, score in scores.items() if name.startswith("without mel")]
    np.testing.assert_allclose(without, scores["none"], atol=1e-6)
    assert scores["none"] == pytest.approx(1 / (1 + np.exp(-0.3)), abs=1e-6)


def test_ablation_table_by_hand():
    scores = [{"none": 0.9, "x": 0.1}, {"none": 0.8, "x": 0.6}, {"none": 0.2, "x": 0.3}]
    none, x = mechanism.ablations([1, 1, 0], scores, 0.5)
    assert (none["f1"], none["auroc"], none["delta_f1"]) == (1.0, 1.0, 0.0)
    assert x["f1"] == pytest.approx(2 / 3)  # one of two found, none wrongly
    assert x["auroc"] == 0.5
    assert x["delta_f1"] == pytest.approx(-1 / 3)
    assert mechanism.ablations([1], scores[:1], 0.5)[0]["auroc"] is None
    assert mechanism.ablations([], [], 0.5) == []


def test_a_backend_without_stages_will_do(looked, monkeypatch):
    ours, _, (figures, _) = looked
    monkeypatch.setattr(ours.detector, "backend", None)
    inside = mechanism.Mechanism(ours, Takes(), [noise(4.0)])
    assert inside.track(noise(4.0))[0]["mean_mask"] == pytest.approx(figures["mean_mask"])


def test_silence_has_no_mechanism(looked):
    _, inside, _ = looked
    assert inside.track(np.zeros(RATE, np.float32)) == ({}, {})
    with pytest.raises(CommandError, match="no audible track"):
        mechanism.Mechanism(looked[0], Takes(), [np.zeros(RATE, np.float32)])


def test_medians_by_source():
    rows = [
        {"source": "s", "label": 1, "mean_mask": m, "mask_spread": v}
        for m, v in ((0.1, 0.2), (0.2, 0.2), (0.4, 0.001))
    ]
    rows.append({"source": "t", "label": 0, "mean_mask": 0.3, "mask_spread": 0.3})
    table = {row["source"]: row for row in mechanism.by_source(rows)}
    assert list(table) == ["all ai", "all real", "s", "t"]
    assert (table["s"]["n"], table["s"]["mean_mask"], table["s"]["flat_masks"]) == (3, 0.2, 1)
