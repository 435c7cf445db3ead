"""The verb `live`: a stream in, and while it runs a score for every window of it.

A thread reads the source into a buffer of fixed size; the caller scores the windows in it. Memory
depends neither on the length of the stream nor on how far computing falls behind: windows that a
live source does not wait for are dropped, and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from artifactnet_jax.audio import resampled
from artifactnet_jax.config import Config
from artifactnet_jax.console.detectors import banks, open_detector
from artifactnet_jax.console.writers import writer
from artifactnet_jax.decision import VerdictWord
from artifactnet_jax.live_decoder import Watch
from artifactnet_jax.live_source import open_source
from artifactnet_jax.recording import MAX_CHANNELS, RATES, SHORT_S, AudioError, Decoded
from artifactnet_jax.results import WORDS, aggregate
from artifactnet_jax.text import (
    OK,
    SOME_FAILED,
    USAGE,
    CommandError,
    clock,
    printable,
)

if TYPE_CHECKING:
    from artifactnet_jax.detector import Detector

SCHEMA = "artifactnet-jax/live/1"
BACKLOG_S = 1.0  # windows of a burst wait as long as this, or one hop; then only the newest counts
GUARD_S = 0.05  # on either side of a flaw that the resampler may carry it
LATENCIES = 4096  # newest ones that the percentiles are of
STOP_S = 0.5  # what the end waits for the reading thread
_BARS = "▁▂▃▄▅▆▇█"


class Stalled(Exception):
    """Nothing came from the source for the time that was allowed."""


class _Closed(Exception):
    """The consumer has gone: stop reading."""


class Window(NamedTuple):
    """A window of the stream, and what is known of it."""

    start: int  # position of its first sample in the stream, at the detector's rate
    samples: np.ndarray  # float32 [size] in [-1, 1]
    arrived: float  # when the source gave its last sample, by the buffer's clock
    flaw: str | None  # "non-finite" or "gap": it holds samples that the source did not have


class Buffer:
    """The last seconds of a stream, mono at the detector's rate, and the windows in them.

    `fill` runs in one thread, `next` in another. size, hop: of the windows, in samples at `rate`
    Hz. wait: the source waits until there is room, so that every window is read. Otherwise a window
    is dropped, and counted in `dropped`, when newer ones have been complete for `BACKLOG_S`.
    `tap` is given all samples, in the thread of `fill`, before a window that ends with them.
    """

    def __init__(
        self,
        rate: int,
        size: int,
        hop: int,
        wait: bool,
        clock: Callable[[], float] = time.monotonic,
        tap: Callable[[np.ndarray], None] = lambda samples: None,
    ):
        self.rate, self.size, self.hop = rate, size, hop
        self.source: Decoded | None = None  # once it is open
        self.total = 0  # samples so far
        self.dropped = 0
        self._wait, self._clock, self._tap = wait, clock, tap
        self._backlog = max(hop, round(BACKLOG_S * rate))
        self._ring = np.zeros(size + self._backlog + 2 * hop, np.float32)
        self._changed = threading.Condition()
        self._next = 0  # start of the next window
        self._frames = 0  # of the source so far
        self._stamps: deque[tuple[int, float]] = deque(maxlen=2**16)  # frames so far, when
        self._flaws: deque[tuple[int, int, str]] = deque()  # first and last position, kind
        self._end: BaseException | None = None
        self._ended = self._closed = False

    def fill(self, source: contextlib.AbstractContextManager[Decoded]) -> None:
        """Open a source and read it to its end; an exception is raised in `next`."""
        end: BaseException | None = None
        try:
            with source as decoded:
                self.source = decoded
                for block in resampled(self._watch(decoded.blocks), decoded.rate, self.rate):
                    block = np.clip(block[0], -1, 1)
                    for k in range(0, len(block), self.hop):
                        self._tap(block[k : k + self.hop])
                        self._append(block[k : k + self.hop])
                missing = ((decoded.frames or 0) - self._frames) / decoded.rate
                missing = max(missing if decoded.exact else 0.0, decoded.flaws.missing_s)
                if decoded.lossless and missing > SHORT_S:
                    text = f"it ended {missing:.1f} s before its declared length"
                    raise AudioError("truncated", f"{text}: did what wrote it break off?")
        except _Closed:
            return
        except BaseException as error:
            end = error
        with self._changed:
            self._end, self._ended = end, True
            self._changed.notify_all()

    def next(self, timeout: float | None) -> Window | None:
        """The next window; None at the end of the stream.

        Raises Stalled if nothing comes for `timeout` seconds, and what ended the source.
        """
        with self._changed:
            while self.total < self._next + self.size:
                if self._ended and self._end is not None:
                    raise self._end
                if self._ended:
                    return None
                if not self._changed.wait(timeout):
                    raise Stalled
            newest = (self.total - self.size) // self.hop * self.hop
            if not self._wait and newest - self._next > self._backlog:
                self.dropped += (newest - self._next) // self.hop
                self._next = newest
            start, end = self._next, self._next + self.size
            at = start % len(self._ring)
            samples = self._ring[at : at + self.size].copy()
            if len(samples) < self.size:
                samples = np.concatenate([samples, self._ring[: self.size - len(samples)]])
            while self._flaws and self._flaws[0][1] <= start:
                self._flaws.popleft()
            flaw = self._flaws[0][2] if self._flaws and self._flaws[0][0] < end else None
            arrived = self._arrival(end)
            self._next += self.hop
            self._changed.notify_all()
        return Window(start, samples, arrived, flaw)

    def close(self) -> None:
        """No more windows are wanted: `fill` returns as soon as the source lets it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def gap(self) -> None:
        """Samples of the source were lost here."""
        with self._changed:
            self._flaw(self._frames, self._frames, "gap")

    def _append(self, block: np.ndarray) -> None:
        with self._changed:
            while self._wait and self.total + len(block) > self._next + len(self._ring):
                if self._closed:
                    raise _Closed
                self._changed.wait()
            if self._closed:
                raise _Closed
            at = self.total % len(self._ring)
            first = block[: len(self._ring) - at]
            self._ring[at : at + len(first)] = first
            self._ring[: len(block) - len(first)] = block[len(first) :]
            self.total += len(block)
            self._changed.notify_all()

    def _watch(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass blocks [frames, channels] on, with the time, and with 0 for what is not finite."""
        for block in blocks:
            finite = np.isfinite(block)
            with self._changed:
                if not finite.all():
                    bad = np.flatnonzero(~finite.all(axis=1))
                    first, last = (self._frames + int(bad[k]) for k in (0, -1))
                    self._flaw(first, last, "non-finite")
                self._frames += len(block)
                self._stamps.append((self._frames, self._clock()))
            yield block if finite.all() else np.where(finite, block, np.float32(0))

    def _flaw(self, first: int, last: int, kind: str) -> None:
        """Keep in mind a flaw from frame `first` to `last` of the source."""
        assert self.source is not None
        guard = 0 if self.source.rate == self.rate else round(GUARD_S * self.rate)
        low, high = (frame * self.rate // self.source.rate for frame in (first, last))
        low, high = low - guard, high + guard + 1
        # No window fits between flaws that are closer than that.
        if self._flaws and low - self._flaws[-1][1] < self.size:
            low, _, kind = self._flaws.pop()
        self._flaws.append((low, high, kind))
        while self._flaws[0][1] < self.total - len(self._ring):
            self._flaws.popleft()

    def _arrival(self, end: int) -> float:
        """When the source gave the last of the frames before position `end`."""
        assert self.source is not None
        frames = min(-(-end * self.source.rate // self.rate), self._frames)
        while self._stamps[0][0] < frames:
            self._stamps.popleft()
        return self._stamps[0][1]


def hop_samples(config: Config, seconds: float) -> int:
    """The hop nearest to `seconds` at which windows share all of their STFT frames."""
    front_end, head = config.front_end, config.texture
    hops = [front_end.hop, *(hop for _, hop in (head.resolutions if head else ()))]
    grid, wanted = math.lcm(*hops), seconds * front_end.sample_rate
    return round(wanted / grid) * grid if grid <= wanted else round(wanted)


def scorer(detector: Detector) -> Callable[[np.ndarray, int], float]:
    """Scorer of the windows of one stream: (audio [N], its position) -> P(AI)."""
    backend: Any = detector.backend
    if not hasattr(backend, "stream"):
        return lambda audio, _: float(backend(audio[None])[0])
    streaming: Callable[[np.ndarray, int], float] = backend.stream()
    return streaming


class Monitor:
    """Judges the windows of one stream: a row for each, and the figures of all.

    over: seconds that the running median is of. timed: the source does not wait, so that the time
    from its last sample to the score means something. Memory does not grow with the stream.
    """

    def __init__(
        self,
        detector: Detector,
        hop: int,
        over: float,
        timed: bool,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._detector = detector
        self._score, self._clock, self._timed = scorer(detector), clock, timed
        self._rate = detector.weights.config.front_end.sample_rate
        self._hop, self._over = hop, round(over * self._rate)
        self._recent: deque[tuple[int, float]] = deque()  # position and score
        self._latencies: deque[float] = deque(maxlen=LATENCIES)  # ms
        self._compute: deque[float] = deque(maxlen=LATENCIES)
        self.counts = {"scored": 0, "ai": 0, "silent": 0, "failed": 0}
        self.median: float | None = None
        self.verdict: VerdictWord = "undecided"

    def __call__(self, window: Window, dropped: int) -> dict[str, Any]:
        """The row of a window."""
        began, score, error = self._clock(), None, window.flaw
        silence = self._detector.weights.config.verdict.silence_peak
        silent = bool(np.abs(window.samples).max() <= silence)
        if error is None and not silent:
            score = self._score(window.samples, window.start)
            if not 0.0 <= score <= 1.0:  # NaN compares false
                score, error = None, "model"
        ended = self._clock()
        if score is not None:
            self._recent.append((window.start, score))
            self.counts["scored"] += 1
            self.counts["ai"] += self._detector.alone(score) >= self._detector.threshold
            self._compute.append(1e3 * (ended - began))
            self._latencies.append(1e3 * (ended - window.arrived))
        elif error is not None:
            self.counts["failed"] += 1
        else:
            self.counts["silent"] += 1
        while self._recent and self._recent[0][0] <= window.start - self._over:
            self._recent.popleft()
        scores = [value for _, value in self._recent]
        self.median = aggregate(scores, [], "median", 0.0) if scores else None
        self.verdict = "undecided" if self.median is None else self._detector.word(self.median)
        row: dict[str, Any] = {
            "schema": SCHEMA,
            "start_sample": window.start,
            "start_s": round(window.start / self._rate, 6),
            "score": score,
            "median": self.median,
            "verdict": self.verdict,
            "n_windows": len(scores),
            "dropped": dropped,
        }
        if score is not None:
            row["compute_ms"] = round(self._compute[-1], 1)
            row["latency_ms"] = round(self._latencies[-1], 1) if self._timed else None
        elif error is None:
            row["silent"] = True
        else:
            row["error"] = {"kind": error, "message": _FLAWS[error]}
        return row

    def summary(self, buffer: Buffer, ended: str) -> dict[str, Any]:
        """Figures of the whole stream, as the last row holds them."""

        def percentiles(values: deque[float]) -> dict[str, float] | None:
            if not values:
                return None
            p50, p99 = np.percentile(values, (50, 99))
            return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "n": len(values)}

        source = buffer.source
        return {
            "ended": ended,
            "audio_s": round(buffer.total / self._rate, 3),
            "window_s": buffer.size / self._rate,
            "hop_s": round(self._hop / self._rate, 6),
            "over_s": self._over / self._rate,
            **self.counts,
            "dropped": buffer.dropped,
            "median": self.median,
            "verdict": self.verdict,
            "threshold": self._detector.threshold,
            "margin": self._detector.margin,
            "prior": None if self._detector.fusion is None else self._detector.prior,
            "latency_ms": percentiles(self._latencies) if self._timed else None,
            "compute_ms": percentiles(self._compute),
            "sample_rate": source.rate if source else None,
            "channels": source.channels if source else None,
            "notices": list(source.notices) if source else [],
            "weights": self._detector.weights.summary(),
            "backend": self._detector.backend.name,
        }


_FLAWS = {
    "non-finite": "the window holds samples that are NaN or infinite",
    "gap": "samples of the device were lost in this window",
    "model": "the model gave a score outside [0, 1]: try other weights, and report this",
}


def run(args: argparse.Namespace) -> int:
    """Score a stream until it ends; returns the exit code. CommandError: it broke off."""
    name, wait = _check(args)
    detector = open_detector(
        args.weights,
        args.backend,
        threshold=args.threshold,
        margin=args.margin,
        prior=args.prior,
        batch_size=1,
        jobs=1,
        banks=banks(args),
    )
    config = detector.weights.config
    front_end = config.front_end
    if front_end.joint.startswith("song") or detector.rule == "graph":
        raise CommandError("these weights score the segments of a song together: use score", USAGE)
    size, hop = front_end.segment_samples, hop_samples(config, args.hop)
    # Compiling and the first touch of memory are over before the stream begins.
    scorer(detector)(np.zeros(size, np.float32), 0)
    watch = Watch(detector.bank, front_end.sample_rate)
    buffer = Buffer(front_end.sample_rate, size, hop, wait, tap=watch.add)
    notes: list[str] = []
    source = open_source(args, buffer.gap, notes)
    monitor = Monitor(detector, hop, args.over, timed=not wait)
    reader = threading.Thread(target=buffer.fill, args=(source,), name="live", daemon=True)
    rows = writer("jsonl", None, []) if args.format == "jsonl" else contextlib.nullcontext(None)
    with rows as write, _display(args.quiet) as show:
        ended = "end"
        failure: BaseException | None = None
        reader.start()
        try:
            while (window := buffer.next(args.timeout or None)) is not None:
                row = monitor(window, buffer.dropped) | watch.row(window.start + size)
                if write:
                    write(row)
                show(row)
        except Stalled:
            text = f"{name}: nothing came for {args.timeout:g} s"
            ended, failure = "stalled", CommandError(text, SOME_FAILED)
        except AudioError as error:
            ended, failure = error.kind, CommandError(f"{name}: {error}", SOME_FAILED)
        except KeyboardInterrupt as error:
            ended, failure = "interrupted", error
        finally:
            buffer.close()
            reader.join(STOP_S)
        found = watch.summary() | {"bank": detector.asked}
        summary = monitor.summary(buffer, ended) | found | {"notes": notes}
        if write:
            write({"schema": SCHEMA, "summary": summary})
        show(None)
        if not args.quiet and buffer.source is not None:
            print(_sentence(summary), file=sys.stderr)
    if failure is not None:
        raise failure
    if not any(monitor.counts.values()):
        text = f"{name}: ended after {summary['audio_s']:.1f} s, before the first window of "
        raise CommandError(f"{text}{front_end.segment_s:g} s was full: use score", SOME_FAILED)
    return SOME_FAILED if monitor.counts["failed"] else OK


def _check(args: argparse.Namespace) -> tuple[str, bool]:
    """What messages call the source, and whether it waits; CommandError: options do not agree."""
    if (args.source is None) == (args.device is None):
        raise CommandError("live needs either a FILE or - for stdin, or --device NAME", USAGE)
    raw = [args.rate, args.channels, args.pcm]
    if args.device is not None:
        if args.pcm or args.realtime or args.every_window:
            options = "--pcm, --realtime and --every-window"
            raise CommandError(f"{options} are not for a device: leave them out", USAGE)
    elif args.source != "-":
        if any(raw):
            text = "--rate, --channels and --pcm describe raw samples on stdin"
            raise CommandError(f"{text}: a file says itself what it holds", USAGE)
    elif any(raw) and not all(raw):
        text = "raw samples on stdin need all of --pcm, --rate and --channels"
        raise CommandError(f"{text}; a WAV stream needs none of them", USAGE)
    for option, value, (low, high) in (
        ("--rate", args.rate, RATES),
        ("--channels", args.channels, (1, MAX_CHANNELS)),
    ):
        if value is not None and not low <= value <= high:
            raise CommandError(f"{option} {value} is outside {low} to {high}", USAGE)
    if args.device is not None:
        return f"device {printable(args.device)}", False
    if args.source != "-":
        return printable(args.source), not args.realtime
    if sys.stdin is None:
        raise CommandError("standard input is closed: pipe a stream to it, or name a file", USAGE)
    file = stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)
    return "standard input", args.every_window or (file and not args.realtime)


@contextlib.contextmanager
def _display(quiet: bool) -> Iterator[Callable[[dict[str, Any] | None], None]]:
    """A function that tells stderr of a row: one line that changes, on a terminal; else changes.

    None ends the line.
    """
    terminal = sys.stderr.isatty()
    bars: deque[str] = deque(maxlen=24)
    said: dict[str, Any] = {"verdict": None, "dropped": 0, "decoder": None}

    def show(row: dict[str, Any] | None) -> None:
        if quiet:
            return
        if row is None:
            if terminal and bars:
                print(file=sys.stderr)
            return
        score, median = ("-" if row[k] is None else f"{row[k]:.3f}" for k in ("score", "median"))
        at = clock(row["start_s"], hours=True)
        if (text := _changed(row, said)) is not None:
            before, after = ("\r", "\x1b[K") if terminal else ("", "")
            print(f"{before}{at}  {text}{after}", file=sys.stderr, flush=True)
        if terminal:
            bars.append(" " if row["score"] is None else _BARS[min(7, int(8 * row["score"]))])
            word = WORDS[row["verdict"]]
            text = f"{at}  {word:<13}  median {median}  now {score:>5}  {''.join(bars)}"
            if row.get("latency_ms") is not None:
                text += f"  {row['latency_ms']:.0f} ms"
            if row["dropped"]:
                text += f"  dropped {row['dropped']}"
            text = text[: shutil.get_terminal_size().columns - 1]
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            return
        if row["dropped"] and not said["dropped"]:
            cure = "take a longer --hop; a pipe that is faster than real time: --every-window"
            print(f"{at}  windows are dropped, computing cannot keep up: {cure}", file=sys.stderr)
        if "error" in row and "error" not in said:
            print(f"{at}  {row['error']['message']}: no score", file=sys.stderr, flush=True)
        if row["verdict"] != said["verdict"]:
            text = f"{at}  {WORDS[row['verdict']]}, median {median} of {row['n_windows']} windows"
            print(text, file=sys.stderr, flush=True)
        said.update(row)

    yield show


def _changed(row: dict[str, Any], said: dict[str, Any]) -> str | None:
    """What there is to say of a decoder where it is another one than was `said`."""
    decoder = row.get("decoder", said["decoder"])
    before, now = (found and found["name"] for found in (said["decoder"], decoder))
    said["decoder"] = decoder
    if now == before:
        return None
    return decoder["sentence"] if now else f"the lines of {before}'s decoder are not there any more"


def _sentence(summary: dict[str, Any]) -> str:
    """The summary in a few lines that people read."""
    median = "-" if summary["median"] is None else f"{summary['median']:.3f}"
    parts = [f"{summary[key]:,} {key}" for key in ("scored", "dropped", "silent", "failed")]
    lines = [
        f"{clock(summary['audio_s'], hours=True)} of audio, "
        f"windows of {summary['window_s']:g} s every {summary['hop_s']:.3f} s: {', '.join(parts)}",
        f"{summary['ai']:,} of {summary['scored']:,} windows at or above "
        f"{summary['threshold']:.4g}; at the end {WORDS[summary['verdict']]}, median {median}",
    ]
    if decoder := summary["decoder"]:
        lines.append(f"as a whole, {decoder['sentence']}")
    for key, what in (
        ("latency_ms", "from the last sample of a window, which must be full first, to its score"),
        ("compute_ms", "to compute a score"),
    ):
        if figures := summary[key]:
            lines.append(f"{what}: p50 {figures['p50']:.0f} ms, p99 {figures['p99']:.0f} ms")
    return "\n".join([*lines, *summary["notes"]])
