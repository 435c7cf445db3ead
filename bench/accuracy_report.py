"""The report of a benchmark: what it found as a page (HTML and Markdown), as CSV and as JSON.

The page is one file: styles and figures (SVG) are in it, and it asks nothing of any other place.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import html
import io
import itertools
import json
import math
import re
import statistics
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from artifactnet_jax import evaluation
from artifactnet_jax.evaluation import BINS, bins_of
from artifactnet_jax.files import replace_file, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA = "artifactnet-jax/bench/1"
FIGURES = "figures"  # folder of the figures' data
DEVELOPMENT = ("train", "dev", "development")  # splits
WORST = 15  # sources of the table of failures
Row = Mapping[str, Any]


def write_report(
    out: Path,
    manifest_rows: Sequence[Row],
    results: Sequence[Row],
    *,
    detectors: Sequence[Row],
    threshold: str | float,
    stress: Sequence[Row] | None,
    sanity: Sequence[Row] | None,
    mechanism: Sequence[Row] | None,
    resamples: int = 2000,
    seed: int = 0,
) -> None:
    """Judge the results and write report.html, report.md, metrics.json and figures/*.csv.

    Files are replaced whole; metrics.json, which holds every figure of the page, comes last.

    manifest_rows: `id`, `label` (1 AI, 0 real), `source`, `generator`, `group`, `lineage`, `split`.
    All are judged but those of the split "calibration"; with several splits each by itself too.

    results: `id`, `detector`, `score` (None: failed), `error` (None, a text, or `kind` and
    `message`), `seconds`. A track without a result is missing. detectors: `name`, `params` (None:
    unknown), `gflops` (None: unknown), and maybe `seconds` per track (default: the median of its
    results) and `second_share`, of tracks that a tiered detector sent on. threshold: a number, or a
    rule of `evaluation.RULES`, by which each detector's is chosen on the split "calibration"; where
    its scores there do not allow it, it is 0.5, and the page says so.

    stress: for each detector `changes`, as of `stress.summarise`, and `codec_delta`, as of
    `sanity.codec_delta`. sanity: rows as of `sanity.evaluate`, with `detector`. mechanism: for each
    detector `sources` and `ablations`, rows as of `mechanism.by_source` and `mechanism.ablations`.

    Raises ValueError: no detectors, rows that `evaluation.evaluate` refuses, or a rule without a
    calibration split. CommandError: the disk takes no more.
    """
    study = _Study(manifest_rows, results, detectors, threshold, resamples, seed)
    found = study.found(stress or (), sanity or (), mechanism or ())
    sections = _sections(study, found)
    out = Path(out)
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    with writing(out):
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        for part in itertools.chain.from_iterable(section.parts for section in sections):
            if isinstance(part, Chart):
                replace_file(out / part.file, _csv([part.columns, *part.data]))
        replace_file(out / "report.md", _markdown(study, sections).encode())
        replace_file(out / "report.html", _html(study, sections).encode())
        replace_file(out / "metrics.json", text.encode())


# --- what is reported ------------------------------------------------------------------------


class _Study:
    """Rows, scores and thresholds by detector, in the order in which detectors were given."""

    def __init__(
        self,
        rows: Sequence[Row],
        results: Sequence[Row],
        detectors: Sequence[Row],
        threshold: str | float,
        resamples: int,
        seed: int,
    ):
        if not detectors:
            raise ValueError("there is no detector to report on")
        self.names = [str(detector["name"]) for detector in detectors]
        self.details = dict(zip(self.names, detectors, strict=True))
        self.drawing = {"resamples": resamples, "seed": seed}
        known = {row["id"] for row in rows}
        self.results: dict[str, dict[Any, Row]] = {name: {} for name in self.names}
        for result in results:
            if result["detector"] in self.results and result["id"] in known:
                self.results[result["detector"]][result["id"]] = result
        self.scored = {name: self._scored(rows, self.results[name]) for name in self.names}
        rule = threshold if isinstance(threshold, str) else None
        self.rule = rule
        splits = Counter(row.get("split") or "" for row in rows)
        if rule and "calibration" not in splits:
            cause = f"threshold {rule!r} is chosen on the split 'calibration'"
            raise ValueError(f"{cause}, and no track is of it: give a number, as 0.5")
        left_out = "calibration" if set(splits) != {"calibration"} else None
        self.judged = {
            name: [row for row in own if row.get("split") != left_out]
            for name, own in self.scored.items()
        }
        self.splits = sorted(split for split in splits if split) if len(splits) > 1 else []
        if rule and not left_out:
            raise ValueError("every track is of the split 'calibration': none is left to judge")
        self.thresholds = {name: self._threshold(name, threshold) for name in self.names}

    def _scored(self, rows: Sequence[Row], own: Mapping[Any, Row]) -> list[dict[str, Any]]:
        return [{**row, "score": own.get(row["id"], {}).get("score")} for row in rows]

    def _threshold(self, name: str, threshold: str | float) -> tuple[float, str]:
        """Value and origin."""
        if not isinstance(threshold, str):
            return float(threshold), "fixed"
        chosen = [row for row in self.scored[name] if row.get("split") == "calibration"]
        limit = (
            f"FPR <= {evaluation.RULES.get(threshold, 0):.0%} on {len(chosen)} calibration tracks"
        )
        try:
            return evaluation.choose_threshold(chosen, threshold), f"highest TPR at {limit}"
        except ValueError as error:
            if threshold not in evaluation.RULES:
                raise
            return 0.5, f"fixed, as none could be chosen: {error}"

    def notice(self) -> str:
        """What a reader must know of the tracks, "" nothing."""
        rows = self.judged[self.names[0]]
        named = [r for r in rows if r.get("development") or r.get("split") in DEVELOPMENT]
        if named:
            text = f"{len(named)} of the {len(rows)} judged tracks are development data"
            return f"{text}: what was made with them looks better here than it is."
        if not any(row.get("split") == "test" for row in rows):
            text = "No track is of a split named test. Where detectors or thresholds were developed"
            return f"{text} on these sources, the figures are better than they would be elsewhere."
        return ""

    def seconds(self, name: str) -> float | None:
        """Cost of a track."""
        if (stated := self.details[name].get("seconds")) is not None:
            return float(stated)
        spent = [r["seconds"] for r in self.results[name].values() if r.get("seconds") is not None]
        return float(statistics.median(spent)) if spent else None

    def failures(self) -> list[dict[str, Any]]:
        """Judged tracks without a score, by detector and what kept them from one."""
        found = []
        for name in self.names:
            causes = defaultdict(list)
            for row in self.judged[name]:
                if row["score"] is None:
                    causes[_cause(self.results[name].get(row["id"]))].append(row)
            for (kind, message), rows in sorted(causes.items(), key=lambda c: -len(c[1])):
                entry = {"detector": name, "kind": kind, "message": message, "n": len(rows)}
                found.append(entry | {"example": str(rows[0]["id"])})
        return found

    def found(
        self, stress: Sequence[Row], sanity: Sequence[Row], mechanism: Sequence[Row]
    ) -> dict[str, Any]:
        """Everything, as metrics.json has it."""
        by_detector = {}
        for name in self.names:
            value, origin = self.thresholds[name]
            detail = self.details[name]
            entry: dict[str, Any] = {"params": detail.get("params"), "gflops": detail.get("gflops")}
            entry |= {"seconds_per_track": self.seconds(name)}
            entry |= {"threshold": value, "threshold_origin": origin}
            entry["judged"] = evaluation.evaluate(self.judged[name], value, **self.drawing)
            entry["by_split"] = {
                split: evaluation.evaluate_rows(
                    [row for row in self.scored[name] if row.get("split") == split],
                    value,
                    **self.drawing,
                )
                for split in self.splits
            }
            if value != 0.5:
                entry["at_0.5"] = evaluation.evaluate_rows(self.judged[name], 0.5, **self.drawing)
            by_detector[name] = entry
        pairs = []
        for a, b in itertools.combinations(self.names, 2):
            pair = evaluation.evaluate_pair(
                self.judged[a],
                self.judged[b],
                threshold_a=self.thresholds[a][0],
                threshold_b=self.thresholds[b][0],
                **self.drawing,
            )
            pairs.append({"a": a, "b": b, **pair})
        return {
            "schema": SCHEMA,
            "notice": self.notice() or None,
            "detectors": by_detector,
            "comparisons": pairs,
            "failures": self.failures(),
            "stress": [dict(row) for row in stress],
            "sanity": [dict(row) for row in sanity],
            "mechanism": [dict(row) for row in mechanism],
        }


def _cause(result: Row | None) -> tuple[str, str]:
    """Kind and message of what kept a track from a score."""
    if result is None:
        return "missing", "there is no result"
    error = result.get("error")
    if isinstance(error, Mapping):
        return str(error.get("kind", "error")), str(error.get("message", ""))
    return "error", str(error or "no score and no reason")


# --- the page's parts ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    small: str = ""  # beneath it
    state: str = ""  # "good", "bad"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells in rows; the first column is text, numbers follow."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    note: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure and its data."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]
    columns: Sequence[str]
    data: Sequence[Sequence[Any]]
    wide: bool = False
    key: bool = True  # whether lines and markers are the detectors'

    @property
    def file(self) -> str:
        return f"{FIGURES}/{self.name}.csv"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    parts: Sequence[Table | Chart]
    text: str = ""


def _sections(study: _Study, found: Mapping[str, Any]) -> list[Section]:
    sections = [
        _results(study, found),
        _failing(study, found),
        _curves(study),
        _cost(study, found),
        _sources(study, found),
        _comparisons(found),
        _sanity(study, found["sanity"]),
        _stress(study, found["stress"]),
        _mechanism(found["mechanism"]),
        _missing(found["failures"]),
    ]
    return [section for section in sections if section.parts]


def _value(entry: Mapping[str, Any]) -> Cell:
    if entry["value"] is None:
        return Cell("-", entry.get("reason", ""))
    interval = entry["interval"]
    return Cell(_number(entry["value"]), _range(interval) if interval else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(interval: Sequence[float], form: str = ".3f") -> str:
    """[low, high], which lines are not broken within."""
    low, high = (f"{bound:{form}}".replace("0.", ".", 1) for bound in interval)
    return f"[{low},\u00a0{high}]"


def _limit(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


TITLES = {
    "f1": "F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "balanced_accuracy": "Balanced accuracy",
    "recall": "Recall (TPR)",
    "fpr": "FPR",
    "precision": "Precision",
    "tpr_at_fpr5": "TPR at FPR ≤ 5 %",
    "tpr_at_fpr1": "TPR at FPR ≤ 1 %",
    "eer": "EER",
    "ece": "ECE",
}


def _results(study: _Study, found: Mapping[str, Any]) -> Section:
    entries = found["detectors"]

    def goodness(name: str) -> tuple[float, ...]:
        own = entries[name]["judged"]["overall"]["missing_left_out"]["metrics"]
        order = [own["f1"]["value"], own["auroc"]["value"], own["recall"]["value"]]
        return tuple(-math.inf if value is None else value for value in order)

    brief = ("f1", "auroc", "balanced_accuracy", "recall", "fpr", "precision", "tpr_at_fpr5")
    ranked = sorted(study.names, key=goodness, reverse=True)

    def row(name: str, block: Mapping[str, Any], way: str, keys: Iterable[str]) -> list[Cell]:
        return [_value(block[way]["metrics"][key]) for key in keys]

    first: list[list[Cell | str]] = []
    wrong: list[list[Cell | str]] = []
    counts: list[list[Cell | str]] = []
    half: list[list[Cell | str]] = []
    splits: list[list[Cell | str]] = []
    for name in ranked:
        entry, block = entries[name], entries[name]["judged"]["overall"]
        scored = f"{block['n']}/{block['attempted']}"
        first.append([name, scored, *row(name, block, "missing_left_out", TITLES)])
        counted = [key for key in TITLES if key in evaluation.COUNTED]
        lost = Cell(str(block["missing"]), state="bad" if block["missing"] else "")
        wrong.append([name, lost, *row(name, block, "missing_as_wrong", counted)])
        limit = Cell(_limit(entry["threshold"]))
        confusions = [
            str(block[way]["confusion"][key])
            for way in ("missing_left_out", "missing_as_wrong")
            for key in ("tp", "fp", "fn", "tn")
        ]
        counts.append([name, limit, *confusions, entry["threshold_origin"]])
        if "at_0.5" in entry:
            half.append([name, *row(name, entry["at_0.5"], "missing_left_out", counted)])
        for split, other in entry["by_split"].items():
            cells = row(name, other, "missing_left_out", brief)
            splits.append([name, split, f"{other['n']}/{other['attempted']}", *cells])
    counted_titles = [TITLES[key] for key in TITLES if key in evaluation.COUNTED]
    confusion = ("TP", "FP", "FN", "TN")
    lost_too = [f"{count}, missing wrong" for count in confusion]
    parts = [
        Table(["Detector", "Scored", *TITLES.values()], first, "Missing tracks left out"),
        Table(
            ["Detector", "Missing", *counted_titles],
            wrong,
            "Missing tracks counted as wrong",
            "A missing AI track counts as called real, a missing real one as called AI.",
        ),
        Table(
            [*("Detector", "Threshold"), *confusion, *lost_too, "Origin of the threshold"],
            counts,
            "Thresholds and counts",
            "A track is called AI where its score is at or above the threshold.",
        ),
    ]
    if half:
        parts.append(Table(["Detector", *counted_titles], half, "At the threshold 0.5 instead"))
    if splits:
        header = ["Detector", "Split", "Scored", *(TITLES[key] for key in brief)]
        parts.append(Table(header, splits, "By split", folded=True))
    text = (
        "Best F1 first. Beneath a figure is its 95 % interval over resampled lineages; one without "
        "width, as where no mistake was made, is too narrow: more tracks may show one."
    )
    return Section("Results", parts, text)


def _rate(block: Mapping[str, Any]) -> tuple[float | None, Sequence[float] | None, str]:
    """Share of a block's scored tracks that are judged wrong, its interval, and its class."""
    figures = block["missing_left_out"]["metrics"]
    recall, fpr = figures["recall"], figures["fpr"]
    if recall["value"] is not None and fpr["value"] is not None:
        accuracy = figures["balanced_accuracy"]
        low_high = accuracy["interval"]
        flipped = [1 - low_high[1], 1 - low_high[0]] if low_high else None
        return 1 - accuracy["value"], flipped, "both"
    if recall["value"] is not None:
        low_high = recall["interval"]
        return 1 - recall["value"], [1 - low_high[1], 1 - low_high[0]] if low_high else None, "AI"
    return fpr["value"], fpr["interval"], "real"


def _failing(study: _Study, found: Mapping[str, Any]) -> Section:
    blocks = {name: found["detectors"][name]["judged"]["per_source"] for name in study.names}
    rates = {
        source: {name: _rate(blocks[name][source]) for name in study.names}
        for source in blocks[study.names[0]]
    }

    def mean(source: str) -> float:
        known = [rate for rate, _, _ in rates[source].values() if rate is not None]
        return statistics.fmean(known) if known else math.inf

    worst = sorted(rates, key=lambda source: (-mean(source), source))
    labels = {
        source: {row["label"] for row in study.judged[study.names[0]] if row["source"] == source}
        for source in worst
    }
    rows = []
    for source in worst:
        kinds = "/".join(map(_label, sorted(labels[source])))
        cells: list[Cell | str] = [source, kinds]
        cells.append(str(blocks[study.names[0]][source]["attempted"]))
        for name in study.names:
            rate, interval, _ = rates[source][name]
            state = "" if rate is None else "bad" if rate > 0.1 else "good" if rate <= 0.05 else ""
            gone = blocks[name][source]["missing"]
            small = _range(interval) if interval else ""
            small += f" {gone}\u00a0missing" if gone else ""
            cells.append(Cell(_number(rate), small, state))
        rows.append(cells)
    header = ["Source", "Class", "Tracks", *study.names]
    text = (
        "Share of a source's tracks that are judged wrong (missed AI, real called AI; for a source "
        "of both classes the mean of the two), worst sources first, by the mean over detectors."
    )
    parts = [Table(header, rows[:WORST])] if rows else []
    if len(rows) > WORST:
        parts.append(Table(header, rows[WORST:], f"The other {len(rows) - WORST}", folded=True))
    return Section("Where it fails", parts, text)


def _arrays(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    scored = [row for row in rows if row["score"] is not None]
    return (
        np.array([row["label"] for row in scored], np.int64),
        np.array([row["score"] for row in scored], np.float64),
    )


def _curves(study: _Study) -> Section:
    from sklearn.metrics import precision_recall_curve, roc_curve

    known = {name: _arrays(study.judged[name]) for name in study.names}
    both = {name: pair for name, pair in known.items() if 0 < pair[0].sum() < len(pair[0])}
    scored = {name: pair for name, pair in known.items() if len(pair[0])}
    roc, recalls, f1s, bins = {}, {}, {}, {}
    grid = np.linspace(0, 1, 201)
    for name, (label, score) in both.items():
        roc[name] = roc_curve(label, score)
        precision, recall, limits = precision_recall_curve(label, score)
        recalls[name] = recall[:-1], precision[:-1], limits  # the last is a point by convention
        called = score[:, None] >= grid
        hits = called[label == 1].sum(axis=0)
        f1s[name] = grid, 2 * hits / (called.sum(axis=0) + label.sum())
        index = bins_of(score)
        count = np.bincount(index, minlength=BINS)
        filled = count > 0
        with_score = np.bincount(index, score, BINS)[filled] / count[filled]
        bins[name] = (
            with_score,
            np.bincount(index, label, BINS)[filled] / count[filled],
            count[filled],
        )
    edges = np.linspace(0, 1, 26)
    shares = {
        (name, kind): np.histogram(score[label == kind], edges)[0] / max(1, (label == kind).sum())
        for name, (label, score) in scored.items()
        for kind in (1, 0)
    }
    order = study.names
    limits = {name: value for name, (value, _) in study.thresholds.items()}
    parts: list[Table | Chart] = []
    if both:
        parts += [
            Chart(
                "roc",
                "ROC",
                "The upper left is better. A dot is the detector's threshold.",
                lambda: _lines(order, roc, "FPR", "Recall (TPR)", known, limits),
                ["detector", "fpr", "tpr", "threshold"],
                [(n, *point) for n, lines in roc.items() for point in zip(*lines, strict=True)],
            ),
            Chart(
                "precision_recall",
                "Precision and recall",
                "The upper right is better. Precision depends on the share of AI tracks.",
                lambda: _lines(order, recalls, "Recall (TPR)", "Precision"),
                ["detector", "recall", "precision", "threshold"],
                [(n, *point) for n, lines in recalls.items() for point in zip(*lines, strict=True)],
            ),
            Chart(
                "f1_threshold",
                "F1 by threshold",
                "A flat top means that the threshold hardly matters.",
                lambda: _lines(order, f1s, "Threshold", "F1"),
                ["detector", "threshold", "f1"],
                [(n, *point) for n, lines in f1s.items() for point in zip(*lines, strict=True)],
            ),
            Chart(
                "calibration",
                "Calibration",
                f"Share of AI among tracks of {BINS} bins of the score; on the grey line a score "
                "is a probability, for the share of AI tracks in these data.",
                lambda: _lines(order, bins, "Mean score", "Share of AI", diagonal=True),
                ["detector", "mean_score", "share_of_ai", "tracks"],
                [(n, *point) for n, lines in bins.items() for point in zip(*lines, strict=True)],
            ),
        ]
    if scored:
        parts.append(
            Chart(
                "score_distributions",
                "Scores",
                "Share of the class's tracks in each of 25 bins; the dashed line is the threshold.",
                lambda: _histograms(list(scored), shares, edges, limits),
                ["detector", "class", "from", "to", "share"],
                [
                    (name, ("real", "ai")[kind], low, high, share)
                    for (name, kind), values in shares.items()
                    for low, high, share in zip(edges[:-1], edges[1:], values, strict=True)
                ],
                wide=True,
                key=False,
            )
        )
    text = "" if both else "Only one class has scores: curves need both."
    return Section("Curves", parts, text)


def _cost(study: _Study, found: Mapping[str, Any]) -> Section:
    points = []
    for name in study.names:
        entry = found["detectors"][name]
        f1 = entry["judged"]["overall"]["missing_left_out"]["metrics"]["f1"]
        row = [name, entry["params"], entry["gflops"], entry["seconds_per_track"]]
        points.append([*row, f1["value"], *(f1["interval"] or (None, None))])
    rows: list[list[Cell | str]] = []
    for name, params, gflops, seconds, f1, low, high in points:
        interval = "" if low is None else _range((low, high))
        costs = [_count(params), _short(gflops), _short(seconds)]
        rows.append([name, *costs, Cell(_number(f1), interval)])
    header = ["Detector", "Parameters", "GFLOP", "Seconds per track", "F1"]
    shares = [study.details[name].get("second_share") for name in study.names]
    if any(share is not None for share in shares):
        header.append("Sent on to the second detector")
        for row, share in zip(rows, shares, strict=True):
            row.append("-" if share is None else f"{share:.1%}")
    table = Table(header, rows)
    parts: list[Table | Chart] = [table]
    axes = [(k, title) for k, title in ((1, "Parameters"), (3, "Seconds per track"))]
    axes = [(k, t) for k, t in axes if any(p[k] and p[4] is not None for p in points)]
    if axes:
        parts.append(
            Chart(
                "cost",
                "F1 by size and by cost",
                "The upper left is better; lines are 95 % intervals.",
                lambda: _scatter(study.names, points, axes),
                ["detector", "params", "gflops", "seconds_per_track", "f1", "low", "high"],
                points,
                wide=True,
            )
        )
    text = (
        "Seconds are those of the machine that made the report, with whatever else ran on it: they "
        "compare the detectors of one run, and nothing else."
    )
    return Section("Size and cost", parts, text)


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _sources(study: _Study, found: Mapping[str, Any]) -> Section:
    parts: list[Table | Chart] = []
    judged = {name: found["detectors"][name]["judged"] for name in study.names}

    def table(key: str, title: str, metric_names: Sequence[str], folded: bool) -> None:
        first = judged[study.names[0]][key]
        rows = [
            [
                part if k == 0 else "",
                name,
                f"{judged[name][key][part]['n']}/{judged[name][key][part]['attempted']}",
                *(
                    _value(judged[name][key][part]["missing_left_out"]["metrics"][metric])
                    for metric in metric_names
                ),
            ]
            for part in first
            for k, name in enumerate(study.names)
        ]
        if rows:
            header = [title, "Detector", "Scored", *(TITLES[metric] for metric in metric_names)]
            parts.append(Table(header, rows, f"By {title.lower()}", folded=folded))

    table("per_group", "Group", ("recall", "fpr", "f1", "auroc"), len(judged) > 3)
    generators = judged[study.names[0]]["per_generator"]
    if set(generators) - set(judged[study.names[0]]["per_source"]):
        table("per_generator", "Generator", ("recall",), True)
    for metric, name, title, caption in (
        ("recall", "ai_sources", "AI sources", "Recall (longer is better)"),
        ("fpr", "real_sources", "Real sources", "FPR (shorter is better)"),
    ):
        data = []
        for source, block in judged[study.names[0]]["per_source"].items():
            for detector in study.names:
                block = judged[detector]["per_source"][source]
                entry = block["missing_left_out"]["metrics"][metric]
                if block["ai" if metric == "recall" else "real"]:
                    low_high = entry["interval"] or (None, None)
                    data.append([detector, source, block["n"], entry["value"], *low_high])
        if not data:
            continue
        means: dict[str, list[float]] = defaultdict(list)
        for _, source, _, value, _, _ in data:
            means[source].append(value)
        sign = 1 if metric == "recall" else -1
        order = sorted(means, key=lambda s: (sign * statistics.fmean(means[s]), s))
        parts.append(
            Chart(
                name,
                title,
                f"{caption}, with 95 % intervals; worst first. In brackets: tracks.",
                functools.partial(_bars, study.names, data, order, TITLES[metric]),
                ["detector", "source", "tracks", metric, "low", "high"],
                data,
                wide=True,
                key=False,
            )
        )
    return Section("Groups and sources", parts)


def _comparisons(found: Mapping[str, Any]) -> Section:
    rows: list[list[Cell | str]] = []
    for pair in found["comparisons"]:
        if not pair["n"]:
            rows.append([pair["a"], pair["b"], "0", *["-"] * 5, pair["reason"]])
            continue
        cells: list[Cell | str] = [pair["a"], pair["b"], str(pair["n"])]
        for metric in ("f1", "auroc", "recall", "fpr"):
            entry = pair["metrics"][metric]
            if entry["difference"] is None:
                cells.append(Cell("-", entry["reason"]))
            else:
                low_high = entry["interval"]
                small = _range(low_high, "+.3f") if low_high else ""
                cells.append(Cell(f"{entry['difference']:+.3f}", small))
        test = pair["mcnemar"]
        cells += [f"{test['only_a_right']} / {test['only_b_right']}", f"{test['p']:.2g}"]
        rows.append(cells)
    header = ["First", "Second", "Common tracks", "F1", "AUROC", "Recall (TPR)", "FPR"]
    header += ["Right alone", "McNemar p"]
    text = (
        "The first less the second, on the tracks that both scored, at their thresholds, with "
        "paired 95 % intervals. Right alone: tracks that only the first / only the second judges "
        "right; McNemar's p is of these (exact, not corrected for the number of pairs)."
    )
    return Section("Detectors against each other", [Table(header, rows)] if rows else [], text)


def _sanity(study: _Study, sanity: Sequence[Row]) -> Section:
    subsets = list(dict.fromkeys((row["subset"], row["label"]) for row in sanity))
    cells = {(row["subset"], row["label"], row["detector"]): row for row in sanity}
    fails = Counter((row["subset"], row["label"]) for row in sanity if not row["passed"])
    rows: list[list[Cell | str]] = []
    for subset, label in sorted(subsets, key=lambda key: (-fails[key], key)):
        own = [cells.get((subset, label, name)) for name in study.names]
        limit = next(row["limit"] for row in own if row)
        line: list[Cell | str] = [subset, _label(label)]
        line.append(f"{'TPR ≥' if label else 'FPR ≤'} {limit:.2f}".replace(" ", "\u00a0"))
        for row in own:
            if row is None:
                line.append("-")
                continue
            state, verdict = ("good", "pass") if row["passed"] else ("bad", "FAIL")
            text, tracks = f"{_number(row['rate'])}\u00a0{verdict}", f"{row['scored']}/{row['n']}"
            line.append(Cell(text, tracks, state))
        rows.append(line)
    totals: list[Cell | str] = []
    for name in study.names:
        verdicts = [bool(row["passed"]) for row in sanity if row["detector"] == name]
        state = "good" if all(verdicts) else "bad"
        totals.append(Cell(f"{sum(verdicts)}/{len(verdicts)} pass", "", state))
    table = Table(
        ["Subset", "Class", "Rule", *study.names], [["All subsets", "", "", *totals], *rows]
    )
    text = (
        "Share of a subset's scored tracks that is called AI, at the detector's threshold, and "
        "whether the subset passes; a subset without scores does not. Most failed first."
    )
    return Section("Sanity", [table] if rows else [], text)


def _stress(study: _Study, stress: Sequence[Row]) -> Section:
    rows: list[dict[str, Any]] = []
    deltas: list[list[Cell | str]] = []
    for own in stress:
        changes = own["changes"]
        if changes:
            first = max(changes, key=lambda row: row["n"])
            plain = {"stress": "as it is", "tpr": first["plain_tpr"], "fpr": first["plain_fpr"]}
            plain |= {"n": first["n"], "moved": 0.0, "flips": 0}
            rows += [{"detector": own["detector"], **row} for row in (plain, *changes)]
        delta = own.get("codec_delta") or {}
        for group, title in (("all", "all"), ("ai", "AI"), ("real", "real")):
            if group in delta:
                figures = [_number(delta[group][k]) for k in ("mean", "median", "p90", "max")]
                passed: Cell | str = ""
                if group == "all":
                    good = delta["passed"]
                    passed = Cell("pass" if good else "FAIL", "", "good" if good else "bad")
                deltas.append([own["detector"], title, str(delta[group]["n"]), *figures, passed])
    for row in rows:
        row["flipped"] = row["flips"] / row["n"] if row["n"] else None
    parts: list[Table | Chart] = []
    if rows:
        columns = ["detector", "stress", "n", "tpr", "fpr", "moved", "flips"]
        columns += ["plain_tpr", "plain_fpr", "mean_ai", "mean_real"]
        parts.append(
            Chart(
                "stress",
                "Rates and shifts by change",
                "Recall, FPR, how far a track's score moves on average, and the share of tracks "
                "that are judged otherwise. The redder, the worse.",
                lambda: _heat(study.names, rows),
                columns,
                [[row.get(column) for column in columns] for row in rows],
                wide=True,
                key=False,
            )
        )
    if deltas:
        header = ["Detector", "Class", "Tracks", "Mean", "Median", "90 %", "Largest", "Passed"]
        note = "Highest less lowest score of a track in WAV, MP3, AAC and Opus (128 kbit/s)."
        parts.append(Table(header, deltas, "Cross-codec delta", note))
    return Section("Stress", parts, "Tracks that were scored both changed and as they are.")


def _mechanism(mechanism: Sequence[Row]) -> Section:
    parts: list[Table | Chart] = []
    for own in mechanism:
        sources, name = own["sources"], own["detector"]
        facts = {k: v for k, v in own.items() if k != "detector" and not isinstance(v, list)}
        stated = "; ".join(f"{_title(key)}: {_plain(value)}" for key, value in facts.items())
        whole = [row for row in sources if str(row["source"]).startswith("all ")]
        rest = [row for row in sources if row not in whole]
        for rows, title, folded in (
            (whole, f"{name}: residual by class", False),
            (rest, f"{name}: residual by source", True),
            (own["ablations"], f"{name}: ablations", False),
        ):
            if rows:
                columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
                cells = [
                    [_label(row[c]) if c == "label" else _plain(row.get(c)) for c in columns]
                    for row in rows
                ]
                note = "" if folded else stated
                parts.append(Table([_title(c) for c in columns], cells, title, note, folded))
    text = "Correlates of a verdict, and no proof: bandwidth, level and mastering confound them."
    return Section("Mechanism", parts, text)


def _label(label: int) -> str:
    return "AI" if label else "real"


def _title(column: str) -> str:
    """A key as a heading: "cutoff_hz" gives "Cutoff, Hz"."""
    for ending, unit in (("_hz", ", Hz"), ("_db", ", dB")):
        if column.endswith(ending):
            column = column.removesuffix(ending) + unit
    return column[:1].upper() + column[1:].replace("_", " ")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _missing(failures: Sequence[Row]) -> Section:
    rows = [
        [row["detector"], str(row["n"]), row["kind"], row["message"], row["example"]]
        for row in failures
    ]
    header = ["Detector", "Tracks", "Kind", "What is said", "First of these tracks"]
    text = "Tracks without a score. Both ways to count them are under Results."
    return Section("Missing tracks", [Table(header, rows)] if rows else [], text)


# --- figures ---------------------------------------------------------------------------------

# Colours of the figures stand for those of the page, which has two schemes.
INK, LINE, BAD = "#1b1c1e", "#c9cbcf", "#c62f2e"
COLOURS = ("#0067b1", "#c4500a", "#00795c", "#a6458d", "#806000", "#5a5fc8")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1)),
    (0, (8, 2, 1, 1, 1, 2)),
)
MARKERS = "os^Dvp"
_POINTS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "p": "⬟"}
_STYLE: Any = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "artifactnet-jax",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.pad": 5,  # points, as for y: the two 0 at the origin are apart
    "ytick.major.pad": 5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
}
_WIDE = 12.2  # inches
_SCALE = 96 / 72  # pixels of the page for a point


def _short_name(text: str, most: int) -> str:
    """A name that fits, on one line: its middle may be left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _line_style(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}


def _lines(
    names: Sequence[str],
    lines: Mapping[str, Sequence[np.ndarray]],
    x: str,
    y: str,
    known: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    limits: Mapping[str, float] | None = None,
    diagonal: bool = False,
) -> Figure:
    figure = _figure(5.9, 4.1)
    axes = figure.add_subplot()
    if diagonal:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, alpha=0.4)
    for k, name in enumerate(names):
        if name not in lines:
            continue
        marker: dict[str, Any] = {"marker": MARKERS[k % 6], "markersize": 3.5} if diagonal else {}
        axes.plot(lines[name][0], lines[name][1], linewidth=1.4, **_line_style(k), **marker)
        if known and limits:
            label, score = known[name]
            called = score >= limits[name]
            point = called[label == 0].mean(), called[label == 1].mean()
            style: dict[str, Any] = {"marker": MARKERS[k % 6], "color": COLOURS[k % len(COLOURS)]}
            axes.plot(*point, **style, markersize=5, clip_on=False, zorder=4)
    axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.01))
    return figure


def _histograms(
    names: Sequence[str],
    shares: Mapping[tuple[str, int], np.ndarray],
    edges: np.ndarray,
    limits: Mapping[str, float],
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = _figure(_WIDE * (columns / 3 if columns < 3 else 1), 2.3 * lines + 0.3)
    for k, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, k + 1)
        for kind, text in ((0, "real"), (1, "AI")):
            colour = COLOURS[kind]
            axes.stairs(shares[name, kind], edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(shares[name, kind], edges, color=colour, linewidth=1.2, label=text)
        axes.axvline(limits[name], color=INK, linestyle=(0, (4, 2)), linewidth=1)
        axes.set(xlim=(0, 1), xlabel="Score")
        axes.set_title(_short_name(name, 44))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, prune="lower"))  # 0 is at the x axis
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    return figure


def _bars(
    names: Sequence[str], data: Sequence[Sequence[Any]], order: Sequence[str], title: str
) -> Figure:
    """A row for each source, a panel for each detector."""
    found = {(detector, source): rest for detector, source, *rest in data}
    tracks = {source: max(row[2] for row in data if row[1] == source) for source in order}
    height = 0.19 * len(order) + 0.75
    figure = _figure(_WIDE if len(names) > 2 else 0.7 * _WIDE, height)
    first: Axes | None = None
    for k, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), k + 1, sharey=first)
        colour = COLOURS[k % len(COLOURS)]
        for y, source in enumerate(order):
            if (name, source) not in found:
                continue
            _, value, low, high = found[name, source]
            axes.barh(y, value, height=0.66, color=colour, alpha=0.45)
            axes.plot([value, value], [y - 0.33, y + 0.33], color=colour, linewidth=1.6)
            if low is not None:
                axes.plot([low, high], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt")
        axes.set(xlim=(0, 1.005), xticks=[0, 0.5, 1], xlabel=title)
        axes.set_xticklabels(["0", "0.5", "1"])
        axes.set_title("\n".join(textwrap.wrap(_short_name(name, 54), max(12, 80 // len(names)))))
        axes.grid(axis="y", visible=False)
        if first is None:
            first = axes
            labels = [f"{_short_name(s, 44)} ({tracks[s]})" for s in order]
            axes.set_yticks(range(len(order)), labels)
            axes.set_ylim(len(order) - 0.4, -0.6)
        else:
            axes.tick_params(labelleft=False)
    return figure


def _scatter(
    names: Sequence[str], points: Sequence[Sequence[Any]], axes_of: Sequence[tuple[int, str]]
) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = _figure(0.5 * _WIDE * len(axes_of), 3.6)
    for place, (column, title) in enumerate(axes_of):
        axes = figure.add_subplot(1, len(axes_of), place + 1)
        known = []
        for k, point in enumerate(points):
            x, f1, low, high = point[column], *point[4:]
            if not x or f1 is None:
                continue
            known.append(x)
            colour = COLOURS[k % len(COLOURS)]
            if low is not None:
                axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
            axes.plot(x, f1, marker=MARKERS[k % 6], color=colour, markersize=7)
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 3, max(known) * 3)
        few = max(known) < 30 * min(known)  # then the decades alone would be too few ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(lambda value, _: _count(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=title, ylabel="F1", ylim=(0, 1.02))
    return figure


def _heat(names: Sequence[str], rows: Sequence[Row]) -> Figure:
    """Panels of cells, a row for each change and a column for each detector."""
    from matplotlib.patches import Rectangle

    found = {(row["stress"], row["detector"]): row for row in rows}
    order = list(dict.fromkeys(row["stress"] for row in rows))
    keys = {"tpr": "Recall (TPR)", "fpr": "FPR", "moved": "Shift of the score"}
    keys |= {"flipped": "Judged otherwise"}
    width = 2.2 + len(keys) * (max(len(names) * 0.38, 1.1) + 0.15)  # inches
    figure = _figure(min(width, _WIDE), 0.21 * len(order) + 2.3)
    for place, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), place + 1)
        for y, stress in enumerate(order):
            for x, name in enumerate(names):
                value = found.get((stress, name), {}).get(key)
                if value is None:
                    axes.text(x + 0.5, y + 0.5, "-", ha="center", va="center", fontsize=7)
                    continue
                bad = 1 - value if key == "tpr" else value
                cell = Rectangle((x, y), 1, 1, facecolor=BAD, alpha=0.75 * bad, linewidth=0)
                axes.add_patch(cell)
                text = f"{value:.2f}"
                axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=7)
        axes.set(xlim=(0, len(names)), ylim=(len(order), 0))
        axes.set_xticks(np.arange(len(names)) + 0.5)
        axes.set_xticklabels([_short_name(name, 26) for name in names], rotation=90)
        axes.xaxis.tick_top()
        axes.set_yticks(np.arange(len(order)) + 0.5)
        axes.set_yticklabels([_short_name(s, 34) for s in order] if place == 0 else [])
        axes.set_xlabel(keys[key])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _svg(chart: Chart) -> str:
    """The chart as an element of the page: its colours are the page's, its ids its own."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # The page's fonts draw what the font that texts are measured with lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure = chart.draw()
        figure.savefig(buffer, format="svg", metadata=none, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{chart.name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{chart.name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = (72 * side for side in figure.get_size_inches())  # points
    size = f'width="{_SCALE * width:.0f}" height="{_SCALE * height:.0f}"'
    label = f'role="img" aria-label="{_text(chart.title)}"'
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return re.sub("<svg[^>]*>", f"<svg {size} {box} {label}>", text, count=1)


_VARIABLES = {INK: "ink", LINE: "line", BAD: "bad"}
_VARIABLES |= {colour: f"c{k}" for k, colour in enumerate(COLOURS)}


# --- the page --------------------------------------------------------------------------------

_STYLES = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1c1e; --soft: #5b5f66; --line: #d5d7db;
  --band: #f5f6f8; --bad: #c62f2e; --good: #1d7a45; --note: #fff5db;
  --c0: #0067b1; --c1: #c4500a; --c2: #00795c; --c3: #a6458d; --c4: #806000; --c5: #5a5fc8;
  --font: system-ui, "Liberation Sans", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e8e9eb; --soft: #a3a8b0;
  --line: #3a3e45; --band: #1f2226; --bad: #f0736c; --good: #5cc98a; --note: #3a3115;
  --c0: #5fb2f2; --c1: #f59457; --c2: #3fc7a0; --c3: #e294cb; --c4: #d8b63c; --c5: #a4a8f5; } }
body { margin: 0 auto; padding: 24px 32px 64px; max-width: 1216px; background: var(--paper);
  color: var(--ink); font: 15px/1.45 var(--font); }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 6px; }
h3 { font-size: 15px; margin: 22px 0 6px; } p { margin: 4px 0 10px; max-width: 90ch; }
nav a { margin-right: 14px; } a { color: var(--c0); }
.soft, small, figcaption { color: var(--soft); }
.notice { background: var(--note); border-left: 4px solid var(--c4); padding: 10px 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; vertical-align: top; }
th { border-bottom: 1px solid var(--line); font-weight: 600; vertical-align: bottom; }
td.text, th.text { text-align: left; } td.text { max-width: 30em; }
td.text:first-child { min-width: 9em; max-width: 22em; }
tbody tr:nth-child(even) { background: var(--band); }
td small { display: block; font-size: 11px; font-weight: 400; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.charts { display: flex; flex-wrap: wrap; gap: 12px 24px; }
figure { margin: 12px 0; flex: 1 1 560px; min-width: 0; } figure.wide { flex-basis: 100%; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 13px; max-width: 90ch; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin: 6px 0; }
.key svg { display: inline-block; vertical-align: middle; margin-right: 6px; }
summary { cursor: pointer; font-weight: 600; margin: 14px 0; }
pre { font-size: 12.5px; overflow-x: auto; }
"""


def _text(value: str) -> str:
    """Text as HTML has it; surrogates are escaped, control characters spaces."""
    value = value.encode("utf-8", "backslashreplace").decode()
    return html.escape("".join(c if c.isprintable() or c == "\u00a0" else " " for c in value))


def _breakable(value: str) -> str:
    """The same, with places where a word above 16 characters may be broken."""
    words = []
    for word in value.split(" "):
        parts = re.findall(r"[A-Z]*[^A-Z:/_.-]{0,16}[:/_.-]*", word) if len(word) > 16 else [word]
        words.append("<wbr>".join(_text(part) for part in parts if part))
    return " ".join(words)


def _html(study: _Study, sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{_slug(s.title)}">{_text(s.title)}</a>' for s in sections)
    notice = f'<p class="notice">{_text(study.notice())}</p>' if study.notice() else ""
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Benchmark report</title>\n<style>{_STYLES}</style>\n</head>\n<body>",
        f"<h1>Benchmark report</h1>\n<p>{_text(_about(study))}</p>{notice}",
        f"<nav>{links}</nav>",
    ]
    for section in sections:
        lines.append(f'<section>\n<h2 id="{_slug(section.title)}">{_text(section.title)}</h2>')
        if section.text:
            lines.append(f"<p>{_text(section.text)}</p>")
        for charts, parts in itertools.groupby(section.parts, lambda p: isinstance(p, Chart)):
            if charts:
                figures = "".join(_html_chart(p, study) for p in parts if isinstance(p, Chart))
                lines.append(f'<div class="charts">{figures}</div>')
            else:
                lines += [_html_table(part) for part in parts if isinstance(part, Table)]
        lines.append("</section>")
    lines.append("<details><summary>How the figures are defined</summary>")
    lines.append(f"<pre>{html.escape(_definitions())}</pre></details>\n</body>\n</html>\n")
    return "\n".join(lines)


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _definitions() -> str:
    return (evaluation.__doc__ or "").strip()


def _about(study: _Study) -> str:
    rows = study.judged[study.names[0]]
    ai = sum(row["label"] for row in rows)
    text = f"{len(rows)} tracks, {ai} AI and {len(rows) - ai} real"
    text += f", of {len({row.get('source') for row in rows})} sources"
    text += f". {len(study.names)} detector{'s' if len(study.names) > 1 else ''}"
    if study.rule is None:
        return f"{text}, threshold {_limit(study.thresholds[study.names[0]][0])}, fixed."
    return f"{text}, thresholds chosen on the calibration split ({study.rule})."


def _html_table(table: Table) -> str:
    textual = [
        k == 0 or not any(re.match(r"[-+.\d]", _of(row[k]).text) for row in table.rows)
        for k in range(len(table.header))
    ]
    kinds = [' class="text"' if text else "" for text in textual]
    head = "".join(
        f"<th{kind}>{_breakable(name)}</th>" for kind, name in zip(kinds, table.header, strict=True)
    )
    body = []
    for row in table.rows:
        cells = []
        for text, value in zip(textual, row, strict=True):
            cell = _of(value)
            names = " ".join(filter(None, ("text" if text else "", cell.state)))
            small = f"<small>{_text(cell.small)}</small>" if cell.small else ""
            kind = f' class="{names}"' if names else ""
            words = _breakable(cell.text) if text else _text(cell.text)
            cells.append(f"<td{kind}>{words}{small}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="soft">{_text(table.note)}</p>' if table.note else ""
    grid = (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{_text(table.title)}</summary>{note}{grid}</details>"
    return (f"<h3>{_text(table.title)}</h3>" if table.title else "") + note + grid


def _of(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def _html_chart(chart: Chart, study: _Study) -> str:
    key = ""
    if chart.key:
        key = "".join(f"<span>{_swatch(k)}{_text(n)}</span>" for k, n in enumerate(study.names))
        key = f'<div class="key">{key}</div>'
    wide = ' class="wide"' if chart.wide else ""
    caption = f"{_text(chart.caption)} Data: {chart.file}"
    return (
        f"<figure{wide}><h3>{_text(chart.title)}</h3>{key}{_svg(chart)}"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _swatch(k: int) -> str:
    """A piece of a detector's line with its marker."""
    dash = DASHES[k % len(DASHES)]
    dashes = "" if dash == "solid" else " ".join(f"{2 * part:g}" for part in dash[1])
    colour = f"var(--c{k % len(COLOURS)})"
    return (
        '<svg width="44" height="14" aria-hidden="true">'
        f'<line x1="0" y1="7" x2="44" y2="7" style="stroke: {colour}; stroke-width: 2; '
        f'stroke-dasharray: {dashes or "none"}"/><text x="22" y="11" text-anchor="middle" '
        f'style="fill: {colour}; font-size: 12px">{_POINTS[MARKERS[k % 6]]}</text></svg>'
    )


def _markdown(study: _Study, sections: Sequence[Section]) -> str:
    lines = ["# Benchmark report", "", _about(study), ""]
    if study.notice():
        lines += [f"> {study.notice()}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [_mark(section.text), ""]
        for part in section.parts:
            if isinstance(part, Chart):
                lines += [f"{part.title}: [{part.file}]({part.file})", ""]
                continue
            lines += [f"### {part.title}", ""] if part.title else []
            lines += [_mark(part.note), ""] if part.note else []
            lines += [_pipes(part.header), "|---" + "|--:" * (len(part.header) - 1) + "|"]
            lines += [_pipes([_words(cell) for cell in row]) for row in part.rows]
            lines.append("")
    lines += ["## How the figures are defined", "", "```text", _definitions(), "```", ""]
    return "\n".join(lines)


def _words(value: Cell | str) -> str:
    cell = _of(value)
    return f"{cell.text} ({cell.small})" if cell.small else cell.text


def _mark(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = _text(text).replace("&quot;", '"').replace("&#x27;", "'")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_mark(cell) for cell in cells)} |"


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8", "backslashreplace")
