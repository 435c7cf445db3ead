"""Figures of a benchmark, against cases worked by hand and against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from artifactnet_jax.evaluation import (
    METRICS,
    RANKED,
    Sample,
    auc,
    choose_threshold,
    evaluate,
    evaluate_pair,
    operating_points,
    threshold_at_fpr,
    tpr_at_fpr,
)


def make(ai: list[float | None], real: list[float | None], **columns: Any) -> list[dict[str, Any]]:
    """Rows named a0, a1, ... and r0, r1, ..., each its own lineage and source."""
    rows = []
    for letter, label, scores in (("a", 1, ai), ("r", 0, real)):
        for k, score in enumerate(scores):
            row = {"id": f"{letter}{k}", "label": label, "score": score, "split": "test"}
            row |= {"source": f"{letter}{k}", "generator": "", "group": "", "lineage": ""}
            rows.append(row | columns)
    return rows


def values(block: dict[str, Any], accounting: str = "missing_left_out") -> dict[str, Any]:
    return {name: entry["value"] for name, entry in block[accounting]["metrics"].items()}


# Two of three AI tracks and two of four real ones are called AI.
AI, REAL = [0.9, 0.8, 0.4], [0.7, 0.6, 0.3, 0.2]


def test_figures_worked_by_hand() -> None:
    block = evaluate(make(AI, REAL), 0.5, resamples=50)["overall"]
    assert block["missing_left_out"]["confusion"] == {"tp": 2, "fp": 2, "fn": 1, "tn": 2}
    expected = {
        "f1": 4 / 7,
        "precision": 1 / 2,
        "recall": 2 / 3,
        "fpr": 1 / 2,
        "balanced_accuracy": 7 / 12,
        "auroc": 10 / 12,  # 0.9 and 0.8 are above four real tracks, 0.4 above two
        "auprc": (1 + 1 + 3 / 5) / 3,
        "tpr_at_fpr5": 2 / 3,
        "tpr_at_fpr1": 2 / 3,
        "eer": 1 / 3,  # a third is missed from FPR 0 to FPR 1/2
        "ece": (0.1 + 0.2 + 0.6 + 0.7 + 0.6 + 0.3 + 0.2) / 7,  # a track to a bin
    }
    assert values(block) == pytest.approx(expected, abs=1e-12)
    assert values(block, "missing_as_wrong") == pytest.approx(
        {name: None if name in RANKED else value for name, value in expected.items()}
    )


def test_a_score_at_the_threshold_is_called_ai() -> None:
    block = evaluate(make([0.5], [0.5]), 0.5, resamples=10)["overall"]
    assert block["missing_left_out"]["confusion"] == {"tp": 1, "fp": 1, "fn": 0, "tn": 0}


def test_ties_count_half_and_move_together() -> None:
    found = values(evaluate(make([0.5, 0.9], [0.5, 0.1]), 0.5, resamples=10)["overall"])
    assert found["auroc"] == pytest.approx(3.5 / 4)
    assert found["auprc"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    assert found["eer"] == pytest.approx(1 / 4)  # halfway from (0, 1/2) to (1/2, 1)


def test_limits_of_the_false_positive_rate() -> None:
    """Of 100 real tracks 1, 5 and 6 are above three of the AI tracks."""
    real = [0.95, *[0.75] * 4, 0.55, *[0.1] * 94]
    found = values(evaluate(make([0.99, 0.9, 0.6, 0.5], real), 0.5, resamples=10)["overall"])
    assert found["tpr_at_fpr1"] == pytest.approx(2 / 4)
    assert found["tpr_at_fpr5"] == pytest.approx(3 / 4)


def test_a_point_on_a_straight_piece_of_the_roc_curve_counts() -> None:
    """The diagonal in steps of 1/40: at an FPR of 2/40 it is 2/40."""
    label, score = np.array([0, 1] * 40), np.repeat(np.arange(40) / 40, 2)
    assert tpr_at_fpr(label, score, 0.05) == pytest.approx(2 / 40)
    fpr, tpr, _ = sk.roc_curve(label, score)  # leaves that point out
    assert tpr[fpr <= 0.05].max() == 1 / 40


def test_tpr_at_an_fpr_of_weighted_and_tied_rows_is_the_best_of_all_thresholds() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        label = np.append(rng.integers(0, 2, 40), [0, 1])
        score = np.round(rng.random(42), 1)
        weight = rng.integers(0, 4, 42) / 4
        weight[-2:] = 1
        for most in (0.01, 0.05, 0.3):
            best = 0.0
            for threshold in score:
                rates = [weight[(label == k) & (score >= threshold)].sum() for k in (0, 1)]
                fpr, tpr = (n / weight[label == k].sum() for k, n in enumerate(rates))
                best = max(best, tpr if fpr <= most else 0)
            assert tpr_at_fpr(label, score, most, weight) == pytest.approx(best, abs=1e-12)


def test_auc_of_weighted_and_tied_rows_is_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    for digits in (1, 2, 8):
        label = np.append(rng.integers(0, 2, 60), [0, 1])
        logit = np.round(rng.normal(label, 1), digits)
        weight = rng.random(62)
        for own in (None, weight):
            expected = sk.roc_auc_score(label, logit, sample_weight=own)
            assert auc(label, logit, own) == pytest.approx(expected, abs=1e-12)
    assert auc(label, label / 3) == 1
    assert auc(label, -label) == 0
    assert auc(label, np.zeros(62)) == 0.5
    assert auc(np.ones(3), logit[:3]) is None


def test_thresholds_are_scikit_learn_without_dropped_points() -> None:
    """The thresholds of `roc_curve` at which no more than a share of the real rows is called AI."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        label = np.append(rng.integers(0, 2, 60), [0, 1])
        score = np.round(rng.random(62), 1 if rng.random() < 0.5 else 2)
        weight = rng.integers(1, 4, 62)
        fpr, tpr, limits = sk.roc_curve(label, score, sample_weight=weight, drop_intermediate=False)
        limits[0] = np.nextafter(score.max(), 2)
        for most in (0.01, 0.05, 0.2):
            expected = limits[fpr <= most + 1e-12].min()
            assert threshold_at_fpr(label, score, most, weight) == expected
        gain = (tpr - fpr).round(12)
        assert (
            operating_points(label, score, weight)["balanced"] == limits[gain == gain.max()].min()
        )


def test_calibration_error_within_a_bin() -> None:
    """0.61 and 0.65 share a bin: mean 0.63 against a share of 1/2. 1 is in the last bin."""
    found = values(evaluate(make([0.65, 1.0], [0.61]), 0.5, resamples=10)["overall"])
    assert found["ece"] == pytest.approx(2 / 3 * 0.13)


@pytest.mark.parametrize("weighted", [False, True])
def test_resamples_are_scikit_learn_with_weights(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 120)
    score = np.round(np.clip(rng.normal(0.4 + 0.2 * label, 0.25), 0, 1), 2)  # with ties
    rows = make([float(s) for s in score[label == 1]], [float(s) for s in score[label == 0]])
    sample = Sample.of(rows)
    if weighted:  # some count nothing
        sample = sample._replace(weight=np.maximum(rng.random(120) - 0.2, 0))
    counts = np.concatenate(list(sample.draws(40, 3)))
    assert counts.shape == (40, 120)
    found = sample.resampled(sample.score >= 0.45, 40, 3)
    for k, drawn in enumerate(counts):
        times = drawn[sample.unit]
        assert times.sum() == 120
        assert times[sample.label == 1].sum() == label.sum()
        weight = times * sample.weight
        y, s = sample.label, sample.score
        called = s >= 0.45
        fpr, tpr, _ = sk.roc_curve(y, s, sample_weight=weight, drop_intermediate=False)
        within = {x: tpr[fpr <= x / 100 + 1e-12].max() for x in (1, 5)}
        expected = {
            "f1": sk.f1_score(y, called, sample_weight=weight),
            "precision": sk.precision_score(y, called, sample_weight=weight),
            "recall": sk.recall_score(y, called, sample_weight=weight),
            "fpr": 1 - sk.recall_score(1 - y, ~called, sample_weight=weight),
            "balanced_accuracy": sk.balanced_accuracy_score(y, called, sample_weight=weight),
            "auroc": sk.roc_auc_score(y, s, sample_weight=weight),
            "auprc": sk.average_precision_score(y, s, sample_weight=weight),
            "tpr_at_fpr5": within[5],
            "tpr_at_fpr1": within[1],
            "eer": np.interp(0, fpr + tpr - 1, fpr),
            "ece": sum(
                abs((weight * (s - y))[np.floor(s * 15).clip(max=14) == b].sum()) for b in range(15)
            )
            / weight.sum(),
        }
        assert set(expected) == set(METRICS)
        assert {n: found[n][k] for n in METRICS} == pytest.approx(expected, abs=1e-12)


def test_whole_lineages_are_drawn() -> None:
    """One lineage right, one wrong: recall is 0, 1/2 or 1, a quarter of the time 0."""
    rows = make([0.9] * 50 + [0.1] * 50, [0.1] * 40)
    for k, row in enumerate(rows[:100]):
        row["lineage"] = "right" if k < 50 else "wrong"
    block = evaluate(rows, 0.5)["overall"]
    assert block["missing_left_out"]["metrics"]["recall"]["interval"] == [0, 1]
    assert (block["by"], block["units"]) == ("lineage, source", 42)
    for row in rows[:100]:
        row["lineage"] = row["id"]
    low, high = evaluate(rows, 0.5)["overall"]["missing_left_out"]["metrics"]["recall"]["interval"]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)  # binomial
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


def test_a_lineage_may_hold_both_classes() -> None:
    """An original and its re-synthesis go together, and no resample lacks a class."""
    rows = make([0.9, 0.4, 0.8], [0.6, 0.2, 0.1])
    for row in rows:
        row["lineage"] = "pair " + row["id"][1]
    block = evaluate(rows, 0.5, resamples=300)["overall"]
    assert block["units"] == 3
    sample = Sample.of(rows)
    for counts in sample.draws(50, 0):
        weight = counts[:, sample.unit]
        assert (weight[:, :3] == weight[:, 3:]).all()
    assert all(entry["interval"] for entry in block["missing_left_out"]["metrics"].values())


@pytest.mark.parametrize(
    ("columns", "by"),
    [
        ({}, "source"),
        ({"source": "all"}, "id"),
        ({"source": ""}, "id"),
        ({"source": "all", "lineage": "x"}, "lineage"),
    ],
)
def test_what_is_drawn_without_lineages(columns: dict[str, str], by: str) -> None:
    block = evaluate(make(AI, REAL, **columns), 0.5, resamples=20)["overall"]
    assert block["by"] == by
    assert block["units"] == (1 if by == "lineage" else 7)


def test_within_a_source_the_group_is_drawn() -> None:
    rows = make(AI, REAL, source="all")
    for row in rows:
        row["group"] = row["id"][0]
    block = evaluate(rows, 0.5, resamples=20)["overall"]
    assert (block["by"], block["units"]) == ("group", 2)


def test_one_lineage_has_no_interval() -> None:
    block = evaluate(make(AI, REAL, lineage="x"), 0.5, resamples=20)["overall"]
    entry = block["missing_left_out"]["metrics"]["recall"]
    assert entry == {
        "value": pytest.approx(2 / 3),
        "interval": None,
        "reason": "no interval: one lineage only",
    }


def test_missing_tracks_count_both_ways() -> None:
    """A missing AI track is a miss, a missing real one a false alarm."""
    block = evaluate(make([*AI, None], [*REAL, None]), 0.5, resamples=200)["overall"]
    assert (block["attempted"], block["missing"], block["n"]) == (9, 2, 7)
    assert block["missing_left_out"]["confusion"] == {"tp": 2, "fp": 2, "fn": 1, "tn": 2}
    assert values(block)["recall"] == pytest.approx(2 / 3)
    wrong = block["missing_as_wrong"]
    assert wrong["confusion"] == {"tp": 2, "fp": 3, "fn": 2, "tn": 2}
    found = values(block, "missing_as_wrong")
    assert found["recall"] == pytest.approx(1 / 2)
    assert found["fpr"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(4 / 9)
    assert found["precision"] == pytest.approx(2 / 5)
    assert wrong["metrics"]["auroc"] == {
        "value": None,
        "interval": None,
        "reason": "needs a score of every track",
    }


def test_one_class_gives_what_it_can_and_says_why_not() -> None:
    for ai, real, gives, lacks in (
        (AI, [], {"recall": 2 / 3}, "no real track"),
        ([], REAL, {"fpr": 1 / 2}, "no AI track"),
        ([], [None], {}, "no scored track"),
    ):
        entries = evaluate(make(ai, real), 0.5, resamples=50)["overall"]["missing_left_out"]
        for name, entry in entries["metrics"].items():
            if name in gives:
                assert entry["value"] == pytest.approx(gives[name])
                assert entry["interval"]
            else:
                assert entry == {"value": None, "interval": None, "reason": lacks}


def test_resamples_that_lack_a_scored_class_are_left_out_and_counted() -> None:
    """One of two real tracks has no score: every fourth resample draws that one twice."""
    rows = make([0.9, 0.8, 0.7], [0.1, None])
    entries = evaluate(rows, 0.5, resamples=400)["overall"]["missing_left_out"]["metrics"]
    sample = Sample.of(rows)
    counts = np.concatenate(list(sample.draws(400, 0)))
    (real,) = np.flatnonzero((sample.label == 0) & sample.scored)
    lacking = int((counts[:, sample.unit[real]] == 0).sum())
    assert 60 < lacking < 140
    for name in METRICS:
        undefined = 0 if name == "recall" else lacking
        assert entries[name].get("undefined", 0) == undefined, name
    for name in ("auroc", "auprc", "tpr_at_fpr5", "tpr_at_fpr1"):  # all in order, in every resample
        assert (entries[name]["value"], entries[name]["interval"]) == (1, [1, 1]), name
    worse = make([0.9, 0.8, 0.3], [0.1, None])
    pair = evaluate_pair(rows, worse, threshold_a=0.5, threshold_b=0.5, resamples=400)["metrics"]
    assert "undefined" not in pair["auprc"]  # a pair is of the tracks that both scored
    assert pair["tpr_at_fpr5"]["interval"] == [0, 0]


def test_pairs_leave_resamples_out_that_lack_a_class() -> None:
    """Both classes in each lineage but one class alone in what both scored."""
    sample = Sample.of(make([0.9, 0.8], [0.1, 0.2]))
    called = sample.score >= 0.5
    drawn = sample._figures(called, np.array([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]), False)
    for name in METRICS:
        if name not in ("recall", "fpr"):
            assert np.isnan(drawn[name]).tolist() == [True, True, False], name
    assert sample.spread(drawn["tpr_at_fpr1"]) == {"interval": [1, 1], "undefined": 2}


def test_no_threshold_without_both_classes() -> None:
    for find in (tpr_at_fpr, threshold_at_fpr):
        with pytest.raises(ValueError, match="no real track: a threshold needs both"):
            find(np.ones(3, np.int64), np.array([0.1, 0.2, 0.3]), 0.05)


def test_nothing_called_ai_has_no_precision() -> None:
    entries = evaluate(make(AI, REAL), 0.95, resamples=50)["overall"]["missing_left_out"]["metrics"]
    assert entries["precision"]["reason"] == "no track is called AI"
    assert entries["f1"]["value"] == 0


def test_parts() -> None:
    rows = make([0.9, 0.1, 0.8], [0.7, 0.1])
    for row, generator in zip(rows, ["Suno", "Suno", "", "", ""], strict=True):
        row["generator"] = generator
        row["group"] = "clean" if row["id"].endswith("0") else None
    found = evaluate(rows, 0.5, resamples=50)
    assert {k: values(v)["recall"] for k, v in found["per_generator"].items()} == {
        "Suno": 0.5,
        "a2": 1,  # by its source
    }
    assert {k: values(v)["fpr"] for k, v in found["per_source"].items() if k[0] == "r"} == {
        "r0": 1,
        "r1": 0,
    }
    assert list(found["per_group"]) == ["clean"]
    assert found["per_group"]["clean"]["n"] == 2


def test_the_order_of_rows_and_other_parts_change_nothing() -> None:
    rows = make(AI * 4, REAL * 4)
    for row in rows:
        row["group"] = row["source"][-1]
    found = evaluate(rows, 0.5, resamples=200)
    assert evaluate(rows[::-1], 0.5, resamples=200) == found
    alone = evaluate([row for row in rows if row["group"] == "1"], 0.5, resamples=200)
    assert alone["overall"] == found["per_group"]["1"]
    assert evaluate(rows, 0.5, resamples=200, seed=1) != found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": 1.5}, r"track a1: score 1.5 is not in \[0, 1\]"),
        ({"score": math.nan}, r"track a1: score nan is not in \[0, 1\]"),
        ({"label": "ai"}, "track a1: label 'ai' is neither 0 nor 1"),
        ({"id": "r0"}, "track r0 is there twice"),
    ],
)
def test_bad_rows(change: dict[str, Any], message: str) -> None:
    rows = make(AI, REAL)
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        evaluate(rows, 0.5)


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        evaluate([], 0.5)


def calibration(ai: list[float | None], real: list[float | None]) -> list[dict[str, Any]]:
    return make(ai, real, split="calibration")


def test_threshold_of_most_found_at_five_percent() -> None:
    """20 real tracks: one may be called AI. 0.6 finds as much as 0.55, which is lower."""
    real: list[float | None] = [0.7, 0.5, *[0.1] * 18]
    assert choose_threshold(calibration([0.9, 0.6, 0.55, 0.3, None], real)) == 0.55
    assert choose_threshold(calibration([0.9, 0.6, 0.55, 0.3], [*real[1:], 0.58])) == 0.55
    assert choose_threshold(calibration([0.9, 0.6, 0.3], real), "fpr1") == 0.9


def test_a_tie_of_found_tracks_goes_to_the_lowest_threshold() -> None:
    real: list[float | None] = [0.7, 0.5, *[0.1] * 18]
    assert choose_threshold(calibration([0.9, 0.2], real)) == 0.7


def test_a_threshold_above_every_score() -> None:
    """The highest score is a real track's, and one of ten is too many."""
    found = choose_threshold(calibration([0.5], [1.0, *[0.1] * 9]))
    assert found == math.nextafter(1.0, 2.0)
    assert choose_threshold(calibration([0.5], [0.6, *[0.1] * 9])) == math.nextafter(0.6, 1.0)


@pytest.mark.parametrize("split", ["test", "train", "", None])
def test_a_threshold_is_not_chosen_elsewhere(split: str | None) -> None:
    rows = calibration(AI, REAL)
    rows[2]["split"] = split
    with pytest.raises(ValueError, match="chosen on the split 'calibration' only"):
        choose_threshold(rows)


def test_a_threshold_needs_both_classes_and_a_known_rule() -> None:
    with pytest.raises(ValueError, match="no real track"):
        choose_threshold(calibration(AI, [None]))
    with pytest.raises(ValueError, match="'best' is unknown: choose from fpr1, fpr5"):
        choose_threshold(calibration(AI, REAL), "best")


def test_operating_points_by_hand() -> None:
    score = np.array([*np.arange(100) / 200, 0.3, 0.47, 0.6, 0.7])
    label = np.array([0] * 100 + [1] * 4)
    points = operating_points(label, score)
    assert points == {
        "fpr1": 0.495,
        "fpr2": 0.49,
        "fpr5": 0.475,  # at 0.47: six of a hundred
        "balanced": 0.47,  # 3 of 4, and 6 of 100
    }
    assert ((score >= points["fpr5"]) & (label == 0)).sum() == 5


def test_one_rule_for_a_threshold_at_an_fpr() -> None:
    """Of `bench accuracy` and `texture`: the lowest score that is above all but two of 40 real."""
    real, ai = np.linspace(0, 0.5, 40), np.linspace(0.3, 0.9, 40)
    rows = calibration([float(x) for x in ai], [float(x) for x in real])
    label, score = np.repeat([1, 0], 40), np.concatenate([ai, real])
    chosen = choose_threshold(rows)
    assert chosen == score[score > real[-3]].min() == pytest.approx(0.4846, abs=1e-4)
    for weight in (None, np.full(80, 0.3)):
        assert operating_points(label, score, weight)["fpr5"] == chosen
    weight = np.where(score == real[-1], 5.0, 1.0)  # 5 of 44 alone: the next score is an AI track's
    assert threshold_at_fpr(label, score, 0.05, weight) == ai[ai > real[-1]].min()


def test_comparison_worked_by_hand() -> None:
    """A alone is right about five tracks, B alone about one: p = 2 (1 + 6) / 64."""
    a = make([0.9, 0.9, 0.9, 0.9, 0.1], [0.1, 0.1, 0.9, None])
    b = make([0.9, 0.1, 0.1, 0.1, 0.9], [0.9, 0.9, 0.9, 0.1])[::-1]
    found = evaluate_pair(a, b, threshold_a=0.5, threshold_b=0.5, resamples=500)
    assert (found["n"], found["ai"], found["real"]) == (8, 5, 3)
    assert found["mcnemar"] == {"only_a_right": 5, "only_b_right": 1, "p": pytest.approx(14 / 64)}
    recall = found["metrics"]["recall"]
    assert (recall["a"], recall["b"]) == (0.8, 0.4)
    assert recall["difference"] == pytest.approx(0.4)
    assert recall["interval"][0] < 0.4 < recall["interval"][1]
    assert found["metrics"]["fpr"]["difference"] == pytest.approx(1 / 3 - 1)


def test_a_difference_is_taken_on_the_same_resamples() -> None:
    """B is A plus one mistake in 40: the paired interval is that of one track in 40."""
    a = make([0.9] * 20 + [0.2] * 20, [0.1] * 10)
    b = [{**row, "score": 0.2} if row["id"] == "a0" else row for row in a]
    entry = evaluate_pair(a, b, threshold_a=0.5, threshold_b=0.5)["metrics"]["recall"]
    assert entry["difference"] == pytest.approx(1 / 40)
    assert entry["interval"] == pytest.approx([0, 3 / 40])  # Poisson of mean 1: 98 % are up to 3
    same = evaluate_pair(a, a, threshold_a=0.5, threshold_b=0.5)
    assert all(entry["interval"] == [0, 0] for entry in same["metrics"].values())
    assert same["mcnemar"]["p"] == 1


def test_detectors_without_common_tracks_or_with_other_labels() -> None:
    a, b = make([0.9], [None]), make([None], [0.1])
    found = evaluate_pair(a, b, threshold_a=0.5, threshold_b=0.5)
    assert (found["n"], found["reason"]) == (0, "no track was scored by both")
    b = [{**row, "score": 0.5, "label": 1 - row["label"]} for row in a]
    with pytest.raises(ValueError, match="track a0"):
        evaluate_pair(a, b, threshold_a=0.5, threshold_b=0.5)


def test_common_tracks_of_one_class() -> None:
    rows = make(AI, [])
    found = evaluate_pair(rows, rows, threshold_a=0.5, threshold_b=0.85, resamples=50)["metrics"]
    assert found["auroc"]["reason"] == "no real track"
    assert found["recall"]["difference"] == pytest.approx(1 / 3)
