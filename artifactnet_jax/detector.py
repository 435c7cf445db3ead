"""The detector: tracks in, verdicts out.

Decoding runs in threads ahead of the backend; segments of several tracks share a batch. Queues are
bounded, so memory depends neither on the length nor on the number of tracks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from artifactnet_jax import decision, decoders, fine_head
from artifactnet_jax.arrays import count_of
from artifactnet_jax.audio import AudioReport, Segment, SegmentReader, Segments, check_plan
from artifactnet_jax.backends import BackendError, cpu_count
from artifactnet_jax.files import facts_of
from artifactnet_jax.fingerprint import Accumulator
from artifactnet_jax.models import load_backend, open_model
from artifactnet_jax.read_ahead import Closed, ReadAhead
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure, Fine, SegmentScore, Verdict, aggregate
from artifactnet_jax.text import printable
from artifactnet_jax.weights import ForeignGraph, Model

EMBEDDED = "embedded"  # among banks: that which comes with the package
FORKS = ("numpy", "onnxruntime")  # backends that can begin anew in a forked process
LONGEST_NAME = 4096  # what is longer is no path: the bytes of a file, perhaps

_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Track:
    """A track on its way: what is known of it so far."""

    index: int
    path: str
    starts: list[float] = dataclasses.field(default_factory=list)
    rms: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    decode_s: float = 0.0
    compute_s: float = 0.0
    song: float | None = None  # what a whole-song graph says
    file: dict[str, Any] | None = None  # size, time of change and digest of what was read
    end: AudioReport | Failure | None = None  # set once the last segment has been read
    carries: decoders.Outcome | None = None  # set with it
    fine: tuple[float | None, str | None] = (None, None)  # logit, or why there is none
    near: list[tuple[float, float, float | None]] = dataclasses.field(default_factory=list)
    band_end: float | None = None  # Hz
    most: int = 0  # segments that it has at most, if the rest of them may be left out
    decided: bool = False  # whatever they say
    skipped: int = 0

    @property
    def done(self) -> bool:
        return self.end is not None and len(self.scores) + self.skipped == len(self.starts)


def _count(name: str, value: Any) -> int:
    """A whole number above 0, of any library, as an int. Raises ValueError."""
    count = count_of(value)
    if count < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
    return count


def _joined(banks: Iterable[decoders.Bank | str | os.PathLike[str]]) -> decoders.Bank | None:
    """One bank of several; None where there is none. BankError: a file cannot be used."""
    found = [
        bank
        if isinstance(bank, decoders.Bank)
        else _embedded()
        if bank == EMBEDDED
        else decoders.load(bank)
        for bank in banks
    ]
    return decoders.join(*found) if found else None


@functools.cache
def _embedded() -> decoders.Bank:
    return decoders.load()


def fine_logit(
    spectrum: Accumulator | None, head: fine_head.FineHead | None
) -> tuple[float | None, str | None]:
    """What the weights' head for the fine spectrum says: (logit, None), or (None, the reason)."""
    if head is None:
        return None, "the weights have no head for the fine spectrum"
    if spectrum is None:
        return None, "no fine spectrum was taken"
    return fine_head.judge(spectrum, head)


def _name(source: Any) -> str:
    """What a row calls a source."""
    if isinstance(source, tuple):
        return "<array>"
    if isinstance(source, (str, bytes, os.PathLike)):
        path = os.fsdecode(source)
        return path if len(path) <= LONGEST_NAME else f"{path[:60]}..."
    name = getattr(source, "name", None)  # a descriptor's number for a file without a name
    return name if isinstance(name, str) else "<stream>"


def _together(song: list[Segment]) -> np.ndarray:
    """The segments of a song, under one gain."""
    gain = min(segment.gain for segment in song)
    return np.stack([segment.samples * np.float32(gain / segment.gain) for segment in song])


def _facts(source: Any) -> dict[str, Any] | None:
    """What tells a file from another: see `files.facts_of`; None for what is no file."""
    if isinstance(source, (str, bytes, os.PathLike)):
        with contextlib.suppress(OSError), open(source, "rb") as file:
            return facts_of(file)
    elif hasattr(source, "seek"):
        with contextlib.suppress(OSError, ValueError):
            return facts_of(source)
    return None


def _made(weights: Model, backend: str, options: dict[str, Any]) -> Detector:
    return Detector(weights, backend, **options)


class Detector:
    """Scores tracks with one set of weights on one backend.

    weights: path of a weights file or of an ONNX model (converted, and kept in a cache), `Weights`,
    or None for those that come with the package. backend: "auto" or a name of `backends.BACKENDS`.
    segments: "all" consecutive 4 s segments, "first60" those of the first minute (raw-song graph),
    or N evenly spaced ones (the public runner takes 7). aggregate_rule: "median", "rms" or "mean";
    threshold: AI when score >= threshold, a number in [0, 1] or the name of one of the weights'
    operating points ("fpr1"); margin: tracks closer than that to the threshold, in log-odds, are
    "unclear" (0: none); all default to what the weights say. prior: share of AI among the tracks
    that are scored, between 0 and 1 (0.5), for weights whose score is calibrated: it becomes the
    probability for such tracks, which is compared with the threshold. Weights of a whole-song model
    see the segments of a track together: then "all" is refused. dtype: "float32", or "bfloat16"
    convolutions on backend "xla". batch_size: segments per backend call. jobs: decoding threads.
    until_decided: leave out the rest of a track's segments once they cannot change its verdict;
    for a median of segments only. banks: whose decoders' lines are looked for in a track's
    spectrum: banks, their files, and "embedded" for the one that comes with the package; none at
    all, and nothing is looked for. A decoder that is found counts with weights that have a fusion
    of the witnesses (`config.Fusion`), unless `aggregate_rule` is given; else it is only named.

    `threshold` is the number in any case, `operating_point` the name, or None where none was given.

    Raises WeightsError, BackendError, BankError, or ValueError for an unknown option or operating
    point.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | Model | None = None,
        backend: str = "auto",
        *,
        segments: Segments | None = None,
        aggregate_rule: str | None = None,
        threshold: float | str | None = None,
        margin: float | None = None,
        prior: float | None = None,
        dtype: str = "float32",
        batch_size: int | None = None,
        jobs: int | None = None,
        until_decided: bool = False,
        banks: Iterable[decoders.Bank | str | os.PathLike[str]] | None = (EMBEDDED,),
    ):
        self.weights = weights if isinstance(weights, Model) else open_model(weights, backend)
        config = self.weights.config
        self._given = {"aggregate_rule": aggregate_rule, "threshold": threshold, "prior": prior}
        self.rule = aggregate_rule or config.verdict.aggregate
        self.threshold = decision.threshold_of(self.weights, threshold)
        self.operating_point = threshold if isinstance(threshold, str) else None
        self.margin = config.verdict.margin if margin is None else decision.number("margin", margin)
        self.prior = decision.EVEN if prior is None else decision.number("prior", prior)
        self.fusion = config.fusion if aggregate_rule is None else None
        self.segments = check_plan(config.verdict.segments if segments is None else segments)
        self._song = self.weights.whole_song
        self.jobs = cpu_count() if jobs is None else _count("jobs", jobs)
        batch_size = None if batch_size is None else _count("batch size", batch_size)
        if self.rule not in ("median", "rms", "mean"):
            raise ValueError(f"unknown aggregation {self.rule!r}: use 'median', 'rms' or 'mean'")
        if not 0.0 <= self.margin < math.inf:
            raise ValueError(f"margin {self.margin} is not a number from 0 up")
        if self._song and isinstance(self.weights, ForeignGraph):
            if aggregate_rule is not None:
                raise ValueError("a whole-song graph aggregates by itself: leave --aggregate out")
            self.rule = "graph"
        if self._song and self.segments == "all":
            cure = "use --segments first60 or a count"
            raise ValueError(f"these weights score the segments of a song together: {cure}")
        if not 0.0 < self.prior < 1.0:
            raise ValueError(f"prior {self.prior} is not between 0 and 1")
        if self.fusion is None and prior is not None:
            cure = "leave --aggregate out" if config.fusion else "leave --prior out"
            raise ValueError(f"a prior needs weights whose score is calibrated: {cure}")
        lower = config.verdict.lower
        self.band = decision.around(self.threshold, self.margin)
        if not self.margin and threshold is None and lower is not None:
            self.band = (lower, self.threshold)
        self.until_decided = until_decided
        if until_decided and self.fusion is not None:
            cure = "use --aggregate median"
            raise ValueError(f"these weights judge a track as a whole, not by segments: {cure}")
        if until_decided and (self.rule != "median" or self._song):
            cure = "use --aggregate median" if not self._song else "leave --until-decided out"
            raise ValueError(f"only a median of segments is decided early: {cure}")
        self.bank = _joined(banks or ())
        self._options: dict[str, Any] = {"dtype": dtype, "batch_size": batch_size}
        self.backend = load_backend(backend, self.weights, **self._options)
        self._process = os.getpid()
        self._locks: dict[int, threading.Lock] = {}  # of file objects that are being read

    def __repr__(self) -> str:
        said = f"{self.weights.name!r}, {self.backend.name!r}, segments={self.segments!r}"
        return f"Detector({said}, threshold={self.threshold:g}, margin={self.margin:g})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle makes a fresh Detector, with a backend of its own, in the other process."""
        options = {
            "segments": self.segments,
            "margin": self.margin,
            "jobs": self.jobs,
            "until_decided": self.until_decided,
            "banks": () if self.bank is None else (self.bank,),
        } | self._options
        options |= self._given  # what was left open is the weights' there too
        return _made, (self.weights, self.backend.name, options)

    def _in_this_process(self) -> None:
        """Begin anew after a fork, which takes neither threads nor devices along. BackendError."""
        if self._process == os.getpid():
            return
        if self.backend.name not in FORKS:
            cure = "make the Detector in the child, and start that by spawn or forkserver"
            raise BackendError(f"backend {self.backend.name!r} does not survive a fork: {cure}")
        self.backend = load_backend(self.backend.name, self.weights, **self._options)
        self._process = os.getpid()

    @property
    def asked(self) -> dict[str, Any] | None:
        """The bank, as rows name it; None without one."""
        bank = self.bank
        return None if bank is None else {"sha256": bank.digest, "decoders": len(bank.decoders)}

    def score(
        self, source: str | os.PathLike[str] | np.ndarray, sample_rate: int | None = None
    ) -> Verdict:
        """Verdict on one file, or on an array [n] or [n, channels] at `sample_rate` Hz.

        Arrays of torch and jax are taken too, and lists. Raises AudioError, whose message names the
        cause and the cure; TypeError for what is no array.
        """
        entry: Any = source
        if sample_rate is not None:
            entry = (source, sample_rate)
        elif hasattr(source, "__array__"):
            raise ValueError("an array needs its sample_rate in Hz")
        with contextlib.closing(self.score_many([entry])) as results:
            _, result = next(results)
        if isinstance(result, Failure):
            raise AudioError(result.kind, result.message)
        return result

    def score_many(
        self, sources: Iterable[Any]
    ) -> Generator[tuple[int, Verdict | Failure], None, None]:
        """Yield (index, Verdict or Failure) of each source as it finishes, whatever the order.

        A source is a path, a binary file object or a pair (array, sample rate). Bad input becomes
        a `Failure` and never stops the others; what `sources` or the backend raises is raised here.
        `sources` is advanced in the decoding threads, one at a time, and may wait for results.
        Closing the generator stops the threads. Raises TypeError for one source instead of many.
        """
        one = isinstance(sources, (str, bytes, os.PathLike)) or hasattr(sources, "read")
        if one or hasattr(sources, "__array__"):
            cause = f"sources is one {type(sources).__name__}"
            raise TypeError(f"{cause}: pass a list of them, or use score")
        return self._score_many(sources)

    def _score_many(
        self, sources: Iterable[Any]
    ) -> Generator[tuple[int, Verdict | Failure], None, None]:
        self._in_this_process()
        self._locks.clear()
        size = 2 * self.backend.batch_size + self.jobs
        ahead = ReadAhead(sources, self._decode, self.jobs, size)
        batch: list[tuple[_Track, np.ndarray]] = []
        with contextlib.closing(ahead.items()) as items:
            for item in items:
                if item is None:  # decoding is the slower side: compute what there is
                    yield from self._compute(batch)
                    batch = []
                    continue
                track, what = item
                if not isinstance(what, np.ndarray):
                    track.end = what
                    if track.done:
                        yield track.index, self._finish(track)
                elif self._song:
                    self._compute_song(track, what)
                elif track.decided:
                    track.skipped += 1
                else:
                    batch.append((track, what))
                if len(batch) == self.backend.batch_size:
                    yield from self._compute(batch)
                    batch = []
            yield from self._compute(batch)

    def _decode(self, number: int, source: Any, ahead: ReadAhead) -> None:
        """Read one source; put its audible segments, then its end. Runs in a thread.

        For a model that sees a song as a whole all segments are one item, silent ones included.
        """
        track = _Track(number, _name(source))
        if hasattr(source, "seek"):  # given twice, it must not be read twice at once
            with self._locks.setdefault(id(source), threading.Lock()):
                self._read(track, source, ahead)
        else:
            self._read(track, source, ahead)

    def _read(self, track: _Track, source: Any, ahead: ReadAhead) -> None:
        config, began = self.weights.config, time.perf_counter()
        song: list[Segment] = []
        audible = False
        # ValueError or TypeError here is the caller's mistake: raised, not a row.
        reader = SegmentReader(
            source,
            config.front_end,
            config.verdict,
            self.segments,
            name=track.path,
            counted=self.until_decided,
            fingerprint=self.bank is not None or config.fusion is not None,
        )
        try:
            for segment in reader:
                ahead.check()
                audible |= segment.peak > config.verdict.silence_peak
                if segment.peak <= config.verdict.silence_peak and not self._song:
                    continue  # nothing to judge; the report says so
                if self.until_decided:
                    track.most = reader.most or 0
                    if len(track.starts) == track.most:
                        raise RuntimeError(f"it has more than {track.most} segments")
                track.starts.append(segment.start_s)
                track.rms.append(segment.rms)
                if self._song:
                    song.append(segment)
                    continue
                track.decode_s += time.perf_counter() - began
                ahead.put((track, segment.samples))
                began = time.perf_counter()
            end: AudioReport | Failure = reader.report
            track.file = _facts(source)
            track.carries = decoders.match(reader.spectrum, self.bank)
            track.fine = fine_logit(reader.spectrum, self.weights.fine)
            self._listen(track, reader.spectrum)
            if audible and song:
                track.decode_s += time.perf_counter() - began
                ahead.put((track, _together(song)))
                began = time.perf_counter()
            elif song:
                track.starts.clear()
        except Closed:
            raise
        except AudioError as error:
            _log.debug("%s", error, exc_info=True)
            end = Failure(track.path, error.kind, str(error))
        except Exception as error:  # a bug in a decoder; the other tracks are none the worse
            _log.debug("%s", error, exc_info=True)
            cause = printable(f"{track.path}: {type(error).__name__} in the decoder: {error}")
            end = Failure(track.path, "internal", f"{cause}: convert it to WAV, and report this")
        track.decode_s += time.perf_counter() - began
        ahead.put((track, end))

    def alone(self, score: float) -> float:
        """What the score of segments means where they are all that there is, as of a stream."""
        if self.fusion is None:
            return score
        heard = decision.Heard(float(decision.log_odds(score)))
        return decision.judge(heard, self.fusion, self.prior).score

    def word(self, score: float) -> decision.VerdictWord:
        """The verdict on a stream, of the score of its segments together."""
        return decision.decide(self.alone(score), *self.band)

    def _listen(self, track: _Track, spectrum: Accumulator | None) -> None:
        """What the decision of a track takes beside its segments."""
        if self.fusion is not None and spectrum is not None:
            track.band_end = spectrum.band_end()
            if self.weights.fine is not None:
                track.near = fine_head.stretches(spectrum, self.weights.fine)

    def _judged(self, track: _Track, scores: list[float], length_s: float) -> dict[str, Any]:
        """The fields of a verdict that say what the track is."""
        if not scores:
            silent = decision.REASONS["undecided"]
            return {"verdict": "undecided", "reason": silent, "score": None}
        rule, eps = self.rule, self.weights.config.verdict.rms_eps
        score = track.song if track.song is not None else aggregate(scores, track.rms, rule, eps)
        if self.fusion is None:
            word = decision.decide(score, *self.band)
            return {"verdict": word, "reason": decision.REASONS.get(word), "score": score}
        together = float(decision.log_odds(score))
        heard = decision.Heard(together, track.fine[0], track.carries, length_s)
        whole = decision.judge(heard, self.fusion, self.prior)
        said: dict[str, Any] = {"score": whole.score, "evidence": whole.evidence}
        reason = decision.too_little(length_s, track.band_end)
        if reason is not None:
            return said | {"verdict": "undecided", "reason": reason}
        verdict, spans, share = decision.parts(
            decision.decide(whole.score, *self.band),
            list(zip(track.starts, scores, strict=True)),
            track.near,
            self.weights.config.front_end.segment_s,
            length_s,
            self.fusion,
        )
        if verdict == "ai":  # the one span is the track
            spans = tuple(dataclasses.replace(one, score=round(whole.score, 4)) for one in spans)
        said |= {"verdict": verdict, "reason": decision.REASONS.get(verdict)}
        return said | {"spans": spans, "ai_share": share}

    def _compute(self, batch: list[tuple[_Track, Any]]) -> Iterator[tuple[int, Verdict | Failure]]:
        """Score a batch of segments; yield the tracks that this completes."""
        if not batch:
            return
        began = time.perf_counter()
        scores = self.backend(np.stack([samples for _, samples in batch]))
        seconds = (time.perf_counter() - began) / len(batch)
        for (track, _), score in zip(batch, scores, strict=True):
            track.scores.append(float(score))
            track.compute_s += seconds
            if self.until_decided and not track.decided:
                rest = track.most - len(track.scores)
                track.decided = decision.decided(track.scores, rest, *self.band)
            if track.done:
                yield track.index, self._finish(track)

    def _compute_song(self, track: _Track, audio: np.ndarray) -> None:
        """Score the segments of a song together; its report follows in the queue."""
        began = time.perf_counter()
        scores = self.backend.song(audio)
        if self.rule == "graph":
            track.starts.clear()  # it gives one score, and none of a segment
            track.song = float(scores[0])
        else:
            track.scores = [float(score) for score in scores]
        track.compute_s = time.perf_counter() - began

    def _finish(self, track: _Track) -> Verdict | Failure:
        if isinstance(track.end, Failure):
            return track.end
        assert track.end is not None
        scores = track.scores if track.song is None else [track.song]
        if not all(0.0 <= score <= 1.0 for score in scores):  # NaN compares false
            cause = f"{printable(track.path)}: the model gave a score outside [0, 1]"
            return Failure(track.path, "model", f"{cause}: try other weights, and report this")
        said = self._judged(track, scores, track.end.duration_s)
        # Those that were left out are the last ones.
        segments = zip(track.starts[: len(track.scores)], track.scores, strict=True)
        return Verdict(
            path=track.path,
            **said,
            threshold=self.threshold,
            band=None if self.band[0] == self.band[1] else self.band,
            prior=None if self.fusion is None else self.prior,
            operating_point=self.operating_point,
            margin=self.margin,
            segments=tuple(SegmentScore(start, value) for start, value in segments),
            duration_s=track.end.duration_s,
            sample_rate=track.end.sample_rate,
            channels=track.end.channels,
            weights=self.weights.summary(),
            backend=self.backend.name,
            dtype=self.backend.dtype,
            aggregate=self.rule,
            plan=self.segments,
            warnings=tuple(track.end.warnings),
            skipped=track.skipped if self.until_decided else None,
            lost_s=track.end.lost_s,
            track=track.end.track,
            file=track.file,
            decoder=track.carries.match if track.carries else None,
            decoder_reason=track.carries.reason if track.carries else None,
            bank=self.asked,
            notices=track.end.notices,
            fine=None if track.fine[0] is None else Fine(track.fine[0]),
            fine_reason=track.fine[1],
            timings={"decode_s": round(track.decode_s, 4), "compute_s": round(track.compute_s, 4)},
        )
