"""Detectors behind one small adapter, so that any of them can be measured by the same benchmark.

A detector is named by a specification, `NAME=` before it gives it another name in the results:

    artifactnet[:WEIGHTS]       ours, with a weights file or a converted ONNX model
    fingerprint[:BANK]          decoders' lines, of the embedded bank and of a file
    onnx:FILE                   an ONNX build of ArtifactNet, run as its public runner runs it
    fakeprint[:FILE.json]       spectral peaks and logistic regression; trained here without a file
    separation[:TEACHER]        what a separator leaves, by logistic regression; trained here
    spectttra:FOLDER            SpecTTTra of the package `sonics`, from local weights
    clam:FOLDER                 CLAM, from a local clone and local weights
    tiered:FAST+SECOND[@L-H]    the second one only where the first one's score is in (L, H)
    package.module:Class        an adapter of yours
    COMMAND                     a process that gets a WAV file's name and prints a score
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile

from artifactnet_jax import decoders
from artifactnet_jax.audio import SegmentReader, Segments
from artifactnet_jax.bench.adapter import RATE, Adapter, DetectorError, Scored, run_batch
from artifactnet_jax.bench.baselines import (
    CLAM,
    SPECTTTRA,
    Clam,
    Fakeprint,
    Separation,
    SpecTTTra,
    Trained,
)
from artifactnet_jax.config import Config, Decision, FrontEnd
from artifactnet_jax.fingerprint import Accumulator
from artifactnet_jax.presets import flops
from artifactnet_jax.results import Failure
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError, brief, printable

BAND = (0.2, 0.8)  # of a tiered detector: scores between these go to the second one
COMMAND_S = 600  # s; a command that takes longer has failed


def _digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- ours, and its ONNX builds ---------------------------------------------------------------


class ArtifactNet(Adapter):
    """Our detector, with the segments and the aggregation that its weights name."""

    def __init__(self, weights: str | None) -> None:
        self._path = weights

    def load(self, device: str) -> None:
        """The backend is the one that `score` would take."""
        from artifactnet_jax.console.detectors import open_detector
        from artifactnet_jax.weights import ForeignGraph, parameter_counts

        self.detector = open_detector(self._path, "numpy" if device == "cpu" else "auto")
        weights = self.detector.weights
        if not isinstance(weights, ForeignGraph):
            self.gflops = flops(weights.config)["total"] / 1e9
            if isinstance(weights.config.unet, type(Config.edge().unet)):
                self.params = parameter_counts(weights.config)["total"]
        self.threshold = self.detector.threshold
        self.identity = f"{weights.sha256} {self.detector.backend.name}"
        if self.detector.fusion is not None:  # then a decoder that is named counts
            self.identity += f" {self.detector.asked}"

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """The tracks share the backend's batches."""
        found: dict[int, float | Scored | DetectorError] = {}
        for index, verdict in self.detector.score_many([(one, RATE) for one in audio]):
            if isinstance(verdict, Failure):
                found[index] = DetectorError(verdict.kind, verdict.message)
            elif verdict.score is None:
                found[index] = DetectorError("silent", "nothing in it rises above -90 dBFS")
            else:
                parts = tuple(segment.score for segment in verdict.segments)
                found[index] = Scored(verdict.score, parts, verdict=verdict.verdict)
        return [found[index] for index in range(len(audio))]

    def score(self, audio: np.ndarray) -> float | Scored:
        """P(AI) of one track; see `Adapter`."""
        (result,) = self.batch([audio])
        if isinstance(result, DetectorError):
            raise result
        return result


class Fingerprint(Adapter):
    """Decoders' lines in a track's spectrum, of the embedded bank and of one in a file.

    The score is L / (L + 3) of L = -log10 p: 0.5 at p = 0.001, where a decoder is named, and below
    it where none is, for whatever reason. Segments are the stretches of 20 s against the best
    decoder alone. A track that cannot be judged fails.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path

    def load(self, device: str) -> None:
        """Read the banks. CommandError: one cannot be used."""
        try:
            banks = [decoders.load(), *([decoders.load(self._path)] if self._path else [])]
        except decoders.BankError as error:
            raise CommandError(f"--detector fingerprint: {error}", USAGE) from error
        self.bank = decoders.join(*banks)
        self.identity = self.bank.digest

    def score(self, audio: np.ndarray) -> Scored:
        """From the p of the best decoder; see the class."""
        spectrum = Accumulator()
        spectrum.add(audio)
        outcome = decoders.match(spectrum, self.bank)
        if outcome.nearest is None:
            raise DetectorError("unjudged", outcome.reason or "")
        score = surprise(outcome.nearest.p)
        if outcome.match is None:
            score = min(score, math.nextafter(0.5, 0))
        return Scored(score, tuple(surprise(window.p) for window in outcome.nearest.windows))


def surprise(p: float) -> float:
    """0 of p = 1, 0.5 at what a decoder is named from, and near 1 far below."""
    size = max(0.0, -math.log10(max(p, 1e-300)))
    return size / (size - math.log10(decoders.FOUND))


class Onnx(Adapter):
    """An ONNX build of ArtifactNet, as the public runner runs it.

    A graph of single segments gets seven evenly spaced ones, one at a time, and the track's score
    is their median; a score that is not finite fails the track, and its row shows which. A graph
    of a whole song (one number for all rows of its input) gets the consecutive segments of the
    first 60 s. onnxruntime runs one thread on the CPU and optimises nothing.
    """

    SEGMENTS = Decision.runner_segments

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self, device: str) -> None:
        """Needs onnxruntime."""
        if not os.path.isfile(self._path):
            raise CommandError(f"onnx:{self._path}: no such file", USAGE)
        try:
            from artifactnet_jax.convert.graph import ConvertError
            from artifactnet_jax.convert.original import session

            self._session = session(self._path, threads=1, optimise=False)
        except ImportError as error:
            cause = f"onnx:{self._path} needs {error.name}"
            cure = 'pip install "artifactnet-jax[bench]"'
            raise CommandError(f"{cause}: {cure}", NO_BACKEND) from error
        except ConvertError as error:
            raise CommandError(f"onnx:{self._path}: {error}", USAGE) from error
        self._input, self._output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        samples = self._input.shape[-1]
        if not isinstance(samples, int) or len(self._input.shape) != 2:
            cause = f"its input {self._input.name} {self._input.shape} is not segments of audio"
            raise CommandError(f"onnx:{self._path}: {cause}: give a build of ArtifactNet", USAGE)
        self._front_end = FrontEnd(segment_samples=samples)
        self.song = not isinstance(self._input.shape[0], int) and self._output.shape == [1]
        self.identity = _digest_of(self._path)
        if os.path.isfile(f"{self._path}.data"):  # external data
            self.identity += _digest_of(f"{self._path}.data")

    def score(self, audio: np.ndarray) -> Scored:
        """P(AI) of one track; see the class."""
        plan: Segments = "first60" if self.song else self.SEGMENTS
        reader = SegmentReader((audio, RATE), self._front_end, Decision(), plan)
        segments = np.stack([segment.samples for segment in reader])
        if self.song:
            return Scored(self._run(segments))
        scores = [self._run(segment[None]) for segment in segments]
        shown = tuple(score if math.isfinite(score) else None for score in scores)
        if None in shown:
            cause = f"{shown.count(None)} of {len(shown)} segments have a score that is not finite"
            raise DetectorError("score", cause, shown)
        return Scored(statistics.median(scores), shown)

    def _run(self, segments: np.ndarray) -> float:
        (value,) = self._session.run([self._output.name], {self._input.name: segments})
        return float(np.asarray(value).reshape(-1)[0])


# --- others' and several -------------------------------------------------------------------------


def trained_parts(detector: Adapter) -> list[Trained]:
    """The parts that must be fitted before a detector can score: itself, or its tiers."""
    if isinstance(detector, Tiered):
        return trained_parts(detector.fast) + trained_parts(detector.second)
    return [detector] if isinstance(detector, Trained) else []


class Tiered(Adapter):
    """A fast detector first, and a second one for the tracks that the first is not sure of.

    The second one's score stands for a track whose first score lies strictly inside `band`. Its
    cost is the fast one's and, for that share of the tracks, the second one's.
    """

    def __init__(self, fast: Adapter, second: Adapter, band: tuple[float, float]) -> None:
        self.fast, self.second, self.band = fast, second, band

    def load(self, device: str) -> None:
        """Load both detectors."""
        self.fast.load(device)
        self.second.load(device)

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Identities of both detectors, and the band."""
        return f"{self.fast.identity} {self.second.identity} {self.band}"

    @property
    def params(self) -> int | None:  # type: ignore[override]
        """Parameters of both detectors; None where one is unknown."""
        counts = (self.fast.params, self.second.params)
        return None if None in counts else sum(counts)  # type: ignore[arg-type]

    def score(self, audio: np.ndarray) -> Scored:
        """P(AI) of one track; see the class."""
        (result,) = self.batch([audio])
        if isinstance(result, DetectorError):
            raise result
        assert isinstance(result, Scored)
        return result

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """Scores of the fast detector; of the second one where the fast one is not sure."""
        results: list[Any] = run_batch(self.fast, audio)
        low, high = self.band
        unsure = [
            i for i, r in enumerate(results) if isinstance(r, Scored) and low < r.score < high
        ]
        results = [dataclasses.replace(r, tier=1) if isinstance(r, Scored) else r for r in results]
        for i, result in zip(
            unsure, run_batch(self.second, [audio[i] for i in unsure]), strict=True
        ):
            scored = isinstance(result, Scored)
            results[i] = dataclasses.replace(result, tier=2) if scored else result  # type: ignore
        return results

    def cost(self, tiers: Sequence[int | None]) -> dict[str, Any]:
        """Share of tracks that went to the second one, and GFLOP for 4 s of audio on average."""
        known = [tier for tier in tiers if tier is not None]
        share = sum(tier == 2 for tier in known) / len(known) if known else None
        own = (self.fast.gflops, self.second.gflops)
        gflops = None
        if share is not None and own[0] is not None and own[1] is not None:
            gflops = own[0] + share * own[1]
        return {"second_share": share, "gflops": gflops, "band": list(self.band)}


class Foreign(Adapter):
    """A class of somebody else: with `score`, as `Adapter`, or with `forward`, at 44.1 kHz."""

    def __init__(self, spec: str) -> None:
        module, _, name = spec.partition(":")
        sys.path.insert(0, os.getcwd())  # as `python -m` would find it
        try:
            self._its = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            cause = f"--detector {spec}: {brief(error)}"
            raise CommandError(f"{cause}: give a module that Python finds here", USAGE) from error
        finally:
            sys.path.remove(os.getcwd())
        self._score = getattr(self._its, "score", None) or getattr(self._its, "forward", None)
        if self._score is None:
            cure = "see artifactnet_jax.bench.adapter.Adapter"
            raise CommandError(f"--detector {spec}: it has no method score: {cure}", USAGE)
        self.name = str(getattr(self._its, "name", "") or name)
        self.params = getattr(self._its, "params", None)
        self.gflops = getattr(self._its, "gflops", None)
        if hasattr(self._its, "score"):
            self.input_rate = int(getattr(self._its, "input_rate", RATE))

    def load(self, device: str) -> None:
        """Call the class's own `load`, where it has one."""
        if hasattr(self._its, "load"):
            self._its.load(device)
        self.identity = str(getattr(self._its, "identity", ""))

    def score(self, audio: np.ndarray) -> float | Scored:
        """Score by the class's own `score` or `forward`."""
        answer: float | Scored = self._score(audio)  # type: ignore[misc]
        return answer

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """Scores by the class's own `batch`, where it has one."""
        if hasattr(self._its, "batch"):
            return list(self._its.batch(audio))
        return super().batch(audio)


class Command(Adapter):
    """A process for each track: the last word that it prints is the score.

    The name of a 44.1 kHz mono WAV file (float32) takes the place of `{}` in the command, or is
    added to it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word.replace("{}", "\0") for word in words]
        if not any("\0" in word for word in self._words):
            self._words.append("\0")
        self.name = os.path.basename(words[0])
        self.identity = " ".join(words)

    def score(self, audio: np.ndarray) -> float:
        """P(AI) of one track; see the class."""
        with tempfile.TemporaryDirectory(prefix="artifactnet-jax-") as folder:
            path = os.path.join(folder, "track.wav")
            soundfile.write(path, audio, RATE, subtype="FLOAT")
            command = [word.replace("\0", path) for word in self._words]
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=COMMAND_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise DetectorError("command", f"it took over {COMMAND_S} s") from error
            except OSError as error:
                raise DetectorError("command", f"it does not start: {error.strerror}") from error
        said = done.stdout.decode("utf-8", "replace").split()
        if done.returncode:
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise DetectorError("command", printable(f"exit code {done.returncode} {last}"))
        try:
            return float(said[-1])
        except (ValueError, IndexError) as error:
            what = printable(said[-1])[:40] if said else "nothing"
            raise DetectorError("command", f"it printed {what}, not a score") from error


# --- specifications --------------------------------------------------------------------------

_LABEL = re.compile(r"[\w.@+-]+=(?!=)")
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_detector(spec: str) -> Adapter:
    """The detector of a specification, not yet loaded. CommandError: there is none."""
    label = _LABEL.match(spec)
    body = spec[label.end() :] if label else spec
    found = _open(body)
    if label:
        found.name = label.group()[:-1]
    found.name = found.name or _short(body)
    return found


def _short(spec: str) -> str:
    """A specification without folders and endings: what results call it."""
    name, colon, rest = spec.partition(":")
    rest = os.path.basename(rest.rstrip("/"))
    for ending in (".safetensors", ".onnx", ".json", ".npz"):
        rest = rest.removesuffix(ending)
    return name + colon + rest


def _open(spec: str) -> Adapter:
    name, _, rest = spec.partition(":")
    if name in ("artifactnet", "ours"):
        return ArtifactNet(rest or None)
    if name == "fingerprint":
        return Fingerprint(rest or None)
    if name == "fakeprint":
        return Fakeprint(rest or None)
    if name == "separation":
        return Separation(rest or None)
    if name in ("onnx", "spectttra", "clam"):
        if not rest:
            origin = {"spectttra": SPECTTTRA, "clam": CLAM}
            what = "FILE" if name == "onnx" else "FOLDER with its weights"
            from_where = f": get them from {origin[name]}" if name in origin else ""
            raise CommandError(f"--detector {name}: give {name}:{what}{from_where}", USAGE)
        return {"onnx": Onnx, "spectttra": SpecTTTra, "clam": Clam}[name](rest)
    if name == "tiered":
        return _tiered(spec, rest)
    if _CLASS.fullmatch(spec):
        return Foreign(spec)
    words = shlex.split(spec)
    if words and shutil.which(words[0]):
        return Command(words)
    known = "artifactnet, fingerprint, onnx:FILE, fakeprint, separation, spectttra:FOLDER, "
    known += "clam:FOLDER, tiered:FAST+SECOND, module:Class or a command"
    raise CommandError(printable(f"--detector {spec}: no such detector: use {known}"), USAGE)


def _tiered(spec: str, rest: str) -> Tiered:
    pair, _, band = rest.partition("@")
    fast, plus, second = pair.partition("+")
    limits = BAND
    try:
        if band:
            low, high = map(float, band.split("-"))
            limits = low, high
        if not (plus and fast and second and 0 <= limits[0] < limits[1] <= 1):
            raise ValueError
    except ValueError:
        cure = "give tiered:FAST+SECOND or tiered:FAST+SECOND@LOW-HIGH, such as @0.2-0.8"
        raise CommandError(printable(f"--detector {spec}: {cure}"), USAGE) from None
    return Tiered(_open(fast), _open(second), limits)
