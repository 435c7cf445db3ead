"""Named thresholds: in Detector, in the commands `score`, `mine` and `doctor`, and in rows.

What is expected follows from one score: a threshold on either side of it, and one at it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifactnet_jax.config import Config
from artifactnet_jax.decision import around, decide
from artifactnet_jax.detector import Detector
from artifactnet_jax.results import Failure
from artifactnet_jax.weights import load_weights, random_tensors, save_weights
from audio_files import noise, write
from tiny_model import TINY, save_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights without operating points."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "plain.safetensors")


@pytest.fixture(scope="module")
def track(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("track"), "x.wav", noise(2, channels=1))


@pytest.fixture(scope="module")
def points(plain: Path, track: Path) -> dict[str, float]:
    """ "fpr1" is above the score of the track, "balanced" equal to it, "fpr5" below."""
    score = Detector(plain, "numpy").score(track).score
    assert score is not None
    assert 0 < score < 1
    return {"fpr1": float(np.nextafter(score, 1)), "balanced": score, "fpr5": score / 2}


@pytest.fixture(scope="module")
def named(plain: Path, points: dict[str, float]) -> Path:
    """The same weights with those points; their default threshold is 0.75 of the score."""
    path = plain.with_name("named.safetensors")
    verdict = dataclasses.replace(
        TINY.verdict, threshold=0.75 * points["balanced"], operating_points=tuple(points.items())
    )
    config = dataclasses.replace(TINY, verdict=verdict)
    save_weights(path, config, random_tensors(TINY), name="points", licence="x", provenance={})
    return path


@pytest.fixture
def run(command, named):
    """A verb with the weights that have names, on backend numpy."""
    return lambda verb, *args: command(verb, "--weights", named, "--backend", "numpy", *args)


def refused(done: Any, *words: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("artifactnet-jax: ")
    assert len(done.err.splitlines()) == 1
    for word in words:
        assert word in done.err


def test_a_name_stands_for_its_number(named, points, track):
    for name, verdict in (("fpr1", "real"), ("balanced", "ai"), ("fpr5", "ai")):
        detector = Detector(named, "numpy", threshold=name)
        assert (detector.threshold, detector.operating_point) == (points[name], name)
        found = detector.score(track)
        assert (found.verdict, found.threshold) == (verdict, points[name])
        assert found.operating_point == name


def test_without_a_name_there_is_none(named, points, track):
    default = load_weights(named).config.verdict.threshold
    for threshold, value in ((None, default), (points["fpr1"], points["fpr1"])):
        detector = Detector(named, "numpy", threshold=threshold)
        assert (detector.threshold, detector.operating_point) == (value, None)
        assert detector.score(track).operating_point is None


def test_an_unknown_name_is_told_those_that_there_are(named, plain, points):
    with pytest.raises(ValueError, match="no operating point 'fpr2'") as caught:
        Detector(named, "numpy", threshold="fpr2")
    listed = ", ".join(f"{name} ({value:g})" for name, value in points.items())
    assert str(caught.value) == (
        f"weights 'points' have no operating point 'fpr2': use {listed} or a number from 0 to 1"
    )
    cure = "no operating point 'fpr1', nor any other: use a number from 0 to 1$"
    with pytest.raises(ValueError, match=cure):
        Detector(plain, "numpy", threshold="fpr1")


def test_a_point_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"operating_points=.*1\.5.*from 0 to 1"):
        dataclasses.replace(TINY.verdict, operating_points=(("odd", 1.5),))


def test_a_file_from_before_there_were_points(track, tmp_path, command, monkeypatch):
    config = TINY.to_dict()
    del config["verdict"]["operating_points"]
    with monkeypatch.context() as patch:
        patch.setattr(Config, "to_dict", lambda self: config)
        path = save_tiny(tmp_path / "old.safetensors")
    assert b"operating_points" not in path.read_bytes()
    assert Detector(path, "numpy").threshold == 0.5
    base = ("score", "--weights", path, "--backend", "numpy", "--format", "jsonl", track)
    (row,) = command(*base, "--threshold", "0.25").rows.values()
    assert (row["threshold"], row["operating_point"]) == (0.25, None)
    refused(command(*base, "--threshold", "fpr1"), "'tiny'", "'fpr1'", "a number from 0 to 1")


def test_rows_of_score(run, points, track, tmp_path):
    for given, value, name in (
        ("fpr1", points["fpr1"], "fpr1"),
        (repr(points["fpr1"]), points["fpr1"], None),
    ):
        arguments = ("score", "--threshold", given, track, tmp_path / "gone.wav", "--format")
        good, bad = json.loads(run(*arguments, "json").out)
        assert (good["threshold"], good["operating_point"]) == (value, name)
        assert bad == Failure(bad["path"], **bad["error"]).to_dict()
        good, bad = csv.DictReader(io.StringIO(run(*arguments, "csv").out))
        assert (float(good["threshold"]), good["operating_point"]) == (value, name or "")
        assert (bad["threshold"], bad["operating_point"]) == ("", "")


@pytest.mark.parametrize("verb", ["score", "mine"])
def test_the_command_refuses_an_unknown_name_in_one_line(run, track, tmp_path, verb):
    out = tmp_path / "m.csv"
    done = run(verb, track, "--threshold", "fpr2", "-o", out, "-q")
    refused(done, "weights 'points'", "'fpr2'", "fpr1 (", "fpr5 (", "balanced (", "a number")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["score", "mine"])
@pytest.mark.parametrize("text", ["1.2", "-0.1", "nan", "inf", "1e9", "", " "])
def test_a_number_out_of_range_is_no_name(run, track, tmp_path, verb, text):
    done = run(verb, track, "--threshold", text, "-o", tmp_path / "m.csv")
    assert (done.code, done.out) == (2, "")
    assert f"argument --threshold: {text!r} is not a number from 0 to 1\n" in done.err


def test_resume_goes_by_the_number(run, points, track, tmp_path):
    out = tmp_path / "rows.jsonl"
    resume = ("score", track, "--format", "jsonl", "--resume", "-o", out, "--threshold")
    assert run(*resume, "fpr1").code == 0
    before = out.read_bytes()
    for same in ("fpr1", repr(points["fpr1"])):
        done = run(*resume, same)
        assert (done.code, done.err) == (0, "resume: 1 done, 0 to score\n")
        assert out.read_bytes() == before
    refused(run(*resume, "fpr5"), "rows with other threshold:")
    row = json.loads(before)
    del row["operating_point"], row["margin"]  # as rows were before there were points
    out.write_text(json.dumps(row) + "\n")
    assert run(*resume, "fpr1").err == "resume: 1 done, 0 to score\n"
    assert json.loads(out.read_text()) == row


def odds(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("away", [1.0, -1.0, 2.5, -0.1])
def test_unclear_within_the_margin(named, track, away):
    score = Detector(named, "numpy").score(track).score
    threshold = 1 / (1 + math.exp(-(odds(score) - away)))  # the score lies `away` above it
    verdict = "ai" if away > 0 else "real"
    for margin, expected in ((0.99 * abs(away), verdict), (1.01 * abs(away), "unclear")):
        found = Detector(named, "numpy", threshold=threshold, margin=margin).score(track)
        assert (found.verdict, found.score, found.margin) == (expected, score, margin)
    assert Detector(named, "numpy", threshold=threshold).score(track).verdict == verdict


def test_scores_of_0_and_1_are_decided():
    for threshold in (0.0, 0.5, 1.0):
        verdicts = [decide(score, *around(threshold, 1.1)) for score in (0.0, 1.0)]
        near = {"real" if threshold else "unclear", "unclear" if threshold == 1 else "ai"}
        assert set(verdicts) == near
        assert decide(threshold, *around(threshold, 0.0)) == "ai"


def test_the_margin_of_the_weights_and_of_the_command(plain, track, tmp_path, command):
    weights = load_weights(plain)
    score = Detector(weights, "numpy").score(track).score
    verdict = dataclasses.replace(weights.config.verdict, threshold=score, margin=0.5)
    config = dataclasses.replace(weights.config, verdict=verdict)
    path = tmp_path / "margin.safetensors"
    save_weights(path, config, weights.tensors, name="m", licence="", provenance={})
    base = ("score", "--weights", path, "--backend", "numpy", "--format", "jsonl", track)
    for given, margin, called in (((), 0.5, "unclear"), (("--margin", "0"), 0.0, "ai")):
        (row,) = command(*base, *given).rows.values()
        assert (row["margin"], row["verdict"], row["score"]) == (margin, called, score)
    for text in ("-1", "nan", "inf", "x"):
        done = command(*base, "--margin", text)
        assert (done.code, done.out) == (2, "")
        assert "--margin" in done.err
    out = tmp_path / "rows.jsonl"
    assert command(*base, "--resume", "-o", out).code == 0
    refused(command(*base, "--resume", "-o", out, "--margin", "0"), "rows with other margin, band:")


def test_mine_judges_at_the_point_and_keeps_its_scores(run, track, tmp_path):
    for name, wrong, resumed in (("fpr1", 0, 0), ("balanced", 1, 1), ("fpr5", 1, 1)):
        done = run("mine", track, "--threshold", name, "-o", tmp_path / "m.csv")
        assert done.code == 0
        assert f"{wrong} of 1 tracks are wrong at " in done.err
        assert ("resume: 1 done, 0 to score" in done.err) == bool(resumed)


def test_doctor(command, monkeypatch, named, plain, points):
    for path, default, have in ((named, 0.75 * points["balanced"], points), (plain, 0.5, {})):
        monkeypatch.setattr("artifactnet_jax.weights.default_path", lambda path=path: path)
        found = json.loads(command("doctor", "--json").out)["weights"]
        assert (found["threshold"], found["operating_points"]) == (default, have)
        assert list(found["operating_points"]) == list(have)
        listed = ", ".join(f"{name} {value:g}" for name, value in have.items()) or "none"
        text = f"threshold {default:g}; operating points: {listed}\n"
        assert text in command("doctor").out
