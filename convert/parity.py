"""The original ONNX file in onnxruntime against the backends: stage by stage, track by track.

Scores are compared with those of the file itself, stages with the same graph whose inner tensors
are made outputs. Errors go into statistics as they are found: memory does not depend on the length
of a track, except where a model scores all of its segments together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from artifactnet_jax import forward
from artifactnet_jax.audio import Segment
from artifactnet_jax.convert.graph import ConvertError
from artifactnet_jax.results import aggregate
from artifactnet_jax.text import brief
from artifactnet_jax.weights import ForeignGraph, Model, Weights

if TYPE_CHECKING:
    from artifactnet_jax.convert.contract import Contract
    from artifactnet_jax.convert.exact import Exact

STAGES = (*forward.STAGES, "score")
# Whether a backend decides; what computes in half precision is reported beside.
BACKENDS = {
    **{"numpy": True, "xla": True, "xla-bfloat16": False},
    **{"onnxruntime": True, "onnx": True, "onnx-fp16": False},
}
FILE = "file"  # the original in onnxruntime, where float64 is what all are held against
DEPARTS = 3e-3  # of a stage's largest value: a 99.9 % error above it is no rounding

# Stages [k, ...] of k segments, their scores [k], and the score of the song: what there is of them.
Outcome = tuple[dict[str, np.ndarray], np.ndarray | None, float | None]


@dataclasses.dataclass(eq=False)
class Errors:
    """Absolute errors of a stage, in constant memory.

    The quantile is read from a histogram of log10(error), 50 bins per decade from 1e-12 to 1e4: it
    is the upper edge of its bin, at most 4.7 % too large.
    """

    scale: float = 0.0  # largest absolute value of the original
    largest: float = 0.0
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(801, np.int64))

    def add(self, original: np.ndarray, ours: np.ndarray) -> None:
        """Count two arrays of one shape, where the original is finite."""
        finite = np.isfinite(original)
        if not finite.any():
            return
        expected = original[finite].astype(np.float64)
        error = np.abs(ours[finite] - expected)
        error[np.isnan(error)] = np.inf
        self.scale = max(self.scale, float(np.abs(expected).max()))
        self.largest = max(self.largest, float(error.max()))
        place = np.ceil(50 * (np.log10(np.clip(error, 1e-12, 1e4)) + 12)).astype(np.int64)
        self.counts += np.bincount(place, minlength=len(self.counts))

    def quantile(self, fraction: float = 0.999) -> float:
        """The error that this share of the values does not exceed."""
        place = int(np.searchsorted(np.cumsum(self.counts), fraction * self.counts.sum()))
        return min(self.largest, float(10.0 ** (place / 50 - 12)))


@dataclasses.dataclass(eq=False)
class Candidate:
    """A backend under test, and what was found of it."""

    name: str
    run: Callable[[np.ndarray], Outcome]  # of audio [k, samples]
    errors: dict[str, Errors] = dataclasses.field(default_factory=dict)
    track_dp: float = 0.0  # largest |dp| of a track
    segment_dp: float = 0.0
    flips: int = 0  # tracks on the other side of the threshold
    not_finite: int = 0  # scores of ours

    def add(self, stage: str, original: np.ndarray, ours: np.ndarray) -> None:
        """Count the errors of a stage."""
        self.errors.setdefault(stage, Errors()).add(original, ours)

    def to_dict(self, tolerance: float) -> dict[str, Any]:
        """As in JSON; "departs" is the first stage whose errors are more than rounding."""
        stages = {stage: self.errors[stage] for stage in STAGES if stage in self.errors}
        beyond = (s for s, e in stages.items() if e.quantile() > DEPARTS * e.scale)
        return {
            "counted": BACKENDS.get(self.name, False),
            "ok": self.track_dp <= tolerance and not self.flips and not self.not_finite,
            "departs": next(beyond, None),
            "track_dp": number(self.track_dp),
            "segment_dp": number(self.segment_dp),
            "flips": self.flips,
            "not_finite": self.not_finite,
            "stages": {
                stage: {"max": number(e.largest), "p999": number(e.quantile()), "scale": e.scale}
                for stage, e in stages.items()
            },
        }


def nearer(ours: Candidate, file: Candidate) -> dict[str, Any]:
    """Which of two lies nearer to float64, and the first stage at which they part.

    They part where one's error is more than three times the other's, and more than a millionth of
    the stage's largest value.
    """
    parts = None
    for stage in STAGES:
        if stage in ours.errors and stage in file.errors:
            a, b = (side.errors[stage].quantile() for side in (ours, file))
            if max(a, b) > max(3 * min(a, b), 1e-6 * ours.errors[stage].scale):
                parts = stage
                break
    side = "backend" if ours.track_dp <= file.track_dp else FILE
    return {"nearer": side, "parts": parts}


def number(x: float | None) -> float | None:
    """A number that JSON has, else None."""
    return x if x is not None and math.isfinite(x) else None


class Original:
    """The ONNX file in onnxruntime, or with `exact` in float64.

    `reference` is what it converts to, which knows its tensors. Raises ConvertError where
    onnxruntime cannot load it. `note` says what was out of the ordinary.
    """

    def __init__(self, path: str, reference: Model, exact: bool = False):
        from artifactnet_jax.convert.contract import Contract, scored
        from artifactnet_jax.convert.graph import read_graph
        from artifactnet_jax.convert.original import session, to_model

        contract = dict(reference.provenance["contract"])
        self.contract = Contract(**{**contract, "axes": tuple(contract["axes"])})
        self._names = dict(reference.provenance.get("stages", {}))
        self.note = ""
        made = self.contract
        graph = read_graph(path)
        if made.of:
            column = "" if made.column is None else f":{made.column}"
            graph, _ = scored(graph, f"{made.of}{column}", made.logit)
        self._exact: Exact | None = None
        if exact:
            from artifactnet_jax.convert.exact import Exact

            names = dict.fromkeys((made.output, *self._names.values()))
            self._exact = Exact(graph, list(names))
            return
        try:
            self._file = session(to_model(graph, [made.output]) if made.of else path)
        except ConvertError as error:  # external data behind a link, which it may refuse
            self._file = session(to_model(graph, [made.output]))
            self.note = f"run from a copy in memory: {error}"
        inner = list(dict.fromkeys(self._names.values()))
        self._stages = session(to_model(graph, inner)) if inner else None

    def __call__(self, audio: np.ndarray) -> Outcome:
        """Run audio [k, samples]. Raises ConvertError."""
        shaped = self.contract.shaped(audio)
        values: dict[str, np.ndarray] = {}
        if self._exact is not None:
            values = self._exact(shaped)
            score = values[self.contract.output]
        else:
            feed = {self.contract.input: shaped}
            try:
                (score,) = self._file.run([self.contract.output], feed)
                if self._stages is not None:
                    names = [value.name for value in self._stages.get_outputs()]
                    values = dict(zip(names, self._stages.run(names, feed), strict=True))
            except Exception as error:  # onnxruntime's own exception classes are not public
                message = f"onnxruntime cannot run the original: {brief(error)}"
                raise ConvertError(message) from error
        stages = {stage: values[name] for stage, name in self._names.items()}
        scores = stages.pop("segment_scores", None)
        if not self.contract.song:
            return stages, score.reshape(-1), None
        return stages, None if scores is None else scores.reshape(-1), float(score.reshape(-1)[0])


def aligned(original: np.ndarray, ours: np.ndarray) -> np.ndarray | None:
    """The original's tensor in the shape of ours; None where it holds something else.

    Axes of size 1 are of no account. Where several orders of the axes fit, the nearest is taken.
    """
    a, b = np.squeeze(original), np.squeeze(ours)
    orders = (a.transpose(axes) for axes in itertools.permutations(range(a.ndim)))
    fitting = [x for x in orders if x.shape == b.shape]
    if len(fitting) > 1:
        fitting.sort(key=lambda x: float(np.abs(np.nan_to_num(x) - b).mean()))
    return fitting[0].reshape(ours.shape) if fitting else None


def together(weights: Model, contract: Contract) -> bool:
    """Whether the segments of a track are scored together."""
    return contract.song or weights.whole_song


@dataclasses.dataclass(eq=False)
class _Track:
    """What the original and the candidates say of one track, in the order of its segments."""

    starts: list[float] = dataclasses.field(default_factory=list)
    rms: list[float] = dataclasses.field(default_factory=list)
    audible: list[bool] = dataclasses.field(default_factory=list)
    expected: list[float] = dataclasses.field(default_factory=list)  # empty: it shows none
    ours: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    song: float | None = None  # what a whole-song graph says
    songs: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Comparison:
    """Compares track after track; `rows` and `not_finite` are what it found, for JSON.

    A track's score is the song graph's own; else the weights' aggregation of the segments' scores,
    of those that are audible and of which the original has a finite score.
    """

    original: Original
    weights: Model
    found: list[Candidate]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    not_finite: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def track(self, name: str, segments: Iterable[Segment]) -> None:
        """Compare one track and add its row. Raises AudioError or ConvertError; no row then."""
        contract, track = self.original.contract, _Track()
        whole = together(self.weights, contract)
        size = None if whole else contract.segments or 1
        pieces = iter(segments)
        while group := list(itertools.islice(pieces, size)):
            audio = np.stack([segment.samples for segment in group])
            short = max(0, (contract.segments or 0) - len(group))
            if short and whole:
                raise ConvertError(
                    f"{name}: {len(group)} segments, and the graph takes {contract.segments}: "
                    "give a longer track"
                )
            self._group(track, np.concatenate([audio, audio[-1:].repeat(short, 0)]), len(group))
            silence = self.weights.config.verdict.silence_peak
            track.starts += [segment.start_s for segment in group]
            track.rms += [segment.rms for segment in group]
            track.audible += [segment.peak > silence for segment in group]
        self._finish(name, track)

    def _group(self, track: _Track, audio: np.ndarray, n: int) -> None:
        """Run segments [k, samples], of which the first n are the track's."""
        stages, expected, track.song = self.original(audio)
        if expected is not None:
            track.expected += expected[:n].tolist()
        for candidate in self.found:
            ours, scores, song = candidate.run(audio)
            if "channels" in ours and candidate.name != FILE:
                ours["channels"] = self._as_classified(ours["channels"])
            for stage in STAGES[:-1]:
                if stage in stages and stage in ours:
                    theirs = aligned(stages[stage], ours[stage])
                    if theirs is not None:
                        candidate.add(stage, theirs, ours[stage])
            if scores is not None:
                track.ours.setdefault(candidate.name, []).extend(scores[:n].tolist())
                if expected is not None:
                    candidate.add("score", expected[:n], scores[:n])
            if song is not None:
                track.songs[candidate.name] = song

    def _as_classified(self, channels: np.ndarray) -> np.ndarray:
        """Channels as the graph has them, which may scale them: our classifier does that first."""
        tensors = self.weights.tensors if isinstance(self.weights, Weights) else {}
        for op, apply in (("mul", np.multiply), ("add", np.add)):
            if (value := tensors.get(f"cnn.channels.{op}.value")) is not None:
                channels = apply(channels, value)
        return channels

    def _finish(self, name: str, track: _Track) -> None:
        """From segments to the track's scores, verdicts and differences."""
        rules, song = self.weights.config.verdict, self.original.contract.song
        every = range(len(track.starts))
        good = [i for i, score in enumerate(track.expected) if math.isfinite(score)]
        chosen = [i for i in good if track.audible[i]] or good or every

        def total(scores: list[float], which: Sequence[int]) -> float:
            p, rms = [scores[i] for i in which], [track.rms[i] for i in which]
            weightless = rules.aggregate == "rms" and not sum(rms) + rules.rms_eps
            if weightless or not all(map(math.isfinite, p)):
                return math.nan
            return aggregate(p, rms, rules.aggregate, rules.rms_eps)

        score = total(track.expected, chosen) if track.song is None else track.song
        row: dict[str, Any] = {"path": name, "n_segments": len(every), "score": number(score)}
        row["backends"] = {}
        for candidate in self.found:
            scores = track.ours.get(candidate.name, [])
            if candidate.name in track.songs:
                own = track.songs[candidate.name]
            else:
                own = total(scores, every if song else chosen)
            apart = [abs(scores[i] - track.expected[i]) for i in good if scores]
            flip, dp, worst = False, None, max(map(_or_inf, apart), default=None)
            if math.isfinite(score):
                dp = _or_inf(abs(own - score))
                flip = (own >= rules.threshold) != (score >= rules.threshold)
            candidate.track_dp = max(candidate.track_dp, dp or 0.0)
            candidate.segment_dp = max(candidate.segment_dp, worst or 0.0)
            candidate.flips += flip
            if not isinstance(self.weights, ForeignGraph):  # which is run as it is, NaN and all
                candidate.not_finite += sum(not math.isfinite(p) for p in (*scores, own))
            found = {"score": own, "dp": dp, "segment_dp": worst}
            found = {key: number(value) for key, value in found.items()}
            row["backends"][candidate.name] = {**found, "flip": flip}
        self.rows.append(row)
        for i in every:
            if track.expected and i not in good:
                says = {k: number(scores[i]) for k, scores in track.ours.items()}
                self._lacking(name, track.starts[i], says)
        if not math.isfinite(score) and len(good) == len(track.expected):
            self._lacking(name, None, {k: v["score"] for k, v in row["backends"].items()})

    def _lacking(self, name: str, start: float | None, says: dict[str, float | None]) -> None:
        """Note where the original is not finite, a whole song where `start` is None."""
        self.not_finite.append({"path": name, "start_s": start, "backends": says})


def _or_inf(x: float) -> float:
    return x if math.isfinite(x) else math.inf
