"""The decision: what the parts of the detector say of a track -> one probability, one verdict.

Three witnesses speak: the segments (network and texture head), the head for the fine spectrum, and
the bank of decoders. Weights with a `config.Fusion` add their log-odds up, by class of length; a
sure match of a decoder decides by itself. The sum is calibrated: of the tracks with this
probability, in a collection half of which is AI, so many are AI. A prior for another collection is
added to it. Weights without a fusion have the segments alone.

A scan over the segments finds parts of a track: stretches whose evidence, segment by segment, adds
up to more than it does in real tracks of the same length.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from artifactnet_jax.config import Fusion
from artifactnet_jax.decoders import Match, Outcome
from artifactnet_jax.weights import Model

VerdictWord = Literal["ai", "partly-ai", "unclear", "real", "undecided"]

WITNESSES = ("base", "segments", "fine", "decoder", "prior")  # keys of `Judgement.evidence`
EVEN = 0.5  # the prior of a collection half of which is AI
WINDOW = 5  # segments in a window of the fine spectrum
LEAST_S = 3.9  # s of audio that a verdict takes: 4 s, and what encoders cut off
LEAST_HZ = 4_000.0  # below the end of the band nothing is judged
# Why there is no verdict, and what to do with one that leaves it open.
REASONS = {
    "undecided": "silent: there is nothing to judge",
    "unclear": "too close to call: score a longer or better copy, and look at its segments",
}


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a track that is AI, with the evidence of its segments as P(AI)."""

    start_s: float
    end_s: float
    score: float


@dataclasses.dataclass(frozen=True)
class Heard:
    """What the witnesses say of a track, or of a stretch."""

    segments: float | None  # log-odds of the segments together
    fine: float | None = None  # logit of the head for the fine spectrum
    decoder: Outcome | None = None
    length_s: float = math.inf


@dataclasses.dataclass(frozen=True)
class Judgement:
    """P(AI) of a track, and the log-odds of it that each witness gave: they add up to it."""

    score: float
    evidence: dict[str, float]


def threshold_of(weights: Model, threshold: float | str | None) -> float:
    """The threshold in [0, 1]: as given, of the operating point so named, or the weights' default.

    Raises ValueError for a number outside [0, 1], and for a name that the weights do not have: it
    lists those that they have.
    """
    verdict = weights.config.verdict
    points = dict(verdict.operating_points)
    value: float
    if threshold is None:
        value = verdict.threshold
    elif not isinstance(threshold, str):
        value = number("threshold", threshold)
    elif threshold in points:
        value = points[threshold]
    else:
        choices = "".join(f"{name} ({point:g}), " for name, point in points.items())
        cause = f"weights {weights.name!r} have no operating point {threshold!r}"
        cause += "" if points else ", nor any other"
        raise ValueError(f"{cause}: use {choices and choices[:-2] + ' or '}a number from 0 to 1")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"threshold {value} is not in [0, 1]")
    return value


def number(name: str, value: Any) -> float:
    """A number of any library as a float. Raises ValueError."""
    if isinstance(value, (bool, np.bool_, str)):
        raise ValueError(f"{name} {value!r} is no number")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} {value!r} is no number") from error


def log_odds(p: Any) -> Any:
    """log(p / (1 - p)), finite for all of [0, 1]: float32 scores come no closer to 0 and 1."""
    p = np.clip(np.asarray(p, np.float64), 1e-9, 1 - 1e-9)
    return np.log(p / (1 - p))


def probability(logit: float) -> float:
    """The inverse of `log_odds`."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def judge(heard: Heard, fusion: Fusion, prior: float = EVEN) -> Judgement:
    """One probability of what the witnesses say. `heard.segments` must not be None.

    Rising in each of them. Without a logit of the fine spectrum, the segments have weights of their
    own; without a bank, or with nothing to compare, the decoders say nothing.
    """
    assert heard.segments is not None
    k = fusion.row(heard.length_s, heard.fine is not None)
    segments = fusion.segments[k] * _clip(heard.segments, fusion.limit)
    evidence = {"base": fusion.bias[k], "segments": segments}
    if heard.fine is not None:
        evidence["fine"] = fusion.fine[k] * _clip(heard.fine, fusion.limit)
    evidence["decoder"] = fusion.decoder[k] * lines(heard.decoder, fusion)
    if sure(heard.decoder, fusion):
        evidence["decoder"] += max(0.0, fusion.decides - math.fsum(evidence.values()))
    evidence["prior"] = float(log_odds(prior))
    return Judgement(probability(math.fsum(evidence.values())), evidence)


def lines(outcome: Outcome | None, fusion: Fusion) -> float:
    """What a decoder's lines weigh: powers of ten of p below `fusion.from_p`, so many at most."""
    near: Match | None = outcome.nearest if outcome else None
    if near is None or (outcome and outcome.match is None and near.p < fusion.sure_p):
        return 0.0  # a match that was refused
    return min(max(0.0, math.log10(fusion.from_p / max(near.p, 1e-300))), fusion.most_lines)


def sure(outcome: Outcome | None, fusion: Fusion) -> bool:
    """Whether a decoder's lines decide by themselves."""
    return bool(outcome and outcome.match and outcome.match.p < fusion.sure_p)


def _clip(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


def decide(score: float, low: float, high: float) -> VerdictWord:
    """The verdict of a score: "ai" from `high` on, "unclear" from `low` on, else "real"."""
    if score >= high:
        return "ai"
    return "unclear" if score >= low else "real"


def decided(scores: list[float], rest: int, low: float, high: float) -> bool:
    """Whether `rest` further scores (or fewer) can no longer change what `decide` says of a median.

    Scores of 0 lower the median as far as it goes, and scores of 1 raise it; `decide` is monotone.
    """
    ends = (float(np.median([*scores, *[end] * rest])) for end in (0.0, 1.0))
    return len({decide(end, low, high) for end in ends}) == 1


def around(threshold: float, margin: float) -> tuple[float, float]:
    """The band of scores within `margin` of the threshold, in log-odds: from, and up to.

    Log-odds rather than differences of scores, because scores crowd near 0 and 1.
    """
    if not margin:
        return threshold, threshold
    middle, end = float(log_odds(threshold)), float(log_odds(1.0))
    # Beyond the ends of what log-odds tell apart there is no verdict but "unclear".
    low = probability(middle - margin) if middle - margin > -end else 0.0
    return low, probability(middle + margin) if middle + margin < end else 2.0


def too_little(duration_s: float, band_end_hz: float | None) -> str | None:
    """Why a track cannot be judged; None where it can."""
    if duration_s < LEAST_S:
        return f"too short: {duration_s:.1f} s, 4 s are needed"
    if band_end_hz is not None and band_end_hz < LEAST_HZ:
        return f"nothing above {band_end_hz / 1000:.1f} kHz: 4 kHz are needed"
    return None


def parts(
    verdict: VerdictWord,
    segments: Sequence[tuple[float, float]],
    near: Sequence[tuple[float, float, float | None]],
    segment_s: float,
    length_s: float,
    fusion: Fusion,
) -> tuple[VerdictWord, tuple[Span, ...], float | None]:
    """The verdict of a track once its stretches have been looked at, its spans of AI, their share.

    `segments` are starts in s and P(AI), `near` is what the head for the fine spectrum says of
    windows: start, end, logit. A track with a stretch of AI is "partly-ai", unless the whole is
    "ai" and no stretch of it is real. Segments that overlap, or leave gaps, are not looked at.
    """
    starts = [start for start, _ in segments]
    gaps = [b - a - segment_s for a, b in itertools.pairwise(starts)]
    if len(starts) < fusion.span_shortest or max(map(abs, gaps), default=1) > segment_s / 4:
        return verdict, (), None
    middles = [start + segment_s / 2 for start in starts]
    fine = [next((x for a, b, x in near if a <= at < b), None) for at in middles]
    logits = [float(log_odds(score)) for _, score in segments]
    values = evidence(logits, fine, fusion)
    found = stretches(values, fusion)
    if verdict == "ai" and not (found and stretches([-value for value in values], fusion)):
        mean = math.fsum(values) / len(values)
        return verdict, (Span(0.0, round(length_s, 3), round(probability(mean), 4)),), 1.0
    spans = []
    for a, b in grown(found, logits):
        end, mean = min(starts[b - 1] + segment_s, length_s), math.fsum(values[a:b]) / (b - a)
        spans.append(Span(round(starts[a], 3), round(end, 3), round(probability(mean), 4)))
    share = math.fsum(span.end_s - span.start_s for span in spans) / length_s
    return ("partly-ai" if spans else verdict), tuple(spans), round(share, 4)


def grown(
    found: Sequence[tuple[int, int, float]], logits: Sequence[float]
) -> list[tuple[int, int]]:
    """Stretches with the segments beside them that are more like theirs than like the others.

    The fine spectrum is of windows of 20 s, which blur an edge: so far it may move. Stretches that
    meet are one.
    """
    inside = np.zeros(len(logits), bool)
    for a, b, _ in found:
        inside[a:b] = True
    every = np.asarray(logits)
    rest = float(np.median(every[~inside])) if not inside.all() else math.inf
    for a, b, _ in found:
        middle = (float(np.median(every[a:b])) + rest) / 2
        if middle <= rest:  # the segments do not tell it from the rest
            continue
        for beside in (range(b, b + WINDOW), range(a - 1, a - 1 - WINDOW, -1)):
            for k in beside:
                if not 0 <= k < len(every) or every[k] <= middle:
                    break
                inside[k] = True
    edges = np.flatnonzero(np.diff(inside.astype(int), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def evidence(logits: Sequence[float], fine: Sequence[float | None], fusion: Fusion) -> list[float]:
    """What each segment says for AI, in log-odds, with the fine spectrum around it."""
    return [
        fusion.span_segments * _clip(one, fusion.limit)
        + (0.0 if near is None else fusion.span_fine * _clip(near, fusion.limit))
        + fusion.span_bias
        for one, near in zip(logits, fine, strict=True)
    ]


def stretches(values: Sequence[float], fusion: Fusion) -> list[tuple[int, int, float]]:
    """Stretches of segments whose evidence adds up: (first, end, mean), in order.

    Of all stretches the one with the largest sum, less a drift for each segment, while it is
    `fusion.span_least`; then the next, before and after it. One that is too short is none, and
    hides no other. That is the rule of CUSUM.
    """
    found: list[tuple[int, int, float]] = []
    waiting = [(0, len(values))]
    while waiting:
        first, end = waiting.pop()
        best, a, b = _best([value - fusion.span_drift for value in values[first:end]])
        if best < fusion.span_least:
            continue
        a, b = first + a, first + b
        if b - a >= fusion.span_shortest:
            found.append((a, b, math.fsum(values[a:b]) / (b - a)))
        waiting += [(first, a), (b, end)]
    return sorted(found)


def _best(values: Sequence[float]) -> tuple[float, int, int]:
    """The stretch with the largest sum: its sum, from, up to (Kadane)."""
    best, span, total, begin = 0.0, (0, 0), 0.0, 0
    for n, value in enumerate(values):
        if total <= 0:
            total, begin = 0.0, n
        total += value
        if total > best:
            best, span = total, (begin, n + 1)
    return best, *span
