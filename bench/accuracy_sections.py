"""Sections of a benchmark's report: tables and charts of what was found."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from artifactnet_jax import evaluation
from artifactnet_jax.bench import accuracy_figures as drawing
from artifactnet_jax.bench.accuracy_parts import Cell, Chart, Section, Table
from artifactnet_jax.bench.accuracy_study import Row, Study
from artifactnet_jax.evaluation import BINS, bins_of

WORST = 15  # sources of the table of failures


def sections_of(study: Study, found: Mapping[str, Any]) -> list[Section]:
    """Sections of the report that have anything to show; found: as of `Study.found`."""
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


def limit_text(value: float) -> str:
    """A threshold, without zeros at its end."""
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


def _results(study: Study, found: Mapping[str, Any]) -> Section:
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
        limit = Cell(limit_text(entry["threshold"]))
        confusions = [
            str(block[way]["confusion"][key])
            for way in ("missing_left_out", "missing_as_wrong")
            for key in ("tp", "fp", "fn", "tn")
        ]
        share = Cell("-" if entry["decided"] is None else f"{entry['decided']:.1%}")
        counts.append([name, limit, *confusions, share, entry["threshold_origin"]])
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
            ["Detector", "Threshold", *confusion, *lost_too, "Decided", "Origin of the threshold"],
            counts,
            "Thresholds and counts",
            "A track is called AI where its score is at or above the threshold. Decided is the "
            "share that the detector itself calls neither unclear nor undecided.",
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


def _failing(study: Study, found: Mapping[str, Any]) -> Section:
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


def _points(label: np.ndarray, score: np.ndarray) -> dict[str, Sequence[np.ndarray]]:
    """Lines of one detector by the name of their chart, of tracks of both classes."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    precision, recall, limits = precision_recall_curve(label, score)
    grid = np.linspace(0, 1, 201)
    called = score[:, None] >= grid
    f1 = 2 * called[label == 1].sum(axis=0) / (called.sum(axis=0) + label.sum())
    index = bins_of(score)
    count = np.bincount(index, minlength=BINS)
    filled = count > 0
    mean, share = (np.bincount(index, x, BINS)[filled] / count[filled] for x in (score, label))
    return {
        "roc": roc_curve(label, score),
        "precision_recall": (recall[:-1], precision[:-1], limits),  # the last one is a convention
        "f1_threshold": (grid, f1),
        "calibration": (mean, share, count[filled]),
    }


# Charts of lines: name, title, caption, x, y, columns of the data behind "detector".
_LINES = (
    (
        "roc",
        "ROC",
        "The upper left is better. A dot is the detector's threshold.",
        *("FPR", "Recall (TPR)", ("fpr", "tpr", "threshold")),
    ),
    (
        "precision_recall",
        "Precision and recall",
        "The upper right is better. Precision depends on the share of AI tracks.",
        *("Recall (TPR)", "Precision", ("recall", "precision", "threshold")),
    ),
    (
        "f1_threshold",
        "F1 by threshold",
        "A flat top means that the threshold hardly matters.",
        *("Threshold", "F1", ("threshold", "f1")),
    ),
    (
        "calibration",
        "Calibration",
        f"Share of AI among tracks of {BINS} bins of the score; on the grey line a score "
        "is a probability, for the share of AI tracks in these data.",
        *("Mean score", "Share of AI", ("mean_score", "share_of_ai", "tracks")),
    ),
)


def _curves(study: Study) -> Section:
    known = {name: _arrays(study.judged[name]) for name in study.names}
    both = {name: pair for name, pair in known.items() if 0 < pair[0].sum() < len(pair[0])}
    scored = {name: pair for name, pair in known.items() if len(pair[0])}
    limits = {name: value for name, (value, _) in study.thresholds.items()}
    points = {name: _points(*pair) for name, pair in both.items()}
    parts: list[Table | Chart] = []
    for key, title, caption, x, y, columns in _LINES if both else ():
        lines = {name: own[key] for name, own in points.items()}
        more: dict[str, Any] = {"diagonal": key == "calibration"}
        more |= {"known": known, "limits": limits} if key == "roc" else {}
        draw = functools.partial(drawing.lines, study.names, lines, x, y, **more)
        data = [(n, *point) for n, own in lines.items() for point in zip(*own, strict=True)]
        parts.append(Chart(key, title, caption, draw, ["detector", *columns], data))
    if scored:
        parts.append(_scores(scored, limits))
    text = "" if both else "Only one class has scores: curves need both."
    return Section("Curves", parts, text)


def _scores(
    scored: Mapping[str, tuple[np.ndarray, np.ndarray]], limits: Mapping[str, float]
) -> Chart:
    edges = np.linspace(0, 1, 26)
    shares = {
        (name, kind): np.histogram(score[label == kind], edges)[0] / max(1, (label == kind).sum())
        for name, (label, score) in scored.items()
        for kind in (1, 0)
    }
    return Chart(
        "score_distributions",
        "Scores",
        "Share of the class's tracks in each of 25 bins; the dashed line is the threshold.",
        lambda: drawing.histograms(list(scored), shares, edges, limits),
        ["detector", "class", "from", "to", "share"],
        [
            (name, ("real", "ai")[kind], low, high, share)
            for (name, kind), values in shares.items()
            for low, high, share in zip(edges[:-1], edges[1:], values, strict=True)
        ],
        wide=True,
        key=False,
    )


def _cost(study: Study, found: Mapping[str, Any]) -> Section:
    points = []
    for name in study.names:
        entry = found["detectors"][name]
        f1 = entry["judged"]["overall"]["missing_left_out"]["metrics"]["f1"]
        row = [name, entry["params"], entry["gflops"], entry["seconds_per_track"]]
        points.append([*row, f1["value"], *(f1["interval"] or (None, None))])
    rows: list[list[Cell | str]] = []
    for name, params, gflops, seconds, f1, low, high in points:
        interval = "" if low is None else _range((low, high))
        costs = [drawing.count(params), _short(gflops), _short(seconds)]
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
                lambda: drawing.scatter(study.names, points, axes),
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


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _sources(study: Study, found: Mapping[str, Any]) -> Section:
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
                functools.partial(drawing.bars, study.names, data, order, TITLES[metric]),
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


def _sanity(study: Study, sanity: Sequence[Row]) -> Section:
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


def _stress(study: Study, stress: Sequence[Row]) -> Section:
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
                lambda: drawing.heat(study.names, rows),
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
