"""Detectors to stand beside ours: baselines that are trained here, and published ones."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from artifactnet_jax.bench.adapter import Adapter, DetectorError, Scored, at_rate
from artifactnet_jax.text import NO_BACKEND, USAGE, CommandError, brief

SPECTTTRA = "huggingface.co/awsaf49/sonics-spectttra-alpha-120s (MIT; config.json and weights)"
CLAM = (
    "github.com/StarkVision-AI/MoM-CLAM: a clone, with best_model_triplet_loss_margin_0.2.pth, "
    "huggingface.co/m-a-p/MERT-v1-95M as MERT-v1-95M, and "
    "huggingface.co/m3hrdadfi/wav2vec2-base-100k-gtzan-music-genres as wav2vec2 in it"
)


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
        """Name of the fit: equal labels mean equal fits."""
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
        """Take a fit that `state` gave. ValueError or KeyError: it is none."""
        if state["kind"] != self.kind:
            raise ValueError(f"it is a {state['kind']}")
        weights = np.array(state["weights"], np.float64)
        self._fitted = weights, float(state["bias"])
        self.params = len(weights) + 1
        self.identity = hashlib.sha256(json.dumps(self.state).encode()).hexdigest()

    @property
    def state(self) -> dict[str, Any]:
        """The fit, for JSON."""
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
        """Peaks of the spectrum; see the class. DetectorError for digital silence."""
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
        peaks: np.ndarray = np.clip(spectrum - floor, 0, self.PEAK_DB)
        peaks /= max(float(peaks.max()), 1e-9)
        return peaks


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
        """Kind and teacher; the built-in teacher is not named."""
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
        """Take a fit. The teacher's digest is part of the identity."""
        super().restore(state)
        self.identity += f" {self._teacher.digest}"


# --- published baselines ---------------------------------------------------------------------


def _torch(name: str, *packages: str) -> list[Any]:
    """The package torch and the others; CommandError when one is missing."""
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
