"""What the scores of a detector are worth: figures with intervals, thresholds, and comparisons.

AI is the positive class; a track is called AI where its score is at or above the threshold.

    recall             share of the AI tracks that are called AI (TPR)
    fpr                share of the real tracks that are called AI
    precision          share of the tracks called AI that are AI; none where no track is called AI
    f1                 2 TP / (2 TP + FP + FN)
    balanced_accuracy  mean of recall and 1 - fpr
    auroc              share of the pairs of an AI and a real track that are in order, ties half
    auprc              average precision: precision at each score, weighted by the recall it adds
    tpr_at_fpr5, ...1  highest recall of any threshold whose fpr is at most 5 % (1 %)
    eer                where fpr = 1 - recall on the straight-lined ROC curve
    ece                expected calibration error over 15 equal bins of P(AI) (Guo et al. 2017, for
                       the positive class): |mean score - share of AI|, weighted by tracks

The share of AI tracks is that of the data at hand, and precision, F1, AUPRC and ECE depend on it.

Intervals are the 2.5 % and 97.5 % quantiles of a bootstrap that draws whole lineages (the same
recording in any encoding is one), with replacement: among those of real tracks alone, of AI tracks
alone, and of both, so that a resample has as many of each. Rows without a lineage go by their
source, or, where that does not tell the rows of a block apart, by their group or id. A resample in
which a figure is not defined is left out of its interval. Where no mistake was made there is none
to draw, and the interval has no width: that is the method's limit, and no certainty.

A track without a score counts in two ways. `missing_left_out` is of the scored tracks alone;
`missing_as_wrong` calls a missing AI track real and a missing real one AI, a lower bound, and has
no figures that need a score (AUROC, AUPRC, TPR at an FPR, EER, ECE): none is made up.

The thresholds, failures and accountings are those of ArtifactBench's frozen protocol.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

COUNTED = ("f1", "precision", "recall", "fpr", "balanced_accuracy")  # known from verdicts alone
RANKED = ("auroc", "auprc", "tpr_at_fpr5", "tpr_at_fpr1", "eer", "ece")
METRICS = COUNTED + RANKED
BINS = 15  # of the calibration error
RULES = {"fpr1": 0.01, "fpr5": 0.05}  # highest FPR of a chosen threshold
POINTS = (1, 2, 5)  # %, highest FPR of an operating point
ROUNDING = 1e-12  # of a rate that is compared with such a limit
_CELLS = 2_000_000  # weights of resamples that are held at once
_OUTCOMES = ("tp", "fp", "fn", "tn")


def evaluate(
    rows: Rows, threshold: float, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Every figure of one detector: overall, per generator, per source and per group.

    Rows have `id`, `label` (1 AI, 0 real), `score` (in [0, 1]; None: missing), and, where known,
    `source`, `generator`, `group` and `lineage` (None or "": unknown). `per_generator` is of AI
    tracks alone; one without a generator goes by its source.

    A block holds the numbers of its tracks (`attempted`, `missing`, `n` scored and of these `ai`
    and `real`), quantiles of its scores, what was resampled (`by`, `units`), and for both ways to
    count missing tracks the `confusion` and `metrics`: each a `value` and an `interval` [low,
    high], both None with a `reason` where the metric is not defined. The order of the rows does
    not matter.

    Raises ValueError: no rows, an id twice, or a label or score that is none; names the track.
    """
    _check(rows)
    block = functools.partial(judge, threshold=threshold, resamples=resamples, seed=seed)

    def blocks(key: str, chosen: Rows) -> dict[str, Any]:
        parts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in chosen:
            name = row.get(key) or (row.get("source") if key == "generator" else None)
            if name:
                parts[str(name)].append(row)
        return {name: block(parts[name]) for name in sorted(parts)}

    return {
        "threshold": threshold,
        "resamples": resamples,
        "seed": seed,
        "overall": block(rows),
        "per_generator": blocks("generator", [row for row in rows if row["label"] == 1]),
        "per_source": blocks("source", rows),
        "per_group": blocks("group", rows),
    }


def judge(rows: Rows, threshold: float, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """One block of `evaluate`: the figures of these rows together."""
    _check(rows)
    sample = _Sample.of(rows)
    scored = sample.scored()
    drawn: dict[str, list[np.ndarray]] = defaultdict(list)
    drawn_all: dict[str, list[np.ndarray]] = defaultdict(list)
    table = sample.outcomes(threshold, missing_as_wrong=True)
    for counts in sample.draws(resamples, seed):
        for name, values in sample.resampled(counts, threshold).items():
            drawn[name].append(values)
        for name, values in _counted(counts[:, sample.unit] @ table).items():
            drawn_all[name].append(values)
    points_all = dict.fromkeys(RANKED, math.nan) | sample.counted(threshold, missing_as_wrong=True)

    def accounting(
        points: dict[str, float], draws: dict[str, list[np.ndarray]], missing_as_wrong: bool
    ) -> dict[str, Any]:
        metrics = {}
        for name in METRICS:
            value = _plain(points[name])
            entry: dict[str, Any] = {"value": value, "interval": None}
            if value is None:
                entry["reason"] = sample.reason(name, missing_as_wrong)
            else:
                entry["interval"] = sample.interval(np.concatenate(draws[name]))
                if entry["interval"] is None:
                    entry["reason"] = f"no interval: one {sample.by} only"
            metrics[name] = entry
        sums = sample.outcomes(threshold, missing_as_wrong).sum(axis=0).astype(int).tolist()
        return {"confusion": dict(zip(_OUTCOMES, sums, strict=True)), "metrics": metrics}

    label, score = sample.label[scored], sample.score[scored]
    quantiles = np.quantile(score, [0.1, 0.5, 0.9]).tolist() if len(score) else [None] * 3
    return {
        "attempted": len(rows),
        "missing": int((~scored).sum()),
        "n": len(label),
        "ai": int(label.sum()),
        "real": int((1 - label).sum()),
        "scores": {
            "mean": float(score.mean()) if len(score) else None,
            **dict(zip(("p10", "median", "p90"), quantiles, strict=True)),
        },
        "by": sample.by,
        "units": sample.units,
        "missing_left_out": accounting(sample.points(threshold), drawn, False),
        "missing_as_wrong": accounting(points_all, drawn_all, True),
    }


def choose_threshold(rows: Rows, rule: str = "fpr5") -> float:
    """The threshold of a rule of `RULES` on rows of the split "calibration": `threshold_at_fpr`.

    Missing scores are left out. Raises ValueError: an unknown rule, a row of another split (above
    all "test"), or scores of one class only.
    """
    if rule not in RULES:
        raise ValueError(f"threshold rule {rule!r} is unknown: choose from {', '.join(RULES)}")
    _check(rows)
    for row in rows:
        if row.get("split") != "calibration":
            cause = f"track {row['id']} is of the split {row.get('split') or 'none'!r}"
            raise ValueError(f"{cause}: a threshold is chosen on the split 'calibration' only")
    label, score = _arrays(rows)
    if reason := _lacking(label):
        raise ValueError(f"the calibration split has {reason}: a threshold needs both classes")
    return threshold_at_fpr(label, score, RULES[rule])


def threshold_at_fpr(
    label: np.ndarray, score: np.ndarray, most: float, weight: np.ndarray | None = None
) -> float:
    """The threshold with the highest TPR at an FPR of at most `most`; rows count `weight` each.

    Candidates are the scores and the next number above the highest, which calls no track AI (it may
    lie above 1). Of equals the lowest is taken.
    """
    fpr, _, thresholds = _roc(label, score, weight)
    return float(thresholds[fpr <= most + ROUNDING].min())


def operating_points(
    label: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, float]:
    """Thresholds by name: "fprN" as `threshold_at_fpr` of N %, and "balanced".

    "balanced" has the largest sum of the shares of both classes that are called right; of equals
    the lowest is taken. A point above 1, the largest score there may be, is left out.
    """
    fpr, tpr, thresholds = _roc(label, score, weight)
    best = tpr - fpr >= (tpr - fpr).max() - ROUNDING
    points = {f"fpr{n}": threshold_at_fpr(label, score, n / 100, weight) for n in POINTS}
    points["balanced"] = float(thresholds[best].min())
    return {name: threshold for name, threshold in points.items() if threshold <= 1}


def tpr_at_fpr(
    label: np.ndarray, score: np.ndarray, most: float, weight: np.ndarray | None = None
) -> float:
    """The highest TPR of any threshold whose FPR is at most `most`; rows count `weight` each."""
    fpr, tpr, _ = _roc(label, score, weight)
    return float(tpr[fpr <= most + ROUNDING].max())


def _roc(
    label: np.ndarray, score: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FPR, TPR and threshold, [points] each: every score, after the next number above them all.

    No point on a straight piece of the curve is left out.
    """
    from sklearn.metrics import roc_curve

    fpr, tpr, thresholds = roc_curve(label, score, sample_weight=weight, drop_intermediate=False)
    thresholds[0] = math.nextafter(score.max(), math.inf)  # is infinite
    return fpr, tpr, thresholds


def compare(
    rows_a: Rows,
    rows_b: Rows,
    *,
    threshold_a: float,
    threshold_b: float,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Two detectors on the tracks that both scored.

    `metrics` holds for each metric the value of `a` and of `b`, the `difference` a - b, and its
    `interval`: both detectors are judged on the same resamples. `mcnemar` is the exact test
    (binomial, two-sided) of the tracks that one of them alone judges right.

    Raises ValueError as `evaluate` does, and where a track has two labels.
    """
    _check(rows_a)
    _check(rows_b)
    scores = {row["id"]: row for row in rows_b if row["score"] is not None}
    pairs = [(a, scores[a["id"]]) for a in rows_a if a["score"] is not None and a["id"] in scores]
    for a, b in pairs:
        if a["label"] != b["label"]:
            raise ValueError(f"track {a['id']}: one detector's rows call it AI, the other's real")
    result: dict[str, Any] = {"n": len(pairs), "threshold_a": threshold_a}
    result |= {"threshold_b": threshold_b, "resamples": resamples, "seed": seed}
    if not pairs:
        return result | {"metrics": {}, "mcnemar": None, "reason": "no track was scored by both"}
    from scipy.stats import binomtest

    samples = [_Sample.of([pair[k] for pair in pairs]) for k in (0, 1)]
    samples[1] = dataclasses.replace(samples[0], score=samples[1].score)
    thresholds = (threshold_a, threshold_b)
    drawn: list[dict[str, list[np.ndarray]]] = [defaultdict(list), defaultdict(list)]
    for counts in samples[0].draws(resamples, seed):
        for sample, threshold, values in zip(samples, thresholds, drawn, strict=True):
            for name, value in sample.resampled(counts, threshold).items():
                values[name].append(value)
    points = [s.points(threshold) for s, threshold in zip(samples, thresholds, strict=True)]
    metrics = {}
    for name in METRICS:
        value_a, value_b = (values[name] for values in points)
        entry: dict[str, Any] = {"a": _plain(value_a), "b": _plain(value_b), "difference": None}
        entry["interval"] = None
        if math.isnan(value_a) or math.isnan(value_b):
            entry["reason"] = samples[0].reason(name)
        else:
            entry["difference"] = value_a - value_b
            difference = np.concatenate(drawn[0][name]) - np.concatenate(drawn[1][name])
            entry["interval"] = samples[0].interval(difference)
        metrics[name] = entry
    label = samples[0].label == 1
    right_a, right_b = ((s.score >= t) == label for s, t in zip(samples, thresholds, strict=True))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    result |= {"ai": int(label.sum()), "real": int((~label).sum())}
    result |= {"by": samples[0].by, "units": samples[0].units, "metrics": metrics}
    return result | {"mcnemar": {"only_a_right": only_a, "only_b_right": only_b, "p": p}}


def _check(rows: Rows) -> None:
    if not rows:
        raise ValueError("there are no rows to judge")
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"track {row['id']} is there twice")
        seen.add(row["id"])
        if row["label"] not in (0, 1):
            raise ValueError(f"track {row['id']}: label {row['label']!r} is neither 0 nor 1")
        if row["score"] is not None and not 0 <= row["score"] <= 1:  # nor NaN
            raise ValueError(f"track {row['id']}: score {row['score']!r} is not in [0, 1]")


def _arrays(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Label and score of the scored rows: int64, float64 [n]."""
    scored = [row for row in rows if row["score"] is not None]
    label = np.array([row["label"] for row in scored], np.int64)
    return label, np.array([row["score"] for row in scored], np.float64)


def _lacking(label: np.ndarray) -> str:
    """What a figure of both classes lacks, "" nothing."""
    if not len(label):
        return "no scored track"
    return "no real track" if label.all() else "" if label.any() else "no AI track"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """The tracks of a block, and what is drawn of them."""

    label: np.ndarray  # int64 [n], of all tracks
    score: np.ndarray  # float64 [n]; NaN: missing
    unit: np.ndarray  # int64 [n]: what is drawn as a whole, numbered from 0
    by: str  # what a unit is

    @classmethod
    def of(cls, rows: Rows) -> _Sample:
        rows = sorted(rows, key=lambda row: str(row["id"]))  # sums depend on the order
        label = np.array([row["label"] for row in rows], np.int64)
        score = np.array([math.nan if r["score"] is None else r["score"] for r in rows], np.float64)
        without = [row for row in rows if not row.get("lineage")]
        fallback = "id"
        for key in ("source", "group"):
            if len({row.get(key) or None for row in without} - {None}) > 1:
                fallback = key
                break
        keys = []
        for row in rows:
            own = "lineage" if row.get("lineage") else fallback if row.get(fallback) else "id"
            keys.append((own, str(row[own])))
        number = {key: k for k, key in enumerate(sorted(set(keys)))}
        by = ", ".join(k for k in ("lineage", "source", "group", "id") if k in dict(keys))
        return cls(label, score, np.array([number[key] for key in keys], np.int64), by)

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def draws(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """How often each unit is drawn, float64 [some resamples, units] at a time."""
        rng = np.random.default_rng(seed)
        has = np.zeros((self.units, 2), bool)
        has[self.unit, self.label] = True
        kind = has @ [1, 2]
        strata = [np.flatnonzero(kind == k) for k in np.unique(kind)]
        step = max(1, _CELLS // len(self.label))
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            counts = np.empty((size, self.units))
            for own in strata:
                pick = rng.integers(0, len(own), (size, len(own)))
                pick += np.arange(size)[:, None] * len(own)
                hits = np.bincount(pick.ravel(), minlength=size * len(own))
                counts[:, own] = hits.reshape(size, len(own))
            yield counts

    def scored(self) -> np.ndarray:
        return ~np.isnan(self.score)

    def outcomes(self, threshold: float, missing_as_wrong: bool) -> np.ndarray:
        """Membership of tracks in `_OUTCOMES`: float64 [n, 4]; a missing track may have none."""
        right = (self.score >= threshold) == (self.label == 1)
        right &= self.scored()
        place = np.where(right, np.where(self.label == 1, 0, 3), np.where(self.label == 1, 2, 1))
        table = np.eye(4)[place]
        if not missing_as_wrong:
            table[~self.scored()] = 0
        return table

    def points(self, threshold: float) -> dict[str, float]:
        """Figures of the scored tracks, NaN where not defined."""
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

        label, score = self.label[self.scored()], self.score[self.scored()]
        values = self.counted(threshold, missing_as_wrong=False)
        if _lacking(label):
            return values | dict.fromkeys(RANKED, math.nan)
        fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
        below = np.interp(0, fpr + tpr - 1, fpr)  # the ROC curve crosses fpr = 1 - tpr once
        gaps = np.bincount(bins_of(score), score - label, BINS)
        return values | {
            "auroc": float(roc_auc_score(label, score)),
            "auprc": float(average_precision_score(label, score)),
            "tpr_at_fpr5": tpr_at_fpr(label, score, 0.05),
            "tpr_at_fpr1": tpr_at_fpr(label, score, 0.01),
            "eer": float(below),
            "ece": float(np.abs(gaps).sum() / len(label)),
        }

    def counted(self, threshold: float, missing_as_wrong: bool) -> dict[str, float]:
        """Figures that verdicts alone give, NaN where not defined."""
        from sklearn.metrics import f1_score, precision_score, recall_score

        kept = np.ones(len(self.label), bool) if missing_as_wrong else self.scored()
        label = self.label[kept]
        right = self.outcomes(threshold, missing_as_wrong)[kept][:, [0, 3]].any(axis=1)
        called = np.where(right, label, 1 - label)
        values = dict.fromkeys(COUNTED, math.nan)
        if (label == 1).any():
            values["recall"] = float(recall_score(label, called))
        if (label == 0).any():
            values["fpr"] = float(called[label == 0].mean())
        if not _lacking(label):
            values["f1"] = float(f1_score(label, called, zero_division=0))
            values["balanced_accuracy"] = (values["recall"] + 1 - values["fpr"]) / 2
            if called.any():
                values["precision"] = float(precision_score(label, called))
        return values

    def resampled(self, counts: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
        """Figures of the scored tracks in resamples: float64 [resamples] each."""
        kept = np.flatnonzero(self.scored())
        order = kept[np.argsort(-self.score[kept], kind="stable")]
        label, score = self.label[order], self.score[order]
        weight = counts[:, self.unit[order]]  # [resamples, n], highest score first
        values = _counted(weight @ self.outcomes(threshold, False)[order])
        if _lacking(label):
            return values | dict.fromkeys(RANKED, np.full(len(counts), math.nan))
        bins = np.zeros((len(order), BINS))
        bins[np.arange(len(order)), bins_of(score)] = score - label
        gaps = np.abs(weight @ bins).sum(axis=1)
        last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # of equal scores
        both = np.cumsum(weight, axis=1)[:, last]
        true = np.cumsum(weight * label, axis=1)[:, last]  # [resamples, different scores]
        false = both - true
        with np.errstate(invalid="ignore"):  # a resample without a class: 0 / 0, which is NaN
            return values | {"ece": gaps / both[:, -1]} | _ranked(true, false)

    def reason(self, name: str, missing_as_wrong: bool = False) -> str:
        """Why a metric is not defined for these tracks."""
        if missing_as_wrong and name in RANKED:
            return "needs a score of every track"
        label = self.label if missing_as_wrong else self.label[self.scored()]
        return _lacking(label) or "no track is called AI"

    def interval(self, values: np.ndarray) -> list[float] | None:
        """[2.5 %, 97.5 %] quantiles; None of a single unit, and where nothing is defined."""
        values = values[~np.isnan(values)]
        if self.units < 2 or not len(values):
            return None
        return [float(bound) for bound in np.quantile(values, [0.025, 0.975])]


def bins_of(score: np.ndarray) -> np.ndarray:
    """The bin of the calibration error that a score is in, [k, k + 1) / BINS; 1 in the last."""
    return np.minimum((score * BINS).astype(np.int64), BINS - 1)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), math.nan), where=whole > 0)


def _counted(table: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of confusion counts, [resamples, 4] in the order of `_OUTCOMES`."""
    tp, fp, fn, tn = table.T
    both = np.where((tp + fn > 0) & (fp + tn > 0), 1.0, math.nan)
    recall, fpr = _share(tp, tp + fn), _share(fp, fp + tn)
    return {
        "f1": _share(2 * tp, 2 * tp + fp + fn) * both,
        "precision": _share(tp, tp + fp) * both,
        "recall": recall,
        "fpr": fpr,
        "balanced_accuracy": (recall + 1 - fpr) / 2,
    }


def _ranked(true: np.ndarray, false: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of the counts of AI and real tracks at or above each score, both [resamples, k]."""
    ai, real = true[:, -1:], false[:, -1:]
    precision = true / np.maximum(true + false, 1)
    start = np.zeros((len(true), 1))
    tpr, fpr = np.hstack([start, true / ai]), np.hstack([start, false / real])  # [resamples, k + 1]
    steps = np.diff(tpr, axis=1)
    rows = np.arange(len(true))
    values = {
        "auroc": (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1])).sum(axis=1) / 2,
        "auprc": (steps * precision).sum(axis=1),
    }
    for percent in (5, 1):
        within = (fpr <= percent / 100 + ROUNDING).sum(axis=1) - 1
        values[f"tpr_at_fpr{percent}"] = tpr[rows, within]
    gap = fpr + tpr - 1  # from -1 to 1
    after = np.maximum(np.argmax(gap >= 0, axis=1), 1)
    low, high = gap[rows, after - 1], gap[rows, after]
    part = -low / (high - low)
    values["eer"] = fpr[rows, after - 1] + part * (fpr[rows, after] - fpr[rows, after - 1])
    return values
