"""Fit the decision of the default weights to what was said of tracks by fits without their groups.

    python scripts/fusion.py SEGMENTS.jsonl FINE.npz DECODERS.npz LONG --weights W

SEGMENTS is what `artifactnet-jax texture --left-out` wrote, FINE what `fine_head.py --left-out`
did, DECODERS what `fingerprint_bank.py left-out` did, LONG the folder of `long_tracks.py`. So no
witness of a track was fitted to its group, and none of the shares that are fitted here is judged
on the tracks that it was fitted to: groups are left out a second time, six parts in turn. The
thresholds come from these scores. The decision goes into W, the figures to fusion-report.json.

A track is there up to three times, in different lengths: all of it (at most 60 s), 20 s, 5 s.
Within a label a source weighs the root of its tracks, and a kind of music the root of its sources.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from fine_head import figures
from fingerprint_bank import folds, shares
from scipy.optimize import minimize

from artifactnet_jax import decision, dsp_numpy, fine_head, texture
from artifactnet_jax.config import Fusion, Texture
from artifactnet_jax.decoders import FOUND, OWN, Match, Outcome
from artifactnet_jax.evaluation import operating_points
from artifactnet_jax.fingerprint import Accumulator, Mean
from artifactnet_jax.train.texture import Calibration
from artifactnet_jax.weights import load_weights, save_weights

REPORT = Path(__file__).parent / "fusion-report.json"
VIEWS = {"whole": (0, None), "20 s": (1, 4), "5 s": (2, 3)}  # segments of a track of five
FOLDS = 6
PULL = 0.02  # towards the weights of all lengths together
DRIFT = 1.5  # log-odds of a segment, of the scan
ALARMS = 0.005  # share of real tracks with a stretch that the scan aims at
SPLICES = 100
PROMISES = {"fpr1": 0.01, "fpr2": 0.02, "fpr5": 0.05}
LOWER = 0.2  # share of the AI tracks below the lower threshold, sources counted alike
FEW = 8  # tracks; kinds of real music with fewer are one
# Above the default threshold: share of real tracks, kinds counted alike, and of the worst kind.
UPPER = {"whole": (0.01, 0.05), "20 s": (0.01, 0.05), "5 s": (0.02, 0.05)}


@dataclasses.dataclass(eq=False)
class Entry:
    """A track, or a part of it, and what the witnesses said."""

    row: dict[str, Any]
    view: str
    heard: decision.Heard
    has_fine: bool


def read(segments: Path, fine: Path, decoders: Path) -> list[Entry]:
    """Everything that was said, joined by the files' names."""
    with np.load(fine) as file:
        logits = {
            (name, view): logit
            for name, view, logit in zip(file["name"], file["view"], file["logit"], strict=True)
            if np.isfinite(logit)
        }
    with np.load(decoders) as file:
        nearest = {
            (name, view): (p, own)
            for name, view, p, own in zip(
                *(file[k] for k in ("name", "view", "p", "own")), strict=True
            )
        }
    found = []
    for line in segments.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name, values = Path(row["path"]).stem, row.pop("logits")
        for view, (first, end) in VIEWS.items():
            if view != "whole" and (len(values) < 5 or (name, view) not in logits):
                continue
            outcome = None
            if (name, view) in nearest:
                p, own = nearest[name, view]
                match = Match("", 0.0, float(p), 1.0, (0.0, 0.0), ())
                outcome = Outcome(match if p < FOUND and own < OWN else None, None, match)
            seconds = {"20 s": 20.0, "5 s": 5.0}.get(view) or row["seconds"]
            logit = logits.get((name, view))
            heard = decision.Heard(
                float(np.median(values[first:end])),
                None if logit is None else float(logit),
                outcome,
                seconds,
            )
            found.append(Entry(row, view, heard, logit is not None))
    return found


def weights_of(entries: list[Entry]) -> np.ndarray:
    """Weight of each entry: in each view both labels sum to 1; see the module."""
    out = np.zeros(len(entries))
    for view in VIEWS:
        for label in (0, 1):
            own = [n for n, e in enumerate(entries) if e.view == view and e.row["label"] == label]
            sources = collections.Counter(entries[n].row["source"] for n in own)
            weight = np.array([sources[entries[n].row["source"]] ** -0.5 for n in own])
            kinds = np.array([entries[n].row["kind"] for n in own])
            for kind in set(kinds):
                weight[kinds == kind] /= math.sqrt(weight[kinds == kind].sum())
            out[own] = weight / weight.sum()
    return out


def said(entries: list[Entry], fusion: Fusion) -> np.ndarray:
    """What `decision.judge` multiplies by its weights: [n, 3]."""
    clip = fusion.limit
    rows = [
        (
            min(max(e.heard.segments or 0.0, -clip), clip),
            min(max(e.heard.fine or 0.0, -clip), clip),
            decision.lines(e.heard.decoder, fusion),
        )
        for e in entries
    ]
    return np.array(rows)


def regress(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, near: np.ndarray | None = None
) -> np.ndarray:
    """Bias and weights from 0 up of a logistic regression, pulled `near` what is given."""
    for label in (0, 1):
        weight = np.where(y == label, weight / weight[y == label].sum() / 2, weight)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        z = values[0] + x @ values[1:]
        slope = weight * (1 / (1 + np.exp(-z)) - y)
        total = weight @ (np.logaddexp(0, z) - y * z)
        away = values - near if near is not None else values * np.array([0, 1, 1, 1])
        pull = PULL if near is not None else 1e-4
        slopes = np.concatenate([[slope.sum()], slope @ x]) + pull * away
        return float(total + pull * away @ away / 2), slopes

    start = near if near is not None else np.array([0, 0.5, 0.5, 0.5])
    bounds = [(None, None), (0, None), (0, None), (0, None)]
    return np.asarray(minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B").x)


def fit(entries: list[Entry], fusion: Fusion) -> Fusion:
    """The fusion whose weights are fitted to what was said."""
    x, y = said(entries, fusion), np.array([e.row["label"] for e in entries])
    weight = weights_of(entries)
    place = np.array([fusion.row(e.heard.length_s, e.has_fine) for e in entries])
    classes = len(fusion.lengths_s)
    together = regress(x[place < classes], y[place < classes], weight[place < classes])
    rows = [
        regress(x[place == k], y[place == k], weight[place == k], together) for k in range(classes)
    ]
    # Where the fine spectrum says nothing, and for streams: the segments by themselves.
    rows.append(regress(x * np.array([1, 0, 1]), y, weight))
    names = ("bias", "segments", "fine", "decoder")
    values = {
        name: tuple(round(float(v), 4) for v in column)
        for name, column in zip(names, np.transpose(rows), strict=True)
    }
    return dataclasses.replace(fusion, **values)


def scores(entries: list[Entry], fusion: Fusion) -> np.ndarray:
    """P(AI) of each entry."""
    return np.array([decision.judge(e.heard, fusion).score for e in entries])


def left_out(entries: list[Entry], fusion: Fusion) -> np.ndarray:
    """P(AI) of each entry by a fusion that was not fitted to its group."""
    fold = folds([e.row["group"] for e in entries], FOLDS)
    out = np.zeros(len(entries))
    for k in range(FOLDS):
        known = [
            e for e, f in zip(entries, fold, strict=True) if f != k and e.row["split"] != "test"
        ]
        own = np.flatnonzero(fold == k)
        out[own] = scores([entries[n] for n in own], fit(known, fusion))
    return out


@dataclasses.dataclass(eq=False)
class Long:
    """A whole track, segment by segment, as witnesses say that were not fitted to its group."""

    name: str
    group: str
    label: int
    logits: np.ndarray  # [n]: log-odds of consecutive segments
    fine: np.ndarray  # [n]: logit of the fine spectrum around each; nan for none

    def values(self, fusion: Fusion) -> np.ndarray:
        """Evidence of each segment."""
        fine = [None if math.isnan(x) else float(x) for x in self.fine]
        return np.array(decision.evidence(self.logits.tolist(), fine, fusion))


def read_long(folder: Path, segments: Path, fine: Path, calibration: Calibration) -> list[Long]:
    """Whole tracks that `long_tracks.py` measured, judged by fits without their groups."""
    rows = [json.loads(line) for line in segments.read_text(encoding="utf-8").splitlines()]
    fold_of = {row["group"]: row["fold"] for row in rows}
    with np.load(f"{segments}.npz") as file:
        heads = [
            {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{k}/")}
            for k in range(1 + max(fold_of.values()))
        ]
    with np.load(fine) as file:
        fine_fold = dict(zip(file["group"].tolist(), file["fold"].tolist(), strict=True))
        fine_heads = [fine_head.from_text(str(text)) for text in file["heads"]]
    found = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            group, start = str(file["group"]), file["T"]
            if group not in fold_of or group not in fine_fold or len(start) < 5:
                continue
            own = texture.logit(
                file["S"].astype(np.float32), Texture(), heads[fold_of[group]], dsp_numpy
            )
            logits = calibration.logits(own.astype(np.float64), file["N"])
            spectrum = Accumulator()
            spectrum.window_frames = int(file["wf"])
            parts = zip(file["n"].tolist(), file["log"], file["pw"], strict=True)
            spectrum.windows = [Mean(*part) for part in parts]
            near = fine_head.stretches(spectrum, fine_heads[fine_fold[group]])
            around = [next((x for a, b, x in near if a <= at + 2 < b), None) for at in start]
            values = np.array([math.nan if x is None else x for x in around])
            label = int(str(file["label"]) != "real")
            found.append(Long(path.stem, group, label, logits, values))
    return found


def fit_scan(tracks: list[Long], fusion: Fusion) -> Fusion:
    """The weights of the scan: of a segment's two witnesses, and the sum that a stretch needs.

    The weights are those of a logistic regression of segments on their track's label, each track
    counting alike. Sums of real tracks have an exponential tail; the least sum is where it comes
    to ALARMS of the tracks.
    """
    has = [np.isfinite(t.fine) for t in tracks]
    x = np.concatenate(
        [
            np.stack(
                [
                    np.clip(t.logits, -fusion.limit, fusion.limit)[h],
                    t.fine[h].clip(-fusion.limit, fusion.limit),
                    np.zeros(h.sum()),
                ],
                axis=1,
            )
            for t, h in zip(tracks, has, strict=True)
        ]
    )
    y = np.concatenate([np.full(h.sum(), t.label) for t, h in zip(tracks, has, strict=True)])
    groups = collections.Counter(t.group for t in tracks)
    weight = np.concatenate(
        [
            np.full(h.sum(), groups[t.group] ** -0.5 / max(h.sum(), 1))
            for t, h in zip(tracks, has, strict=True)
        ]
    )
    bias, segments, fine, _ = (round(value, 4) for value in regress(x, y, weight).tolist())
    fusion = dataclasses.replace(
        fusion, span_bias=bias, span_segments=segments, span_fine=fine, span_drift=DRIFT
    )
    sums = [decision._best((t.values(fusion) - DRIFT).tolist())[0] for t in tracks if not t.label]
    above = [value for value in sums if value > 0]
    least = np.mean(above) * math.log(len(above) / len(sums) / ALARMS)
    return dataclasses.replace(fusion, span_least=round(float(max(least, 1.0)), 2))


def spliced(tracks: list[Long], fusion: Fusion, seed: int) -> dict[str, Any]:
    """What the scan finds of AI stretches of 32 to 60 s, put into real tracks.

    The scores of segments are put together, not the sound.
    """
    rng = np.random.default_rng(seed)
    real = [t for t in tracks if not t.label and len(t.logits) >= 16]
    ai = [t for t in tracks if t.label and len(t.logits) >= 15]
    found, edges = [], []
    for _ in range(SPLICES):
        r, a = real[rng.integers(len(real))], ai[rng.integers(len(ai))]
        size, at = int(rng.integers(8, 16)), int(rng.integers(0, len(r.logits) + 1))
        first = int(rng.integers(0, len(a.logits) - size + 1))
        own = r.values(fusion)
        both = np.concatenate([own[:at], a.values(fusion)[first : first + size], own[at:]])
        spans = decision.stretches(both.tolist(), fusion)
        meets = [s for s in spans if s[0] < at + size and s[1] > at]
        found.append(bool(meets))
        if meets:
            edges += [4.0 * abs(meets[0][0] - at), 4.0 * abs(meets[-1][1] - at - size)]
    return {
        "tracks": SPLICES,
        "found": round(float(np.mean(found)), 4),
        "edges_within_6_s": float(np.mean(np.array(edges) <= 6)) if edges else math.nan,
    }


def scanned(tracks: list[Long], fusion: Fusion) -> dict[str, Any]:
    """The scan by groups left out: false alarms of real tracks, found stretches, AI tracks."""
    fold = folds([t.group for t in tracks], FOLDS).tolist()
    alarmed, cut, of_splices = [], [], []
    for k in range(FOLDS):
        one = fit_scan([t for t, part in zip(tracks, fold, strict=True) if part != k], fusion)
        held = [t for t, part in zip(tracks, fold, strict=True) if part == k]
        for t in held:
            values = t.values(one)
            if t.label:
                cut.append(bool(decision.stretches((-values).tolist(), one)))
            else:
                alarmed.append(bool(decision.stretches(values.tolist(), one)))
        of_splices.append(spliced(held, one, k))
    return {
        "real": len(alarmed),
        "real_with_a_stretch": int(sum(alarmed)),
        "ai": len(cut),
        "ai_with_a_real_stretch": int(sum(cut)),
        "splices": {
            name: round(float(np.nanmean([s[name] for s in of_splices])), 4)
            for name in ("found", "edges_within_6_s")
        },
    }


def kinds_of(entries: list[Entry]) -> np.ndarray:
    """Kind of each entry's real music; those with few tracks are one kind. "" of AI."""
    count = collections.Counter(
        e.row["kind"] for e in entries if e.view == "whole" and not e.row["label"]
    )
    names = [e.row["kind"] if count[e.row["kind"]] >= FEW else "others" for e in entries]
    return np.array(["" if e.row["label"] else n for e, n in zip(entries, names, strict=True)])


def alarms(score: np.ndarray, kind: np.ndarray, threshold: float) -> dict[str, float]:
    """Share of each kind of real music at or above the threshold."""
    return {
        str(name): float(np.mean(score[kind == name] >= threshold))
        for name in np.unique(kind)
        if name
    }


def threshold_for(score: np.ndarray, kind: np.ndarray, mean: float, worst: float = 1.0) -> float:
    """The least threshold with so many false alarms, kinds counted alike, and in the worst kind."""
    for value in np.append(np.unique(score[kind != ""]), 1.0):
        found = alarms(score, kind, math.nextafter(float(value), 2))
        if np.mean(list(found.values())) <= mean and max(found.values()) <= worst:
            return min(1.0, round(math.ceil(float(value) * 1e4) / 1e4 + 1e-4, 4))
    raise AssertionError("the threshold 1 calls no real track AI")


def points(entries: list[Entry], score: np.ndarray) -> dict[str, Any]:
    """Thresholds: of the operating points, the default one, and the lower one."""
    kind, view = kinds_of(entries), np.array([e.view for e in entries])
    label = np.array([e.row["label"] for e in entries])
    whole = view == "whole"
    named = {
        name: threshold_for(score[whole], kind[whole], rate) for name, rate in PROMISES.items()
    }
    upper = max(
        threshold_for(score[view == name], kind[view == name], mean, worst)
        for name, (mean, worst) in UPPER.items()
    )
    ai = np.flatnonzero(whole & (label == 1))
    source = np.array([entries[n].row["source"] for n in ai])
    weight = np.array([1 / (source == name).sum() for name in source])
    order = np.argsort(score[ai])
    below = np.cumsum(weight[order]) / weight.sum()
    lower = float(score[ai][order][np.searchsorted(below, LOWER)])
    weight = weights_of(entries)[whole]
    named["balanced"] = round(operating_points(label[whole], score[whole], weight)["balanced"], 4)
    return {
        "threshold": upper,
        "lower": min(upper, math.floor(lower * 1e4) / 1e4),
        "operating_points": named,
    }


def sets(entries: list[Entry]) -> np.ndarray:
    """What each entry is judged with."""
    names = []
    for e in entries:
        page = e.row["group"].startswith(("demo-", "clip-"))
        field = "demo pages" if page and e.row["kind"] != "service" else "field"
        recon = "reconstructions" if e.row["kind"] == "codec-recon" else field
        names.append(recon if e.row["label"] else "real")
    return np.array(names)


def without(entries: list[Entry], *witnesses: str) -> list[Entry]:
    """The entries, some witnesses silent."""
    silent: dict[str, Any] = {"segments": 0.0, "fine": None, "decoder": None}
    changes = {name: silent[name] for name in witnesses}
    return [dataclasses.replace(e, heard=dataclasses.replace(e.heard, **changes)) for e in entries]


def table(entries: list[Entry], score: np.ndarray, threshold: float) -> dict[str, Any]:
    """Figures by length and set, of scores by fits without the groups."""
    of, view = sets(entries), np.array([e.view for e in entries])
    group = np.array([e.row["group"] for e in entries])
    clip = np.array([e.row["group"].startswith("clip-") for e in entries])
    out: dict[str, Any] = {}
    here = {
        "whole files": (view == "whole") & ~clip,
        "20 s": view == "20 s",
        "5 s, and clips": (view == "5 s") | clip,
    }
    for name, mask in here.items():
        real = mask & (of == "real")
        out[name] = {}
        for part in ("all", "field", "demo pages", "reconstructions"):
            ai = mask & (of != "real" if part == "all" else of == part)
            if ai.sum() < 10:
                continue
            logit = decision.log_odds(score)
            out[name][part] = figures(logit[ai], logit[real], group[ai], group[real]) | {
                "found": round(float(np.mean(score[ai] >= threshold)), 4),
                "false_alarms": round(float(np.mean(score[real] >= threshold)), 4),
            }
    return out


def thresholds_of_others(entries: list[Entry], score: np.ndarray) -> dict[str, Any]:
    """What is called AI, and what is below the lower threshold, at thresholds of other groups."""
    fold, of = folds([e.row["group"] for e in entries], FOLDS), sets(entries)
    called, below = np.zeros(len(entries), bool), np.zeros(len(entries), bool)
    for k in range(FOLDS):
        others, own = np.flatnonzero(fold != k), fold == k
        chosen = points([entries[n] for n in others], score[others])
        called[own] = score[own] >= chosen["threshold"]
        below[own] = score[own] < chosen["lower"]
    view = np.array([e.view for e in entries])
    return {
        length: {
            str(name): {
                "called_ai": shares(called[(view == length) & (of == name)]),
                "below": shares(below[(view == length) & (of == name)]),
            }
            for name in np.unique(of[view == length])
        }
        for length in VIEWS
    }


def by_kind(entries: list[Entry], score: np.ndarray, chosen: dict[str, Any]) -> dict[str, Any]:
    """False alarms by kind of real music, found by kind of AI, with intervals: whole, 20 s, 5 s."""
    kind = np.array([e.row["kind"] for e in entries])
    view = np.array([e.view for e in entries])
    label = np.array([e.row["label"] for e in entries])
    low, high = chosen["lower"], chosen["threshold"]
    out: dict[str, Any] = {}
    for value, name in ((0, "real"), (1, "ai")):
        out[name] = {}
        for one in sorted(set(kind[label == value])):
            here = (label == value) & (kind == one)
            cells = {}
            for length in VIEWS:
                own = score[here & (view == length)]
                if len(own):
                    cells[length] = shares(own >= high) | {
                        "unclear": round(float(np.mean((own >= low) & (own < high))), 4)
                    }
            out[name][one] = cells
    return out


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("segments", "fine", "decoders", "long"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    args = parser.parse_args()
    entries = read(args.segments, args.fine, args.decoders)
    model = load_weights(args.weights)
    history = model.provenance["history"][-1]
    tracks = read_long(args.long, args.segments, args.fine, Calibration(**history["calibration"]))
    known = [e for e in entries if e.row["split"] != "test"]
    fusion = fit_scan(tracks, fit(known, Fusion()))
    score = left_out(entries, Fusion())
    chosen = points(entries, score)
    parts = {
        "all": entries,
        "without the decoders": without(entries, "decoder"),
        "without the fine spectrum": without(entries, "fine"),
        "segments alone": without(entries, "fine", "decoder"),
    }
    report = {
        "entries": dict(collections.Counter(e.view for e in entries)),
        "groups": len({e.row["group"] for e in entries}),
        **chosen,
        "figures": {
            name: table(some, left_out(some, Fusion()), chosen["threshold"])
            for name, some in parts.items()
        },
        "by_kind": by_kind(entries, score, chosen),
        "thresholds_of_others": thresholds_of_others(entries, score),
        "scan": scanned(tracks, Fusion()),
    }
    verdict = dataclasses.replace(
        model.config.verdict,
        threshold=chosen["threshold"],
        lower=chosen["lower"],
        operating_points=tuple(chosen["operating_points"].items()),
    )
    config = dataclasses.replace(model.config, verdict=verdict, fusion=fusion)
    entry = {"phase": "fusion", **report["entries"], "groups": report["groups"], **chosen}
    provenance = {**model.provenance, "history": [*model.provenance["history"], entry]}
    save_weights(
        *(args.weights, config, model.tensors),
        name=model.name,
        licence=model.licence,
        provenance=provenance,
        dtype=np.float16,
        fine=model.fine,
    )
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
