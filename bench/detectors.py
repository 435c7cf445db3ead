"""Detectors behind one small adapter, so that any of them can be measured by the same benchmark.

A detector is named by a specification, `NAME=` before it gives it another name in the results:

    artifactnet[:WEIGHTS]       ours, with a weights file or a converted ONNX model
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
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import soundfile
import soxr

from artifactnet_jax.audio import SegmentReader, Segments
from artifactnet_jax.config import Config, FrontEnd, Verdict
from artifactnet_jax.presets import flops
from artifactnet_jax.results import NO_BACKEND, USAGE, CommandError, Failure, brief, printable

RATE = FrontEnd.sample_rate  # Hz; what every track is decoded to
BAND = (0.2, 0.8)  # of a tiered detector: scores between these go to the second one
COMMAND_S = 600  # s; a command that takes longer has failed
SPECTTTRA = "huggingface.co/awsaf49/sonics-spectttra-alpha-120s (MIT; config.json and weights)"
CLAM = (
    "github.com/StarkVision-AI/MoM-CLAM: a clone, with best_model_triplet_loss_margin_0.2.pth, "
    "huggingface.co/m-a-p/MERT-v1-95M as MERT-v1-95M, and "
    "huggingface.co/m3hrdadfi/wav2vec2-base-100k-gtzan-music-genres as wav2vec2 in it"
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a detector says of one track."""

    score: float  # P(AI) in [0, 1]
    segments: tuple[float | None, ...] = ()  # of its parts, where it has them
    tier: int | None = None  # of a tiered detector: 1 or 2


class DetectorError(Exception):
    """A track cannot be scored; `kind` is for machines. The others are none the worse."""

    def __init__(self, kind: str, message: str, segments: tuple[float | None, ...] = ()):
        super().__init__(message)
        self.kind, self.segments = kind, segments


class Adapter:
    """A detector. One of yours needs no more than this: `name`, `params` and so on, and `score`.

    `load` is called once, before anything else. `score` takes mono float32 [n] in [-1, 1] at
    `input_rate` Hz and gives P(AI) (or a `Scored`); it raises what it likes. `batch` does the same
    for several tracks at once, of any lengths.
    """

    name = ""
    params: int | None = None  # trained parameters
    gflops: float | None = None  # for 4 s of audio; 1e9 operations, a multiply-add is two
    input_rate = RATE  # Hz
    identity = ""  # of the weights and settings: other scores, another identity

    def load(self, device: str) -> None:
        """Make ready, on "auto", "cpu" or "cuda". CommandError: what it needs is not there."""

    def score(self, audio: np.ndarray) -> float | Scored:
        """P(AI) of one track."""
        raise NotImplementedError

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """The same for several tracks; a DetectorError in place of a score fails that track."""
        return [_caught(self.score, one) for one in audio]


def trained_parts(detector: Adapter) -> list[Trained]:
    """What has to be fitted before this detector can score: itself, or its tiers."""
    if isinstance(detector, Tiered):
        return trained_parts(detector.fast) + trained_parts(detector.second)
    return [detector] if isinstance(detector, Trained) else []


def _caught(
    score: Callable[[np.ndarray], float | Scored], audio: np.ndarray
) -> float | Scored | DetectorError:
    try:
        return score(audio)
    except DetectorError as error:
        return error
    except Exception as error:  # somebody's code: its failure is the track's
        return DetectorError("detector", brief(error))


def at_rate(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mono float32 at 44.1 kHz -> the same at `rate` (soxr HQ, in [-1, 1])."""
    return audio if rate == RATE else np.clip(soxr.resample(audio, RATE, rate, "HQ"), -1, 1)


def run_batch(detector: Adapter, audio: Sequence[np.ndarray]) -> list[Scored | DetectorError]:
    """A detector's word on tracks at 44.1 kHz, every score checked: finite and in [0, 1]."""
    heard = [at_rate(one, detector.input_rate) for one in audio]
    try:
        results = list(detector.batch(heard))
    except Exception:  # of a foreign `batch`: whose track it is shows one by one
        results = [_caught(detector.score, one) for one in heard]
    if len(results) != len(audio):
        cause = f"{detector.name} gave {len(results)} scores for {len(audio)} tracks"
        return [DetectorError("detector", cause)] * len(audio)
    return [_checked(result) for result in results]


def _checked(result: Any) -> Scored | DetectorError:
    if isinstance(result, DetectorError):
        return result
    scored = result if isinstance(result, Scored) else None
    try:
        value = float(result if scored is None else scored.score)
    except (TypeError, ValueError):
        return DetectorError("score", f"{printable(repr(result))[:80]} is no score")
    if not 0 <= value <= 1:  # NaN compares false
        cause = f"its score {value} is not a number in [0, 1]"
        return DetectorError("score", cause, () if scored is None else scored.segments)
    return Scored(value) if scored is None else dataclasses.replace(scored, score=value)


# --- ours, and its ONNX builds ---------------------------------------------------------------


class ArtifactNet(Adapter):
    """Our detector, with the segments and the aggregation that its weights name."""

    def __init__(self, weights: str | None) -> None:
        self._path = weights

    def load(self, device: str) -> None:
        """The backend is the one that `score` would take."""
        from artifactnet_jax.score import open_detector
        from artifactnet_jax.weights import parameter_counts

        self.detector = open_detector(self._path, "numpy" if device == "cpu" else "auto")
        weights = self.detector.weights
        if weights.graph is None:
            self.gflops = flops(weights.config)["total"] / 1e9
            if isinstance(weights.config.unet, type(Config.edge().unet)):
                self.params = parameter_counts(weights.config)["total"]
        self.identity = f"{weights.sha256} {self.detector.backend.name}"

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
                found[index] = Scored(verdict.score, parts)
        return [found[index] for index in range(len(audio))]

    def score(self, audio: np.ndarray) -> float | Scored:
        """See `Adapter`."""
        (result,) = self.batch([audio])
        if isinstance(result, DetectorError):
            raise result
        return result


class Onnx(Adapter):
    """An ONNX build of ArtifactNet, as the public runner runs it.

    A graph of single segments gets seven evenly spaced ones, one at a time, and the track's score
    is their median; a score that is not finite fails the track, and its row shows which. A graph
    of a whole song (one number for all rows of its input) gets the consecutive segments of the
    first 60 s. onnxruntime runs one thread on the CPU and optimises nothing.
    """

    SEGMENTS = Verdict.runner_segments

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
        """See the class."""
        plan: Segments = "first60" if self.song else self.SEGMENTS
        reader = SegmentReader((audio, RATE), self._front_end, Verdict(), plan)
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


def _digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- baselines that are trained here -------------------------------------------------------------


class Trained(Adapter):
    """Features of a track and a logistic regression on them, fitted to the part "train".

    scikit-learn's, its classes balanced. What was fitted is a small JSON file; given one, nothing
    is fitted.
    """

    kind = ""

    def __init__(self, path: str | None = None) -> None:
        self.params = None
        self._fitted: tuple[np.ndarray, float] | None = None  # weights, bias
        if path is not None:
            try:
                with open(path, encoding="utf-8") as file:
                    self.restore(json.load(file))
            except OSError as error:
                raise CommandError(f"{self.kind}:{path}: {error.strerror}", USAGE) from error
            except (ValueError, KeyError, TypeError) as error:
                cause = f"{self.kind}:{path}: not a fitted {self.kind} ({brief(error)})"
                raise CommandError(f"{cause}: leave the file out to fit one", USAGE) from error

    @property
    def label(self) -> str:
        """What is fitted: equal labels, equal fits."""
        return self.kind

    @property
    def fitted(self) -> bool:
        """Whether it can score."""
        return self._fitted is not None

    def features(self, audio: np.ndarray) -> np.ndarray:
        """float64 [d] of mono audio at `input_rate`; DetectorError."""
        raise NotImplementedError

    def fit(self, examples: Iterable[tuple[np.ndarray, int]]) -> None:
        """Fit to (audio at `input_rate`, label) pairs; ValueError: one class only, or none."""
        from sklearn.linear_model import LogisticRegression

        known = []
        for audio, label in examples:
            try:
                known.append((self.features(audio), label))
            except DetectorError:
                continue
        labels = np.array([label for _, label in known])
        if len(set(labels)) < 2:
            raise ValueError(f"{len(known)} tracks to fit {self.kind} to are not of both classes")
        x = np.stack([features for features, _ in known])
        middle = x.mean(axis=0)
        model = LogisticRegression(class_weight="balanced", max_iter=2000)
        model.fit(x - middle, labels)
        weights = model.coef_[0]
        bias = float(model.intercept_[0] - weights @ middle)
        self.restore({"kind": self.kind, "weights": weights.tolist(), "bias": bias})

    def restore(self, state: dict[str, Any]) -> None:
        """Take what `state` gave; ValueError or KeyError."""
        if state["kind"] != self.kind:
            raise ValueError(f"it is a {state['kind']}")
        weights = np.array(state["weights"], np.float64)
        self._fitted = weights, float(state["bias"])
        self.params = len(weights) + 1
        self.identity = hashlib.sha256(json.dumps(self.state).encode()).hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        """What was fitted, for JSON."""
        assert self._fitted is not None
        weights, bias = self._fitted
        return {"kind": self.kind, "weights": weights.tolist(), "bias": bias}

    def score(self, audio: np.ndarray) -> Scored:
        """The regression's probability."""
        assert self._fitted is not None
        weights, bias = self._fitted
        logit = float(weights @ self.features(audio)) + bias
        return Scored(1 / (1 + math.exp(-min(max(logit, -700.0), 700.0))))


class Fakeprint(Trained):
    """The spectrum's peaks over its lower hull, from 1 to 8 kHz (Afchar et al., ISMIR 2025).

    Decoders that upsample by transposed convolutions leave peaks at fixed frequencies: they show in
    the mean spectrum. 16 kHz, first 180 s, power spectrogram of n_fft 8192 (Hann, hop a half), in
    dB between -100 and 60, mean over time; hull: minima of every 10 bins, joined by parabolas, and
    no lower than -45 dB; what rises above it, up to 5 dB, over the largest. 3,585 bins.
    """

    kind = "fakeprint"
    input_rate = 16_000
    N_FFT, HOP, SECONDS = 8192, 4096, 180
    FIRST, LAST = 512, 4096  # bins: 1 and 8 kHz, both included
    AREA, FLOOR_DB, PEAK_DB = 10, -45.0, 5.0
    gflops = 4 * 16_000 / HOP * 5 * N_FFT * math.log2(N_FFT) / 1e9

    def features(self, audio: np.ndarray) -> np.ndarray:
        """See the class. DetectorError for digital silence."""
        from scipy.interpolate import make_interp_spline

        audio = audio[: self.SECONDS * self.input_rate]
        if not audio.any():
            raise DetectorError("silent", "it is silent")
        audio = np.pad(audio, (0, max(0, self.N_FFT - len(audio))))
        frames = np.lib.stride_tricks.sliding_window_view(audio, self.N_FFT)[:: self.HOP]
        window = np.hanning(self.N_FFT + 1)[:-1].astype(np.float32)
        total = np.zeros(self.N_FFT // 2 + 1)
        for start in range(0, len(frames), 64):
            power = np.square(np.abs(np.fft.rfft(frames[start : start + 64] * window)))
            total += (10 * np.log10(np.clip(power, 1e-10, 1e6))).sum(axis=0)
        spectrum = (total / len(frames))[self.FIRST : self.LAST + 1]
        starts = range(0, len(spectrum), self.AREA)
        lowest = np.array([s + int(spectrum[s : s + self.AREA].argmin()) for s in starts])
        hull = make_interp_spline(lowest, spectrum[lowest], k=2)
        floor = np.maximum(hull(np.arange(len(spectrum))), self.FLOOR_DB)
        peaks = np.clip(spectrum - floor, 0, self.PEAK_DB)
        return peaks / max(float(peaks.max()), 1e-9)


class Separation(Trained):
    """How much of a track a source separator cannot explain, in dB of its energy.

    The reconstruction error of the dual-engine design (stems against the input): generated music
    is said to come apart without remainder. The teachers are those of `artifactnet-jax residuals`;
    the built-in one is no separator, and its residual only a stand-in.
    """

    kind = "separation"

    def __init__(self, teacher: str | None = None) -> None:
        super().__init__()
        self._spec = teacher or "builtin"

    @property
    def label(self) -> str:
        """With the teacher, unless that is the built-in one."""
        return self.kind if self._spec == "builtin" else f"{self.kind}-{self._spec}"

    def load(self, device: str) -> None:
        """Opens the teacher."""
        from artifactnet_jax.data.teachers import open_teacher

        self._teacher = open_teacher(self._spec)

    def features(self, audio: np.ndarray) -> np.ndarray:
        """[dB of the residual's energy over the track's]."""
        energy = float(np.square(audio, dtype=np.float64).sum())
        if not energy:
            raise DetectorError("silent", "it is silent")
        blocks = self._teacher.residual(audio[:, None])
        left = sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks)
        return np.array([10 * math.log10(max(left / energy, 1e-12))])

    def restore(self, state: dict[str, Any]) -> None:
        """Its identity is the teacher's too."""
        super().restore(state)
        self.identity += f" {self._teacher.digest}"


# --- published baselines ---------------------------------------------------------------------


def _torch(name: str, *packages: str) -> list[Any]:
    """torch and the other packages; CommandError when one is missing."""
    try:
        return [importlib.import_module(package) for package in ("torch", *packages)]
    except ImportError as error:
        known = {"sonics": "git+https://github.com/awsaf49/sonics.git"}
        package = str(error.name)
        cure = f"pip install {known.get(package, package)}"
        raise CommandError(f"{name} needs the package {package}: {cure}", NO_BACKEND) from error


def _torch_device(torch: Any, device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def centred(audio: np.ndarray, size: int) -> np.ndarray:
    """The middle `size` samples, or all of them and zeros behind."""
    start = max(0, (len(audio) - size) // 2)
    return np.pad(audio[start : start + size], (0, max(0, size - len(audio))))


class SpecTTTra(Adapter):
    """SpecTTTra alpha-120s (Rahman et al., SONICS, ICLR 2025): the middle 120 s at 16 kHz."""

    params = 18_679_693
    input_rate = 16_000
    SECONDS = 120

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def load(self, device: str) -> None:
        """From a local folder; nothing is downloaded."""
        _need(os.path.join(self._folder, "config.json"), f"spectttra:{self._folder}", SPECTTTRA)
        self._pytorch, sonics = _torch("spectttra", "sonics")
        self._device = _torch_device(self._pytorch, device)
        model = sonics.HFAudioClassifier.from_pretrained(self._folder)
        self._model = model.to(self._device).eval()
        self.identity = _folder_identity(self._folder)

    def score(self, audio: np.ndarray) -> float:
        """Sigmoid of the logit."""
        clip = centred(audio, self.SECONDS * self.input_rate)[None].astype(np.float32)
        with self._pytorch.inference_mode():
            logit = self._model(self._pytorch.from_numpy(clip).to(self._device))
        return float(self._pytorch.sigmoid(logit).item())


class Clam(Adapter):
    """CLAM (Melody or Machine, 2025): MERT at 24 kHz and wav2vec2 at 16 kHz, the middle 90 s.

    All 13 hidden states of both, their means over time, go into the model of the authors' own
    repository, whose code is run from the local clone. Half precision on CUDA, as published.
    """

    params = 194_300_000
    SECONDS = 90
    STATES, WIDTH = 13, 768
    CHECKPOINT = "best_model_triplet_loss_margin_0.2.pth"

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def load(self, device: str) -> None:
        """From a local folder; nothing is downloaded."""
        name = f"clam:{self._folder}"
        checkpoint = os.path.join(self._folder, self.CHECKPOINT)
        for part in ("models/clam.py", self.CHECKPOINT, "MERT-v1-95M", "wav2vec2"):
            _need(os.path.join(self._folder, part), name, CLAM)
        self._pytorch, transformers = _torch("clam", "transformers")
        self._device = _torch_device(self._pytorch, device)
        spec = importlib.util.spec_from_file_location(
            "clam_of_its_authors", os.path.join(self._folder, "models", "clam.py")
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        head = module.CLAM(
            in_channel1=self.STATES,
            in_channel2=self.STATES,
            embed_dim1=self.WIDTH,
            embed_dim2=self.WIDTH,
        )
        state = self._pytorch.load(checkpoint, map_location="cpu", weights_only=True)
        head.load_state_dict(state)
        half = self._device == "cuda"
        self._dtype = self._pytorch.float16 if half else self._pytorch.float32
        self._head = head.to(self._device, self._dtype).eval()
        self._encoders = []
        for part in ("MERT-v1-95M", "wav2vec2"):
            path = os.path.join(self._folder, part)
            # MERT's own modelling code lies beside its weights.
            options = {"trust_remote_code": True, "local_files_only": True}
            processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(path, **options)
            model = transformers.AutoModel.from_pretrained(path, **options)
            self._encoders.append((processor, model.to(self._device, self._dtype).eval()))
        self.identity = _folder_identity(self._folder)

    def score(self, audio: np.ndarray) -> float:
        """Sigmoid of the logit."""
        with self._pytorch.inference_mode():
            embeddings = [self._embedding(audio, *encoder) for encoder in self._encoders]
            logit = self._head(*embeddings)
        return float(self._pytorch.sigmoid(logit.float()).item())

    def _embedding(self, audio: np.ndarray, processor: Any, model: Any) -> Any:
        rate = processor.sampling_rate
        clip = centred(at_rate(audio, rate), self.SECONDS * rate)
        inputs = processor(clip, sampling_rate=rate, return_tensors="pt")
        values = inputs["input_values"].to(self._device, self._dtype)
        states = model(values, output_hidden_states=True).hidden_states
        return self._pytorch.stack(states).mean(dim=2).transpose(0, 1)  # [1, states, width]


def _need(path: str, name: str, origin: str) -> None:
    if not os.path.exists(path):
        raise CommandError(f"{name}: {path} is not there: get it from {origin}", USAGE)


def _folder_identity(folder: str) -> str:
    """Names, sizes and times of a folder's large files: hashing gigabytes at each start is slow."""
    facts = []
    for root, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            if name.endswith((".bin", ".pth", ".safetensors", ".json")):
                found = os.stat(os.path.join(root, name))
                facts.append((name, found.st_size, found.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# --- others' and several -------------------------------------------------------------------------


class Tiered(Adapter):
    """A fast detector first, and a second one for the tracks that the first is not sure of.

    The second one's score stands for a track whose first score lies strictly inside `band`. Its
    cost is the fast one's and, for that share of the tracks, the second one's.
    """

    def __init__(self, fast: Adapter, second: Adapter, band: tuple[float, float]) -> None:
        self.fast, self.second, self.band = fast, second, band

    def load(self, device: str) -> None:
        """Both are loaded."""
        self.fast.load(device)
        self.second.load(device)

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Of both, and the band."""
        return f"{self.fast.identity} {self.second.identity} {self.band}"

    @property
    def params(self) -> int | None:  # type: ignore[override]
        """Of both."""
        counts = (self.fast.params, self.second.params)
        return None if None in counts else sum(counts)  # type: ignore[arg-type]

    def score(self, audio: np.ndarray) -> Scored:
        """See the class."""
        (result,) = self.batch([audio])
        if isinstance(result, DetectorError):
            raise result
        assert isinstance(result, Scored)
        return result

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """The fast one on all, then the second one on the rest."""
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
            cure = "see artifactnet_jax.bench.detectors.Adapter"
            raise CommandError(f"--detector {spec}: it has no method score: {cure}", USAGE)
        self.name = str(getattr(self._its, "name", "") or name)
        self.params = getattr(self._its, "params", None)
        self.gflops = getattr(self._its, "gflops", None)
        if hasattr(self._its, "score"):
            self.input_rate = int(getattr(self._its, "input_rate", RATE))

    def load(self, device: str) -> None:
        """Its own `load`, where it has one."""
        if hasattr(self._its, "load"):
            self._its.load(device)
        self.identity = str(getattr(self._its, "identity", ""))

    def score(self, audio: np.ndarray) -> float | Scored:
        """Its own `score`."""
        return self._score(audio)  # type: ignore[misc]

    def batch(self, audio: Sequence[np.ndarray]) -> list[float | Scored | DetectorError]:
        """Its own `batch`, where it has one."""
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
        """See the class."""
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
    for ending in (".safetensors", ".onnx", ".json"):
        rest = rest.removesuffix(ending)
    return name + colon + rest


def _open(spec: str) -> Adapter:
    name, _, rest = spec.partition(":")
    if name in ("artifactnet", "ours"):
        return ArtifactNet(rest or None)
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
    known = "artifactnet, onnx:FILE, fakeprint, separation, spectttra:FOLDER, clam:FOLDER, "
    known += "tiered:FAST+SECOND, module:Class or a command"
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
