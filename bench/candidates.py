"""What `bench throughput` times: the audio, our backends, and a peer."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from artifactnet_jax.audio import Segment, SegmentReader
from artifactnet_jax.backends import BACKENDS
from artifactnet_jax.console.detectors import open_detector
from artifactnet_jax.decision import around, decide
from artifactnet_jax.recording import AudioError
from artifactnet_jax.results import Failure, aggregate
from artifactnet_jax.text import NO_BACKEND, SOME_FAILED, USAGE, CommandError, brief
from artifactnet_jax.weights import Model

TRACKS = (("flac", 44_100), ("mp3", 44_100), ("wav", 48_000), ("ogg", 44_100))  # generated
TRACK_S = 30.0
PEER_BATCHES = (1, 2, 4, 8)  # that an ONNX model is tried at
TORCH_GPU_BATCH = 16


def music(seconds: float, rate: int, seed: int) -> np.ndarray:
    """Two chords a second over noise bursts, float32 [n, 2]: the same for the same arguments."""
    rng = np.random.default_rng(seed)
    n, beat = round(seconds * rate), rate // 2
    t = np.arange(beat) / rate
    fade = np.exp(-4 * t) * np.minimum(1, 200 * t)
    notes = np.zeros((8, beat))
    for note, midi in zip(notes, (45, 48, 52, 55, 57, 60, 64, 67), strict=True):
        pitch = 440 * 2 ** ((midi - 69) / 12) * (1 + 1e-3 * rng.standard_normal())
        for k in range(1, min(30, int(0.45 * rate / pitch))):
            note += np.sin(2 * np.pi * (k * pitch * t + rng.random())) / k * fade
    out = np.zeros((-(-n // beat) * beat, 2), np.float32)
    for start in range(0, len(out), beat):
        chord = notes[rng.choice(len(notes), 3, replace=False)].sum(axis=0)
        burst = rng.standard_normal((beat, 2)) * np.exp(-30 * t)[:, None]
        pan = rng.uniform(0.3, 0.7)
        out[start : start + beat] = 0.1 * chord[:, None] * (pan, 1 - pan) + 0.05 * burst
    return out[:n]


def write_audio(path: str, blocks: Iterator[np.ndarray], rate: int) -> str:
    """Write float32 blocks [n, channels] as a 16-bit or lossy file; returns its path."""
    import soundfile

    first = next(blocks)
    kind = os.path.splitext(path)[1][1:].upper()
    with soundfile.SoundFile(path, "w", rate, first.shape[1], format=kind) as file:
        for block in itertools.chain([first], blocks):
            for start in range(0, len(block), rate):  # long writes crash some Vorbis encoders
                file.write(block[start : start + rate])
    return path


def generate(folder: str) -> list[str]:
    """The default tracks: 30 s of music, a format each, of those that libsndfile can write."""
    import soundfile

    written = []
    for seed, (suffix, rate) in enumerate(TRACKS):
        if suffix.upper() in soundfile.available_formats():
            path = os.path.join(folder, f"music-{seed}.{suffix}")
            written.append(write_audio(path, iter([music(TRACK_S, rate, seed)]), rate))
    return written


@dataclasses.dataclass(eq=False)
class Track:
    """A recording that can be scored."""

    path: str
    duration_s: float
    sample_rate: int
    segments: int


def examine(
    paths: Sequence[str], weights: Model, plan: Any
) -> tuple[list[Track], list[dict[str, Any]], np.ndarray]:
    """Tracks that can be read, rows of those that cannot, and one segment [N] of the first."""
    tracks, failed, sample = [], [], None
    config = weights.config
    for path in paths:
        reader = SegmentReader(path, config.front_end, config.verdict, plan)
        try:
            n = 0
            for segment in reader:
                n += 1
                if sample is None and segment.peak > config.verdict.silence_peak:
                    sample = segment.samples
        except AudioError as error:
            failed.append(Failure(path, error.kind, str(error)).to_dict())
            continue
        found = reader.report
        tracks.append(Track(path, found.duration_s, found.sample_rate, n))
    if not tracks:
        raise CommandError(f"no track can be read: {failed[0]['error']['message']}", SOME_FAILED)
    if sample is None:  # all of them are silent
        sample = np.zeros(config.front_end.segment_samples, np.float32)
    return tracks, failed, sample


class Outcome(NamedTuple):
    """What one candidate says of a track."""

    verdict: str
    score: float | None
    segments: tuple[float, ...]


Scored = Iterator[tuple[int, Outcome | Failure]]


@dataclasses.dataclass(eq=False)
class Candidate:
    """Something that scores tracks, and what is known of it before it is timed."""

    name: str
    score: Callable[[Sequence[str]], Scored]  # as they finish
    call: Callable[[np.ndarray], Any]  # the model alone: float32 [B, N], B <= batch
    batch: int
    facts: dict[str, Any]
    peer: bool = False


def backend_of(name: str) -> tuple[str, str]:
    """Backend and dtype of a name on the command line: "xla-bfloat16" is ("xla", "bfloat16")."""
    kind, _, dtype = name.rpartition("-")
    return (kind, dtype) if kind in BACKENDS and name not in BACKENDS else (name, "float32")


def ours(name: str, weights: Model, plan: Any, batch: int | None, label: str) -> Candidate:
    """A backend as `score` runs it, `name` as `backend_of` takes it."""
    kind, dtype = backend_of(name)
    began = time.perf_counter()
    options = {"dtype": dtype, "batch_size": batch, "segments": plan}
    detector = open_detector(weights, kind, **options)
    build_s = time.perf_counter() - began

    def score(paths: Sequence[str]) -> Scored:
        for index, result in detector.score_many(paths):
            if isinstance(result, Failure):
                yield index, result
                continue
            segments = tuple(segment.score for segment in result.segments)
            yield index, Outcome(result.verdict, result.score, segments)

    backend: Any = detector.backend
    whole = detector.weights.config.front_end.joint.startswith("song") or detector.rule == "graph"
    facts = {
        "backend": backend.name,
        "dtype": backend.dtype,
        "batch": backend.batch_size,
        "segments": detector.segments,
        "build_s": build_s,
    }
    call = backend.song if whole else backend
    return Candidate(label, score, call, 1 if whole else backend.batch_size, facts)


@dataclasses.dataclass(eq=False)
class Peer:
    """Scores tracks with somebody else's model, as fairly as that can be.

    It gets our decoder, the same segments, and a thread that reads the next track while one is
    scored. Segments without a finite score are left out, as the public runner does.
    """

    weights: Model  # whose front end and rules hold
    plan: Any
    call: Callable[[np.ndarray], np.ndarray]  # float32 [B, N] -> scores [B], or [1] of a song
    batch: int
    song: bool

    def score(self, paths: Sequence[str]) -> Scored:
        """As of a Candidate."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read, paths[0])
            for index, following in enumerate([*paths[1:], None]):
                segments = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._read, following)
                if isinstance(segments, Failure):
                    yield index, segments
                else:
                    yield index, self._outcome(segments)

    def _read(self, path: str) -> list[Segment] | Failure:
        config = self.weights.config
        try:
            found = list(SegmentReader(path, config.front_end, config.verdict, self.plan))
        except AudioError as error:
            return Failure(path, error.kind, str(error))
        heard = [segment for segment in found if segment.peak > config.verdict.silence_peak]
        return found if self.song and heard else heard

    def _outcome(self, segments: list[Segment]) -> Outcome:
        rule = self.weights.config.verdict
        if not segments:
            return Outcome("undecided", None, ())
        audio = np.stack([segment.samples for segment in segments])
        if self.song:
            score = float(self.call(audio)[0])
            if not math.isfinite(score):
                return Outcome("undecided", None, ())
            scores = []
        else:
            parts = [audio[i : i + self.batch] for i in range(0, len(audio), self.batch)]
            scores = [float(score) for part in parts for score in self.call(part)]
            pairs = zip(scores, segments, strict=True)
            kept = [(p, segment.rms) for p, segment in pairs if math.isfinite(p)]
            if not kept:
                return Outcome("undecided", None, ())
            p, rms = (list(values) for values in zip(*kept, strict=True))
            score = aggregate(p, rms, rule.aggregate, rule.rms_eps)
        return Outcome(decide(score, *around(rule.threshold, rule.margin)), score, tuple(scores))


class OnnxModel:
    """An ONNX file in onnxruntime, one thread per core: float32 [B, N] -> scores.

    `batch` is the fastest of those that it takes. Raises CommandError.
    """

    def __init__(self, path: str, weights: Model):
        from artifactnet_jax.convert.graph import ConvertError
        from artifactnet_jax.convert.original import session

        if importlib.util.find_spec("onnxruntime") is None:
            cure = "pip install 'artifactnet-jax[ort]'"
            raise CommandError(f"--onnx needs onnxruntime: {cure}", NO_BACKEND)
        size = weights.config.front_end.segment_samples
        try:
            began = time.perf_counter()
            self._session = session(path)
            build_s = time.perf_counter() - began
        except ConvertError as error:
            raise CommandError(f"--onnx {path}: {error}", USAGE) from error
        entry = self._session.get_inputs()[0]
        self._input, shape = entry.name, list(entry.shape)
        samples = shape[-1] if isinstance(shape[-1], int) else size
        if samples != size or entry.type != "tensor(float)":
            wanted = f"float32 segments of {size} samples, as the weights"
            raise CommandError(f"--onnx {path}: its input is not {wanted}: {shape}", USAGE)
        self._shape = (-1, *[1] * (len(shape) - 2), size)
        self._output = self._session.get_outputs()[0].name
        self._fixed = shape[0] if isinstance(shape[0], int) else None
        tried = self._try(path)
        self.song = 0 in tried
        self.batch = 1 if self.song else min(tried, key=lambda size: tried[size])
        self.facts = {
            "model": os.path.basename(path),
            "input": shape,
            "form": "song" if self.song else "segment",
            "ms_per_segment_by_batch": {str(n): 1000 * s for n, s in tried.items() if n},
            "build_s": build_s,
        }

    def _try(self, path: str) -> dict[int, float]:
        """Batch -> seconds per segment, where scores are those of batch 1; {0: 0} for a song."""
        fixed = self._fixed
        found: dict[int, float] = {}
        noise = np.random.default_rng(0).standard_normal((max(PEER_BATCHES), self._shape[-1]))
        alone = math.nan
        for n in (fixed,) if fixed else PEER_BATCHES:
            audio = np.resize(0.1 * noise, (n, noise.shape[1])).astype(np.float32)
            try:
                scores = self._run(audio)
                began = time.perf_counter()
                self._run(audio)
                taken = time.perf_counter() - began
            except Exception as error:  # onnxruntime's own exception classes are not public
                if found:  # a batch axis in name only
                    continue
                cause = f"onnxruntime cannot run it: {brief(error)}"
                raise CommandError(f"--onnx {path}: {cause}", USAGE) from error
            if n > 1 and len(scores) == 1:
                return {0: 0.0}
            alone = scores[0] if n == 1 else alone
            if len(scores) == n and (
                fixed or np.isclose(scores[0], alone, atol=1e-3, equal_nan=True)
            ):
                found[n] = taken / n
        if not found:
            cause = f"its first output {self._output!r} is no score of each segment, or of all"
            raise CommandError(f"--onnx {path}: {cause}", USAGE)
        return found

    def _run(self, audio: np.ndarray) -> np.ndarray:
        feed = {self._input: audio.reshape(self._shape)}
        return np.ravel(self._session.run([self._output], feed)[0])

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """Scores float [B], or [1] of a song: float32 [B, N]. A fixed batch is filled up."""
        short = max(0, (self._fixed or 0) - len(audio))
        padded = np.concatenate([audio, audio[-1:].repeat(short, 0)])
        return self._run(padded)[: len(audio)]


def onnx_peer(path: str, weights: Model, plan: Any) -> Candidate:
    """The given ONNX file as a candidate. Raises CommandError."""
    model = OnnxModel(path, weights)
    if model.song and plan == "all":
        plan = "first60"
    scorer = Peer(weights, plan, model, model.batch, model.song)
    facts = {"backend": "peer", "dtype": "float32", "batch": model.batch, "segments": plan}
    name = f"onnxruntime {os.path.basename(path)}"
    return Candidate(name, scorer.score, model, model.batch, facts | model.facts, peer=True)


def torch_peer(weights: Model, plan: Any) -> Candidate:
    """The same network in PyTorch as a candidate. Raises CommandError."""
    if importlib.util.find_spec("torch") is None:
        raise CommandError("--torch needs PyTorch: pip install torch", NO_BACKEND)
    from artifactnet_jax.bench.torch_network import TorchNetwork

    began = time.perf_counter()
    try:
        network = TorchNetwork(weights)
    except ValueError as error:
        raise CommandError(f"--torch: {error}: use weights of preset v94", USAGE) from error
    build_s = time.perf_counter() - began
    batch = 1 if network.device.type == "cpu" else TORCH_GPU_BATCH
    scorer = Peer(weights, plan, network, batch, False)
    facts = {"backend": "peer", "dtype": "float32", "batch": batch, "segments": plan}
    facts |= {"device": network.device.type, "build_s": build_s}
    return Candidate("torch", scorer.score, network, batch, facts, peer=True)


def calls(candidate: Candidate, segment: np.ndarray, batch: int, times: int) -> list[float]:
    """Seconds of calls of the model alone with so many equal segments."""
    audio = np.repeat(segment[None], batch, 0).astype(np.float32)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        candidate.call(audio)
        found.append(time.perf_counter() - began)
    return found
