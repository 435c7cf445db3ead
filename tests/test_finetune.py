"""Adapting weights to hard negatives: what is held out, trained on, judged and written.

The tiny model hears a 9 kHz tone as AI. Music with a 3 kHz tone is what it wrongly calls AI.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifactnet_jax.cli import build_parser, main
from artifactnet_jax.config import CNN, Decision, Fusion
from artifactnet_jax.data.manifest import ManifestError, Row, write_manifest
from artifactnet_jax.detector import Detector
from artifactnet_jax.text import CommandError
from artifactnet_jax.train import changes, finetune, frozen, loop, mine
from artifactnet_jax.train.move import Move
from artifactnet_jax.weights import (
    ForeignGraph,
    Weights,
    load_weights,
    random_tensors,
    save_weights,
)
from audio_files import write
from tiny_model import TINY

CONFIG = dataclasses.replace(TINY, cnn=CNN(widths=(4, 8), hidden=8, dropout=0.0))
FEW = {"steps": 40, "batch": 4, "seconds": 1, "rate": 1e-2, "ema": 0.5}
FEW |= {f"augment.{name}": 0 for name in ("mp3", "aac", "opus", "vorbis")}
FEW |= {f"augment.{name}_p": 0 for name in ("speed", "eq", "clip", "band", "noise", "level")}


def row(path: str, label: int = 0, **changes: Any) -> Row:
    kind = ("real", "ai")[label]
    return dataclasses.replace(Row(path, label, kind, kind, "", f"{kind}/{path}", ""), **changes)


def tracks(source: str, label: int, n: int, **changes: Any) -> list[Row]:
    return [row(f"{source}-{label}-{k}.wav", label, source=source, **changes) for k in range(n)]


def parts(rows: list[Row]) -> Counter[str]:
    return Counter(one.split for one in rows)


def scored(rows: list[Row], scores: list[float], threshold: float = 0.5) -> list[mine.Scored]:
    verdicts = [
        {"score": score, "segments": [{"start_s": 4.0, "score": score}]} for score in scores
    ]
    return mine.rank(rows, verdicts, threshold)


# --- what is held out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "keep", "expected"),
    [
        (1, False, {"train": 1}),
        (2, False, {"train": 1, "test": 1}),
        (3, False, {"train": 2, "test": 1}),
        (10, False, {"train": 7, "test": 3}),
        (10, True, {"train": 7, "test": 3}),
    ],
)
def test_hard_tracks_are_divided_as_far_as_they_go(n, keep, expected):
    kept = [t for k in range(4) for label in (0, 1) for t in tracks(f"s{k}", label, 5)]
    hard, rest, warnings = finetune._held_out(tracks("h", 0, n), kept if keep else [])
    assert parts(hard) == expected
    assert any("held out" in text for text in warnings) == (n == 1)
    assert any("not checked" in text for text in warnings) == (not keep)
    again, _, _ = finetune._held_out(tracks("h", 0, n), rest)
    assert again == hard


def test_each_label_of_the_hard_tracks_is_divided():
    hard, _, _ = finetune._held_out([*tracks("h", 0, 20), *tracks("g", 1, 2)], [])
    assert parts([one for one in hard if one.label]) == {"train": 1, "test": 1}
    assert parts([one for one in hard if not one.label]) == {"train": 14, "test": 6}


def test_parts_that_are_given_stay():
    hard = [row("a", split="test"), row("b", split="train"), row("c", group="g"), row("d")]
    keep = [row(f"{part}{label}", label, split=part) for part in finetune.PARTS for label in (0, 1)]
    keep.append(row("e", group="g", split="test"))
    divided, rest, _ = finetune._held_out(hard, keep)
    assert [one.split for one in divided][:3] == ["test", "train", "test"]
    assert rest == keep
    train = [t for label in (0, 1) for t in tracks("t", label, 14, split="train")]
    keep = [one for one in [*keep, *train] if one.split != "validation"]
    _, rest, _ = finetune._held_out(hard, keep)
    assert {one.path: one.split for one in rest if one.split != "validation"}.items() < {
        (one.path, one.split) for one in keep
    }
    assert Counter(one.label for one in rest if one.split == "validation") == {0: 4, 1: 4}


def test_the_keep_set_is_divided_by_source_and_by_group_if_it_must():
    keep = [t for k in range(8) for label in (0, 1) for t in tracks(f"s{k}-{label}", label, 5)]
    _, rest, warnings = finetune._held_out(tracks("h", 0, 5), keep)
    assert warnings == []
    for one in rest:
        assert {other.split for other in rest if other.source == one.source} == {one.split}
    _, rest, warnings = finetune._held_out(tracks("h", 0, 5), [*tracks("a", 1, 20), *keep])
    assert set(parts(rest)) == set(finetune.PARTS)
    keep = [*tracks("r", 0, 20), *tracks("a", 1, 20)]
    _, rest, (warning,) = finetune._held_out(tracks("h", 0, 5), keep)
    assert "both trained on and tested: a, r" in warning
    assert parts([one for one in rest if one.label]) == {"train": 12, "test": 4, "validation": 4}


def test_what_shares_a_group_is_in_one_part():
    hard = [row(f"h{k}", group=f"g{k}") for k in range(10)]
    keep = [row(f"k{label}-{k}", label, group=f"g{k}") for label in (0, 1) for k in range(30)]
    divided, rest, _ = finetune._held_out(hard, keep)
    part_of = {one.group: one.split for one in divided}
    assert set(part_of.values()) == set(finetune.HARD_PARTS)
    for one in rest:
        assert one.split == part_of.get(one.group, one.split)


def test_leaks_and_missing_parts_are_refused():
    keep = [row(f"{p}{label}", label, split=p) for p in ("train", "test") for label in (0, 1)]
    _, _, warnings = finetune._held_out(tracks("h", 0, 3), keep)
    assert "no track to keep is in the part 'validation'" in warnings[0]
    leak = [*keep, row("x", group="g", split="train"), row("y", group="g", split="test")]
    with pytest.raises(ManifestError, match="the split leaks: group 'g'"):
        finetune._held_out(tracks("h", 0, 3), leak)
    hard = [row("x", group="real/test0", split="train")]
    with pytest.raises(ManifestError, match="the split leaks: group 'real/test0'"):
        finetune._held_out(hard, keep)
    with pytest.raises(ManifestError, match="no ai track to keep is in the part 'test'"):
        finetune._held_out(tracks("h", 0, 3), keep[:3])


# --- what is trained on ----------------------------------------------------------------------


def test_shares_of_the_crops_by_hand():
    """Power 0.5: keep sources of 4 and 1 tracks share as 2 to 1, and half goes to mined tracks."""
    hard = tracks("h", 0, 3, split="train")
    hard[2] = dataclasses.replace(hard[2], split="test")
    far = row("far", source="h", split="train")
    keep = [*tracks("a", 0, 4, split="train"), *tracks("b", 0, 1, split="train")]
    keep[0] = dataclasses.replace(keep[0], weight=3.0)
    keep += [*tracks("c", 1, 2, split="train"), *tracks("d", 1, 2, split="validation")]
    ranked = scored([*hard, far], [0.9, 0.31, 0.8, 0.1])
    rows = finetune.training_rows(ranked, [*keep, *tracks("e", 0, 2, split="test")], 0.5)
    found = {one.path: one for one in rows}
    assert parts(rows) == {"train": 10, "validation": 2}
    assert {one.source for one in rows if one.split == "train"} == {"real", "ai"}
    real = {one.path: one.weight for one in rows if one.split == "train" and not one.label}
    third = 0.5 / 4  # of sources a (2), b (1) and the hard track that is right (1)
    expected = {"h-0-0.wav": 0.25, "h-0-1.wav": 0.25, "b-0-0.wav": third, "far": third}
    expected |= {"a-0-0.wav": 2 * third / 2} | {f"a-0-{k}.wav": 2 * third / 6 for k in (1, 2, 3)}
    assert real == pytest.approx(expected)
    assert found["c-1-0.wav"].weight == found["c-1-1.wav"].weight
    assert dict(found["h-0-0.wav"].extra)["segment_start_s"] == "4.0"


def test_if_none_is_wrong_to_train_on_all_hard_tracks_are():
    hard = [row("a", split="train"), row("b", split="train"), row("c", split="test")]
    rows = finetune.training_rows(scored(hard, [0.1, 0.2, 0.9]), [], 0.5)
    assert {one.path: one.weight for one in rows} == pytest.approx({"a": 0.25, "b": 0.25})


# --- what is kept of the change --------------------------------------------------------------


def weights_of(value: float) -> Weights:
    tensors = {name: tensor + np.float32(value) for name, tensor in random_tensors(TINY).items()}
    return Weights("w", TINY, tensors, str(value), "none", {})


def test_a_blend_lies_between():
    old, new = weights_of(0), weights_of(1)
    same = next(iter(old.tensors))
    new = dataclasses.replace(new, tensors={**new.tensors, same: old.tensors[same]})
    half = finetune.blend(old, new, 0.25)
    for name, tensor in half.tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, old.tensors[name] + 0.25 * (name != same), atol=1e-6)
    np.testing.assert_array_equal(half.tensors[same], old.tensors[same])
    whole = finetune.blend(old, new, 1.0)
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(tensor, new.tensors[name])
    assert len({half.sha256, whole.sha256, finetune.blend(old, new, 0.5).sha256}) == 3


def judging(**verdict: Any) -> Weights:
    """TINY weights whose last bias is 0.25."""
    weights = weights_of(0)
    tensors = {**weights.tensors, "cnn.out.bias": np.array([0.25], np.float32)}
    config = dataclasses.replace(TINY, verdict=Decision(**verdict))
    return dataclasses.replace(weights, config=config, tensors=tensors)


def odds(score: Any) -> Any:
    return np.log(score / (1 - score))


BEFORE, AFTER = [0.1, 0.9, 0.3, 0.6], [0.5, 0.2, 0.95, 0.7]  # by rank: 0.2, 0.5, 0.7, 0.95
POINTS = (("fpr1", 0.97), ("fpr2", 0.9), ("fpr5", 0.05))


def test_thresholds_follow_the_real_tracks_by_hand():
    """0.6 is the third track's, now at 0.7; 0.97 lies above all, as far from the last as before."""
    old = judging(threshold=0.6, lower=0.3, operating_points=POINTS)
    new = finetune.recalibrated(old, BEFORE, AFTER)
    shift = odds(0.6) - odds(0.7)
    assert new.tensors["cnn.out.bias"] == pytest.approx(0.25 + shift, abs=1e-6)
    rule = new.config.verdict
    assert rule.threshold == 0.6
    expected = [odds(0.97) + odds(0.95) - odds(0.9), odds(0.95), odds(0.05) + odds(0.2) - odds(0.1)]
    found = [odds(point) for _, point in rule.operating_points]
    assert found == pytest.approx([value + shift for value in expected], abs=1e-6)
    assert odds(rule.lower) == pytest.approx(odds(0.5) + shift, abs=1e-6)
    assert new.sha256 != old.sha256


def test_a_calibrated_decision_takes_the_shift_itself():
    old = judging(threshold=0.6)
    old = dataclasses.replace(old, config=dataclasses.replace(old.config, fusion=Fusion()))
    new = finetune.recalibrated(old, BEFORE, AFTER)
    assert new.config.fusion is not None
    assert new.config.fusion.bias == pytest.approx([odds(0.6) - odds(0.7)] * 4)
    assert new.config.verdict.threshold == 0.6
    np.testing.assert_array_equal(new.tensors["cnn.out.bias"], old.tensors["cnn.out.bias"])


def test_where_no_bias_shifts_scores_the_threshold_moves():
    new = finetune.recalibrated(judging(threshold=0.6, aggregate="rms"), BEFORE, AFTER)
    assert new.config.verdict.threshold == pytest.approx(0.7)
    assert new.tensors["cnn.out.bias"] == 0.25


def test_every_threshold_calls_as_many_real_tracks_ai_as_before():
    rng = np.random.default_rng(0)
    before, after = rng.random(50), rng.random(50) ** 2
    names = [(f"p{k}", k / 20) for k in range(1, 20)]
    new = finetune.recalibrated(judging(operating_points=tuple(names)), before, after)
    shift = float(new.tensors["cnn.out.bias"][0]) - 0.25
    moved = 1 / (1 + np.exp(-shift) * (1 - after) / after)
    for name, point in new.config.verdict.operating_points:
        assert (moved >= point).sum() == (before >= dict(names)[name]).sum()


def choose(monkeypatch, hard, keep, before, after: dict[float, dict[str, float]]) -> float:
    """The share that is kept, if `after` gives the scores for each share."""

    def blend(old: Weights, new: Weights, alpha: float) -> Weights:
        return dataclasses.replace(old, name=str(alpha))

    monkeypatch.setattr(finetune, "blend", blend)
    monkeypatch.setattr(finetune, "recalibrated", lambda weights, before, after: weights)

    def scorer(rows: Any, weights: Weights) -> Any:
        return after[float(weights.name)]

    alpha, chosen = finetune._choose(weights_of(0), weights_of(1), hard, keep, before, scorer)
    assert float(chosen.name) == alpha
    return alpha


def test_as_much_as_does_no_harm_to_the_keep_set(monkeypatch):
    keep = [*tracks("r", 0, 50, split="validation"), *tracks("a", 1, 50, split="validation")]
    paths = [one.path for one in keep]
    before = dict(zip(paths, [0.1] * 50 + [0.9] * 50, strict=True))

    def flipped(real: int, ai: int) -> dict[str, float]:
        scores = [0.9] * real + [0.1] * (50 - real) + [0.1] * ai + [0.9] * (50 - ai)
        return dict(zip(paths, scores, strict=True))

    harm = {1.0: flipped(0, 3), 0.75: flipped(2, 0), 0.5: flipped(1, 1), 0.25: flipped(0, 0)}
    assert choose(monkeypatch, [], keep, before, harm) == 0.5
    lost = {1.0: flipped(0, 2), 0.75: flipped(0, 1)}  # of 50 AI tracks: 4 and 2 %
    assert choose(monkeypatch, [], keep, before, lost) == 0.75
    assert choose(monkeypatch, [], keep, before, {a: flipped(5, 5) for a in harm}) == 0.25
    assert choose(monkeypatch, [], keep, before, {a: flipped(0, 0) for a in harm}) == 1.0


def test_without_a_keep_set_the_least_that_helps(monkeypatch):
    hard = [*tracks("h", 0, 9, split="validation"), *tracks("g", 1, 1, split="validation")]
    paths = [one.path for one in hard]

    def right(n: int) -> dict[str, float]:
        scores = [0.1 if k < n else 0.9 for k in range(9)] + [0.9]
        return dict(zip(paths, scores, strict=True))

    after = {0.25: right(3), 0.5: right(8), 0.75: right(9), 1.0: right(9)}
    assert choose(monkeypatch, hard, [], {}, after) == 0.5
    assert choose(monkeypatch, hard, [], {}, {a: right(2) for a in after}) == 1.0
    train = [dataclasses.replace(one, split="train") for one in hard]
    assert choose(monkeypatch, train, [], {}, after) == 0.5
    # What is held out for the report has no say.
    few = [
        dataclasses.replace(one, split="train" if k < 3 else "test") for k, one in enumerate(hard)
    ]
    assert choose(monkeypatch, few, [], {}, after) == 0.25


# --- what is worse ---------------------------------------------------------------------------


def compared(*sources: tuple[str, int, int, int, int]) -> dict[tuple[str, str], Any]:
    """Changes by label and source, of (source, label, tracks, called AI before, after)."""
    rows, before, after = [], {}, {}
    for source, label, n, was, now in sources:
        for k, one in enumerate(tracks(source, label, n)):
            rows.append(one)
            before[one.path], after[one.path] = (0.2 + 0.6 * (k < m) for m in (was, now))
    return {
        (c.label, c.source): c for c in changes.evaluate("keep", rows, before, after, (0.5, 0.5))
    }


@pytest.mark.parametrize(
    ("label", "n", "was", "now", "worse"),
    [
        (0, 100, 2, 5, False),  # + 0.03 is the limit itself
        (0, 100, 2, 6, True),
        (0, 34, 0, 1, False),
        (0, 34, 0, 2, True),
        (0, 100, 50, 0, False),
        (1, 20, 20, 19, False),  # - 0.05 is the limit itself
        (1, 20, 20, 18, True),
        (1, 20, 0, 20, False),
    ],
)
def test_the_regression_rule(label, n, was, now, worse):
    (change,) = compared(("s", label, n, was, now)).values()
    assert (change.judged, change.worse) == (True, worse)
    assert change.called_ai == (was, now)
    means = [0.2 + 0.6 * m / n for m in (was, now)]
    assert change.mean_score == pytest.approx(means, abs=1e-5)


def test_small_sources_are_judged_together():
    found = compared(("big", 0, 40, 0, 0), ("s1", 0, 20, 0, 2), ("s2", 0, 20, 0, 0))
    assert {key[1]: (c.judged, c.worse) for key, c in found.items()} == {
        "big": (True, False),
        "s1": (False, False),
        "s2": (False, False),
        "(small sources)": (True, True),  # 2 of 40
        "(all)": (True, False),  # 2 of 80
    }


def test_all_tracks_of_a_label_are_judged_however_few():
    found = compared(("s", 0, 3, 0, 1), ("t", 1, 2, 2, 2))
    assert {key: (c.judged, c.worse) for key, c in found.items()} == {
        ("real", "s"): (False, False),
        ("real", "(all)"): (True, True),
        ("ai", "t"): (False, False),
        ("ai", "(all)"): (True, False),
    }


# --- the verb --------------------------------------------------------------------------------


def tone(folder: Path, name: str, rng: np.random.Generator, *tones: float) -> None:
    t = np.arange(44_100) / 44_100
    audio = 0.1 * rng.standard_normal(len(t)) + sum(0.1 * np.sin(2 * np.pi * f * t) for f in tones)
    write(folder, name, (32767 * audio.clip(-1, 1)[:, None]).astype(np.int16))


@pytest.fixture(scope="module", autouse=True)
def move() -> Iterator[None]:
    """Eight values before the last layers take a freer move than the default weights'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune, "Move", functools.partial(Move, rate=3e-2, keep=0.1, pull=0.01, dropout=0.0)
        )
        yield


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """A folder with `album` (hard), `keep`, and weights that call most of the album AI."""
    folder = tmp_path_factory.mktemp("music")
    rng, rows = np.random.default_rng(0), []
    for name in ("album", "keep"):
        (folder / name).mkdir()
    for k in range(10):
        tone(folder / "album", f"{k}.wav", rng, 3_000)
    for k in range(24):
        for label, tones in enumerate(((), (3_000, 9_000))):
            name = f"keep/{('real', 'ai')[label]}{k}.wav"
            tone(folder, name, rng, *tones)
            source = f"{('real', 'ai')[label]}-{k % 6}"
            rows.append(row(str(folder / name), label, source=source))
    write_manifest(folder / "keep.csv", rows)
    tensors = random_tensors(CONFIG)
    tensors["cnn.out.kernel"] *= -5
    tensors["cnn.out.bias"] = -5 * (tensors["cnn.out.bias"] + np.float32(1.7))
    save_weights(
        folder / "w.safetensors", CONFIG, tensors, name="w", licence="own", provenance={"by": "x"}
    )
    return folder


def arguments(music: Path, out: Path, *more: Any, keep: bool = True) -> list[Any]:
    base = ["finetune", "--weights", music / "w.safetensors"]
    base += ["--hard-negatives", music / "album", "--cache", music / "cache", "--out", out]
    return [*base, *(["--keep", music / "keep.csv"] if keep else []), *more]


def deep(**changes: Any) -> list[str]:
    pairs = {**FEW, **changes}.items()
    return ["--deep", *(f"--set={key}={value}" for key, value in pairs)]


@pytest.fixture(scope="module")
def adapted(music) -> Path:
    """Weights made by one whole run."""
    out = music / "whole.safetensors"
    assert main([str(argument) for argument in arguments(music, out, "-q")]) == 0
    return out


def report_of(out: Path) -> dict[str, Any]:
    return json.loads(Path(f"{out}.report.json").read_text())


def scores(weights: Path | Weights, folder: Path, rows: list[str]) -> dict[str, Any]:
    detector = Detector(weights, "numpy")
    return {name: detector.score(folder / name).score for name in rows}


def names_of(out: Path, music: Path, of: str) -> list[str]:
    """Tracks of a part of the test, found anew by how the verb divides."""
    line = [str(argument) for argument in arguments(music, out)]
    hard, keep, _ = finetune._held_out(*finetune._rows(build_parser().parse_args(line)))
    rows = [one for one in (hard if of == "hard" else keep) if one.split == "test"]
    return [os.path.relpath(one.path, music) for one in rows]


def check_report(music: Path, out: Path) -> dict[str, Any]:
    """Held against scores of the detector; returns the report."""
    report = report_of(out)
    assert (report["written"], report["worse"], report["failed"]) == (True, [], 0)
    assert report["warnings"] == []
    assert report["tracks"]["hard"] == {"train": 7, "test": 3}
    assert sum(report["tracks"]["keep"].values()) == 48
    weights = load_weights(out)
    assert report["weights"]["after"] == weights.summary()
    assert report["weights"]["before"] == load_weights(music / "w.safetensors").summary()
    held = names_of(out, music, "hard")
    old, new = scores(music / "w.safetensors", music, held), scores(out, music, held)
    (change,) = [c for c in report["changes"] if c["of"] == "hard"]
    assert (change["source"], change["label"], change["tracks"]) == ("album", "real", 3)
    assert change["called_ai"] == [sum(s[n] >= 0.5 for n in held) for s in (old, new)]
    assert change["called_ai"][0] > change["called_ai"][1]
    means = [np.mean([s[n] for n in held]) for s in (old, new)]
    assert change["mean_score"] == pytest.approx(means, abs=1e-5)
    assert means[1] < 0.9 * means[0]
    whole = {c["label"]: c for c in report["changes"] if c["source"] == "(all)"}
    for label, kind in enumerate(("real", "ai")):
        kept = [name for name in names_of(out, music, "keep") if kind in name]
        assert whole[kind]["tracks"] == len(kept) >= 4
        assert whole[kind]["called_ai"] == [label * len(kept)] * 2
    assert set(report["seconds"]) == {"reading", "training", "choosing", "checking"}
    return report


def test_false_positives_go_and_the_rest_stays(music, adapted):
    report = check_report(music, adapted)
    assert report["deep"] is None
    for was, now in report["operating_points"].values():
        assert now <= was + 0.2  # of five real tracks one at most
    old, new = load_weights(music / "w.safetensors"), load_weights(adapted)
    assert (new.name, new.licence) == ("whole", "own")
    for name, tensor in old.tensors.items():
        last = name in ("cnn.hidden.kernel", "cnn.hidden.bias", "cnn.out.kernel", "cnn.out.bias")
        assert np.array_equal(tensor, new.tensors[name]) != last, name
    first, finetuned = new.provenance["history"]
    assert first["weights"] == old.summary()
    assert finetuned["finetune"]["changes"] == report["changes"]
    assert not Path(f"{adapted}.run").exists()


def test_again_nothing_is_read_and_the_weights_are_the_same(
    command, music, adapted, tmp_path, monkeypatch
):
    def reading(*args: Any) -> None:
        raise AssertionError("it reads a recording again")

    monkeypatch.setattr(frozen, "SegmentReader", reading)
    out = tmp_path / "w2.safetensors"
    done = command(*arguments(music, out))
    assert done.code == 0
    assert load_weights(out).sha256 == load_weights(adapted).sha256
    table = done.out.splitlines()
    assert table[0].split()[:4] == ["set", "source", "label", "tracks"]
    assert table[1].split()[:4] == ["hard", "album", "real", "3"]


def test_deep_trains_the_whole_classifier_and_goes_on(command, music, tmp_path, monkeypatch):
    out = tmp_path / "w2.safetensors"

    def killed(self, state, batch):
        raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", killed)
        assert command(*arguments(music, out, *deep())).code == 1
    assert not out.exists()
    assert command(*arguments(music, out, *deep())).code == 0
    assert check_report(music, out)["deep"] == "head"
    old, new = load_weights(music / "w.safetensors"), load_weights(out)
    for name, tensor in old.tensors.items():
        still = name.startswith("unet.") or name.endswith((".mean", ".var"))
        assert np.array_equal(tensor, new.tensors[name]) == still, name
    _, trained, _ = new.provenance["history"]
    assert trained["phase"] == "head"
    again = command(*arguments(music, out, *deep()))
    assert again.code == 0
    assert "all 40 steps were done" in again.err
    after = load_weights(out)
    assert (after.sha256, after.provenance) == (new.sha256, new.provenance)
    other = command(*arguments(music, out, *deep(rate=1e-3)))
    assert other.code == 2
    assert "holds another run (settings.rate 0.01 there, 0.001 here)" in other.err


def test_weights_that_are_worse_are_not_written(command, music, adapted, tmp_path, monkeypatch):
    """If any change counted as worse."""
    out = tmp_path / "w2.safetensors"
    monkeypatch.setattr(changes, "LIMITS", (-1.0, -1.0))
    done = command(*arguments(music, out))
    assert done.code == 1
    assert "worse on the keep-set: real (all), ai (all)" in done.err.splitlines()[-1]
    assert not out.exists()
    report = report_of(out)
    assert (report["written"], report["alpha"]) == (False, 0.25)
    assert report["worse"] == ["real (all)", "ai (all)"]
    done = command(*arguments(music, out, "--accept-worse"))
    assert done.code == 0
    assert "warning: worse on the keep-set" in done.err
    assert load_weights(out).sha256 == report["weights"]["after"]["sha256"]


def test_without_a_keep_set_it_does_little_and_says_so(command, music, tmp_path):
    album = Path(shutil.copytree(music / "album", tmp_path / "album"))
    (album / "bad.wav").write_bytes(b"RIFF")
    write(album, "still.wav", np.zeros((44_100, 1), np.int16))
    out = tmp_path / "w2.safetensors"
    line = arguments(music, out, "-q", keep=False)
    line[line.index(music / "album")] = album
    done = command(*line)
    assert done.code == 1  # a track could not be read
    assert "warning: what else has changed was not checked" in done.err
    assert "bad.wav" in done.err
    report = report_of(out)
    assert report["written"]
    assert report["failed"] == 1
    assert (report["auc"], report["operating_points"]) == ([None, None], {})
    assert sum(report["tracks"]["hard"].values()) == 10
    (change,) = report["changes"]
    assert change["called_ai"][1] < change["called_ai"][0]
    assert load_weights(out).licence == "own"


def test_with_nothing_wrong_there_is_nothing_to_do(command, music, tmp_path):
    out = tmp_path / "w2.safetensors"
    rows = [row(str(music / f"keep/real{k}.wav")) for k in range(3)]
    write_manifest(tmp_path / "hard.csv", rows)
    line = arguments(music, out)
    line[line.index(music / "album")] = tmp_path / "hard.csv"
    done = command(*line)
    assert (done.code, done.out) == (1, "")
    assert "0 of 3 hard tracks are wrong at 0.5: there is nothing to adapt to" in done.err
    assert not out.exists()


def test_a_track_in_both_sets_is_hard(music, tmp_path):
    names = [str(music / f"keep/real{k}.wav") for k in range(2)]
    write_manifest(tmp_path / "hard.csv", [row(name) for name in names])
    hard, keep = finetune._rows(
        argparse.Namespace(hard_negatives=str(tmp_path / "hard.csv"), keep=str(music / "keep.csv"))
    )
    assert [(one.path, one.source) for one in hard] == list(
        zip(names, ["real-0", "real-1"], strict=True)
    )
    assert len(keep) == 46
    assert not {one.path for one in keep} & set(names)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"--hard-negatives": "empty"}, "empty: there is no audio in it"),
        ({"--hard-negatives": "none"}, "none: no such file or folder"),
        ({"--hard-negatives": "none.csv"}, "none.csv: cannot be read: No such file"),
        ({"--hard-negatives": "bad"}, "none of the 2 hard tracks can be read"),
        ({"--keep": "real.csv"}, "real.csv: no ai track to keep"),
        ({"--keep": "leak.csv"}, "the split leaks: group 'g'"),
        ({"--keep": "wrong.csv"}, "correct one"),
        ({"--keep": "bad.csv"}, "2 of 6 tracks of the keep-set cannot be read"),
        ({"--keep": "few.csv"}, "nothing is left for"),
        ({"--weights": "none.safetensors"}, "none.safetensors: no such weights file"),
        ({"--out": "w.safetensors"}, "--out w.safetensors is --weights"),
        ({"--out": "no/w2.safetensors"}, "its folder does not exist"),
        ({"--set": "steps=1"}, "--set is for a phase of training: give --deep"),
        ({"--deep": "head", "--set": "stepz=1"}, "no setting 'stepz'"),
        ({"--deep": "head", "--set": "moves=unet.nothing"}, "the model has no such part"),
    ],
)
def test_it_refuses_in_one_line(command, music, tmp_path, monkeypatch, changes, word):
    monkeypatch.chdir(tmp_path)
    shutil.copy(music / "w.safetensors", "w.safetensors")
    for name in ("empty", "bad"):
        os.mkdir(name)
    for name in ("bad/a.wav", "bad/b.wav"):
        Path(name).write_bytes(b"RIFF")
    real, ai = (str(music / f"keep/{kind}0.wav") for kind in ("real", "ai"))
    write_manifest("real.csv", [row(real)])
    write_manifest("few.csv", [row(real), row(ai, 1)])
    leak = [row(real, group="g", split="train"), row(ai, 1, group="g", split="test")]
    write_manifest("leak.csv", leak)
    write_manifest("wrong.csv", [row(str(music / "album/0.wav"), 1), row(real), row(ai, 1)])
    divided = [
        row(str(music / f"keep/{kind}{k}.wav"), label, split="train")
        for k in range(2)
        for label, kind in enumerate(("real", "ai"))
    ]
    broken = [row("bad/a.wav", split="test"), row("bad/b.wav", 1, split="test")]
    write_manifest("bad.csv", [*divided, *broken])
    pairs = {"--weights": "w.safetensors", "--hard-negatives": str(music / "album")}
    pairs |= {"--keep": str(music / "keep.csv"), "--out": "w2.safetensors", **changes}
    words = [word for pair in pairs.items() for word in pair]
    done = command("finetune", "-q", *words)
    assert done.code == (1 if word.endswith("be read") else 2)
    assert done.out == ""
    assert word in done.err.splitlines()[-1]
    assert not os.path.exists("w2.safetensors")


def test_weights_of_whole_songs_are_refused(music, tmp_path):
    native = load_weights(music / "w.safetensors")
    front_end = dataclasses.replace(CONFIG.front_end, joint="song")
    config = dataclasses.replace(CONFIG, front_end=front_end)
    path = tmp_path / "song.safetensors"
    save_weights(path, config, native.tensors, name="s", licence="", provenance={})
    line = arguments(music, tmp_path / "x.safetensors")
    line[line.index(music / "w.safetensors")] = path
    with pytest.raises(CommandError, match="score the segments of a song together"):
        finetune.run(build_parser().parse_args([str(argument) for argument in line]))


def test_a_foreign_graph_cannot_be_trained(music, monkeypatch):
    native = load_weights(music / "w.safetensors")
    graph = ForeignGraph("g", native.config, {}, "", "", {}, {"nodes": []})
    monkeypatch.setattr(finetune.training, "open_model", lambda path: graph)
    line = [str(argument) for argument in arguments(music, music / "x.safetensors")]
    with pytest.raises(CommandError, match="only native models can be trained"):
        finetune.run(build_parser().parse_args(line))
