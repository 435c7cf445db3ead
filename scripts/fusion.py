"""Fit the decision of the default weights to what was said of tracks by fits without their groups.

    python scripts/fusion.py SEGMENTS.jsonl FINE.npz DECODERS.npz LONG --weights W

SEGMENTS is what `artifactnet-jax texture --left-out` wrote, FINE what `fine_head.py --left-out`
did, DECODERS what `fingerprint_bank.py left-out` did, LONG the folder of `long` below. So no
witness of a track was fitted to its group, and none of the shares that are fitted here is judged
on the tracks that it was fitted to: groups are left out a second time, six parts in turn.

A track is there up to three times, as different lengths: all of it (at most 60 s), 20 s, 5 s. Within
a label a source weighs the root of its tracks, and a kind of music the root of its sources.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from artifactnet_jax import decision
from artifactnet_jax.config import Fusion
from artifactnet_jax.decoders import FOUND, OWN, Match, Outcome

REPORT = Path(__file__).parent / "fusion-report.json"
VIEWS = {"whole": (0, None), "20 s": (1, 4), "5 s": (2, 3)}  # segments of a track of five
FOLDS = 6
PULL = 0.02  # towards the weights of all lengths together
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
            length = {
                "whole": 60.0 if len(values) >= 5 else 12.0 * len(values),
                "20 s": 20.0,
                "5 s": 5.0,
            }
            logit = logits.get((name, view))
            heard = decision.Heard(
                float(np.median(values[first:end])),
                None if logit is None else float(logit),
                outcome,
                length[view] if len(values) > 1 else 5.0,
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
    groups = sorted({e.row["group"] for e in entries})
    part = dict(zip(groups, np.random.default_rng(0).permutation(len(groups)) % FOLDS, strict=True))
    fold = np.array([part[e.row["group"]] for e in entries])
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
    bias, segments, fine, _ = regress(x, y, weight).tolist()
    return dataclasses.replace(
        fusion, span_bias=round(bias, 4), span_segments=round(segments, 4), span_fine=round(fine, 4)
    )


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
            return min(1.0, math.ceil(float(value) * 1e4) / 1e4 + 1e-4)
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
