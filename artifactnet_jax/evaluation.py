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
which a figure is not defined is left out of its interval and counted: `undefined` of a metric is
their number, and is there where any were. It happens where all scored tracks of a class may go
undrawn, because others of their kind have no score. Where no mistake was made there is none
to draw, and the interval has no width: that is the method's limit, and no certainty.

A track without a score counts in two ways. `missing_left_out` is of the scored tracks alone;
`missing_as_wrong` calls a missing AI track real and a missing real one AI, a lower bound, and has
no figures that need a score (AUROC, AUPRC, TPR at an FPR, EER, ECE): none is made up.

The thresholds, failures and accountings are those of ArtifactBench's frozen protocol.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


# --- reports on detectors --------------------------------------------------------------------


def evaluate(
    rows: Rows, threshold: float, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Every figure of one detector: overall, per generator, per source and per group.

    Rows have `id`, `label` (1 AI, 0 real), `score` (in [0, 1]; None: missing), and, where known,
    `source`, `generator`, `group` and `lineage` (None or "": unknown). `per_generator` is of AI
    tracks alone; one without a generator goes by its source. The order of the rows does not matter.

    Returns:
        The arguments, and a block as of `evaluate_rows` for all rows and for each part.

    Raises:
        ValueError: no rows, an id twice, or a label or score that is none; names the track.
    """
    _check(rows)
    block = functools.partial(evaluate_rows, threshold=threshold, resamples=resamples, seed=seed)

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


def evaluate_rows(
    rows: Rows, threshold: float, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """One block of `evaluate`: the figures of these rows together.

    Returns:
        The numbers of tracks (`attempted`, `missing`, `n` scored and of these `ai` and `real`),
        quantiles of the scores, what was resampled (`by`, `units`), and for both ways to count
        missing tracks the `confusion` and `metrics`: each a `value` and an `interval` [low, high],
        both None with a `reason` where the metric is not defined, and `undefined` resamples.

    Raises:
        ValueError: as `evaluate`.
    """
    _check(rows)
    sample = Sample.of(rows)
    called = sample.score >= threshold

    def accounting(missing_as_wrong: bool) -> dict[str, Any]:
        points = sample.points(called, missing_as_wrong)
        draws = sample.resampled(called, resamples, seed, missing_as_wrong)
        metrics = {}
        for name in METRICS:
            value = _plain(points[name])
            entry: dict[str, Any] = {"value": value, "interval": None}
            if value is None:
                entry["reason"] = sample.reason(name, missing_as_wrong)
            else:
                entry |= sample.spread(draws[name])
                if entry["interval"] is None:
                    entry["reason"] = f"no interval: one {sample.by} only"
            metrics[name] = entry
        sums = sample.outcomes(called, missing_as_wrong).sum(axis=0).astype(int).tolist()
        return {"confusion": dict(zip(_OUTCOMES, sums, strict=True)), "metrics": metrics}

    label, score = sample.label[sample.scored], sample.score[sample.scored]
    quantiles = np.quantile(score, [0.1, 0.5, 0.9]).tolist() if len(score) else [None] * 3
    return {
        "attempted": len(rows),
        "missing": len(rows) - len(label),
        "n": len(label),
        "ai": int(label.sum()),
        "real": int((1 - label).sum()),
        "scores": {
            "mean": float(score.mean()) if len(score) else None,
            **dict(zip(("p10", "median", "p90"), quantiles, strict=True)),
        },
        "by": sample.by,
        "units": sample.units,
        "missing_left_out": accounting(False),
        "missing_as_wrong": accounting(True),
    }


def evaluate_pair(
    rows_a: Rows,
    rows_b: Rows,
    *,
    threshold_a: float,
    threshold_b: float,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Two detectors on the tracks that both scored.

    Returns:
        `metrics` holds for each metric the value of `a` and of `b`, the `difference` a - b, and its
        `interval`: both detectors are measured on the same resamples. `mcnemar` is the exact test
        (binomial, two-sided) of the tracks that one of them alone calls right.

    Raises:
        ValueError: as `evaluate`, and where a track has two labels.
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

    first = Sample.of([a for a, _ in pairs])
    second = first._replace(score=Sample.of([b for _, b in pairs]).score)
    samples = ((first, first.score >= threshold_a), (second, second.score >= threshold_b))
    point_a, point_b = (sample.points(called) for sample, called in samples)
    drawn_a, drawn_b = (sample.resampled(called, resamples, seed) for sample, called in samples)
    metrics = {}
    for name in METRICS:
        values = _plain(point_a[name]), _plain(point_b[name])
        entry: dict[str, Any] = {"a": values[0], "b": values[1], "difference": None}
        entry["interval"] = None
        if None in values:
            entry["reason"] = first.reason(name)
        else:
            entry["difference"] = point_a[name] - point_b[name]
            entry |= first.spread(drawn_a[name] - drawn_b[name])
        metrics[name] = entry
    label = first.label == 1
    right_a, right_b = (called == label for _, called in samples)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    result |= {"ai": int(label.sum()), "real": int((~label).sum())}
    result |= {"by": first.by, "units": first.units, "metrics": metrics}
    return result | {"mcnemar": {"only_a_right": only_a, "only_b_right": only_b, "p": p}}


def choose_threshold(rows: Rows, rule: str = "fpr5") -> float:
    """The threshold of a rule of `RULES` on rows of the split "calibration": `threshold_at_fpr`.

    Missing scores are left out.

    Raises:
        ValueError: an unknown rule, a row of another split (above all "test"), or scores of one
            class only.
    """
    if rule not in RULES:
        raise ValueError(f"threshold rule {rule!r} is unknown: choose from {', '.join(RULES)}")
    _check(rows)
    for row in rows:
        if row.get("split") != "calibration":
            cause = f"track {row['id']} is of the split {row.get('split') or 'none'!r}"
            raise ValueError(f"{cause}: a threshold is chosen on the split 'calibration' only")
    scored = [row for row in rows if row["score"] is not None]
    label = np.array([row["label"] for row in scored], np.int64)
    if reason := _lacking(label):
        raise ValueError(f"the calibration split has {reason}: a threshold needs both classes")
    return threshold_at_fpr(label, np.array([row["score"] for row in scored]), RULES[rule])


def _check(rows: Rows) -> None:
    if not rows:
        raise ValueError("there are no rows to evaluate")
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"track {row['id']} is there twice")
        seen.add(row["id"])
        if row["label"] not in (0, 1):
            raise ValueError(f"track {row['id']}: label {row['label']!r} is neither 0 nor 1")
        if row["score"] is not None and not 0 <= row["score"] <= 1:  # nor NaN
            raise ValueError(f"track {row['id']}: score {row['score']!r} is not in [0, 1]")


def _lacking(label: np.ndarray) -> str:
    """What a figure of both classes lacks, "" nothing."""
    if not len(label):
        return "no scored track"
    return "no real track" if label.all() else "" if label.any() else "no AI track"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- figures of labels [n] and scores [n] ----------------------------------------------------


def auc(label: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> float | None:
    """Area under the ROC curve; None with one class. Rows count `weight` [n] each."""
    both = 0 < np.mean(label) < 1
    return float(_ranked(*_above(label, score, weight)[:2])["auroc"][0]) if both else None


def tpr_at_fpr(
    label: np.ndarray, score: np.ndarray, most: float, weight: np.ndarray | None = None
) -> float:
    """The highest TPR of any threshold whose FPR is at most `most`. Rows count `weight` [n] each.

    Every score is a threshold: no point on a straight piece of the ROC curve is left out.
    """
    fpr, tpr, _ = _roc(label, score, weight)
    return float(tpr[fpr <= most + ROUNDING].max())


def threshold_at_fpr(
    label: np.ndarray, score: np.ndarray, most: float, weight: np.ndarray | None = None
) -> float:
    """The threshold with the highest TPR at an FPR of at most `most`.

    Candidates are the scores and the next number above the highest, which calls no track AI (it may
    lie above 1). Of equals the lowest is taken. Rows count `weight` [n] each.
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


def _roc(
    label: np.ndarray, score: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FPR, TPR and threshold, [points] each: every score, after the next number above them all.

    Raises ValueError where a class is gone.
    """
    if reason := _lacking(np.asarray(label)):
        raise ValueError(f"there is {reason}: a threshold needs both classes")
    (ai,), (real,), scores = _above(label, score, weight)
    top = np.nextafter(scores[0], np.inf)
    fpr, tpr = np.append(0.0, real / real[-1]), np.append(0.0, ai / ai[-1])
    return fpr, tpr, np.append(top, scores)


def _above(
    label: np.ndarray, score: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight of the AI rows and of the real rows at or above each different score, highest first.

    Rows count 1, or `weight`: [n], or of several resamples [resamples, n]. Returns both sums
    [resamples or 1, k] and the scores [k], float64.
    """
    label, score = np.asarray(label), np.asarray(score, np.float64)
    order = np.argsort(-score, kind="stable")
    label, score = label[order], score[order]
    ordered = np.ones((1, len(order))) if weight is None else np.atleast_2d(weight)[:, order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # of equal scores
    ai, real = (np.cumsum(ordered * (label == k), axis=1)[:, last] for k in (1, 0))
    return ai, real, score[last]


def _ranked(true: np.ndarray, false: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of the weights of AI and real rows at or above each score, both [resamples, k]."""
    true, false = (np.pad(sums, ((0, 0), (1, 0))) for sums in (true, false))  # from (0, 0) on
    with np.errstate(invalid="ignore"):  # a resample without a class: 0 / 0, which is NaN
        tpr, fpr = true / true[:, -1:], false / false[:, -1:]
        pairs = (np.diff(false, axis=1) * (true[:, 1:] + true[:, :-1])).sum(axis=1) / 2
        values = {"auroc": pairs / (true[:, -1] * false[:, -1])}
    precision = np.nan_to_num(_share(true, true + false))  # where it is 0 / 0 nothing is added
    both = np.where((true[:, -1] > 0) & (false[:, -1] > 0), 1.0, math.nan)
    values["auprc"] = (np.diff(tpr, axis=1) * precision[:, 1:]).sum(axis=1) * both
    resample = np.arange(len(true))
    for percent in (5, 1):
        within = (fpr <= percent / 100 + ROUNDING).sum(axis=1) - 1
        values[f"tpr_at_fpr{percent}"] = tpr[resample, within] * both
    gap = fpr + tpr - 1  # from -1 to 1
    after = np.maximum(np.argmax(gap >= 0, axis=1), 1)
    low, high = gap[resample, after - 1], gap[resample, after]
    start, stop = fpr[resample, after - 1], fpr[resample, after]
    return values | {"eer": start - low / (high - low) * (stop - start)}


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


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    share = np.full(np.shape(part), math.nan)
    np.divide(part, whole, out=share, where=whole > 0)
    return share


def bins_of(score: np.ndarray) -> np.ndarray:
    """The bin of the calibration error that a score is in, [k, k + 1) / BINS; 1 in the last."""
    return np.minimum((score * BINS).astype(np.int64), BINS - 1)


# --- what is resampled -----------------------------------------------------------------------


class Sample(NamedTuple):
    """Labelled and scored rows, what each counts, and what a bootstrap draws of them.

    A unit is drawn as a whole, with replacement, and units are drawn within their kind: those of
    real rows alone, of AI rows alone, and of both. So no resample lacks a class; that of its scored
    rows it may.
    """

    label: np.ndarray  # int64 [n]: 1 AI, 0 real
    score: np.ndarray  # float64 [n]; NaN: missing
    unit: np.ndarray  # int64 [n]: units are numbered from 0
    by: str  # what a unit is
    weight: np.ndarray  # float64 [n]: what a row counts
    at_once: int = 0  # resamples that are drawn together; 0: as many as memory allows

    @classmethod
    def of(cls, rows: Rows) -> Sample:
        """Rows of `evaluate`, by lineage, and all counting alike."""
        rows = sorted(rows, key=lambda row: str(row["id"]))  # sums depend on the order
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
        by = ", ".join(k for k in ("lineage", "source", "group", "id") if k in dict(keys))
        label = np.array([row["label"] for row in rows], np.int64)
        return cls(label, score, numbered(keys), by, np.ones(len(rows)))

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.unit.max()) + 1

    @property
    def scored(self) -> np.ndarray:
        """Whether a row has a score: bool [n]."""
        scored: np.ndarray = ~np.isnan(self.score)
        return scored

    def points(self, called: np.ndarray, missing_as_wrong: bool = False) -> dict[str, float]:
        """`METRICS` of the rows as they are, NaN where not defined; `called` AI: bool [n]."""
        values = self._figures(called, np.ones((1, self.units)), missing_as_wrong)
        return {name: float(value[0]) for name, value in values.items()}

    def resampled(
        self, called: np.ndarray, resamples: int, seed: int, missing_as_wrong: bool = False
    ) -> dict[str, np.ndarray]:
        """The same of resamples, float64 [resamples] each; of a seed always the same resamples."""
        drawn = self.draws(resamples, seed)
        parts = [self._figures(called, counts, missing_as_wrong) for counts in drawn]
        return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}

    def draws(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """How often each unit is drawn, float64 [some resamples, units] at a time."""
        rng = np.random.default_rng(seed)
        has = np.zeros((self.units, 2), bool)
        has[self.unit, self.label] = True
        kind = has @ [1, 2]
        strata = [np.flatnonzero(kind == k) for k in np.unique(kind)]
        step = self.at_once or max(1, _CELLS // len(self.label))
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            counts = np.empty((size, self.units))
            for own in strata:
                pick = rng.integers(0, len(own), (size, len(own)))
                pick += np.arange(size)[:, None] * len(own)
                hits = np.bincount(pick.ravel(), minlength=size * len(own))
                counts[:, own] = hits.reshape(size, len(own))
            yield counts

    def outcomes(self, called: np.ndarray, missing_as_wrong: bool) -> np.ndarray:
        """Membership of rows in `_OUTCOMES`: float64 [n, 4]; a missing track may have none."""
        right = (called == (self.label == 1)) & self.scored
        place = np.where(right, np.where(self.label == 1, 0, 3), np.where(self.label == 1, 2, 1))
        table = np.eye(4)[place]
        if not missing_as_wrong:
            table[~self.scored] = 0
        return table

    def _figures(
        self, called: np.ndarray, counts: np.ndarray, missing_as_wrong: bool
    ) -> dict[str, np.ndarray]:
        """`METRICS` with so many of each unit: [resamples, units] -> float64 [resamples] each."""
        weight = counts[:, self.unit] * self.weight
        values = _counted(weight @ self.outcomes(called, missing_as_wrong))
        kept = self.scored
        label, score, weight = self.label[kept], self.score[kept], weight[:, kept]
        if missing_as_wrong or _lacking(label):
            return values | dict.fromkeys(RANKED, np.full(len(counts), math.nan))
        bins = np.zeros((len(score), BINS))
        bins[np.arange(len(score)), bins_of(score)] = score - label
        gaps = np.abs(weight @ bins).sum(axis=1)
        ranked = _ranked(*_above(label, score, weight)[:2])
        both = np.where(np.isnan(ranked["auroc"]), math.nan, 1.0)
        values["ece"] = _share(gaps, weight.sum(axis=1)) * both
        return values | ranked

    def reason(self, name: str, missing_as_wrong: bool = False) -> str:
        """Why a metric is not defined for these tracks."""
        if missing_as_wrong and name in RANKED:
            return "needs a score of every track"
        label = self.label if missing_as_wrong else self.label[self.scored]
        return _lacking(label) or "no track is called AI"

    def spread(self, drawn: np.ndarray) -> dict[str, Any]:
        """`interval`: [2.5 %, 97.5 %] quantiles of what is defined in `drawn`, and `undefined`.

        The interval is None of a single unit, and where nothing is defined.
        """
        values = drawn[~np.isnan(drawn)]
        if self.units < 2 or not len(values):
            return {"interval": None}
        entry: dict[str, Any] = {"interval": np.quantile(values, [0.025, 0.975]).tolist()}
        return entry | ({"undefined": len(drawn) - len(values)} if len(values) < len(drawn) else {})


def numbered(keys: Sequence[Hashable]) -> np.ndarray:
    """The place of each key among the different ones, sorted: int64 [n]."""
    place = {key: k for k, key in enumerate(sorted(set(keys)))}  # type: ignore[type-var]
    return np.array([place[key] for key in keys], np.int64)
