"""The sanity protocol: every subset of a benchmark by itself, passed or failed.

Paper, section IV-D: an AI subset passes where at least 90 % of its tracks are found (60 % of the
two harder Stable Audio ones), a real subset where at most 5 % are called AI. The paper's own 28
subsets are `PAPER_SUBSETS`; a subset is what a manifest calls a source, so the rules
hold for any other list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from artifactnet_jax.config import REGRESSION
from artifactnet_jax.data.manifest import LABELS

LEAST_TPR, MOST_FPR = 0.90, 0.05
SOFT = {"aime_stable_audio_v1": 0.60, "aime_stable_audio_v2": 0.60}  # least TPR
REAL_SUBSETS = (
    *("sonics_real", "mom_real", "mom_real_wav", "mom_extra_real"),
    *("fma_hardneg", "youtube_hardneg"),
)
_AI = {
    "aime": "musicgen_small musicgen_medium musicgen_large riffusion stable_audio_v1 "
    "stable_audio_v2 suno_v3 suno_v35 udio",
    "mom": "diffrythm riffusion udio yue",
    "sonics": "chirp-v2-xxl-alpha chirp-v3 chirp-v3.5 udio-30s udio-120s",
    "suno": "cdn_latest extra",
    "udio": "cdn_latest extra",
}
AI_SUBSETS = tuple(f"{site}_{name}" for site, names in _AI.items() for name in names.split())
PAPER_SUBSETS = AI_SUBSETS + REAL_SUBSETS
# Public runner: every track in four codecs, each a change of `artifactnet_jax.bench.stress`.
CODEC_PAIR = ("wav", "mp3-128", "aac-128", "opus-128")
MOST_CODEC_MEAN, MOST_CODEC_LARGEST = 0.15, 0.35  # of the tracks' deltas


def evaluate(
    rows: Iterable[Mapping[str, Any]], threshold: float, subsets: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """A row for every subset of one detector's rows (id, label, source, score or None).

    subsets: only these, in this order; one that has no rows is not passed, its `rate` is None.
    `rate` is the share of the scored tracks that is called AI, `limit` what it is held against. A
    source with tracks of both labels is two subsets.
    """
    known: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for row in rows:
        known[row["source"], row["label"]].append(row["score"])
    wanted = list(subsets) or sorted({source for source, _ in known})
    table = []
    for source in wanted:
        labels = [label for label in (1, 0) if (source, label) in known]
        for label in labels or [int(source not in REAL_SUBSETS)]:
            scores = known.get((source, label), [])
            scored = [score for score in scores if score is not None]
            rate = sum(score >= threshold for score in scored) / len(scored) if scored else None
            limit = SOFT.get(source, LEAST_TPR) if label else MOST_FPR
            passed = rate is not None and (rate >= limit if label else rate <= limit)
            table.append(
                {
                    "subset": source,
                    "label": label,
                    "n": len(scores),
                    "scored": len(scored),
                    "rate": rate,
                    "limit": limit,
                    "passed": passed,
                }
            )
    return table


def codec_delta(
    tracks: Iterable[Mapping[str, Any]], views: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any] | None:
    """Cross-codec delta of one detector; None unless all of `CODEC_PAIR` were scored.

    tracks: id and label; views: scores by change and id. A track's delta is the largest less the
    smallest of its four scores; tracks that lack one are left out. For "ai", "real" and "all": `n`,
    `mean`, `median`, `p90`, `max`, and `of_means`, the paper's delta: the range of the four mean
    scores. `passed` is the public runner's rule on the mean and the largest of all.
    """
    if not set(CODEC_PAIR) <= set(views):
        return None
    scores: dict[str, list[list[float]]] = {"ai": [], "real": [], "all": []}
    for track in tracks:
        four = [views[codec].get(track["id"]) for codec in CODEC_PAIR]
        known = [score for score in four if score is not None]
        if len(known) == len(four):
            scores[LABELS[track["label"]]].append(known)
            scores["all"].append(known)
    result: dict[str, Any] = {}
    for name, rows in scores.items():
        if rows:
            delta = np.ptp(np.array(rows), axis=1)
            result[name] = {
                "n": len(delta),
                "mean": float(delta.mean()),
                "median": float(np.median(delta)),
                "p90": float(np.quantile(delta, 0.9)),
                "max": float(delta.max()),
                "of_means": float(np.ptp(np.array(rows).mean(axis=0))),
            }
    if "all" not in result:
        return None
    both = result["all"]
    passed = both["mean"] <= MOST_CODEC_MEAN and both["max"] <= MOST_CODEC_LARGEST
    return result | {"passed": passed}


def regressions(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Sources that got worse from one `per_source.json` to another (public runner's rule).

    That is an FPR that rose, or a TPR that fell, by more than `config.REGRESSION` beyond rounding.
    """
    worse = []
    rise, fall = REGRESSION
    for source in sorted(set(before) & set(after)):
        for key, most, sign in (("fpr", rise, 1), ("tpr", fall, -1)):
            old, new = before[source].get(key), after[source].get(key)
            if old is not None and new is not None and sign * (new - old) > most + 1e-9:
                worse.append({"source": source, "rate": key, "before": old, "after": new})
    return worse
